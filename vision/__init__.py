"""Where an action is a class label, a box, a mask or an image code. The loss is grpo.py's, unchanged."""
