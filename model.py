"""GPT-2's architecture with a KV cache: samples groups of answers and scores them through one path.

Radford et al. 2019 (GPT-2). Module names are those of transformers' GPT2LMHeadModel: weights pass both ways.
Left out: rotary positions, grouped-query attention, sharding; paged caches belong in a server.
Run: python sft.py (trains one), python sample.py (asks one)
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from utils.hf import load_gpt2, save_gpt2


@dataclass
class GPTConfig:
    vocab_size: int
    block_size: int = 256
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    dropout: float = 0.0


SIZES = {  # name: (layers, heads, width); "nano" trains in minutes on a laptop, the last four are OpenAI's
    "nano": (4, 4, 128), "micro": (6, 6, 192), "mini": (6, 6, 384), "small": (8, 8, 512),
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, attn_mask=None, cache=None, slots=None):
        N, T, C = x.shape
        qkv = self.c_attn(x).view(N, T, 3, self.n_head, C // self.n_head)
        dropout = self.dropout if self.training else 0.0
        if slots is not None and len(cache) == 3:
            return F.dropout(self.c_proj(decode_attention(qkv, attn_mask, cache, slots)), dropout)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, T, head_dim)
        if slots is not None:  # answers look at their prompt too
            each = N // len(cache[0])
            k, v = (torch.cat([old.repeat_interleave(each, 0), new], 2) for old, new in zip(cache, (k, v)))
            attn_mask = attn_mask if len(attn_mask) == 1 else attn_mask.repeat_interleave(each, 0)
        elif cache is not None:
            cache[:] = k.contiguous(), v.contiguous()  # every later token reads them
        if q.dtype == torch.bfloat16 and q.device.type == "cpu":
            y = plain_attention(q, k, v, attn_mask, dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask, dropout, is_causal=attn_mask is None)
        return F.dropout(self.c_proj(y.transpose(1, 2).reshape(N, T, C)), dropout)


@torch.autocast("cpu", enabled=False)  # it would copy what softmax reads into float32 and back
def plain_attention(q, k, v, attn_mask, dropout):
    """softmax(q·kᵀ/√d)·v, written out: on a CPU in bfloat16, PyTorch's fused one has a slow backward pass."""
    if attn_mask is None:
        attn_mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    hide = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    weights = ((q * q.shape[3] ** -0.5) @ k.transpose(2, 3)).add_(hide).softmax(-1)  # (N, heads, T, S)
    return F.dropout(weights, dropout) @ v


