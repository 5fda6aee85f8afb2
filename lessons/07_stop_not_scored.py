"""The policy never learns to stop, though ending an answer earns most.

Met in: trl#2708, trl#4970, nanochat#810.
Trap: padding often has the id of the stop token. A mask that hides this id also hides the stop that the
policy drew. To stop is an action, but the loss then has no term for it.
Failure: mask = tokens != STOP.
Cure: the mask goes by position, as generate gives it: true up to the stop, and the stop is scored.
What tells them apart: the share of answers that end before max_new, after 25 updates.
Run: python lessons/07_stop_not_scored.py
"""
from shared import P, note, show, start, update  # first: it finds all below
import torch
from generate import generate, score
from grpo import OBJECTIVES, group_advantage, grpo_loss

B, G, VOCAB, STOP, MAX_NEW, UPDATES = 4, 16, 64, 0, 8, 25


def train(by_id):
    """An answer earns 1 for its stop and 1/8 for each token from 1 to 31. Stops are rare at the start."""
    policy, optimizer, generator = start(seed=0, lr=3e-3, vocab_size=VOCAB)
    curves = {}
    for _ in range(UPDATES):
        prompts = torch.randint(1, VOCAB, (B, P), generator=generator)
        tokens, logp_old, mask = generate(policy, prompts, MAX_NEW, G, stop=[(STOP,)], generator=generator)
        answer = tokens[:, P:]  # (B·G, MAX_NEW)
        ended = ((answer == STOP) & mask).any(1).float()
        reward = ended + ((answer > STOP) & (answer < 32) & mask).sum(1) / MAX_NEW
        scored = mask & (answer != STOP) if by_id else mask
        logp = score(policy, tokens, P)[0]
        logp, logp_old, scored = (x.view(B, G, MAX_NEW) for x in (logp, logp_old, scored))
        loss, _ = grpo_loss(logp, logp_old, logp_old, group_advantage(reward.view(B, G)), scored,
                            OBJECTIVES["dr_grpo"])
        update(optimizer, loss)
        note(curves, share_ended=ended.mean(), length=mask.sum(1).float().mean())
    return curves


def lesson():
    return {"failure: masked by id": train(by_id=True), "cure: masked by position": train(by_id=False)}


if __name__ == "__main__":
    show(lesson)
