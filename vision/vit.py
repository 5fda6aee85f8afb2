"""A vision transformer whose dropout is part of the policy: one body, three kinds of answer.

ViT (arXiv:2010.11929) with dropout left on when it answers, so that each pass is another network: MC dropout
(arXiv:1506.02142). A pass takes the seed of its dropout masks, so that it can be replayed. GRPO then scores
an answer under the very network that gave it.
Left out: pretrained weights, dropout on attention weights, other image sizes. Run: python -m vision.vit_grpo
"""
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn

from utils import checkpoint
from utils.cli import die


@dataclass
class ViTConfig:
    image_size: int = 16
    patch: int = 4
    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1
    task: str = "class"  # class: one label; box: x1, y1, x2, y2; mask: a 0 or 1 a pixel
    n_classes: int = 10
    bins: int = 33       # of a box's coordinate: bin i is i / (bins - 1) of the side
    channels: int = 3

    @property
    def actions(self):
        """T, how many actions an answer has."""
        return {"class": 1, "box": 4, "mask": self.image_size ** 2}[self.task]

    @property
    def choices(self):
        """V, among how many values an action chooses."""
        return {"class": self.n_classes, "box": self.bins, "mask": 2}[self.task]


def dropout(x, p, generator):
    """x·m / (1 − p), with one Bernoulli(1 − p) m a number, from the generator; without one x itself."""
    if generator is None or p == 0:
        return x
    mask = torch.rand(x.shape, generator=generator, device=x.device) >= p
    return x * mask / (1 - p)


class Block(nn.Module):
    """Attention, then an MLP, each with a norm before and dropout after it (arXiv:2010.11929, eq. 2, 3)."""

    def __init__(self, width, heads, p):
        super().__init__()
        self.heads, self.p = heads, p
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, generator):
        N, L, D = x.shape
        qkv = self.qkv(self.norm1(x)).view(N, L, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (N, heads, L, D / heads) each
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, L, D)
        x = x + dropout(self.out(attended), self.p, generator)
        return x + dropout(self.mlp(self.norm2(x)), self.p, generator)


class ViT(nn.Module):
    """vit(images, seed=None): (N, C, H, W) -> logits (N, T, V); the seed is that of the dropout masks.

    The same seed, with the same images in the same order, is the same network. None is the mean network,
    without dropout, for evaluation. Each row of the batch has masks of its own, so an image repeated G times
    is answered by G networks. A label and a box are read from T learnt tokens in front of the patches: ViT's
    class token, or four of them. A mask is read from the patches' own tokens.
    """

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        if c.image_size % c.patch or c.width % c.heads or not 0 <= c.dropout < 1:
            die(f"a ViT of images {c.image_size}, patch {c.patch}, width {c.width}, heads {c.heads}, dropout "
                f"{c.dropout}: wanted patch to divide images, heads to divide width, and 0 <= dropout < 1")
        patches = (c.image_size // c.patch) ** 2
        self.front = 0 if c.task == "mask" else c.actions  # tokens in front of the patches
        self.embed = nn.Linear(c.channels * c.patch ** 2, c.width)
        self.answer = nn.Parameter(torch.randn(self.front, c.width) * 0.02)
        self.position = nn.Parameter(torch.randn(self.front + patches, c.width) * 0.02)
        self.blocks = nn.ModuleList([Block(c.width, c.heads, c.dropout) for _ in range(c.depth)])
        self.norm = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, c.choices * (c.patch ** 2 if c.task == "mask" else 1))

    def tokens(self, images, seed=None):
        """(N, C, H, W) -> (N, L, width), the tokens that the head reads: one an action, or one a patch."""
        c = self.config
        generator = None if seed is None else torch.Generator(images.device).manual_seed(seed)
        x = self.embed(F.unfold(images, c.patch, stride=c.patch).transpose(1, 2))  # (N, patches, width)
        x = torch.cat([self.answer.expand(len(x), -1, -1).to(x.dtype), x], 1)
        x = dropout(x + self.position, c.dropout, generator)
        for block in self.blocks:
            x = block(x, generator)
        return self.norm(x[:, :self.front] if self.front else x)

    def features(self, images):
        return self.tokens(images).mean(1)  # (N, width)

    def forward(self, images, seed=None):
        c = self.config
        logits = self.head(self.tokens(images, seed)).float()  # losses are in float32 under autocast, too
        if c.task == "mask":  # fold undoes unfold: patch by patch becomes row by row
            logits = F.fold(logits.transpose(1, 2), c.image_size, c.patch, stride=c.patch)  # (N, 2, H, W)
            logits = logits.flatten(2).transpose(1, 2)  # (N, H·W, 2)
        return logits


def answers(config, action):
    """What actions (…, T) mean: classes (…), boxes (…, 4) as shares of the sides, or masks (…, H, W)."""
    if config.task == "box":
        return action / (config.bins - 1)
    return action[..., 0] if config.task == "class" else action.unflatten(-1, (config.image_size,) * 2)


def as_actions(config, target):
    """The actions (N, T) that mean a target: the inverse of `answers`, to the nearest bin."""
    if config.task == "box":
        return (target * (config.bins - 1)).round().long()
    return target.reshape(len(target), -1)


def load_vit(path, config, classes):
    """The ViT in a best_vit_*.pt, with config's dropout. Another model ends the run with a message."""
    content = checkpoint.load(path, "vit", "python -m vision.vit_grpo", ("config", "model", "classes"))
    for name, value in {**asdict(config), "classes": classes}.items():
        saved = content["classes"] if name == "classes" else content["config"][name]
        if name != "dropout" and saved != value:
            die(f"{path} is of another model: its {name} is {saved}, wanted {value}")
    model = ViT(config)
    model.load_state_dict(content["model"])
    return model
