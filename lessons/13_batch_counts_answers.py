"""A batch of 8 runs out of memory. In another library it learns from one prompt. What does "batch" count?

Met in: trl#2858, trl#3020.
Trap: a step has B prompts and G answers to each. Some libraries call B the batch, others B·G.
Failure: 8 is meant as answers and taken as prompts. One pass holds all 64 answers.
Cure: the flags say it, --prompts_per_step 8 --group_size 8. With --micro_batch 1 a pass holds one prompt's
answers, and the gradient is the same, since the denominators are those of the whole step.
What tells them apart: the answers in a pass, and the megabytes that autograd keeps for the backward pass.
Run: python lessons/13_batch_counts_answers.py
"""
from types import SimpleNamespace

from shared import G, P, T, rollout, show, tiny_policy  # first: it finds all below
import torch
from answers import Answers, minibatches
from generate import score
from grpo import OBJECTIVES, group_advantage, grpo_loss


def step(prompts, micro_batch):
    """-> the counts of a step with so many prompts, and its gradient."""
    policy, generator, kept = tiny_policy(seed=0), torch.Generator().manual_seed(0), []
    tokens, *others = rollout(policy, generator)
    tokens, (reward, logp_old, mask) = tokens.unflatten(0, (-1, G))[:prompts], (x[:prompts] for x in others)
    adv = group_advantage(reward)
    answers = Answers(tokens, logp_old, mask, None, None, [], slice(0, prompts), prompts)
    flags = SimpleNamespace(minibatches=1, micro_batch=micro_batch)
    batch, = minibatches(answers, mask, flags, generator)
    for rows in batch.parts:
        tensors = {}  # {address: bytes} of the tensors that autograd keeps

        def keep(x):
            tensors[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            logp = score(policy, tokens[rows].flatten(0, 1), P)[0].unflatten(0, (-1, G))
            loss, _ = grpo_loss(logp, logp_old[rows], logp_old[rows], adv[rows], mask[rows],
                                OBJECTIVES["grpo"], T, batch.n_tokens, batch.n_answers)
        loss.backward()
        kept.append(sum(tensors.values()) / 1e6)
    counts = {"prompts": prompts, "answers": prompts * G, "answers a pass": len(batch.parts[0]) * G,
              "MB a pass": max(kept)}
    return counts, torch.cat([p.grad.flatten() for p in policy.parameters()])


def lesson():
    steps = {"failure: 8 prompts at once": step(8, 0), "cure: 8 prompts, one by one": step(8, 1),
             "compare: 8 answers, one prompt": step(1, 0)}
    (_, whole), *_ = steps.values()
    return {name: counts | {"gradient's distance": ((gradient - whole).norm() / whole.norm()).item()}
            for name, (counts, gradient) in steps.items()}


if __name__ == "__main__":
    show(lesson)
