"""Instructions with boxes from JSON or digit scenes, and the reward of an answer's text.

An example is {image, prompt, solution, size, scales} and the other keys of its line, which a reward may use.
An answer's coordinates are those of the image after the processor's resize. `scales` turns them into pixels
of the original image, as the solution's are. Left out: several boxes an example, rotated ones.
"""
import functools
import itertools
import json
import os
import re
from pathlib import Path

import torch

from utils import guard
from utils.cli import die
from utils.run import step_generator
from vision import rewards
from vision.data import open_rgb, to_tensor
from vision.regions import digit_scenes, warn_of_units
from vision.show import grid

ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # from full-width forms
ASCII |= dict.fromkeys(map(ord, "‐‑‒–—―−"), "-") | {ord("、"): ","}
NUMBER = r"-?\d++(?:\.\d++)?+"  # ++ gives nothing back, so that a long text takes linear time
COMMA = r"\s*+(?:[)\]]\s*+)?,\s*+(?:[(\[]\s*+)?"
CHAIN = re.compile(rf"(?<![\w.,\-])({NUMBER}(?:{COMMA}{NUMBER})++)(?![\w.]*\w)")
NAMED = re.compile(r"""["']?\b[xy][12]?["']?\s*[:=]\s*""")  # the names in: "x": 12, "y": 34


def parse_answer(text):
    """The first point (x, y) or box (x1, y1, x2, y2) in a text, as floats, or None.

    It is the first run of numbers with commas between them, in <answer>…</answer> if there is one, and never
    in <think>…</think>. Brackets, keys and words may stand beside it. A run of two is a point, one of four a
    box. Another length or a negative number (any dash) is no answer. Full-width characters count as ASCII.
    What follows the first run is not read, so a text that could mean two things earns nothing.
    """
    text = re.sub(r"(?s)^.*</think>|<think>.*", "", text.translate(ASCII))
    tagged = re.search(r"(?s)<answer>(.*?)(</answer>|$)", text)
    chain = CHAIN.search(NAMED.sub("", tagged[1] if tagged else text))
    values = [float(v) for v in re.findall(NUMBER, chain[1])] if chain else []
    return tuple(values) if len(values) in (2, 4) and min(values) >= 0 else None


class Scorer:
    """A reward function of TRL's signature: the weighted sum of an answer's rewards.

    weights {accuracy_reward_coord, iou, distance, format}. `index` tells each answer's example. custom is a
    user's function instead. After a call .unparsed is the share of answers with nothing inside the image.
    """
    __name__ = "reward"  # TRL names its column after it

    def __init__(self, examples, weights, custom=None):
        self.examples, self.weights, self.custom, self.unparsed = examples, weights, custom, None

    def __call__(self, completions, index, **_):
        texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
        examples = [self.examples[i] for i in index]
        parts = self.parts(texts, examples)
        self.unparsed = 1 - parts["format"].mean().item()
        if self.custom:
            names = set.intersection(*map(set, examples)) - {"prompt"}
            return self.custom(completions=texts, prompts=[e["prompt"] for e in examples],
                               **{name: [e[name] for e in examples] for name in names})
        return sum(weight * parts[name] for name, weight in self.weights.items()).tolist()

    @staticmethod
    def parts(texts, examples):
        """Every reward of every answer, (N,) each: 0 where the text has no point or box inside the image."""
        box = torch.full((len(texts), 1, 4), -1.0)
        point = torch.full((len(texts), 1, 2), -1.0)
        for i, (text, example) in enumerate(zip(texts, examples)):
            answer = original(parse_answer(text), example)
            if answer is not None:
                point[i, 0] = torch.tensor(answer[:2])
                box[i, 0] = torch.tensor(answer if len(answer) == 4 else (0.0,) * 4)  # a point has no IoU
        true = torch.tensor([e["solution"] for e in examples], dtype=torch.float32)
        inside = (point[:, 0] >= 0).all(1).float()
        return {"accuracy_reward_coord": rewards.point_in_box(point, true)[:, 0] * inside,
                "iou": rewards.iou(box, true)[:, 0] * inside,
                "distance": rewards.distance(point, true)[:, 0] * inside, "format": inside}


