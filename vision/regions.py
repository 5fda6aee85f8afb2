"""Images with a box or a mask, the targets of vit_grpo.py: scenes of digits, COCO JSON, PNG masks.

Left out: several boxes an image, categories, run-length masks.
"""
import functools
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils import guard
from utils.cli import die
from utils.run import step_generator
from vision.data import (
    Data, Images, digits, files_below, open_rgb, open_upright, split_folders, to_tensor, with_test)


def digit_scenes(n, size=32, seed=0, split="train", sides=(0.35, 0.65)):
    """n black canvases with a digit each, at a random place and size.

    -> images (n, 1, size, size) in 0 … 1, labels (n,), boxes (n, 4) in pixels (x1, y1, x2, y2, the far edges
    exclusive), masks (n, size, size). sides: a digit's least and greatest side, as shares of the canvas.
    The digits are of that split.
    """
    stock = getattr(digits(8, seed), split)
    generator = step_generator(seed, ("train", "val", "test").index(split), "data")
    images, masks = torch.zeros(n, 1, size, size), torch.zeros(n, size, size, dtype=torch.bool)
    labels, boxes = torch.zeros(n, dtype=torch.long), torch.zeros(n, 4)
    for i in range(n):
        u = torch.rand(4, generator=generator)
        side = round(size * (sides[0] + (sides[1] - sides[0]) * u[0].item()))
        x, y = (int(v * (size - side + 1)) for v in u[1:3].tolist())
        index = int(u[3] * len(stock))
        digit = F.interpolate(stock.images[index:index + 1, :1], (side, side), mode="bilinear")[0, 0]
        ink = digit > 0.3
        images[i, 0, y:y + side, x:x + side] = digit
        masks[i, y:y + side, x:x + side] = ink
        rows, columns = ink.any(1).nonzero(), ink.any(0).nonzero()
        boxes[i] = torch.tensor([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1])
        labels[i] = stock.targets[index]
    return images, labels, boxes, masks


def load_regions(task, root, size, seed=0):
    """task "box": targets (4,) as shares of the image's sides; task "mask": targets (size, size) of 0 and 1.

    root: "digits" for digit scenes, or a folder as for `split_folders`: in each part images and, for boxes,
    one COCO JSON (the largest box of an image is its target), for masks NAME_mask.png beside NAME.jpg.
    An image is resized to size × size without a crop, so that every box and mask stays whole.
    """
    if root == "digits":
        def part(n, split):
            images, _, boxes, masks = digit_scenes(n, size, seed, split)
            targets = boxes / size if task == "box" else masks.long()
            return Images(images.expand(-1, 3, -1, -1), targets, [f"{split}/{i}" for i in range(n)])
        return Data(part(2000, "train"), part(500, "val"), part(500, "test"))
    collect, read = (coco_boxes, read_box) if task == "box" else (mask_files, read_mask)
    found, read = [collect(folder) for folder in split_folders(root)], functools.partial(read, size)
    parts = [Images(files, targets, files, read) for files, targets in found]
    return Data(*with_test(parts, root, seed, by_class=False), normalised=True)


