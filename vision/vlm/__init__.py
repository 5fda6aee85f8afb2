"""The parts of vision/vlm_grpo.py: examples with their rewards, and the models that answer."""
