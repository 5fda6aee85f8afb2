"""python -m lessons.01_loss_is_zero finds shared.py, as python lessons/01_loss_is_zero.py does."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
