"""Llama's family (Touvron et al. 2023, arXiv:2302.13971): Llama, SmolLM2, Qwen2 and Qwen3.

Against model.py's GPT-2: RMSNorm (arXiv:1910.07467), rotary positions (arXiv:2104.09864), grouped-query
attention (arXiv:2305.13245), SwiGLU (arXiv:2002.05202). Qwen2 has biases at q, k, v; Qwen3 norms q and k.
Module names are those of transformers' LlamaForCausalLM, so weights pass both ways.
Left out: mixtures of experts, sliding windows, rotary scalings other than Llama 3's.
Run: python sample.py --policy smollm2 --start "What is 2 + 3?"
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import attention, places
from utils import hf
from utils.cli import die

PLAIN = {  # what this file computes; a config that differs here is refused, not approximated
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False,
    "partial_rotary_factor": 1.0}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
NAMES = {  # our name of a setting: transformers'
    "vocab_size": "vocab_size", "block_size": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "n_hidden": "intermediate_size", "head_dim": "head_dim", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings", "family": "model_type"}


@dataclass
class LlamaConfig:
    vocab_size: int
    block_size: int  # tokens of context
    n_layer: int
    n_head: int
    n_kv_head: int  # each pair of keys and values serves n_head / n_kv_head queries
    n_embd: int
    n_hidden: int  # width within the MLP
    head_dim: int
    norm_eps: float = 1e-6
    tied: bool = True  # the output head is the embedding table
    family: str = "llama"
    rope: dict | None = None  # transformers' rope_parameters

    def build(self):
        return Llama(self)

    @classmethod
    def from_hf(cls, c, source):
        """transformers' config.json, of any age, as ours. A message where it asks for what isn't here."""
        if c.get("model_type") not in CLASSES:
            die(f"{source} has the architecture {c.get('model_type')!r}: wanted {', '.join(CLASSES)} or gpt2")
        rope = {"rope_theta": c.get("rope_theta", 10000.0)} | (c.get("rope_scaling") or {})
        rope |= c.get("rope_parameters") or {}
        rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
        wrong = [f"{k}={c[k]!r}" for k, v in PLAIN.items() if c.get(k, v) != v]
        if wrong or rope["rope_type"] not in ("default", "llama3"):
            die(f"{source} has {' '.join(wrong) or rope}, which llama.py doesn't compute: take another model")
        heads = c["num_attention_heads"]
        c = {"num_key_value_heads": heads, "tie_word_embeddings": False} | c
        c["head_dim"] = c.get("head_dim") or c["hidden_size"] // heads
        return cls(**{ours: c[theirs] for ours, theirs in NAMES.items() if theirs in c}, rope=rope)

    def to_hf(self):
        c = {theirs: getattr(self, ours) for ours, theirs in NAMES.items()}
        rope = self.rope or {"rope_theta": 10000.0, "rope_type": "default"}
        scaling = None if rope["rope_type"] == "default" else rope  # transformers 4 has two keys
        return PLAIN | c | {"architectures": [CLASSES[self.family]], "rope_parameters": rope,
                            "rope_theta": rope["rope_theta"], "rope_scaling": scaling}


# ---- rotary positions ----
def frequencies(config, device):
    """By how much each pair of a head's dimensions turns from one position to the next: (head_dim / 2,)."""
    rope = config.rope or {"rope_theta": 10000.0, "rope_type": "default"}
    turn = rope["rope_theta"] ** -(torch.arange(0, config.head_dim, 2, device=device) / config.head_dim)
    if rope["rope_type"] == "llama3":  # slow turns are slowed, quick ones stay, between them both are mixed
        turns = turn * rope["original_max_position_embeddings"] / (2 * math.pi)  # within the old context
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        turn = keep * turn + (1 - keep) * turn / rope["factor"]
    return turn


def rotate(x, cos, sin):
    """Turns dimensions i and i + d/2 of x (N, heads, T, d) together by their position's angle."""
    a, b = x.chunk(2, -1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


# ---- the model ----
class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        width, kv_width = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
        bias = config.family == "qwen2"
        self.q_proj = nn.Linear(config.n_embd, width, bias)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias)
        self.o_proj = nn.Linear(width, config.n_embd, bias=False)
        if config.family == "qwen3":
            self.q_norm = nn.RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, config.norm_eps)

    def forward(self, x, cos, sin, mask=None, cache=None):
        N, T, _ = x.shape
        q, k, v = (proj(x).view(N, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (N, heads or kv heads, T, head_dim)
        q, k = rotate(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
        y = attention(q, k, v, mask) if cache is None else cache.attend(self.layer, q, k, v, mask)
        return self.o_proj(y.transpose(1, 2).reshape(N, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_hidden, bias=False)
        self.down_proj = nn.Linear(config.n_hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, *how):
        x = x + self.self_attn(self.input_layernorm(x), *how)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: activations are computed again in the backward pass
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = nn.RMSNorm(config.n_embd, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, tokens, pad=None, cache=None):
        """tokens (N, T) -> last hidden states (N, T, C), as model.GPT.hidden has it."""
        T, device = tokens.shape[1], tokens.device
        end = T if cache is None else T + cache.start
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens don't fit the context of {self.config.block_size} (block_size)")
        position, mask = places(T, pad, device) if cache is None else cache.places(T, device)
        angle = position[..., None] * frequencies(self.config, device)
        x = self.embed_tokens(tokens)
        cos, sin = (part.unsqueeze(-3).to(x.dtype) for part in (angle.cos(), angle.sin()))  # (…, 1, T, d/2)
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, cache, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, cache)
        return self.norm(x)

    def logits(self, hidden):
        return F.linear(hidden, (self.embed_tokens if self.config.tied else self.lm_head).weight)

    def forward(self, tokens, pad=None):
        """tokens (N, T) -> logits (N, T, V) of the next token."""
        return self.logits(self.hidden(tokens, pad))

    @classmethod
    def from_pretrained(cls, source):
        """A folder in transformers' format, a hub name, or a .gguf -> the model in eval mode, in float32."""
        c, weights = hf.read(source)
        with hf.readable(source):
            with torch.device("meta"):  # no time and no memory for weights that are replaced
                model = cls(LlamaConfig.from_hf(c, source))
            hf.fill(model, weights, assign=True)
        return model.eval()

    def export_hf(self, folder, tokenizer=None):
        """Writes what transformers' AutoModelForCausalLM and, given a tokenizer, AutoTokenizer load."""
        weights = {name if name.startswith("lm_head") else f"model.{name}": w
                   for name, w in self.state_dict().items()}
        hf.write(folder, self.config.to_hf(), weights, tokenizer)