def decode_attention(qkv, attn_mask, cache, slots):
    """Attention of G answers' new tokens to their prompt, which the group holds once, and to themselves.

    qkv (B·G, T, 3, heads, d) -> (B·G, T, heads·d). cache: the prompt's keys and values (B, heads, P, d) and
    one buffer of both for the answers' own (2, B, heads, G, S, d), whose `slots` are written here.
    """
    (prompt_k, prompt_v, own), (N, T, _, H, d) = cache, qkv.shape
    B, _, P, _ = prompt_k.shape
    G = N // B
    qkv = qkv.view(B, G, T, 3, H, d).permute(3, 0, 4, 1, 2, 5)  # (3, B, heads, G, T, d)
    own[..., slots, :] = qkv[1:]
    end = slots.stop if isinstance(slots, slice) else None  # static: all, and the mask hides the rest
    k, v = own[..., :end, :]
    q = (qkv[0] * d ** -0.5).reshape(B, H, G * T, d)
    to_prompt = (q @ prompt_k.transpose(2, 3)).view(B, H, G, T, P)
    weights = torch.cat([to_prompt, q.view(B, H, G, T, d) @ k.transpose(3, 4)], -1)
    if attn_mask is not None:
        weights = weights.masked_fill(~attn_mask[:, :, None], -torch.inf)
    weights = weights.softmax(-1)  # (B, heads, G, T, P + S)
    y = (weights[..., P:] @ v).view(B, H, G * T, d) + weights[..., :P].flatten(2, 3) @ prompt_v
    return y.view(B, H, G, T, d).permute(0, 2, 3, 1, 4).reshape(N, T, H * d)


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
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, attn_mask=None, cache=None, slots=None):
        x = x + self.attn(self.ln_1(x), attn_mask, cache, slots)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: activations are computed again in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the output head: tied
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        # GPT-2's std is 0.02 at any width: what this gives for 768, but too little for a narrow model
        std = 0.55 / math.sqrt(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:  # as in GPT-2, what is added to the residual stream shrinks with depth
                depth = math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 1.0
                nn.init.normal_(p, std=std / depth)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, tokens, pad=None, cache=None, t0=0):
        """tokens (N, T) at positions t0 … t0 + T - 1 -> last hidden states (N, T, C).

        pad (N,): how many tokens on the left of each row are padding; they are never attended to.
        cache: a list a layer. Tokens at t0 = 0 leave their keys and values there; later ones are of G answers
        to each of those prompts, side by side, and attend to them too (pad is then that of the B prompts);
        with `decode_attention`'s buffer as its third entry they leave their own, too.
        t0 is a tensor where shapes must not change from token to token (--compile).
        """
        T, static = tokens.shape[1], isinstance(t0, torch.Tensor)
        P = cache[0][0].shape[2] if static or t0 else 0
        S = P + cache[0][2].shape[4] if static else t0 + T
        if S > self.config.block_size:
            raise ValueError(f"{S} tokens don't fit the context of {self.config.block_size} (block_size)")
        position = t0 + torch.arange(T, device=tokens.device)
        slots = None if not P else position - P if static else slice(t0 - P, S - P)
        attn_mask = None  # causal
        if pad is not None or static or slots and (T > 1 or len(cache[0]) == 2):
            left = tokens.new_zeros(1) if pad is None else pad
            key = torch.arange(S, device=tokens.device)
            seen = (key >= left[:, None, None]) & (key <= position[:, None])
            # padding sees itself: a softmax over nothing would be NaN
            attn_mask = (seen | (key == position[:, None]))[:, None]  # (B or 1, 1, T, S)
        if pad is not None:
            position = (position - pad[:, None]).clamp(min=0).repeat_interleave(len(tokens) // len(pad), 0)
        x = F.dropout(self.wte(tokens) + self.wpe(position), self.config.dropout, self.training)
        again = self.checkpointing and torch.is_grad_enabled()
        for i, block in enumerate(self.h):
            args = x, attn_mask, None if cache is None else cache[i], slots
            x = checkpoint(block, *args, use_reentrant=False) if again else block(*args)
        return self.ln_f(x)

    def logits(self, hidden):
        return F.linear(hidden, self.wte.weight)

    def forward(self, tokens, pad=None):
        """tokens (N, T) -> logits (N, T, V) of the next token."""
        return self.logits(self.hidden(tokens, pad))

    def score(self, tokens, prompt_len, temperature=1.0, pad=None, group_size=1):
        """Log-probability and full-softmax entropy of the answer: tokens (N, P + T) -> two float32 (N, T).

        Only the last T positions meet the output head. The entropy carries no gradient. group_size G > 1:
        rows are G answers to each prompt, side by side, and the prompt is read once for its group.
        """
        if group_size == 1:
            hidden = self.hidden(tokens[:, :-1], pad)[:, prompt_len - 1:]
        else:
            cache, pad = [[] for _ in self.h], None if pad is None else pad[::group_size]
            first = self.hidden(tokens[::group_size, :prompt_len], pad, cache)[:, -1:]
            rest = self.hidden(tokens[:, prompt_len:-1], pad, cache, prompt_len)
            hidden = torch.cat([first.repeat_interleave(group_size, 0), rest], 1)
        logits = self.logits(hidden).float() / temperature  # (N, T, V)
        logp = -F.cross_entropy(logits.flatten(0, 1), tokens[:, prompt_len:].flatten(), reduction="none")
        with torch.no_grad():
            entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        return logp.view_as(entropy), entropy

    def draw(self, hidden, uniform, temperature=1.0, top_k=0, top_p=1.0):
        """Last hidden states (N, C) and uniforms (N,) -> the next tokens (N,) and their log-probabilities."""
        dist = sampling_logp(self.logits(hidden).float() / temperature, top_k, top_p)  # (N, V)
        action = inverse_cdf(dist, uniform)
        return action, dist.gather(1, action[:, None])[:, 0]

    def next_token(self, token, t0, pad, cache, *how):
        """Reads tokens (N, 1) at position t0 and draws the ones behind them: as `draw`."""
        return self.draw(self.hidden(token, pad, cache, t0)[:, -1], *how)

    @torch.no_grad()
    def generate(self, prompt, max_new, group_size=1, temperature=1.0, top_k=0, top_p=1.0, stop=(),
                 generator=None, uniforms=None, pad=None, compiled=None):
        """G answers to each of B prompts: (B, P) -> tokens (B·G, P + T), logp and mask (B·G, T); T = max_new.

        stop: token sequences that end an answer; they are part of it (mask is True) and what follows is not.
        Each prompt is read once for its group. The draw is inverse-CDF: the first token whose cumulative
        probability exceeds a number of uniforms (B·G, T), which come from `generator` unless given.
        logp is that of the distribution sampled from: temperature, then top_k, then top_p.
        compiled: next_token, compiled (utils.device.compiled).
        """
        (B, P), device, N = prompt.shape, prompt.device, prompt.shape[0] * group_size
        if P + max_new > self.config.block_size:
            raise ValueError(f"prompt {P} + max_new {max_new} don't fit the context of "
                             f"{self.config.block_size} (block_size)")
        if uniforms is None:
            uniforms = torch.rand(N, max_new, generator=generator).to(device)
        cache = [[] for _ in self.h]
        hidden = self.hidden(prompt, pad, cache)[:, -1].repeat_interleave(group_size, 0)
        for layer in cache:
            k = layer[0]  # (B, heads, P, head_dim)
            layer.append(k.new_zeros(2, B, k.shape[1], group_size, max_new, k.shape[3]))
        tokens = torch.cat([prompt.repeat_interleave(group_size, 0), prompt.new_zeros(N, max_new)], dim=1)
        logp = torch.zeros(N, max_new, device=device)
        mask = torch.zeros(N, max_new, dtype=torch.bool, device=device)
        alive = torch.ones(N, dtype=torch.bool, device=device)
        position = torch.arange(P + max_new, device=device) if compiled else range(P + max_new)
        step = compiled or torch.inference_mode()(self.next_token)
        for t in range(max_new):
            how = uniforms[:, t], temperature, top_k, top_p
            if t == 0:
                action, logp[:, t] = self.draw(hidden, *how)
            else:
                action, logp[:, t] = step(tokens[:, P + t - 1:P + t], position[P + t - 1], pad, cache, *how)
            tokens[:, P + t] = action
            mask[:, t] = alive
            for sequence in stop:
                if t + 1 >= len(sequence):
                    tail = tokens[:, P + t + 1 - len(sequence):P + t + 1]
                    alive = alive & ~(tail == tail.new_tensor(sequence)).all(1)
            look = device.type == "cpu" or t % 8 == 7  # a GPU's answer has to be waited for
            if stop and look and not alive.any():
                break
        return tokens, logp * mask, mask

    @classmethod
    def from_pretrained(cls, source):
        """GPT-2's weights: a folder in transformers' format, or a name ("gpt2") in the hub or its cache."""
        return load_gpt2(source, cls, GPTConfig)

    def export_hf(self, folder):
        """Writes the config.json and model.safetensors that transformers' GPT2LMHeadModel loads."""
        save_gpt2(self, folder)


def sampling_logp(logits, top_k=0, top_p=1.0):
    """Log-probabilities that sampling follows, (N, V) -> (N, V); -inf outside the top_k or top_p.

    top_k keeps the k likeliest tokens and all that tie with the k-th (0: all tokens); of those, top_p keeps
    the likeliest until their mass reaches top_p, and always the likeliest one.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p < 1.0:
        ordered, index = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = (before >= top_p) & (before > 0)  # `before`, the mass of likelier tokens, is 0 at the first
        logits = ordered.masked_fill(drop, -torch.inf).gather(-1, index.argsort(-1))
    return logits.log_softmax(-1)


def inverse_cdf(logp, u):
    """First token whose cumulative probability exceeds u: logp (N, V), u (N,) in [0, 1) -> (N,).

    In float64, since a float32 sum over V tokens would lose the unlikely ones. u is scaled by the last sum,
    which is 1 but for rounding, so that it is always exceeded.
    """
    cdf = logp.double().exp().cumsum(-1)
    action = torch.searchsorted(cdf, u.double()[:, None] * cdf[:, -1:], right=True)[:, 0]
    return action.clamp(max=logp.shape[-1] - 1)
