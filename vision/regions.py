"""Images with a box or a mask, the targets of vit_grpo.py: scenes of digits, COCO JSON, PNG masks.

Left out: several boxes an image, categories, run-length masks.
"""
import functools
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from utils.cli import die
from vision.data import KINDS, Data, Images, digit_arrays, open_rgb, split_folders, to_tensor


def digit_scenes(n, size=32, digits=1, seed=0, split="train", sides=(0.35, 0.65)):
    """n grey canvases with `digits` digits each, at random places and sizes that don't overlap.

    -> images (n, 1, size, size) in 0 … 1, labels (n, digits), boxes (n, digits, 4) in pixels (x1, y1, x2, y2,
    the far edges exclusive), masks (n, digits, size, size). The digits are those of `split`, so that no test
    digit is in a training scene. sides: the least and greatest side of a digit, as shares of the canvas.
    """
    stock, stock_labels = digit_arrays()[split]
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    images = torch.zeros(n, 1, size, size)
    masks = torch.zeros(n, digits, size, size, dtype=torch.bool)
    labels, boxes = torch.zeros(n, digits, dtype=torch.long), torch.zeros(n, digits, 4)
    for i in range(n):
        for k in range(digits):
            for attempt in range(100):
                u = torch.rand(4, generator=generator)
                side = round(size * (sides[0] + (sides[1] - sides[0]) * u[0].item()))
                x, y = (int(v * (size - side + 1)) for v in u[1:3].tolist())
                if not images[i, 0, y:y + side, x:x + side].any():
                    break
            else:
                die(f"{digits} digits of {sides[0]:.0%} to {sides[1]:.0%} of a side don't fit a scene")
            index = int(u[3] * len(stock))
            digit = F.interpolate(stock[index:index + 1], (side, side), mode="bilinear")[0, 0]
            ink = digit > 0.3
            images[i, 0, y:y + side, x:x + side] += digit
            masks[i, k, y:y + side, x:x + side] = ink
            rows, columns = ink.any(1).nonzero(), ink.any(0).nonzero()
            boxes[i, k] = torch.tensor([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1])
            labels[i, k] = stock_labels[index]
    return images, labels, boxes, masks


def load_regions(task, root, size):
    """task "box": targets (4,) as shares of the image's sides; task "mask": targets (size, size) of 0 and 1.

    root: "digits" for digit scenes, or a folder with train/ and val/ (or eval/): in each images and, for
    boxes, one COCO JSON (the largest box of an image is its target), for masks NAME_mask.png beside NAME.jpg.
    An image is resized to size × size without a crop, so that every box and mask stays whole.
    """
    if root == "digits":
        def part(n, split):
            images, _, boxes, masks = digit_scenes(n, size, split=split)
            targets = boxes[:, 0] / size if task == "box" else masks[:, 0].long()
            return Images(images.expand(-1, 3, -1, -1), targets, [f"{split}/{i}" for i in range(n)])
        return Data(part(2000, "train"), part(500, "test"))
    collect, read = (coco_boxes, read_box) if task == "box" else (mask_files, read_mask)
    parts = [collect(folder) for folder in split_folders(root)]
    read = functools.partial(read, size)
    return Data(*[Images(files, targets, files, read) for files, targets in parts], normalised=True)


def coco_boxes(folder):
    """-> files, boxes (x1, y1, x2, y2 as shares of the sides); images without a box are left out."""
    files = sorted(folder.rglob("*.json"))
    if len(files) != 1:
        die(f"{folder} holds {len(files)} JSON files: wanted one, COCO's, beside the images")
    file = files[0]
    try:
        content = json.loads(file.read_text())
        images = {image["id"]: image for image in content["images"]}
        annotations = [(a["id"], images[a["image_id"]], [float(v) for v in a["bbox"]])
                       for a in content["annotations"]]
        sizes = {i: (float(image["width"]), float(image["height"])) for i, image in images.items()}
        paths = {i: file.parent / image["file_name"] for i, image in images.items()}
    except (ValueError, KeyError, TypeError) as error:
        die(f"{file} is no COCO JSON ({type(error).__name__}: {error}): wanted images (id, file_name, "
            "width, height) and annotations (id, image_id, bbox = [x, y, width, height])")
    largest = {}
    for number, image, box in annotations:
        width, height = sizes[image["id"]]
        x, y, w, h = box if len(box) == 4 else (0, 0, 0, 0)
        inside = 0 <= x < width and 0 <= y < height and x + w <= width + 1 and y + h <= height + 1
        if not (w > 0 and h > 0 and inside):
            die(f"{file}: annotation {number} has bbox {box}: wanted x, y, width, height in pixels of "
                f"the {width:g} × {height:g} of {paths[image['id']].name}")
        if w * h > largest.get(image["id"], (0,))[0]:
            share = torch.tensor([x / width, y / height, (x + w) / width, (y + h) / height]).clamp(max=1)
            largest[image["id"]] = (w * h, str(paths[image["id"]]), share)
    for _, path, _ in largest.values():
        if not Path(path).is_file():
            die(f"{file} names {Path(path).name}, which isn't in {file.parent}")
    if not largest:
        die(f"{file} has no annotation: wanted at least one box")
    return [path for _, path, _ in largest.values()], [share for _, _, share in largest.values()]


def mask_files(folder):
    """-> images, and their masks' files."""
    files = sorted(str(p) for p in folder.rglob("*") if p.suffix.lower() in KINDS and p.is_file())
    images = [path for path in files if not Path(path).stem.endswith("_mask")]
    masks = [str(Path(p).with_name(Path(p).stem + "_mask.png")) for p in images]
    for image, mask in zip(images, masks):
        if not Path(mask).is_file():
            die(f"{image} has no mask: wanted {Path(mask).name} beside it, its foreground not black")
    if not images:
        die(f"{folder} has no images: wanted NAME.jpg (or .png) with NAME_mask.png beside each")
    return images, masks


def read_box(size, path, box):
    return to_tensor(open_rgb(path).resize((size, size))), box


def read_mask(size, path, mask_path):
    image = open_rgb(path)
    with Image.open(mask_path) as mask:
        if image.size != mask.size:
            raise ValueError(f"{mask.size} pixels in the mask, {image.size} in the image")
        mask = mask.convert("L").resize((size, size), Image.Resampling.NEAREST)
        target = torch.from_numpy(np.array(mask) > 0).long()
        return to_tensor(image.resize((size, size))), target
