"""clip_frac is 0 in every step. Is the clip broken?

Met in: trl#3757, trl#3120.
Trap: the ratio compares the policy now with the one that sampled. With one update a rollout they are one
policy, so every ratio is 1. Any ε gives the same weights.
Failure: one update a rollout. An ε that is 200 times smaller changes nothing.
Cure: several updates a rollout, if the clip is wanted. With one it is not broken: it has nothing to do.
What tells them apart: clip_frac, the share of tokens that the clip leaves without gradient.
Run: python lessons/02_clip_never_acts.py
"""
from dataclasses import replace

from shared import log_prob, note, rollout, show, start, update  # first: it finds all below
from grpo import OBJECTIVES, group_advantage, grpo_loss

ROLLOUTS = 15


def train(updates, eps):
    policy, optimizer, generator = start(seed=0, lr=3e-3)
    objective = replace(OBJECTIVES["grpo"], eps_low=eps, eps_high=eps, beta=0.0)
    curves = {}
    for _ in range(ROLLOUTS):
        tokens, reward, logp_old, mask = rollout(policy, generator)
        for _ in range(updates):
            loss, stats = grpo_loss(log_prob(policy, tokens), logp_old, logp_old, group_advantage(reward),
                                    mask, objective)
            update(optimizer, loss)
        # clip_frac and ratio_max are those of the rollout's last update.
        note(curves, clip_frac=stats["clip_frac"], ratio_max=stats["ratio_max"], reward=reward.mean())
    return curves


def lesson():
    return {"failure: 1 update, ε 0.2": train(1, 0.2), "compare: 1 update, ε 0.001": train(1, 0.001),
            "cure: 4 updates, ε 0.2": train(4, 0.2)}


if __name__ == "__main__":
    show(lesson)
