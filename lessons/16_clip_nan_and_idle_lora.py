"""CLIP is NaN after one step. LoRA on it runs, and trains less than it says. Why?

Met in: CLIP#40, CLIP#144, peft#761.
Trap: openai-clip has fp16 weights on a GPU, where Adam's eps of 1e-8 is 0. CLIP's attention reads out_proj's
weight and never calls that module, so an adapter on it is idle.
Failure: Adam on fp16 weights: a gradient of 0 gives 0/0. LoRA by the names of the modules.
Cure: fp32 weights, bf16 only within autocast. vision/clip/lora.py splits the attention into layers that are
called, and its check_gradients() refuses an idle adapter. It needs pip install '.[clip]'
What tells them apart: the share of weights that are NaN, and the share of adapters with a gradient.
Run: python lessons/16_clip_nan_and_idle_lora.py
"""
import copy

from shared import show  # first: it finds all below
import torch
import torch.nn.functional as F
from utils.cli import need
from vision.clip import lora
from vision.clip.model import SMALL, build, clip_package, config_of


def train(visual, images):
    """Five of Adam's steps on eight images, a class each; the tower's features are the logits."""
    optimizer, losses = torch.optim.Adam(visual.parameters(), lr=1e-4), []
    for _ in range(5):
        loss = F.cross_entropy(visual(images.to(visual.conv1.weight.dtype)).float(), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    nan = torch.cat([p.isnan().flatten() for p in visual.parameters()]).float().mean()
    return {"NaN weights": nan.item(), "loss": losses}


def adapters(visual, images):
    visual(images).square().sum().backward()  # the gradient of A is 0 at the start, since B is
    busy = [p.grad is not None and bool(p.grad.any()) for n, p in visual.named_parameters() if "lora_B" in n]
    return {"adapters": len(busy), "with a gradient": sum(busy) / len(busy)}


def lesson():
    peft, clip = need("peft", "clip"), clip_package()
    torch.manual_seed(0)
    images, (model, _) = torch.rand(8, 3, 32, 32), build(config_of(SMALL, context_length=24))
    whole, by_name, split = (copy.deepcopy(model.visual) for _ in range(3))
    clip.model.convert_weights(model)  # what clip.load does on a GPU
    by_name = peft.get_peft_model(by_name, peft.LoraConfig(target_modules=["out_proj", "c_fc", "c_proj"]))
    split = lora.add_lora(split)
    lora.check_gradients(split, images)
    return {"failure: fp16 weights": train(model.visual, images), "cure: fp32 weights": train(whole, images),
            "failure: LoRA by name": adapters(by_name, images),
            "cure: attention split": adapters(split, images)}


if __name__ == "__main__":
    show(lesson)
