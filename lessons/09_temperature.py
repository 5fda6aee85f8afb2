"""Sampled at temperature 0.6, and the very first ratios are far from 1.

Met in: trl#4159.
Trap: the sampler draws from softmax(logits / 0.6), and the trainer scores softmax(logits). These are two
policies. So the first update treats the answers as another policy's, and the clip acts for no reason.
Failure: logp_old is the sampler's, at 0.6. logp is scored at temperature 1.
Cure: the trainer divides the logits by the sampler's temperature, in every pass.
What tells them apart: ratio_max at the first update, before any weight has moved. It must be 1.
Run: python lessons/09_temperature.py
"""
from shared import log_prob, rollout, show, tiny_policy  # first: it finds all below
import torch
from grpo import OBJECTIVES, group_advantage, grpo_loss

SEEDS = 8


def first_update(sampled_at, scored_at):
    """Means over untrained policies. Logits times 4 prefer some tokens, as those of a trained one do."""
    rows = []
    for seed in range(SEEDS):
        policy = tiny_policy(seed)
        policy.ln_f.weight.data.mul_(4)
        tokens, reward, logp_old, mask = rollout(policy, torch.Generator().manual_seed(seed), sampled_at)
        logp = log_prob(policy, tokens, scored_at)
        _, stats = grpo_loss(logp, logp_old, logp_old, group_advantage(reward), mask, OBJECTIVES["grpo"])
        ratio = torch.exp(logp - logp_old)
        rows.append([stats["ratio_max"], ((ratio - 1).abs() > 0.2).float().mean(), stats["clip_frac"]])
    names = "ratio_max", "ratios beyond 0.8 to 1.2", "clip_frac"
    return dict(zip(names, torch.tensor(rows).mean(0).tolist()))


def lesson():
    return {"failure: sampled at 0.6, scored at 1": first_update(0.6, 1.0),
            "cure: sampled and scored at 0.6": first_update(0.6, 0.6),
            "compare: sampled and scored at 1": first_update(1.0, 1.0)}


if __name__ == "__main__":
    show(lesson)
