"""CLIP is NaN after one step. LoRA on it runs, and trains less than it says. Why?

Met in: CLIP#40, CLIP#144, peft#761.
Trap: openai-clip gives fp16 weights, and Adam's eps of 1e-8 is 0 in fp16. CLIP's attention reads the weight of
its out_proj and never calls the module, so an adapter on that module is never read.
Failure: Adam on fp16 weights, where a gradient of 0 gives 0/0. LoRA by the names of the modules.
Cure: fp32 weights (bf16 only within autocast). vision/clip/lora.py splits the attention into layers that are
called, and check_gradients() refuses an adapter that gets no gradient.
What tells them apart: the share of weights that are NaN, and of adapters with a gradient.
Needs: pip install '.[clip]'
Run: python lessons/16_clip_nan_and_idle_lora.py
"""
import copy

from shared import show

import torch
import torch.nn.functional as F

from utils.cli import need
from vision.clip import lora
from vision.clip.model import SMALL, build, clip_package, config_of

TARGETS = ["out_proj", "c_fc", "c_proj"]  # of each block: the attention's output and the MLP


def train(model, images):
    """Five of Adam's steps on eight images, a class each; the tower's features are the logits."""
    visual, losses = model.visual, []
    optimizer = torch.optim.Adam(visual.parameters(), lr=1e-4)
    for _ in range(5):
        loss = F.cross_entropy(visual(images.to(visual.conv1.weight.dtype)).float(), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    nan = torch.cat([p.isnan().flatten() for p in visual.parameters()]).float().mean()
    return {"NaN weights": nan.item(), "loss": losses}


def adapters(visual, images):
    visual(images).square().sum().backward()
    b = [p.grad is not None and bool(p.grad.any()) for name, p in visual.named_parameters() if "lora_B" in name]
    return {"adapters": len(b), "with a gradient": sum(b) / len(b)}


def lesson():
    peft, clip = need("peft", "clip"), clip_package()
    torch.manual_seed(0)
    images, (model, _) = torch.rand(8, 3, 32, 32), build(config_of(SMALL, context_length=24))
    half, visual = copy.deepcopy(model), copy.deepcopy(model.visual)
    clip.model.convert_weights(half)  # what clip.load does on a GPU
    by_name = peft.get_peft_model(copy.deepcopy(visual), peft.LoraConfig(target_modules=TARGETS))
    split = lora.add_lora(visual)
    lora.check_gradients(split, images)
    return {"failure: fp16 weights": train(half, images), "cure: fp32 weights": train(model, images),
            "failure: LoRA by name": adapters(by_name, images), "cure: attention split": adapters(split, images)}


if __name__ == "__main__":
    show(lesson)
