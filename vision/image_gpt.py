"""The image GPT moved to vision/c2i/image_gpt.py; its names can still be imported from here."""
from vision.c2i.image_gpt import *  # noqa: F401, F403
from vision.c2i.vq import load_official  # noqa: F401
