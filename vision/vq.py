"""The VQ tokenizer moved to vision/c2i/vq.py; its names can still be imported from here."""
from vision.c2i.vq import *  # noqa: F401, F403
