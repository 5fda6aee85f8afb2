"""GPT-2's architecture (Radford et al. 2019).

Module names are those of transformers' GPT2LMHeadModel, so weights pass both ways. Sampling and scoring are
in generate.py, the KV cache is in attention.py.
Left out: dropout of attention's weights (docs/log.md), rotary positions, grouped-query attention, sharding.
Run: python sft.py (trains one), python sample.py (asks one)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import attention, places
from utils.hf import load_gpt2, save_gpt2


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 256  # tokens of context
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0

    def build(self):
        return GPT(self)


SIZES = {  # name: (layers, heads, width); "nano" trains in minutes on a laptop, the last four are OpenAI's
    "nano": (4, 4, 128), "micro": (6, 6, 192), "mini": (6, 6, 384), "small": (8, 8, 512),
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.n_head, self.dropout, self.layer = config.n_head, config.dropout, layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, mask=None, cache=None):
        N, T, C = x.shape
        qkv = self.c_attn(x).view(N, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim)
        y = attention(q, k, v, mask) if cache is None else cache.attend(self.layer, q, k, v, mask)
        y = self.c_proj(y.transpose(1, 2).reshape(N, T, C))
        return F.dropout(y, self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, cache=None):
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: activations are computed again in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head: tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's std is 0.02 at any width, which is too little for a narrow model. For 768 this gives 0.02
        std = 0.55 / math.sqrt(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # as in GPT-2, what is added to the residual stream shrinks with depth
                depth = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=std / depth)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, tokens, pad=None, cache=None):
        """tokens (N, T) -> last hidden states (N, T, C).

        pad (N,): how many tokens on the left of each row are padding. They are never attended to.
        cache: attention.py's, of the tokens that stand before these. It knows their padding.
        ValueError where the tokens don't fit the context.
        """
        T, device = tokens.shape[1], tokens.device
        end = T if cache is None else T + cache.start
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens don't fit the context of {self.config.block_size} (block_size)")
        position, mask = places(T, pad, device) if cache is None else cache.places(T, device)
        x = F.dropout(self.wte(tokens) + self.wpe(position), self.config.dropout, self.training)
        for block in self.h:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        return self.ln_f(x)

    def logits(self, hidden):
        weight, V = self.wte.weight, self.config.vocab_size
        if weight.is_cuda and V % 8:  # a GPU is several times slower where V is no multiple of 8
            weight = F.pad(weight, (0, 0, 0, -V % 8))
        return F.linear(hidden, weight)[..., :V]

    def forward(self, tokens, pad=None):
        """tokens (N, T) -> logits (N, T, V) of the next token."""
        return self.logits(self.hidden(tokens, pad))

    @classmethod
    def from_pretrained(cls, source):
        """GPT-2's weights: a folder in transformers' format, or a name ("gpt2") in the hub or its cache."""
        return load_gpt2(source, cls, GPTConfig)

    def export_hf(self, folder, tokenizer=None):
        """Writes what transformers' AutoModelForCausalLM and, given a tokenizer, AutoTokenizer load."""
        save_gpt2(self, folder, tokenizer)
