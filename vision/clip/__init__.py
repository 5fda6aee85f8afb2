"""What clip_grpo.py is made of: its data and texts, its network, LoRA."""
