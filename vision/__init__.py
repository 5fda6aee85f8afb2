"""Where an action isn't a token: class labels, boxes, masks, image codes. The loss is grpo.py's, unchanged."""
