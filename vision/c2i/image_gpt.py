"""LlamaGen's class-conditional GPT over image tokens: draws grids of codes with a KV cache, and scores them.

LlamaGen (arXiv:2406.06525): Llama's blocks, rotary positions in two dimensions (RoPE, arXiv:2104.09864) and
classifier-free guidance (CFG, arXiv:2207.12598). Parameter names are LlamaGen's, so its weights load.
Slot 0 of the sequence holds the class, and slot 1 + t holds code t. The logits at slot t are those of code t.
Left out: text conditions, several class slots, null labels in training. Run: python -m vision.c2i_grpo
"""
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import attention
from graph import record_call
from vision.c2i.sampling import check_sampling, draw, guide, guided_steps
from vision.c2i.vq import in_range


@dataclass(frozen=True)
class ImageGPTConfig:
    """The dropouts are 0, as RL needs them. LlamaGen trained with 0.1 each, but for attn_dropout_p 0."""
    dim: int
    n_layer: int
    n_head: int
    vocab_size: int
    block_size: int                          # codes an image, a square number
    num_classes: int
    n_kv_head: int | None = None             # None: n_head
    multiple_of: int = 256                   # the feed-forward width is rounded up to a multiple of it
    ffn_dim_multiplier: float | None = None
    rope_base: float = 10000
    norm_eps: float = 1e-5
    token_dropout_p: float = 0.0
    attn_dropout_p: float = 0.0
    resid_dropout_p: float = 0.0
    ffn_dropout_p: float = 0.0

    def __post_init__(self):
        if self.dim % (4 * self.n_head) or self.n_head % self.kv_heads:
            raise ValueError(f"dim {self.dim}, n_head {self.n_head}, n_kv_head {self.n_kv_head}: wanted dim "
                             "/ n_head a multiple of 4 (a row's, a column's pairs), n_head one of n_kv_head")
        if self.block_size < 1 or math.isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(f"block_size {self.block_size}: wanted a square number, that of a square grid")

    @property
    def kv_heads(self):
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self):
        return self.dim // self.n_head

    @property
    def ffn_dim(self):
        width = int(int(2 * 4 * self.dim / 3) * (self.ffn_dim_multiplier or 1))
        return math.ceil(width / self.multiple_of) * self.multiple_of


class Sizes(dict):
    def __missing__(self, name):  # the paper's short names: "B" is GPT-B
        if f"GPT-{name}" not in self:
            raise KeyError(f"{name!r}: wanted one of {', '.join(self)}")
        return self[f"GPT-{name}"]


# LlamaGen's sizes for ImageNet at 256 × 256. For 384 × 384, replace block_size by 576.
IMAGE_GPTS = Sizes({f"GPT-{name}": ImageGPTConfig(dim, n_layer, n_head, 16384, 256, 1000)
                    for name, dim, n_layer, n_head in (
    ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1280, 36, 20), ("XXL", 1536, 48, 24),
    ("XXXL", 2560, 48, 40), ("1B", 2048, 22, 32), ("3B", 3200, 24, 32), ("7B", 4096, 32, 32))})


# ---- positions ----
def rope_table(config, device=None):
    """cos and sin of every slot's rotations, (1 + block_size, head_dim / 2, 2), always float32.

    Pair k of the first half turns by the code's grid row times base^(-2k/(head_dim/2)), and the second half
    by its column in the same way. The class slot's cos and sin are 0, as in LlamaGen: its q and k vanish.
    It is no buffer, since a cast would round it.
    """
    grid, half = math.isqrt(config.block_size), config.head_dim // 2
    step = torch.arange(0, half, 2, dtype=torch.float32, device=device)
    place = torch.arange(grid, dtype=torch.float32, device=device)
    angle = place[:, None] * (1.0 / config.rope_base ** (step / half))  # (grid, head_dim / 4)
    angle = torch.cat([angle.repeat_interleave(grid, 0), angle.repeat(grid, 1)], 1)  # (T, head_dim / 2)
    return F.pad(torch.stack([angle.cos(), angle.sin()], -1), (0, 0, 0, 0, 1, 0))


