"""The KL is inf, or billions. One step later every weight is NaN. What happened?

Met in: torchforge#664.
Trap: k3 = exp(d) - d - 1, d = logp_ref - logp. A token that π has made very unlikely gives a large d.
Failure: d is float16, whose exp is inf from 11.1 on. The next step makes every weight NaN.
Cure: d is float32, whose exp is inf from 88.8 on. The step has a large KL and a finite gradient.
Also: utils/checkpoint.py ends a run at a loss or gradient that isn't finite, before the weights.
What tells them apart: the share of weights that are NaN at the end.
Run: python lessons/12_infinite_kl.py
"""
import contextlib
import copy

from shared import log_prob, rollout, show, start  # first: it finds all below
import torch
from grpo import kl_penalty, plain_grpo
from utils.checkpoint import finite

LR = 0.3  # a hundred times too large: π jumps away from π₀


def train(dtype, rule=False):
    """30 rollouts of 4 updates each, with log-probabilities in dtype. rule: the non-finite rule holds."""
    policy, optimizer, generator = start(seed=0, lr=LR)
    reference = copy.deepcopy(policy).requires_grad_(False)
    kl_max, rewards = 0.0, []
    with contextlib.suppress(SystemExit):  # the rule's, with a line on stderr
        for update in range(120):
            if update % 4 == 0:
                tokens, reward, logp_old, mask = rollout(policy, generator)
                rewards.append(reward.mean().item())
            logp, logp_ref = (log_prob(model, tokens).to(dtype) for model in (policy, reference))
            kl_max = max(kl_max, kl_penalty(logp, logp_ref).max().item())
            loss = plain_grpo(reward, logp, logp_old.to(dtype), logp_ref, mask)
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            if rule:
                finite(update, "out/grpo", loss=loss, grad_norm=grad_norm)
            optimizer.step()
    nan = torch.cat([p.isnan().flatten() for p in policy.parameters()]).float().mean()
    return {"greatest KL of a token": kl_max, "NaN weights": nan.item(), "reward": rewards}


def lesson():
    return {"failure: float16": train(torch.float16), "cure: float32": train(torch.float32),
            "compare: float16 and the rule": train(torch.float16, rule=True)}


if __name__ == "__main__":
    show(lesson)
