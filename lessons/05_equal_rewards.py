"""The answers of every group earn the same. Nothing is learnt, or the policy jumps.

Met in: trl#3857 (nothing), NeMo-RL#4161 (a jump).
Trap: such a group says nothing about its answers, so its advantage must be 0. But in float32 the mean of equal
numbers can miss them by a rounding error. A tiny std makes it larger, and Adam makes of any gradient a step.
Failure: the textbook's formula. Every reward is 0.35, and the policy moves as far as with real rewards.
Cure: subtract one of the rewards before the mean, as group_advantage does. Equal rewards give exactly 0.
What tells them apart: the KL to the start after 30 updates. frac_zero_std is 1 where nothing can be learnt.
Run: python lessons/05_equal_rewards.py
"""
import copy

from shared import adam, log_prob, rollout, show, tiny_policy, update  # first: it finds what follows
import torch
from grpo import OBJECTIVES, group_advantage, grpo_loss

STEPS = 30


def textbook(reward):
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)


def train(advantage, equal=True):
    policy = tiny_policy(seed=0)
    start = copy.deepcopy(policy)
    optimizer = adam(policy, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    curves = {"|advantage|": [], "KL to the start": [], "frac_zero_std": []}
    for _ in range(STEPS):
        tokens, reward, logp_old, mask = rollout(policy, generator)
        reward = torch.full_like(reward, 0.35) if equal else reward
        adv = advantage(reward)
        loss, stats = grpo_loss(log_prob(policy, tokens), logp_old, log_prob(start, tokens).detach(), adv,
                                mask, OBJECTIVES["dr_grpo"])
        update(optimizer, loss)
        curves["|advantage|"].append(adv.abs().max().item())
        curves["KL to the start"].append(stats["kl"].item())
        curves["frac_zero_std"].append((reward == reward[:, :1]).all(1).float().mean().item())
    return curves


def lesson():
    return {"failure: the textbook's": train(textbook), "cure: group_advantage": train(group_advantage),
            "compare: rewards that differ": train(group_advantage, equal=False)}


if __name__ == "__main__":
    show(lesson)
