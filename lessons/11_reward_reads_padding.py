"""The reward model gives one answer another score in another batch. Which token does it read?

Met in: trl#937.
Trap: the answers of a batch are padded to one width, and the score is read at the last position.
Failure: the mask is True everywhere, so the score is read at a padding token.
Cure: the mask is True at the answer's own tokens. The score is read at the last of them.
What tells them apart: the change of a score when 8 padding tokens are added, in standard deviations of the
scores. The accuracy is good in both, as long as batches are padded as in training.
Run: python lessons/11_reward_reads_padding.py
"""
from shared import adam, show, tiny_policy, update  # first: it finds all below
import torch
import torch.nn.functional as F
from reward import RewardModel

PAIRS, P, T, PAD = 600, 2, 12, 0  # a prompt has P tokens, the longest answer has T


def answers():
    """-> tokens (PAIRS, 2, P + T), mask (PAIRS, 2, T). Better is the greater share of tokens below 6."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 12, (PAIRS, 2, P + T), generator=generator)
    length = torch.randint(3, T + 1, (PAIRS, 2), generator=generator)
    mask = torch.arange(T) < length[:, :, None]
    tokens[:, :, P:].masked_fill_(~mask, PAD)
    share = ((tokens[:, :, P:] < 6) & mask).sum(2) / length
    order = share.argsort(1, descending=True)[:, :, None]
    return [x.gather(1, order.expand_as(x))[share[:, 0] != share[:, 1]] for x in (tokens, mask)]


def train(mask_of):
    """mask_of(mask) is what the reward model gets for a mask."""
    tokens, mask = answers()
    model = RewardModel(tiny_policy(seed=0, block_size=32).config, pool="last")
    optimizer = adam(model, lr=3e-3)
    for rows in torch.randint(100, len(tokens), (150, 32)):
        score = model(tokens[rows].flatten(0, 1), mask_of(mask[rows].flatten(0, 1))).view(-1, 2)
        update(optimizer, -F.logsigmoid(score[:, 0] - score[:, 1]).mean())
    held_out = tokens[:100].flatten(0, 1), mask[:100].flatten(0, 1)
    with torch.no_grad():
        score, padded = (model(F.pad(held_out[0], (0, n), value=PAD), mask_of(F.pad(held_out[1], (0, n))))
                         for n in (0, 8))
    right = [(x[::2] > x[1::2]).float().mean().item() for x in (score, padded)]
    return {"accuracy": right[0], "with 8 more pads": right[1],
            "change of a score": ((padded - score).abs().mean() / score.std()).item()}


def lesson():
    return {"failure: the last position": train(torch.ones_like),
            "cure: the last real token": train(lambda mask: mask)}


if __name__ == "__main__":
    show(lesson)
