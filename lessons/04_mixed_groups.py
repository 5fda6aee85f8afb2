"""The reward stays flat, though every function passes its test. The groups hold answers to other prompts.

Met in: R1-V#67, slime#1414.
Trap: the prompts are repeated in one order, and the flat rewards are cut into groups in another. All shapes
fit. An easy prompt's answers then look good, whatever they say, and a hard prompt's look bad.
Failure: prompts.repeat(G, 1) gives the order p1 p2 … p1 p2 …, and then view(-1, G).
Cure: generate(…, group_size=G) keeps a group's answers side by side; from there on it has an axis of its own.
What tells them apart: how much of the advantage is the prompt's own worth (correlation; right is exactly 0).
Run: python lessons/04_mixed_groups.py
"""
from shared import B, G, P, T, VOCAB, log_prob, show, tiny_policy

import torch

from generate import generate
from grpo import OBJECTIVES, group_advantage, grpo_loss

STEPS = 40


def train(mixed):
    """The reward of lesson 1, plus what the prompt is worth: its first token, 0 to 11, whatever is answered."""
    policy = tiny_policy(seed=0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    curves = {"correlation": [], "reward of the answer": []}
    for _ in range(STEPS):
        prompts = torch.randint(VOCAB, (B, P), generator=generator)
        asked, group_size = (prompts.repeat(G, 1), 1) if mixed else (prompts, G)
        tokens, logp_old, mask = generate(policy, asked, T, group_size, generator=generator)
        worth = tokens[:, 0].float()  # (B·G,)
        own = (tokens[:, P:] % 2 == tokens[:, :1] % 2).float().mean(1)
        adv = group_advantage((own + worth).view(-1, G))  # (B, G), or what is taken for it
        loss, _ = grpo_loss(log_prob(policy, tokens), logp_old.view(B, G, T), logp_old.view(B, G, T), adv,
                            mask.view(B, G, T), OBJECTIVES["dr_grpo"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curves["correlation"].append(torch.corrcoef(torch.stack([adv.flatten(), worth]))[0, 1].item())
        curves["reward of the answer"].append(own.mean().item())
    return curves


def lesson():
    return {"failure: mixed groups": train(mixed=True), "cure: a prompt's own answers": train(mixed=False)}


if __name__ == "__main__":
    show(lesson)
