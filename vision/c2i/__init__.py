"""The parts of vision/c2i_grpo.py: data, models, LlamaGen's image GPT and tokenizer, and its sampling."""
