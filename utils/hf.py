"""GPT-2's weights from transformers' files and back to them (GPT2LMHeadModel; Radford et al. 2019).

Left out: other architectures, weights in several files. Run: python sft.py --init gpt2 --tokenizer gpt2
"""
import json
from dataclasses import asdict
from pathlib import Path

from utils.cli import atomic_write, die, need

PLAIN = {  # what model.py computes; a config that differs here is refused, not approximated
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "n_inner": None, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
}
WANTED = ["config.json", "model.safetensors"]


def transposed(name):  # transformers keeps GPT-2's projections as (in, out)
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def load_gpt2(source, model_class, config_class):
    """A folder in transformers' format, or a name in the hub or its cache -> the model, or a message."""
    safetensors, folder = need("safetensors.torch", "hf"), Path(source)
    if not folder.is_dir():
        try:
            folder = Path(need("huggingface_hub", "hf").snapshot_download(source, allow_patterns=WANTED,
                                                                          etag_timeout=5))
        except Exception as error:  # a dozen kinds of "can't reach it" that mean the same to the user
            die(f"{source!r} is no folder here, and the hub gave nothing ({type(error).__name__}). "
                f"Download {' and '.join(WANTED)} where there is a network and name their folder.")
    for name in WANTED:
        if not (folder / name).is_file():
            die(f"{folder} has no {name}: wanted a folder that transformers' save_pretrained wrote.")
    try:
        c = {**PLAIN, **json.loads((folder / "config.json").read_text())}
        wrong = [f"{k}={c[k]!r}" for k, v in PLAIN.items() if c[k] != v]
        if c["model_type"] != "gpt2" or wrong:
            die(f"{folder}/config.json is no plain GPT-2: model_type {c['model_type']!r} {' '.join(wrong)}")
        model = model_class(config_class(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"],
                                         c["n_embd"]))
        weights = {k.removeprefix("transformer."): w for k, w in
                   safetensors.load_file(folder / "model.safetensors").items()}
        model.load_state_dict({k: weights[k].T if transposed(k) else weights[k] for k in model.state_dict()})
    except Exception as error:  # damaged JSON, a truncated safetensors file, weights of other shapes
        die(f"{folder} can't be read as GPT-2 ({type(error).__name__}: {str(error)[:80]}): wanted a "
            "whole config.json and model.safetensors that belong together.")
    return model


def save_gpt2(model, folder):
    safetensors = need("safetensors.torch", "hf")
    c = asdict(model.config)
    c = {k: c[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")} | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": c["block_size"],
        "activation_function": "gelu_new", "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
        **{k: c["dropout"] for k in ("attn_pdrop", "embd_pdrop", "resid_pdrop")}}
    weights = {f"transformer.{k}": (w.T if transposed(k) else w).detach().cpu().contiguous()
               for k, w in model.state_dict().items()}
    atomic_write(Path(folder) / "config.json", json.dumps(c, indent=2).encode())
    atomic_write(Path(folder) / "model.safetensors", safetensors.save(weights, {"format": "pt"}))
