"""The sampler of image codes moved to vision/c2i/sampling.py; its names can still be imported from here."""
from vision.c2i.sampling import *  # noqa: F401, F403
