"""A YOLO classifier trains without an error, and its reward stays. What learns?

Met in: ultralytics#14907.
Trap: ultralytics saves the moving average of its weights. That copy is frozen: requires_grad is False.
Failure: backward() refuses such a loss. loss.requires_grad_(True) silences it, and nothing learns.
Cure: vision/cnn.py's Classifier unfreezes what it gets. Then assert that each tensor gets a gradient.
What tells them apart: the share of weights that have moved.
Run: python lessons/18_frozen_yolo.py
"""
import copy

from shared import adam, show, update  # first: it finds all below
import torch
from grpo import OBJECTIVES, group_advantage, grpo_loss
from vision.bandit import draw
from vision.cnn import Classifier, SmallCNN
from vision.rewards import bandit

LABEL = torch.arange(64) % 4  # of the 64 images of a batch: which corner is brighter


def batch(generator):
    """Noise with a brighter corner: (64, 3, 8, 8)."""
    corner = torch.nn.functional.interpolate(torch.eye(4)[LABEL].view(64, 1, 2, 2), scale_factor=4)
    return torch.rand(64, 3, 8, 8, generator=generator) + corner


def train(net, force=False):
    """GRPO as in vision/cnn_grpo.py. force: the loss is told to have a gradient."""
    before = torch.cat([p.detach().flatten() for p in net.parameters()])
    optimizer, generator, rewards = adam(net, lr=3e-3), torch.Generator().manual_seed(0), []
    for step in range(100):
        logp_all = net(batch(generator)).log_softmax(1)  # (64, 4)
        action = draw(logp_all.detach(), 8, generator)
        reward = bandit(action, LABEL)
        logp = logp_all.gather(1, action)[:, :, None]  # (64, 8, 1)
        loss, _ = grpo_loss(logp, logp.detach(), logp.detach(), group_advantage(reward),
                            torch.ones_like(logp), OBJECTIVES["dr_grpo"])
        update(optimizer, loss.requires_grad_(True) if force else loss)
        if step == 0 and not force:
            assert all(p.grad is not None and p.grad.any() for p in net.parameters())
        rewards.append(reward.mean().item())
    moved = torch.cat([p.detach().flatten() for p in net.parameters()]) != before
    return {"weights that moved": moved.float().mean().item(), "reward": rewards}


def lesson():
    torch.manual_seed(0)
    average = copy.deepcopy(SmallCNN(4)).requires_grad_(False)  # as a file of ultralytics holds it
    return {"failure: the loss is forced": train(copy.deepcopy(average), force=True),
            "cure: unfrozen, asserted": train(Classifier(average, 4))}


if __name__ == "__main__":
    show(lesson)
