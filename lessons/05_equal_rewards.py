"""The answers of every group earn the same. Nothing is learnt, or the policy jumps.

Met in: trl#3857 (nothing), NeMo-RL#4161 (a jump).
Trap: such a group says nothing about its answers, so its advantage must be 0. In float32 the mean of equal
numbers can differ from them by a rounding error. The division by a tiny std enlarges it, and then Adam does.
Failure: the textbook's formula. Every reward is 0.35, and the policy moves farther than with real rewards.
Cure: subtract one of the rewards before the mean, as group_advantage does. Equal rewards give exactly 0.
What tells them apart: the KL to the start after 30 updates. frac_zero_std is 1 where nothing can be learnt:
rewards that differ end there as well, once all answers are right.
Run: python lessons/05_equal_rewards.py
"""
import copy

from shared import log_prob, note, rollout, show, start, update  # first: it finds all below
import torch
from grpo import OBJECTIVES, group_advantage, grpo_loss

STEPS = 30


def textbook(reward):
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)


def train(advantage, equal=True):
    policy, optimizer, generator = start(seed=0, lr=1e-2)
    reference = copy.deepcopy(policy).requires_grad_(False)
    curves = {}
    for _ in range(STEPS):
        tokens, reward, logp_old, mask = rollout(policy, generator)
        reward = torch.full_like(reward, 0.35) if equal else reward
        adv = advantage(reward)
        loss, stats = grpo_loss(log_prob(policy, tokens), logp_old, log_prob(reference, tokens), adv,
                                mask, OBJECTIVES["dr_grpo"])
        update(optimizer, loss)
        equal_groups = (reward == reward[:, :1]).all(1).float().mean()
        note(curves, max_adv=adv.abs().max(), kl=stats["kl"], frac_zero_std=equal_groups)
    return curves


def lesson():
    return {"failure: the textbook's": train(textbook), "cure: group_advantage": train(group_advantage),
            "compare: rewards that differ": train(group_advantage, equal=False)}


if __name__ == "__main__":
    show(lesson)