def original(answer, example):
    """An answer's numbers in pixels of the original image; None where they lie outside of it."""
    if answer is None:
        return None
    pixels = [v * example["scales"][i % 2] for i, v in enumerate(answer)]
    return pixels if all(v <= example["size"][i % 2] for i, v in enumerate(pixels)) else None


def seen_size(processor, width, height):
    """An image's (width, height) after the processor's resize, Qwen2-VL's smart_resize."""
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    image = processor.image_processor
    if not (hasattr(image, "merge_size") and hasattr(image, "patch_size")):
        die("this model's processor doesn't resize as Qwen2-VL's does: give each example `scales`, [sx, sy], "
            "pixels of the original for one unit of what the model says ([1, 1] if it says pixels)")
    try:
        h, w = smart_resize(height, width, image.patch_size * image.merge_size, image.size["shortest_edge"],
                            image.size["longest_edge"])
    except ValueError as error:
        die(f"an image of {width} × {height} pixels: {error}")
    return w, h


# ---- where examples come from ----
@functools.cache
def scenes(n, seed, split, side=112):
    """n digit scenes with the prompt "where is the 7?". The box's side is 24 to 44 of 112 pixels."""
    from PIL import Image
    images, labels, boxes, _ = digit_scenes(n, side, seed=seed, split=split, sides=(24 / 112, 44 / 112))
    return [{"image": Image.fromarray((image[0] * 255).byte().numpy()).convert("RGB"),
             "prompt": f"where is the {label.item()}?", "solution": box.tolist(), "size": (side, side),
             "scales": (1.0, 1.0)} for image, label, box in zip(images, labels, boxes)]


def load_data(args, processor):
    """-> training, validation and test examples, of files or digit scenes. An image is in one part."""
    if args.test_data and not args.eval_data:
        die(f"--test_data {args.test_data} goes with --eval_data, the examples of validation")
    n = args.eval_examples
    if not args.data:
        return [scenes(k, args.seed, split) for k, split in ((3000, "train"), (n, "val"), (n, "test"))]
    paths = [path for path in (args.data, args.eval_data, args.test_data) if path]
    parts = [load_examples(path, args.images_root, processor) for path in paths]
    if len(paths) < 3:  # the last file gives the parts that have no file
        parts[-1:] = by_image(parts[-1], 4 - len(paths), args.seed, paths[-1])
    for one, other in itertools.combinations([{row["image"] for row in part} for part in parts], 2):
        if one & other:
            die(f"{min(one & other)} is in two of {', '.join(paths)}: wanted each image in one of them")
    return parts[0], parts[1][:n], parts[2][:n]


def by_image(examples, n_parts, seed, path):
    """examples in two halves or three parts of 8, 1 and 1 tenths. The seed draws their images."""
    images = list(dict.fromkeys(row["image"] for row in examples))
    share = len(images) // 2 if n_parts == 2 else max(1, len(images) // 10)
    sizes = [len(images) - share * (n_parts - 1), *[share] * (n_parts - 1)]
    if min(sizes) < 1:
        die(f"{path} has examples of {len(images)} images: wanted {n_parts} at least, since it is split. "
            "Add images, or give --eval_data and --test_data")
    print(f"{path}: its {len(images)} images are split, {' + '.join(map(str, sizes))}, the last for the test")
    order = torch.randperm(len(images), generator=step_generator(seed, 0, "split"))
    drawn = [{images[i] for i in part} for part in order.split(sizes)]
    return [[row for row in examples if row["image"] in part] for part in drawn]


