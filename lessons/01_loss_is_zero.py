"""The loss is 0 at the start, and later it rises. Is anything learnt?

Met in: trl#2703, trl#3452, open-r1#239.
Trap: with one update a rollout every ratio is 1, and a group's advantages add up to 0. So the loss is β·KL,
whether the policy learns or not. It even rises as the policy learns and leaves π₀.
Failure: logp_old keeps its gradient, so that the ratio's gradient cancels. The loss looks the same.
Cure: logp_old is detached. Watch reward and grad_norm, not the loss.
What tells them apart: grad_norm at the first step.
Run: python lessons/01_loss_is_zero.py
"""
import copy

from shared import log_prob, note, rollout, show, start, update  # first: it finds all below
import torch
from grpo import plain_grpo

STEPS = 40


def train(detach):
    policy, optimizer, generator = start(seed=0, lr=1e-2)
    reference = copy.deepcopy(policy).requires_grad_(False)
    curves = {}
    for _ in range(STEPS):
        tokens, reward, _, mask = rollout(policy, generator)
        logp = log_prob(policy, tokens)  # (B, G, T)
        logp_old = logp.detach() if detach else logp
        loss = plain_grpo(reward, logp, logp_old, log_prob(reference, tokens), mask)
        note(curves, loss=loss, reward=reward.mean(), grad_norm=update(optimizer, loss))
    return curves


def lesson():
    return {"failure: logp_old has a gradient": train(detach=False),
            "cure: logp_old is detached": train(detach=True)}


if __name__ == "__main__":
    show(lesson)
