"""The VLM's data moved to vision/vlm/data.py; its names can still be imported from here."""
from vision.vlm.data import *  # noqa: F401, F403
