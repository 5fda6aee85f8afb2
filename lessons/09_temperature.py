"""Sampled at temperature 0.6, and the very first ratios are far from 1.

Met in: trl#4159.
Trap: the sampler draws from softmax(logits / 0.6), and the trainer scores softmax(logits). These are two
policies. So the first update is off-policy, and the clip removes gradients for no reason.
Failure: logp_old as the sampler noted it, logp scored at temperature 1.
Cure: the trainer divides the logits by the sampler's temperature, in every pass.
What tells them apart: ratio_max and clip_frac at the first update, before any weight has moved.
Run: python lessons/09_temperature.py
"""
from shared import log_prob, rollout, show, tiny_policy

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss

TEMPERATURE, UPDATES = 0.6, 20


def train(scored_at):
    policy = tiny_policy(seed=0)
    policy.ln_f.weight.data.mul_(4)  # A policy that prefers some tokens, as a trained one does.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    curves = {"ratio_max": [], "clip_frac": [], "reward": []}
    for _ in range(UPDATES):
        tokens, reward, logp_old, mask = rollout(policy, generator, TEMPERATURE)
        logp = log_prob(policy, tokens, scored_at)
        loss, stats = grpo_loss(logp, logp_old, logp_old, group_advantage(reward), mask, OBJECTIVES["grpo"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, x in (stats | {"reward": reward.mean()}).items():
            if name in curves:
                curves[name].append(x.item())
    return curves


def lesson():
    return {"failure: scored at 1": train(1.0), "cure: scored at 0.6": train(TEMPERATURE)}


if __name__ == "__main__":
    show(lesson)
