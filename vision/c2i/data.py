"""What c2i_grpo.py reads: images or codes with their classes, and each step's share of them.

Items are (x, label, number). x is an image (3, H, W) in -1 … 1, or codes (n_aug, T) of an image's n_aug
augmentations, or empty (0,) where the run needs the label alone. Code files lie as LlamaGen's do
(arXiv:2406.06525): DIR/imagenet{size}_codes/{i}.npy and DIR/imagenet{size}_labels/{i}.npy.
Left out: augmentation, streaming. Run: python -m vision.c2i_grpo
"""
import functools
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from utils.cli import atomic_write, die, need
from utils.ranks import first_on_rank_0
from utils.run import step_generator
from vision import data as vision_data
from vision.data import Images, open_rgb, step_index
from vision.c2i.vq import in_range

COLUMNS = ("image", "image_path", "file", "filepath"), ("label", "labels")  # names that data sets use


def load_data(args, is_digits, T):
    """-> Images. Those of --data-path are read only if teacher forcing or --extract-codes needs them."""
    if args.code_path:
        stem = f"{args.code_path}/imagenet{args.image_size}"
        numbers = range(len(list(Path(f"{stem}_codes").glob("[0-9]*.npy"))))
        if not numbers:
            die(f"no {stem}_codes/*.npy: write them with --extract-codes DIR, or mend --code-path")
        read = functools.partial(read_codes, stem, T, args.codebook_size, args.num_classes)
        return Images(numbers, numbers, numbers, read)
    if is_digits:
        return digits(args.image_size, args.seed)
    rows, column, labels = open_saved(args.data_path, args.num_classes)
    numbers = range(len(labels))
    if args.sampling == "autoregressive" and not args.extract_codes:
        return Images(torch.empty(len(labels), 0), labels, numbers)
    read = functools.partial(read_image, rows, column, args.data_path, args.image_size)
    return Images(numbers, labels, numbers, read)


def digits(size, seed, split="train"):
    data = getattr(vision_data.digits(size, seed), split)
    data.images = data.images * 2 - 1
    return data


def open_saved(path, num_classes):
    """-> the train split of what `datasets` wrote with save_to_disk, its column of images, labels (N,)."""
    datasets = need("datasets", "c2i")
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        die(f"--data-path {path} can't be read as a data set ({why}): wanted what save_to_disk wrote")
    if isinstance(data, dict) and "train" not in data:
        die(f"--data-path {path} has the splits {', '.join(data)}: wanted one called train")
    data = data["train"] if isinstance(data, dict) else data
    columns = [next((name for name in names if name in data.column_names), None) for names in COLUMNS]
    for column, names in zip(columns, COLUMNS):
        if column is None:
            die(f"--data-path {path} has the columns {', '.join(data.column_names)}: wanted one of "
                f"{', '.join(names)}")
    try:
        labels = torch.tensor(data[columns[1]][:])
        if labels.dtype != torch.long or labels.dim() != 1:
            raise ValueError(f"labels of {labels.dtype}, shape {tuple(labels.shape)}: wanted whole numbers")
        in_range("labels", labels, num_classes)
    except (RuntimeError, TypeError, ValueError) as error:
        die(f"--data-path {path}: {error} (--num-classes {num_classes})")
    return data, columns[0], labels


def read_image(rows, column, folder, size, i, label):
    image = rows[i][column]
    if isinstance(image, str) and not Path(image).is_file():
        image = Path(folder) / image
    pixels = torch.from_numpy(np.array(center_crop(open_rgb(image), size)))
    return pixels.permute(2, 0, 1) / 127.5 - 1, label


def center_crop(image, size):
    """guided-diffusion's crop: halves by a box filter while it can, then bicubic, then the middle square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_codes(stem, T, codebook_size, num_classes, i, _):
    codes, label = (torch.from_numpy(np.load(f"{stem}_{part}/{i}.npy")).long()
                    for part in ("codes", "labels"))
    if codes.dim() != 3 or codes.shape[2] != T or label.numel() != 1:
        raise ValueError(f"codes of shape {tuple(codes.shape)}: wanted (1, n_aug, {T}), and one label")
    in_range("codes", codes, codebook_size)
    in_range("labels", label, num_classes)
    return codes[0], label.view(())


def read(data, indices, num_workers):
    """For each list of indices: a tuple of x, and labels (B,). An item that can't be read ends the run."""
    for items in DataLoader(data, batch_sampler=indices, num_workers=num_workers, collate_fn=as_arrays):
        for x, why, i in items:
            if x is None:
                die(f"image {i} of --data-path or --code-path can't be read ({why})")
        x, labels, _ = zip(*items)
        yield [torch.from_numpy(part) for part in x], torch.tensor(labels)


def as_arrays(items):
    """A worker's items without tensors, each of which would be an open file of this process."""
    return [item if item[0] is None else (item[0].numpy(), int(item[1]), item[2]) for item in items]


def batches(data, batch_size, seed, start, steps, num_workers, rank, world):
    """Yields x and labels (B,) of each step: x is images (B, 3, H, W), codes (B, T), or empty (B, 0).

    batch_size is B · world. Each process gets every world-th item, so a step's items don't depend on their
    number. One of the n_aug augmentations in a code file is drawn, from (seed, step).
    """
    index = (step_index(len(data), batch_size, seed, s).tolist()[rank::world] for s in range(start, steps))
    for step, (x, labels) in enumerate(read(data, index, num_workers), start):
        if x[0].dim() == 2:
            draws = torch.rand(batch_size, generator=step_generator(seed, step, "data"))[rank::world].tolist()
            x = [codes[int(u * len(codes))] for codes, u in zip(x, draws)]
        yield torch.stack(x), labels


def write_codes(data, vq, args, device, rank, world):
    """--extract-codes: codes (1, 1, T) and label (1,) of each image, in folders named when whole."""
    stems = [f"{args.extract_codes}/imagenet{args.image_size}_{part}" for part in ("codes", "labels")]
    for stem in stems:
        if Path(stem).exists():
            die(f"--extract-codes: {stem} is there already: remove it, or name another folder")
        if rank == 0:
            shutil.rmtree(f"{stem}.part", ignore_errors=True)
    first_on_rank_0(lambda: None)  # until rank 0 has cleared up
    parts = [part.tolist() for part in torch.arange(rank, len(data), world).split(args.sample_batch_size)]
    for part, (x, labels) in zip(parts, read(data, parts, args.num_workers)):
        codes = vq.encode(torch.stack(x).to(device)).flatten(1).cpu()
        for i, row, label in zip(part, codes.numpy(), labels.numpy()):
            for stem, array in zip(stems, (row[None, None], label[None])):
                atomic_write(f"{stem}.part/{i}.npy", lambda file: np.save(file, array))
    first_on_rank_0(lambda: None)  # until all have written theirs
    if rank == 0:
        for stem in reversed(stems):
            os.replace(f"{stem}.part", stem)
    print(f"wrote the codes of {len(data)} images to {args.extract_codes}")