def coco_boxes(folder):
    """-> files, targets: the largest box (x, y, width, height) and the image's (width, height), in pixels.

    Crowds and boxes without area are left out and counted, images without another box are left out.
    """
    files = files_below(folder, ".json")
    if len(files) != 1:
        die(f"{folder} holds {len(files)} JSON files: wanted one, COCO's, beside the images")
    file, largest, left_out, every = Path(files[0]), {}, 0, []
    guard.note(f"file {file}", file)
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
        images = {image["id"]: (str(file.parent / image["file_name"]), float(image["width"]),
                                float(image["height"])) for image in content["images"]}
        if len(images) < len(content["images"]):
            raise ValueError("two images have one id")
        for note in content["annotations"]:
            path, width, height = images[note["image_id"]]
            x, y, w, h = box = [float(v) for v in note["bbox"]]
            if not (-1 <= x < width and -1 <= y < height and 0 <= w <= width + 1 - x and
                    0 <= h <= height + 1 - y):
                die(f"{file}: annotation {note['id']} has bbox {box}: wanted x, y, width, height in pixels "
                    f"of the {width:g} × {height:g} of {Path(path).name}")
            if note.get("iscrowd") or not w * h:
                left_out += 1
                continue
            every.append((box, (width, height)))
            if w * h > largest.get(path, (0,))[0]:
                largest[path] = (w * h, every[-1])
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        die(f"{file} is no COCO JSON ({type(error).__name__}: {error}): wanted images (id, file_name, "
            "width, height) and annotations (id, image_id, bbox = [x, y, width, height])")
    for path in largest:
        if not os.path.isfile(path):
            die(f"{file} names {Path(path).name}, which isn't in {file.parent}")
    if not largest:
        die(f"{file} has no annotation with an area: wanted at least one box")
    if left_out:
        print(f"{file}: left out {left_out} crowds and boxes without area")
    warn_of_units(file, every, "x1, y1, x2, y2", lambda x, y, w, h, width, height: x < w and y < h)
    return list(largest), [target for _, target in largest.values()]


def warn_of_units(file, boxes, order, fits):
    """Warns where all boxes fit another unit or order, too. A run on such data would earn nothing.

    boxes: [(numbers of the file, (width, height))]. fits(*box, width, height): can a box be in that order?
    """
    numbers = [v for box, _ in boxes for v in box]
    beyond = sum(width > 1200 or height > 1200 for _, (width, height) in boxes)  # 1000 can be exceeded
    moved = [(*box, *size) for box, size in boxes if len(box) == 4 and any(box[:2])]  # else both are alike
    looks = ("shares of the sides, 0 … 1" if max(numbers) <= 1 else
             "thousandths of the sides, 0 … 1000" if max(numbers) <= 1000 and beyond >= 10 else
             order if len(moved) >= 10 and all(fits(*row) for row in moved) else "")
    if looks:
        print(f"warning: {file}: all boxes look like {looks}: wanted pixels of the image, see docs/vision/",
              file=sys.stderr)


def mask_files(folder):
    """-> images, and their masks' files."""
    images = [path for path in files_below(folder) if not Path(path).stem.endswith("_mask")]
    masks = [str(Path(p).with_name(Path(p).stem + "_mask.png")) for p in images]
    for image, mask in zip(images, masks):
        if not Path(mask).is_file():
            die(f"{image} has no mask: wanted {Path(mask).name} beside it, its foreground not black")
    if not images:
        die(f"{folder} has no images: wanted NAME.jpg (or .png) with NAME_mask.png beside each")
    guard.note(f"list of images in {folder}", "\n".join(images))
    return images, masks


def read_box(size, path, target):
    image, ((x, y, w, h), sides) = open_rgb(path), target
    if image.size != sides:
        raise ValueError(f"{image.size} pixels in the file, upright; the COCO JSON says {sides}")
    box = torch.tensor([x, y, x + w, y + h]) / torch.tensor(sides * 2)
    return to_tensor(image.resize((size, size))), box.clamp(0, 1)


def read_mask(size, path, mask_path):
    """The mask is where its file isn't black, whatever the type of its pixels."""
    image, mask = open_rgb(path), open_upright(mask_path)
    if image.size != mask.size:
        raise ValueError(f"{mask.size} pixels in the mask, {image.size} in the image")
    pixels = np.array(mask if mask.mode[0] in "IF" else mask.convert("RGB"))
    ink = (pixels != 0).reshape(*pixels.shape[:2], -1).any(2)
    see_through = mask.has_transparency_data and mask.convert("RGBA").getextrema()[3][0] < 255
    if see_through or mask.mode == "P" and (ink != (np.array(mask) != 0)).any():
        raise ValueError("a mask with transparent pixels, or a palette whose 0 isn't black: wanted grey")
    mask = Image.fromarray(ink).resize((size, size), Image.Resampling.NEAREST)
    return to_tensor(image.resize((size, size))), torch.from_numpy(np.array(mask)).long()
