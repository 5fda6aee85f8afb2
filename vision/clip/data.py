"""The data of clip_grpo.py: images as CLIP wants them, classes as words, measures on held-out images."""
import functools
import os
import re
import unicodedata
from pathlib import Path

import torch

from utils.cli import die, need
from vision import rewards
from vision.bandit import class_reward
from vision.clip import model as clip_model
from vision.data import SPLITS, batches, load_classes, read_class

STARTS = "out/clip"  # the folder of the small CLIP's starts
MEASURES = ["top1", "top5", "top1_other_templates", "top1_rotated"]  # of a split


# ---- the model, the images and their classes ----
def load(args):
    """-> CLIP, its config, Data with words for classes, whether digits, two sets of templates."""
    dataset = args.dataset or ("cifar100" if args.model else "digits")
    digits, is_folder = dataset in SPLITS, dataset not in (*SPLITS, "cifar100")
    if not args.model and dataset != "digits":
        die(f"--dataset {dataset}: without --model there is only a small CLIP of digits. Add "
            f"--model (a file, or one of {', '.join(clip_model.SIZES)})")
    if dataset == "cifar100" and args.data_path:
        os.environ["NANOGRPO_DATA"] = args.data_path
    root = args.data_path or "data/imagenet" if dataset == "imagenet" else dataset
    if args.model:
        model, config = clip_model.load_clip(args.model, args.weights, args.seed)
    else:
        model, config = clip_model.digits_start(STARTS, args.seed, args.start_accuracy)
    size = config["image_resolution"]
    data = load_classes(root, size, False, args.seed)
    if is_folder:
        as_clip_does = functools.partial(read_class, size, False, shorter=size, by="bicubic")
        data.train.read = data.val.read = data.test.read = as_clip_does
    data.classes = class_words(data.classes, root, args.classnames)
    usual, other = clip_model.TEMPLATES, clip_model.OTHER_TEMPLATES
    if digits:
        usual, other = clip_model.DIGIT_TEMPLATES, clip_model.OTHER_DIGIT_TEMPLATES
    return model, config, data, digits, args.templates or usual, args.other_templates or other


def class_words(classes, dataset, names_file=""):
    """Folder names -> words: the user's file's, a digit's, ImageNet's, or their own with spaces for _."""
    if names_file:
        try:
            text = unicodedata.normalize("NFC", Path(names_file).read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError) as error:
            die(f"--classnames {names_file} can't be read ({error}): wanted UTF-8, lines FOLDER WORDS")
        lines = [line.split(maxsplit=1) for line in text.splitlines()]
        words = {line[0]: line[1].split(",")[0] for line in lines if len(line) == 2}
        if lost := [name for name in classes if name not in words]:
            die(f"--classnames {names_file} has no line for {', '.join(lost[:5])}: wanted one a class")
        words = [words[name] for name in classes]
        if twins := sorted({word for word in words if words.count(word) > 1}):
            print(f"warning: several classes are called {', '.join(twins[:5])}: CLIP can't tell them apart")
        return words
    if dataset in SPLITS:
        return list(clip_model.DIGITS)
    wnids = [name for name in classes if re.fullmatch(r"n\d{8}", name)]
    if wnids and len(wnids) == len(classes) == 1000:  # sorted they are in the order of ImageNet's class list
        return list(need("torchvision.models", "clip").ResNet50_Weights.DEFAULT.meta["categories"])
    if wnids:
        die(f"{len(wnids)} of {len(classes)} folders are ImageNet's ({wnids[0]}): words are known for 1,000 "
            "only. Give --classnames FILE, lines FOLDER WORDS, as ImageNet's LOC_synset_mapping.txt")
    return [name.replace("_", " ") for name in classes]


def rotated(images, degrees=25.0):
    """The images turned counter-clockwise about their centre. Outside of them it is black."""
    transforms = need("torchvision.transforms.functional", "clip")
    return transforms.rotate(images, degrees, transforms.InterpolationMode.BILINEAR)


def reward_function(args, words, text):
    """--reward on classes whose similarity is that of their texts, (C, D): see `class_reward`."""
    similarity, C = text @ text.T, len(text)
    distance = (1 - similarity).sum() / (C * (C - 1))  # mean over pairs of classes
    tau = args.tau if args.tau is not None else distance / 10  # a miss at that distance earns e⁻¹⁰
    return class_reward(args.reward, {
        "bandit": lambda action, label, probability: rewards.bandit(action, label),
        "smooth": lambda action, label, probability: rewards.smooth(action, label, similarity, tau)}, words)


@torch.no_grad()
def evaluate(encoder, part, text, other_text, digits, **reading):
    """A split -> {measure: share}, [a class's accuracy], the classes named; digits also turned by 25°."""
    right, labels, named = {name: [] for name in MEASURES}, [], []
    for images, label, _ in batches(part, 128, **reading):
        features, label = encoder(images), label.to(text.device)
        labels.append(label)
        best = (features @ text.T).topk(min(5, len(text)), dim=1).indices
        hits = best == label[:, None]
        named.append(best[:, 0])
        right["top1"].append(hits[:, 0])
        if len(text) > 5:
            right["top5"].append(hits.any(1))
        right["top1_other_templates"].append((features @ other_text.T).argmax(1) == label)
        if digits:
            right["top1_rotated"].append((encoder(rotated(images)) @ text.T).argmax(1) == label)
    top1, labels = torch.cat(right["top1"]).float(), torch.cat(labels)
    scores = {name: torch.cat(parts).float().mean().item() for name, parts in right.items() if parts}
    by_class = [top1[labels == c] for c in range(len(text))]
    return scores, [hits.mean().item() if len(hits) else None for hits in by_class], torch.cat(named)
