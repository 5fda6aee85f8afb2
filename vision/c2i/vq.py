"""VQ-16 and VQ-8 turn images into a grid of codebook indices and back; also the loader of LlamaGen's files.

LlamaGen (arXiv:2406.06525, section 3.1), after VQGAN (arXiv:2012.09841): a convolutional encoder, the nearest
of a codebook of unit vectors, a convolutional decoder. Parameter names are LlamaGen's, so its weights load.
Left out: the perceptual, adversarial and entropy losses (`loss` suffices for digits, not for photographs);
`codebook_used` is read, but not kept up to date. Run: python -m vision.c2i_grpo
"""
import argparse
import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from utils import guard
from utils.cli import die


@dataclass(frozen=True)
class VQConfig:
    """Every level but the last one halves the grid: VQ-16 has five levels, VQ-8 four, that of digits two."""
    ch: int = 128                                # level l has ch · ch_mult[l] channels
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    z_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8

    @property
    def downsample(self):
        return 2 ** (len(self.ch_mult) - 1)


VQS = {"VQ-16": VQConfig(), "VQ-8": VQConfig(ch_mult=(1, 2, 2, 4))}


# ---- layers: (B, C, H, W) -> (B, C', H', W'). The keywords of `chain` are names in LlamaGen's files. ----
def chain(**parts):
    return nn.Sequential(OrderedDict(parts))


def conv3(c_in, c_out):
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def group_norm(channels):
    """32 groups, or the largest power of two that divides a small model's channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels, eps=1e-6)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), conv3(c_in, c_out)
        self.norm2, self.conv2 = group_norm(c_out), conv3(c_out, c_out)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv2(F.silu(self.norm2(h))) + self.nin_shortcut(x)


class Attention(nn.Module):
    """Attention of one head over all H·W places: x + proj_out(softmax(q·kᵀ/√C)·v)."""

    def __init__(self, c):
        super().__init__()
        self.norm = group_norm(c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None] for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]  # (B, H·W, C)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


def downsample(c):
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(c, c, 3, stride=2))  # right and bottom


class Level(nn.Module):
    """n_res residual blocks, attention behind each where it is wanted; then the grid's size may change."""

    def __init__(self, c_in, c_out, n_res, attention, down=False, up=False):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_out if i else c_in, c_out) for i in range(n_res))
        self.attn = nn.ModuleList(Attention(c_out) if attention else nn.Identity() for _ in range(n_res))
        self.downsample = downsample(c_out) if down else nn.Identity()
        self.upsample = (chain(nearest=nn.Upsample(scale_factor=2.0), conv=conv3(c_out, c_out)) if up
                         else nn.Identity())

    def forward(self, x):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


def middle(c):
    return nn.Sequential(ResBlock(c, c), Attention(c), ResBlock(c, c))


def encoder(config):
    """Images (B, 3, H, W) -> (B, z_channels, h, w)."""
    widths = [config.ch * m for m in config.ch_mult]
    last = len(widths) - 1
    return chain(
        conv_in=conv3(3, config.ch),
        conv_blocks=nn.Sequential(*(
            Level(widths[i - 1] if i else config.ch, width, n_res=2, attention=i == last, down=i < last)
            for i, width in enumerate(widths))),
        mid=middle(widths[-1]), norm_out=group_norm(widths[-1]), swish=nn.SiLU(),
        conv_out=conv3(widths[-1], config.z_channels))


def decoder(config):
    """(B, z_channels, h, w) -> images (B, 3, H, W); the deepest level is conv_blocks.0."""
    widths = [config.ch * m for m in reversed(config.ch_mult)]
    last = len(widths) - 1
    return chain(
        conv_in=conv3(config.z_channels, widths[0]), mid=middle(widths[0]),
        conv_blocks=nn.Sequential(*(
            Level(widths[max(i - 1, 0)], width, n_res=3, attention=i == 0, up=i < last)
            for i, width in enumerate(widths))),
        norm_out=group_norm(widths[-1]), swish=nn.SiLU(), conv_out=conv3(widths[-1], 3))


