"""The reward hardly rises, though every function passes its test: groups hold answers to other prompts.

Met in: R1-V#67, slime#1414.
Trap: the prompts are repeated in one order, and the flat rewards are cut into groups in another. All shapes
fit. The answers to an easy prompt then look good, whatever they say, and those to a hard one look bad.
Failure: prompts.repeat(G, 1), which gives the order p1 p2 … p1 p2 …, then view(-1, G).
Cure: generate(…, group_size=G) keeps a group's answers side by side. Then a group has an axis of its own.
What tells them apart: the correlation of the advantage with what the prompt adds to the reward. It must be 0.
Run: python lessons/04_mixed_groups.py
"""
from shared import B, G, P, T, VOCAB, log_prob, note, show, start, update  # first: it finds all below
import torch
from generate import generate
from grpo import OBJECTIVES, group_advantage, grpo_loss

SEEDS, STEPS = 3, 60


def train(mixed, seed):
    """A token is right if it is odd where the prompt's first token is odd, even where it is even.

    To the share of right tokens the reward adds what the prompt is worth: its first token, 0 to 11.
    """
    policy, optimizer, generator = start(seed, lr=1e-2)
    curves = {}
    for _ in range(STEPS):
        prompts = torch.randint(VOCAB, (B, P), generator=generator)
        asked, group_size = (prompts.repeat(G, 1), 1) if mixed else (prompts, G)
        tokens, logp_old, mask = generate(policy, asked, T, group_size, generator=generator)
        worth = tokens[:, 0].float()  # (B·G,)
        right = (tokens[:, P:] % 2 == tokens[:, :1] % 2).float().mean(1)
        adv = group_advantage((right + worth).view(-1, G))  # (B, G), or what is taken for it
        loss, _ = grpo_loss(log_prob(policy, tokens), logp_old.view(B, G, T), logp_old.view(B, G, T), adv,
                            mask.view(B, G, T), OBJECTIVES["dr_grpo"])
        update(optimizer, loss)
        correlation = torch.corrcoef(torch.stack([adv.flatten(), worth]))[0, 1]
        correlation = correlation.nan_to_num(0.0)  # all advantages may be 0
        note(curves, correlation=correlation, right_tokens=right.mean())
    return curves


def mean_over_seeds(mixed):
    runs = [train(mixed, seed) for seed in range(SEEDS)]
    return {name: torch.tensor([run[name] for run in runs]).mean(0).tolist() for name in runs[0]}


def lesson():
    return {"failure: mixed groups": mean_over_seeds(mixed=True),
            "cure: a prompt's own answers": mean_over_seeds(mixed=False)}


if __name__ == "__main__":
    show(lesson)
