"""What c2i_grpo.py reads: images and codes with their classes; steps of them, shared between processes.

Images are float, -1 … 1; codes are a grid's, row by row. Code files have the layout of LlamaGen's
(arXiv:2406.06525): DIR/imagenet{size}_codes/{i}.npy and DIR/imagenet{size}_labels/{i}.npy.
Left out: augmentation, streaming data sets. Run: python -m vision.c2i_grpo
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from utils.cli import atomic_write, die, need
from utils.task import step_generator
from vision.data import digit_arrays, step_index

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "image_path", "file", "filepath"), ("label", "labels")


def center_crop(image, size):
    """guided-diffusion's: halved by a box filter while it can be, then bicubic, then the middle square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_tensor(image):
    """A PIL image -> (3, H, W), mean and std 0.5 taken off."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 127.5 - 1


class Saved(Dataset):
    """The train split of what `datasets` wrote with save_to_disk: items (image or None, None, label)."""

    def __init__(self, path, size, num_classes, with_images):
        datasets = need("datasets", "c2i")
        try:
            found = datasets.load_from_disk(str(path))
        except (OSError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            die(f"--data-path {path} can't be read as a data set ({why}): wanted a folder that "
                "datasets.save_to_disk wrote")
        if isinstance(found, dict):
            if "train" not in found:
                die(f"--data-path {path} has the splits {', '.join(found)}: wanted one called train")
            found = found["train"]
        self.path, self.size, self.with_images = Path(path), size, with_images
        self.image, label = (next((c for c in names if c in found.column_names), None)
                             for names in (IMAGE_COLUMNS, LABEL_COLUMNS))
        for column, names in ((self.image, IMAGE_COLUMNS), (label, LABEL_COLUMNS)):
            if column is None:
                die(f"--data-path {path} has the columns {', '.join(found.column_names)}: wanted one of "
                    f"{', '.join(names)}")
        self.rows, self.labels = found, found[label][:]
        odd = next((y for y in self.labels if not isinstance(y, int) or not 0 <= y < num_classes), None)
        if odd is not None:
            die(f"--data-path {path}: the class {odd!r} is not in 0 … {num_classes - 1} (--num-classes "
                f"{num_classes})")

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        if not self.with_images:
            return None, None, self.labels[i]
        try:
            image = self.rows[i][self.image]
            if isinstance(image, str):
                image = Image.open(image if Path(image).is_file() else self.path / image)
            return to_tensor(center_crop(image.convert("RGB"), self.size)), None, self.labels[i]
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"--data-path {self.path}: image {i} can't be read ({error})"


class CodeFiles(Dataset):
    """LlamaGen's code files: items (None, codes (n_aug, T), label)."""

    def __init__(self, path, size, T, vocab_size, num_classes):
        self.path, self.size, self.T, self.limits = Path(path), size, T, (vocab_size, num_classes)
        self.n = len(list((self.path / f"imagenet{size}_codes").glob("*.npy")))
        if not self.n:
            die(f"--code-path {path} has no imagenet{size}_codes/*.npy: write them with --extract-codes DIR")

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        paths = [self.path / f"imagenet{self.size}_{part}" / f"{i}.npy" for part in ("codes", "labels")]
        try:
            codes, label = (np.load(path) for path in paths)
        except (OSError, EOFError, ValueError) as error:
            return f"--code-path {self.path}: entry {i} can't be read ({error})"
        if codes.ndim != 3 or codes.shape[2] != self.T or label.size != 1:
            return (f"{paths[0]} holds {codes.shape}, its label {label.shape}: wanted (1, n_aug, {self.T}), "
                    f"as images of {self.size} pixels have {self.T} codes, and (1,)")
        for name, ids, limit in zip(("code", "class"), (codes, label), self.limits):
            if ids.min() < 0 or ids.max() >= limit:
                return f"{paths[0]}: the {name} {ids.max()} (or {ids.min()}) is not in 0 … {limit - 1}"
        return None, torch.from_numpy(codes[0].astype(np.int64)), int(label.item())


def digits(size=8, part="train"):
    """-> images (N, 3, size, size), labels (N,)."""
    images, labels = digit_arrays()[part]
    images = images if size == 8 else F.interpolate(images, (size, size), mode="bilinear")
    return images.expand(-1, 3, -1, -1) * 2 - 1, labels


def load_data(args, is_digits, T):
    if args.code_path:
        return CodeFiles(args.code_path, args.image_size, T, args.codebook_size, args.num_classes)
    if is_digits:
        images, labels = digits(args.image_size)
        return [(x, None, y) for x, y in zip(images, labels.tolist())]
    with_images = args.sampling == "teacher-forced" or args.extract_codes is not None
    return Saved(args.data_path, args.image_size, args.num_classes, with_images)


def read(data, indices, num_workers):
    """For each list of indices: images, codes, labels, three tuples; what can't be read ends the run."""
    for items in DataLoader(data, batch_sampler=indices, num_workers=num_workers, collate_fn=list):
        for item in items:
            if isinstance(item, str):
                die(item)
        yield zip(*items)


def batches(data, batch_size, seed, start, steps, num_workers, rank, world):
    """Yields images (B, 3, H, W) or None, codes (B, T) or None, labels (B,), a step each.

    A rank gets every world-th item, so what a step sees doesn't depend on the world; batch_size = B · world.
    Of an image's augmentations in code files one is drawn, from (seed, step).
    """
    index = (step_index(len(data), batch_size, seed, s).tolist()[rank::world] for s in range(start, steps))
    for step, (images, codes, labels) in enumerate(read(data, index, num_workers), start):
        draws = torch.rand(batch_size, generator=step_generator(seed, step))[rank::world].tolist()
        if codes[0] is not None:
            codes = torch.stack([x[int(u * len(x))] for x, u in zip(codes, draws)])
        yield (None if images[0] is None else torch.stack(images), None if codes[0] is None else codes,
               torch.tensor(labels))


def write_codes(data, vq, folder, size, device, batch_size, num_workers, rank, world):
    """--extract-codes: a file (1, 1, T) int64 and one (1,) an image; each process writes every world-th."""
    parts = torch.arange(rank, len(data), world).split(batch_size)
    found = read(data, [part.tolist() for part in parts], num_workers)
    for part, (images, _, labels) in zip(parts, found):
        codes = vq.encode(torch.stack(images).to(device)).flatten(1).cpu().numpy()
        for i, row, label in zip(part.tolist(), codes, labels):
            for name, x in (("codes", row[None, None]), ("labels", np.array([label]))):
                atomic_write(f"{folder}/imagenet{size}_{name}/{i}.npy", lambda file: np.save(file, x))
