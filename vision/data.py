"""Images and their classes: scikit-learn's digits, image folders, CIFAR-100; batches of them.

Nothing is drawn at random while an image is loaded, so step s of a run sees the same batch after a resume and
with any number of workers; a flip is drawn by the loop, for the whole batch. Boxes and masks: regions.py.
Left out: augmentation beyond the flip, streaming data sets.
"""
import functools
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from utils.cli import die, need

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class Images(Dataset):
    """Items (image (C, H, W), target, name), from tensors in memory or from files, read when asked for.

    A file that can't be read gives image None: `batches` refuses it, or skips and counts it.
    """

    def __init__(self, images, targets, names, read=None):
        self.images, self.targets, self.names, self.read = images, targets, names, read
        self.skipped = set()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        if self.read is None:
            return self.images[i], self.targets[i], self.names[i]
        try:
            return *self.read(self.images[i], self.targets[i]), self.names[i]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return None, str(error), str(self.images[i])

    def subset(self, index):
        part = Images([self.images[i] for i in index], [self.targets[i] for i in index],
                      [self.names[i] for i in index], self.read)
        part.skipped = self.skipped  # counted once for the whole
        return part


@dataclass
class Data:
    train: Images
    val: Images
    classes: list[str] = field(default_factory=list)  # none for boxes and masks
    flip: bool = False                                # a mirrored image is as good: not so for digits
    normalised: bool = False                          # ImageNet's mean and std are taken off


def batches(data, batch_size, seed=0, start=0, steps=None, num_workers=0, bad_images="refuse"):
    """Yields images (B, C, H, W), targets, names a step; steps=None: once through the data, in order."""
    if steps is None:
        index = torch.arange(len(data)).split(batch_size)
    else:
        index = [step_index(len(data), batch_size, seed, step) for step in range(start, steps)]
    loader = DataLoader(data, batch_sampler=[i.tolist() for i in index], num_workers=num_workers,
                        collate_fn=list)
    for items in loader:
        for image, why, path in items:
            if image is None and bad_images == "refuse":
                die(f"{path}: not readable as an image ({why}). Mend or remove it, or give --bad_images skip")
            if image is None:
                data.skipped.add(path)
        items = [item for item in items if item[0] is not None]
        if not items and steps is None and len(data.skipped) < len(data):
            continue
        if not items:
            die(f"none of the {batch_size} images of a batch can be read: {path} is the last of them")
        images, targets, names = zip(*items)
        yield torch.stack(images), torch.stack(targets), list(names)


def step_index(n, batch_size, seed, step):
    """Which images step `step` sees: epochs in an order of their own, from (seed, epoch) alone."""
    a_pass = max(1, n // batch_size)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step // a_pass)
    return torch.randperm(n, generator=generator)[step % a_pass * batch_size:][:batch_size]


def flip(images, generator):
    """Mirrors half of the images, drawn from the generator."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None].to(images.device), images.flip(-1), images)


# ---- classes ----
def load_classes(root, size, normalise=True):
    """root: "digits", "cifar100", or a folder with train/ and val/ (or eval/), a folder a class in each."""
    if root == "digits":
        return digits(size)
    if root == "cifar100":
        return cifar100(size, normalise)
    read = functools.partial(read_class, size, normalise)
    parts = [class_files(folder) for folder in split_folders(root)]
    (train_classes, *_), (val_classes, *_) = parts
    if train_classes != val_classes:
        odd = sorted(set(train_classes) ^ set(val_classes))
        die(f"{root}: the two parts' classes differ, only one has {', '.join(odd[:5])}: wanted the same "
            "folders in both")
    return Data(*[Images(files, labels, files, read) for _, files, labels in parts], train_classes, True,
                normalise)


def split_folders(root):
    root = Path(root)
    if not root.is_dir():
        die(f"--data_root {root}: no such folder. Wanted one with train/ and val/ (or eval/), or `digits`.")
    val = next((root / name for name in ("val", "eval") if (root / name).is_dir()), root / "val")
    for folder in (root / "train", val):
        if not folder.is_dir():
            found = ", ".join(sorted(p.name for p in root.iterdir())[:5]) or "nothing"
            die(f"--data_root {root} has no {folder.name}/ ({found}): wanted train/ and val/ (or eval/)")
    return root / "train", val


def class_files(folder):
    """-> class names, files, labels; ImageNet's layout: a folder a class."""
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir())
    if len(classes) < 2:
        die(f"{folder} has {len(classes)} class folders: wanted at least 2, with a class's images in each")
    files, labels = [], []
    for i, name in enumerate(classes):
        found = image_files(folder / name)
        if not found:
            die(f"{folder / name} has no images: wanted {', '.join(KINDS[:3])}, … of the class {name!r}")
        files += found
        labels += [torch.tensor(i)] * len(found)
    return classes, files, labels


def image_files(folder):
    return sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in KINDS)


def read_class(size, normalise, path, label):
    """The shorter side to size·256/224, the centre of it, as ImageNet's evaluation does it."""
    image = open_rgb(path)
    scale = size * 256 / 224 / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return to_tensor(image.crop((left, top, left + size, top + size)), normalise), label


def open_rgb(path):
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits a pixel: convert("RGB") would clip it to white
            image = Image.fromarray((np.array(image) / 257).clip(0, 255).astype("uint8"))
        return image.convert("RGB")


def to_tensor(image, normalise=True):
    """A PIL image -> (3, H, W) float, 0 … 1, or ImageNet's mean and std taken off."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return standard(x) if normalise else x


def standard(x, inverse=False):
    """ImageNet's normalisation of (..., 3, H, W), or back."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return x * std + mean if inverse else (x - mean) / std


@functools.cache
def digit_arrays(seed=0):
    """1,797 handwritten digits -> {"train" or "test": (images (N, 1, 8, 8) in 0 … 1, labels (N,))}."""
    found = need("sklearn.datasets", "vision").load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = {"train": order[:1438], "test": order[1438:]}
    return {name: (images[part], labels[part]) for name, part in parts.items()}


def digits(size=8, channels=3):
    """scikit-learn's digits, scaled to size × size; the split is the same in every run."""
    def part(name):
        images, labels = digit_arrays()[name]
        if size != 8:
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        images = images.expand(-1, channels, -1, -1)
        return Images(images, labels, [f"{name}/{i}" for i in range(len(labels))])
    return Data(part("train"), part("test"), [str(i) for i in range(10)])


def cifar100(size=32, normalise=True):
    """CIFAR-100, 60,000 images of 32 × 32: from NANOGRPO_DATA or data/, else downloaded (169 MB, checked)."""
    datasets = need("torchvision.datasets", "vision")
    root = next((r for r in (os.environ.get("NANOGRPO_DATA", "data"), "data")
                 if (Path(r) / "cifar-100-python").is_dir()), "data")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(15)
    try:
        parts = [datasets.CIFAR100(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        die(f"CIFAR-100 isn't at {root}/cifar-100-python and can't be downloaded ({type(error).__name__}): "
            "put the unpacked folder there, or name an image folder")
    finally:
        socket.setdefaulttimeout(before)
    read = functools.partial(read_cifar, size, normalise)
    made = [Images([Image.fromarray(x) for x in part.data], torch.tensor(part.targets),
                   [f"cifar100/{i}" for i in range(len(part))], read) for part in parts]
    return Data(*made, parts[0].classes, True, normalise)


def read_cifar(size, normalise, image, label):
    scaled = image if size == 32 else image.resize((size, size), Image.Resampling.BICUBIC)
    return to_tensor(scaled, normalise), label
