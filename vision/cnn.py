"""The networks of cnn_grpo.py: a small CNN, torchvision's classifiers with a linear head, Lite0, yolov8*-cls.

Left out: detection and segmentation models. ultralytics is AGPL-3.0 and is imported only for yolov8.
"""
import importlib
import os
import pickle
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from utils.checkpoint import FORMAT
from utils.cli import die, impatient, need
from vision.lite0 import LITE0, lite0

YOLO = [f"yolov8{size}-cls" for size in "nsmlx"]


class SmallCNN(nn.Module):
    """(B, 3, H, W), H and W at least 8 -> logits (B, n_classes); 15,626 parameters for ten classes."""

    def __init__(self, n_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.conv3 = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32 * 4, n_classes)

    def forward(self, x):
        for conv in (self.conv1, self.conv2, self.conv3):
            x = torch.relu(conv(x))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 2).flatten(1))


class Classifier(nn.Module):
    """A network whose last linear layer gives the logits. It stays in eval mode, so KL at step 0 is 0."""

    def __init__(self, net, n_classes):
        super().__init__()
        linear = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            die(f"{type(net).__name__} has no linear head to train: choose another --model")
        self.net = net.requires_grad_(True)  # ultralytics loads its weights with False
        self.head_name = linear[-1]
        if self.head.out_features != n_classes:
            net.set_submodule(self.head_name, nn.Linear(self.head.in_features, n_classes))
        self.eval()

    @property
    def head(self):
        return self.net.get_submodule(self.head_name)

    def forward(self, images):
        out = self.net(images)
        logits = out[1] if isinstance(out, tuple) else out  # yolov8 in eval mode gives (softmax, logits)
        return logits.float()

    def features(self, images):
        """What the head reads, (B, D)."""
        head_inputs = []
        hook = self.head.register_forward_pre_hook(lambda module, inputs: head_inputs.append(inputs[0]))
        self(images)
        hook.remove()
        return head_inputs[0].float()


def build(name, n_classes, weights):
    """weights: "default" (published ones; none for `small`), "none" (random), or a file."""
    if name == LITE0:
        net = lite0(published=weights == "default")
    elif name not in ("small", *YOLO):
        models = need("torchvision.models", "vision")
        known = models.list_models(module=models)
        if name not in known:
            resnets = ", ".join(n for n in known if n.startswith("resnet"))
            die(f"--model {name!r} is unknown: wanted small, {LITE0}, {YOLO[0]} … {YOLO[-1]}, "
                f"or a classifier of torchvision, {resnets} and others")
        net = models.get_model(name, weights=None)
        if weights == "default":
            net.load_state_dict(download(models.get_model_weights(name).DEFAULT))
    elif name == "small":
        net = SmallCNN(n_classes)
    else:
        net = yolo(name, weights)
    model = Classifier(net, n_classes)
    if weights not in ("default", "none") and (name not in YOLO or is_ours(weights)):
        load_weights(model, name, weights)
    return model


def download(weights):
    """The state dict of torchvision's published weights, from its cache or the network."""
    try:
        with impatient():
            return weights.get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        die(f"--weights default: {weights.url} can't be fetched ({error}): put that file into "
            f"{torch.hub.get_dir()}/checkpoints, or give --weights FILE or --weights none")


def is_ours(path):
    """Whether the file is a checkpoint of cnn_grpo.py's, by its format."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True).get("format") == FORMAT
    except Exception:  # then it is not ours, and whoever reads it next says what is wrong with it
        return False


def load_weights(model, name, path):
    """Fills model from a checkpoint of cnn_grpo.py or a state dict; a head of other classes stays new."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        die(f"--weights {path} can't be read ({getattr(error, 'strerror', None) or type(error).__name__}): "
            "wanted default, none, or a state dict")
    if isinstance(content, dict) and content.get("format") == FORMAT:
        made_for = content.get("config", {}).get("model")
        if content.get("kind") != "classifier" or made_for != name:
            die(f"--weights {path} is of a {content.get('kind')} {made_for or ''}: wanted a --model {name}")
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        die(f"--weights {path} holds a {type(content).__name__}: wanted a state dict, names to tensors")
    state = {key.removeprefix("net."): value for key, value in content.items()}
    weight, bias = f"{model.head_name}.weight", f"{model.head_name}.bias"
    if weight in state and len(state[weight]) != len(model.head.weight):
        print(f"{path}: its head has {len(state[weight])} classes, a new one is trained")
        state |= {weight: model.head.weight, bias: model.head.bias}
    try:
        model.net.load_state_dict(state)
    except RuntimeError as error:
        difference = " ".join(str(error).splitlines()[1].split())[:200]
        die(f"--weights {path} doesn't fit --model {name}: {difference}")


def yolo(name, weights):
    """ultralytics' ClassificationModel. Its import must not reach a network nor change this process."""
    threads, save, read = os.environ.get("OMP_NUM_THREADS"), torch.save, Image.open
    os.environ.update(YOLO_OFFLINE="true", YOLO_VERBOSE="false")
    os.environ.setdefault("YOLO_CONFIG_DIR", str(Path("out/ultralytics").resolve()))
    Path(os.environ["YOLO_CONFIG_DIR"]).mkdir(parents=True, exist_ok=True)
    tasks = need("ultralytics.nn.tasks", "yolo")
    torch.save, Image.open = save, read  # the import replaces both
    os.environ.pop("OMP_NUM_THREADS") if threads is None else os.environ.update(OMP_NUM_THREADS=threads)
    if weights == "default" or weights != "none" and not is_ours(weights):
        return published_yolo(f"{name}.pt" if weights == "default" else weights)
    return tasks.ClassificationModel(f"{name}.yaml", verbose=False)


def published_yolo(path):
    """The network in a file of ultralytics. Such a file pickles classes: torch.nn's and its own may load."""
    if not Path(path).is_file():
        die(f"--weights: no {path} here: fetch it from ultralytics/assets on GitHub, or give --weights none")
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        foreign = [n for n in names if not n.startswith(("torch.nn.modules.", "ultralytics.nn."))]
        if foreign:
            die(f"{path} pickles {foreign[0]}, which is no layer: no file of ultralytics, so not loaded")
        parts = [n.rpartition(".") for n in names]
        with torch.serialization.safe_globals([getattr(importlib.import_module(m), c) for m, _, c in parts]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        return (content.get("ema") or content["model"]).float()
    except Exception as error:
        die(f"{path} can't be read as weights of ultralytics ({type(error).__name__}: {error})")
