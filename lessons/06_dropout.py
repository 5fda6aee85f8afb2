"""The KL to π₀ is large at step 0, before any update.

Met in: trl#3500.
Trap: dropout is on while the policy is scored. A network in train mode draws another mask in every pass, so
it differs from the policy that sampled, and from π₀, which has the same weights.
Failure: policy.train(), as every training loop does by habit.
Cure: policy.eval() in RL, also for the update. Gradients flow all the same.
What tells them apart: the KL at step 0, and the first ratio, which must be 1.
Run: python lessons/06_dropout.py
"""
import copy

from shared import log_prob, rollout, show, tiny_policy  # first: it finds all below
import torch
from grpo import OBJECTIVES, group_advantage, grpo_loss


def first_step(training):
    policy = tiny_policy(seed=0, dropout=0.1)
    reference = copy.deepcopy(policy)
    tokens, reward, logp_old, mask = rollout(policy, torch.Generator().manual_seed(0))
    policy.train(training)
    logp_ref = log_prob(reference, tokens).detach()
    loss, stats = grpo_loss(log_prob(policy, tokens), logp_old, logp_ref, group_advantage(reward), mask,
                            OBJECTIVES["grpo"])
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    return {"KL at step 0": stats["kl"].item(), "ratio_max": stats["ratio_max"].item(),
            "clip_frac": stats["clip_frac"].item(), "grad_norm": grad_norm.item()}


def lesson():
    return {"failure: policy.train()": first_step(True), "cure: policy.eval()": first_step(False)}


if __name__ == "__main__":
    show(lesson)