# ---- the codebook ----
class Codebook(nn.Module):
    """Unit vectors, normalised whenever they are read."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        nn.init.uniform_(self.embedding.weight, -1 / config.codebook_size, 1 / config.codebook_size)
        self.register_buffer("codebook_used", torch.zeros(65536))  # LlamaGen's files have it

    def nearest(self, z):
        """argmin_k |z - e_k|², as |z|² + |e_k|² - 2 z·e_k: z (B, h, w, D) -> (B, h, w)."""
        e = F.normalize(self.embedding.weight, dim=-1)
        rows = z.flatten(0, -2)
        distance = rows.square().sum(1, keepdim=True) + e.square().sum(1) - 2 * rows @ e.T  # (B·h·w, K)
        return distance.argmin(1).view(z.shape[:-1])

    def lookup(self, codes):
        """(B, h, w) -> unit vectors (B, h, w, D)."""
        return F.normalize(F.embedding(codes, self.embedding.weight), dim=-1)


class VQModel(nn.Module):
    """The tokenizer. Images are float in -1 … 1: mean and std 0.5 are taken off."""
    wrapping = ("ema", "model", "state_dict")  # names of the weights in LlamaGen's files, tried in this order
    tolerated = ()

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.encoder, self.decoder, self.quantize = encoder(config), decoder(config), Codebook(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def embed(self, images):
        """images (B, 3, H, W) -> unit vectors (B, h, w, D), before the codebook."""
        step = self.config.downsample
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] % step or images.shape[3] % step:
            raise ValueError(f"images have shape {tuple(images.shape)}: wanted (B, 3, H, W), multiples of "
                             f"{step}, the downsample factor")
        return F.normalize(self.quant_conv(self.encoder(images)).permute(0, 2, 3, 1), dim=-1)

    def encode(self, images):
        """images (B, 3, H, W) in -1 … 1 -> codes (B, h, w), int64; h = H / downsample."""
        return self.quantize.nearest(self.embed(images))

    def decode(self, codes):
        """codes (B, h, w), or (B, h·w) of a square grid -> images (B, 3, H, W), about -1 … 1, not clamped."""
        if codes.dim() == 2 and math.isqrt(codes.shape[1]) ** 2 == codes.shape[1]:
            codes = codes.unflatten(1, (math.isqrt(codes.shape[1]), -1))  # (B, h, w)
        if codes.dim() != 3:
            raise ValueError(f"codes have shape {tuple(codes.shape)}: wanted (B, h, w), or (B, h·w), h = w")
        in_range("codes", codes, self.config.codebook_size)
        return self.from_vectors(self.quantize.lookup(codes))

    def from_vectors(self, z):
        return self.decoder(self.post_quant_conv(z.permute(0, 3, 1, 2)))

    def loss(self, images, beta=0.25):
        """mean |x̂ - x|² + mean |sg(z) - q|² + β · mean |z - sg(q)|²: VQGAN's eq. 4, no perceptual part.

        images (B, 3, H, W) -> scalar. x̂ = decode(z + sg(q - z)): the encoder gets the gradient at q.
        """
        z = self.embed(images)  # (B, h, w, D)
        q = self.quantize.lookup(self.quantize.nearest(z))
        mse = F.mse_loss(self.from_vectors(z + (q - z).detach()), images)
        return mse + F.mse_loss(q, z.detach()) + beta * F.mse_loss(z, q.detach())


def in_range(name, ids, n):
    """ValueError on an id that isn't in 0 … n - 1. It waits for a GPU, so a pass there goes without."""
    if ids.numel() and not 0 <= ids.min() <= ids.max() < n:
        bad = ids[(ids < 0) | (ids >= n)][0].item()
        raise ValueError(f"{name} hold {bad}: wanted whole numbers from 0 to {n - 1}")


# ---- LlamaGen's files ----
def load_official(model, path):
    """Fills an ImageGPT or a VQModel from a file of LlamaGen's, or a folder's consolidated.pth -> the model.

    The weights may lie bare or under a name of model.wrapping. An argparse.Namespace beside them is dropped,
    and so are keys with a part in model.tolerated. A model on the meta device takes the file's tensors.
    """
    path = Path(path)
    path = path / "consolidated.pth" if path.is_dir() else path
    if not path.is_file():
        die(f"no checkpoint at {path}: wanted a file of LlamaGen's, or a folder with consolidated.pth")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # on damaged bytes the unpickler raises nearly anything
        die(f"{path} can't be read: empty, truncated, or more than tensors, plain values, argparse.Namespace")
    guard.note(f"file {path}", path)
    content = content if isinstance(content, dict) else {type(content).__name__: content}
    wrapped = [content[name] for name in model.wrapping if isinstance(content.get(name), dict)]
    weights = wrapped[0] if wrapped else content
    if not all(isinstance(w, torch.Tensor) for w in weights.values()):
        die(f"{path} holds no state dict (found {', '.join(map(str, list(weights)[:5]))}): wanted it bare or "
            f"under {', '.join(model.wrapping)}")
    weights = {k: w for k, w in weights.items() if not set(model.tolerated) & set(str(k).split("."))}
    want, have = ({k: tuple(w.shape) for k, w in part.items()} for part in (model.state_dict(), weights))
    missing = [f"lacks {k} {shape}" for k, shape in want.items() if have.get(k) != shape]
    unknown = [f"also has {k} {shape}" for k, shape in have.items() if want.get(k) != shape]
    if missing or unknown:
        die(f"{path} doesn't fit this {type(model).__name__}: it {'; '.join(missing[:2] + unknown[:2])} "
            f"(in all {len(missing)} lost, {len(unknown)} too many). Is it of another size?")
    model.load_state_dict(weights, assign=next(model.parameters()).is_meta)
    return model
