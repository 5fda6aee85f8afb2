"""CLIP moved to vision/clip/model.py; its names can still be imported from here."""
from vision.clip.model import *  # noqa: F401, F403