def load_examples(path, root, processor):
    """JSON (a list) or JSONL of {image, prompt, solution, …}; all are checked before anything trains."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        die(f"{path} can't be read ({error}): wanted a JSON or JSONL file")
    guard.note(f"file {path}", text)
    is_list = text.lstrip().startswith("[")
    rows = []
    for number, line in enumerate([text] if is_list else text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:  # a number of 5,000 digits is a plain ValueError
                line, column = getattr(error, "lineno", 1), getattr(error, "colno", 1)
                place = f"line {number + line - 1}, column {column}"
                die(f"{path}: wrong JSON at {place}: {getattr(error, 'msg', error)}")
            rows += row if is_list else [row]
    if not rows:
        die(f"{path} has no examples: wanted at least one {{image, prompt, solution}}")
    examples = [check(row, f"{path}: example {i}", root, processor) for i, row in enumerate(rows)]
    boxes = [(row["solution"], example["size"]) for row, example in zip(rows, examples)]
    warn_of_units(path, boxes, "x, y, width, height",
                  lambda x, y, w, h, width, height: x + w <= width and y + h <= height)
    return examples


def numbers(row, name, lengths):
    value = row.get(name)
    good = isinstance(value, list) and len(value) in lengths and all(type(v) in (int, float) for v in value)
    return value if good and all(abs(v) < 1e9 for v in value) else None


def check(row, where, root, processor):
    """A line of the file as an example, or a message that says what is wrong with it."""
    words = [row.get(name) for name in ("image", "prompt")] if isinstance(row, dict) else [None]
    if not all(isinstance(word, str) and word and word.encode(errors="ignore").decode() == word
               for word in words):
        die(f"{where}: wanted {{image: FILE, prompt: a text, solution: [x1, y1, x2, y2] or [x, y]}}")
    for key in {"prompts", "completions"} & row.keys():
        die(f"{where}: the key {key!r} is an argument of every reward function: rename it")
    path = Path(root, row["image"])
    if not os.path.isfile(path):
        die(f"{where}: no image {path}: mend the name, or give --images_root")
    width, height = picture({"image": str(path)}, f"{where}: ").size
    box = numbers(row, "solution", (2, 4))
    if box is None:
        die(f"{where}: solution {row.get('solution')}: wanted [x1, y1, x2, y2] or [x, y] in pixels")
    if len(box) == 2 and 0 <= box[0] <= width and 0 <= box[1] <= height:  # a point stands for a box around it
        box = [box[0] - width / 20, box[1] - height / 20, box[0] + width / 20, box[1] + height / 20]
    elif len(box) == 2 or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
        die(f"{where}: solution {box} lies outside of the image or is inverted: wanted 0 <= x1 < x2 <= "
            f"{width}, 0 <= y1 < y2 <= {height}, pixels of {path.name}")
    scales = numbers(row, "scales", (2,))
    if "scales" in row and (scales is None or min(scales) <= 0):
        die(f"{where}: scales {row['scales']}: wanted [sx, sy], both above 0")
    if scales is None:
        seen = seen_size(processor, width, height)
        scales = (width / seen[0], height / seen[1])
    return row | {"image": str(path), "solution": box, "size": (width, height), "scales": scales}


def picture(example, where=""):
    """The example's image as RGB."""
    if not isinstance(example["image"], str):
        return example["image"]
    try:
        return open_rgb(example["image"])
    except Exception as error:  # on damaged bytes PIL raises nearly anything
        die(f"{where}{example['image']} can't be read as an image ({error})".split("\n")[0])


def draw(path, examples, rows):
    """A PNG of images, resized to squares, with true boxes and those of rows {"before": texts, …}."""
    images = torch.stack([to_tensor(picture(e).resize((224, 224)), normalise=False) for e in examples])
    sizes = torch.tensor([e["size"] * 2 for e in examples], dtype=torch.float32)
    truth = torch.tensor([e["solution"] for e in examples]) / sizes
    shown = {}
    for name, texts in rows.items():
        answers = [original(parse_answer(text), e) or (-9.0,) * 4 for text, e in zip(texts, examples)]
        boxes = torch.tensor([a if len(a) == 4 else a * 2 for a in answers]) / sizes
        margins = [[-0.02, -0.02, 0.02, 0.02] if len(a) == 2 else [0.0] * 4 for a in answers]
        shown[name] = boxes + torch.tensor(margins)  # a point is drawn as a little square
    grid(path, images, truth, shown or {"data": torch.full_like(truth, -9.0)})
