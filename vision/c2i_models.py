"""The image GPT's models moved to vision/c2i/models.py; its names can still be imported from here."""
from vision.c2i.models import *  # noqa: F401, F403