def rotate(x, rope):
    """Turns each pair (2i, 2i + 1) of x (B, T, heads, head_dim) by rope (T, head_dim / 2, 2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rope[:, None].unbind(-1)  # (T, 1, head_dim / 2)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


class Slots:
    """What the layers of a pass share: the rotations of its slots and, when sampling, the KV cache.

    It is one object: FSDP2 casts the tensors among a block's arguments, which would round and copy these.
    """

    def __init__(self, config, device, cached=False):
        self.table, self.cached = rope_table(config, device), cached
        self.start, self.stop, self.kv = 0, 0, {}

    def extend(self, T):
        self.start, self.stop = self.stop, self.stop + T
        self.rope = self.table[self.start:self.stop]

    def store(self, layer, k, v):
        """k, v (B, heads, T, head_dim) of this pass -> those of all slots so far, of the first B rows."""
        if not self.cached:
            return k, v
        if layer not in self.kv:  # only here is the dtype known: autocast or FSDP2 may change it
            self.kv[layer] = [x.new_empty(*x.shape[:2], len(self.table), x.shape[3]) for x in (k, v)]
        cache = [x[:len(k)] for x in self.kv[layer]]
        for x, new in zip(cache, (k, v)):
            x[:, :, self.start:self.stop] = new
        return [x[:, :, :self.stop] for x in cache]

    def repeat(self, n):
        self.kv = {layer: [x.repeat_interleave(n, 0) for x in pair] for layer, pair in self.kv.items()}


# ---- layers ----
class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wqkv = nn.Linear(config.dim, (config.n_head + 2 * config.kv_heads) * config.head_dim, bias=False)
        self.wo = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x, slots):
        c, dropout = self.config, self.config.attn_dropout_p if self.training else 0.0
        qkv = self.wqkv(x).unflatten(-1, (-1, c.head_dim))  # (B, T, n_head + 2 kv_heads, head_dim)
        qk, v = qkv.split([c.n_head + c.kv_heads, c.kv_heads], dim=2)
        qk, v = rotate(qk, slots.rope).transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        q, k = qk.split([c.n_head, c.kv_heads], dim=1)
        k, v = slots.store(self, k, v)
        if c.kv_heads != c.n_head:
            k, v = (y.repeat_interleave(c.n_head // c.kv_heads, 1) for y in (k, v))
        if slots.cached:  # a new code sees all slots so far
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=q.shape[2] > 1)
        else:
            y = attention(q, k, v, None, dropout)
        return F.dropout(self.wo(y.transpose(1, 2).flatten(2)), c.resid_dropout_p, self.training)


class FeedForward(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dropout = config.ffn_dropout_p
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x):
        return F.dropout(self.w2(F.silu(self.w1(x)) * self.w3(x)), self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention, self.feed_forward = Attention(config), FeedForward(config)
        self.attention_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.dim, config.norm_eps)

    def forward(self, x, slots):
        x = x + self.attention(self.attention_norm(x), slots)
        return x + self.feed_forward(self.ffn_norm(x))


class ImageGPT(nn.Module):
    """Every pass goes through `forward`, since FSDP2 and DDP have their hooks there."""
    wrapping = ("model", "module", "state_dict")  # names of the weights in LlamaGen's files, tried in order
    tolerated = ("freqs_cis", "kv_cache")         # exports and official sampling leave such keys in them

    def __init__(self, config):
        super().__init__()
        self.config, self.recordings = config, {}
        classes = nn.Embedding(config.num_classes + 1, config.dim)  # the last one is null
        self.cls_embedding = nn.ModuleDict({"embedding_table": classes})
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02)
        nn.init.zeros_(self.output.weight)  # all codes are equally likely at first

    def forward(self, codes, labels, slots=None):
        """codes (B, T), labels (B,) -> float32 logits (B, T + 1, V), those at t of code t; T: 0 … block_size.

        The label num_classes is the null class. Sampling passes its slots: once they hold the class, `labels`
        is not read and the result is (B, T, V). ValueError on shapes; on a CPU also on ids.
        """
        c = self.config
        slots = Slots(c, codes.device) if slots is None else slots
        first = slots.stop == 0
        if first:
            if codes.shape[1] > c.block_size or labels.shape != codes.shape[:1]:
                raise ValueError(f"codes have shape {tuple(codes.shape)}, labels {tuple(labels.shape)}: "
                                 f"wanted at most {c.block_size} codes a row (block_size), and a label")
            if codes.device.type == "cpu":
                in_range("codes", codes, c.vocab_size)
                in_range("labels", labels, c.num_classes + 1)
        x = self.tok_embeddings(codes)
        if first:
            x = torch.cat([self.cls_embedding["embedding_table"](labels)[:, None], x], dim=1)
        slots.extend(x.shape[1])
        x = F.dropout(x, c.token_dropout_p, self.training)
        for layer in self.layers:
            x = layer(x, slots)
        return self.output(self.norm(x)).float()

    @torch.no_grad()
    def sample(self, labels, uniforms, group_size=1, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, top_k=0,
               top_p=1.0):
        """G images for each of B labels: codes (B·G, T) int32, logp (B·G, T), kept (B·G, T, V) bool or None.

        T = block_size. The images of a label stand side by side, and its slot is prefilled once for all.
        kept is None where all codes may be drawn. Draws are inverse-CDF on uniforms (B·G, T). `score` with
        the same settings and `kept` gives logp again. ValueError on a setting or a label out of range. On one
        GPU the whole loop is a recorded graph.
        """
        check_sampling(cfg_scale, temperature, top_k, top_p)
        in_range("labels", labels, self.config.num_classes)
        how = group_size, cfg_scale, cfg_interval, temperature, top_k, top_p
        uniforms, loop = uniforms.to(labels.device), functools.partial(self.loop, how)
        if labels.is_cuda and not torch.distributed.is_initialized():
            key = id(self), uniforms.shape, torch.is_autocast_enabled(), how  # a copy needs its own
            if key not in self.recordings:
                self.recordings[key] = record_call(loop, (labels, uniforms))
            loop = self.recordings[key]
        codes, logp, *kept = loop(labels, uniforms)
        return codes, logp, kept[0] if kept else None

    def loop(self, how, labels, uniforms):
        """What `sample` returns, without a kept of None."""
        group_size, cfg_scale, cfg_interval, *how = how
        c, device, N = self.config, labels.device, len(labels) * group_size
        n_guided = guided_steps(c.block_size, cfg_scale, cfg_interval)
        codes = torch.zeros(N, c.block_size, dtype=torch.int32, device=device)
        draws = []
        slots = Slots(c, device, cached=True)
        rows = torch.cat([labels, torch.full_like(labels, c.num_classes)]) if n_guided else labels
        logits = self(codes.new_zeros(len(rows), 0), rows, slots).repeat_interleave(group_size, 0)
        slots.repeat(group_size)
        for t in range(c.block_size):
            if t:
                last = codes[:, t - 1:t]
                logits = self(torch.cat([last, last]) if t < n_guided else last, None, slots)
            if t < n_guided:
                logits = guide(*logits.chunk(2), cfg_scale)
            draws.append(draw(logits[:, 0], uniforms[:, t], *how))
            codes[:, t] = draws[t][0]
        _, logp, kept = zip(*draws)
        return [codes, torch.stack(logp, 1), *([] if kept[0] is None else [torch.stack(kept, 1)])]

    def generate(self, labels, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0,
                 generator=None):
        """An image for each label: (B,) -> codes (B, block_size), int32. As `sample`; top_k=1 is greedy."""
        device = "cpu" if generator is None else generator.device
        uniforms = torch.rand(len(labels), self.config.block_size, generator=generator, device=device)
        return self.sample(labels, uniforms, 1, cfg_scale, cfg_interval, temperature, top_k, top_p)[0]
