"""The same batch, cut into smaller pieces to save memory, gives another result.

Met in: trl#3021, trl#6024.
Trap: each micro-batch divides by its own number of tokens, and then the losses are averaged. A token of a
micro-batch with short answers weighs more than one of a micro-batch with long answers.
Failure: grpo_loss of each piece, and the mean of the pieces.
Cure: every piece divides by n_tokens of the whole batch, and the pieces add up.
What tells them apart: how far the gradient is from that of the whole batch, as a share of its length.
Run: python lessons/08_micro_batches.py
"""
from shared import P, VOCAB, show, tiny_policy  # first: it finds all below
import torch
from generate import generate, score
from grpo import OBJECTIVES, group_advantage, grpo_loss

B, G, STOP, MAX_NEW = 8, 8, 0, 12


def gradient(policy, tokens, mask, adv, size, whole):
    """Of the batch in pieces of `size` prompts: one vector. whole: n_tokens is that of all pieces."""
    policy.zero_grad()
    for rows in torch.arange(B).split(size):
        logp = score(policy, tokens[rows].flatten(0, 1), P)[0].view(-1, G, MAX_NEW)
        old = logp.detach()
        loss, _ = grpo_loss(logp, old, old, adv[rows], mask[rows], OBJECTIVES["dapo"],
                            n_tokens=mask.sum() if whole else None)
        (loss if whole else loss * size / B).backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def lesson():
    policy = tiny_policy(seed=0)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(VOCAB, (B, P), generator=generator)
    tokens, _, mask = generate(policy, prompts, MAX_NEW, G, stop=[(STOP,)], generator=generator)
    tokens, mask = tokens.view(B, G, -1), mask.view(B, G, -1)
    adv = group_advantage((tokens[:, :, P:] < 6).float().mean(2))
    one_piece = gradient(policy, tokens, mask, adv, size=B, whole=True)

    def distances(whole):
        pieces = {size: gradient(policy, tokens, mask, adv, size, whole) for size in (1, 2, 4, 8)}
        return {f"prompts a piece: {size}": ((g - one_piece).norm() / one_piece.norm()).item()
                for size, g in pieces.items()}
    return {"failure: each piece's own tokens": distances(whole=False),
            "cure: tokens of the whole batch": distances(whole=True)}


if __name__ == "__main__":
    show(lesson)
