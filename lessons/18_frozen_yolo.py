"""A YOLO classifier trains without an error, and its reward stays. What learns?

Met in: ultralytics#14907.
Trap: ultralytics keeps the moving average of its weights, and all of its requires_grad are False.
Failure: backward() refuses such a loss. loss.requires_grad_(True) silences it, and nothing learns.
Cure: vision/cnn.py's Classifier unfreezes what it gets. Then assert that each tensor gets a gradient.
What tells them apart: the share of weights that have moved.
Run: python lessons/18_frozen_yolo.py
"""
import copy

from shared import show

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from vision.bandit import draw
from vision.cnn import Classifier, SmallCNN
from vision.rewards import bandit

IMAGES, CLASSES, G = 64, 4, 8


def batch(generator):
    """Noise with a bright corner, whose number is the label: (IMAGES, 3, 8, 8), (IMAGES,)."""
    images, label = torch.rand(IMAGES, 3, 8, 8, generator=generator), torch.arange(IMAGES) % CLASSES
    corners = images.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3)  # (IMAGES, 3, CLASSES, 4, 4)
    brighter = torch.arange(CLASSES) == label[:, None]
    corners = corners + brighter[:, None, :, None, None]
    return corners.unflatten(2, (2, 2)).permute(0, 1, 2, 4, 3, 5).reshape(images.shape), label


def train(net, force=False):
    before = copy.deepcopy(net.state_dict())
    generator, rewards = torch.Generator().manual_seed(0), []
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.0)
    for step in range(100):
        images, label = batch(generator)
        logp_all = net(images).log_softmax(1)  # (IMAGES, CLASSES)
        action = draw(logp_all.detach(), G, generator)
        reward = bandit(action, label)
        logp = logp_all.gather(1, action)[:, :, None]  # (IMAGES, G, 1)
        loss, _ = grpo_loss(logp, logp.detach(), logp.detach(), group_advantage(reward),
                            torch.ones_like(logp), OBJECTIVES["dr_grpo"])
        optimizer.zero_grad()
        (loss.requires_grad_(True) if force else loss).backward()
        if step == 0 and not force:
            assert all(p.grad is not None and p.grad.any() for p in net.parameters())
        optimizer.step()
        rewards.append(reward.mean().item())
    moved = torch.cat([(p != before[name]).flatten() for name, p in net.state_dict().items()])
    return {"weights that moved": moved.float().mean().item(), "reward": rewards}


def lesson():
    torch.manual_seed(0)
    average = copy.deepcopy(SmallCNN(CLASSES)).requires_grad_(False)  # as a file of ultralytics holds it
    return {"failure: the loss is forced": train(copy.deepcopy(average), force=True),
            "cure: unfrozen, asserted": train(Classifier(average, CLASSES))}


if __name__ == "__main__":
    show(lesson)
