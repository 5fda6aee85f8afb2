"""The policy never learns to stop, though ending an answer earns most.

Met in: trl#2708, trl#4970, nanochat#810.
Trap: padding often has the id of the stop token. A mask that hides this id hides the stop that the policy drew
as well. To stop is an action, and it gets no gradient. The other tokens push it down.
Failure: mask = tokens != STOP.
Cure: the mask goes by position, as generate gives it: true up to the stop, and the stop is scored.
What tells them apart: the share of answers that end before max_new, after 25 updates.
Run: python lessons/07_stop_not_scored.py
"""
from shared import P, adam, show, tiny_policy, update  # first: it finds what follows
import torch
from generate import generate, score
from grpo import OBJECTIVES, group_advantage, grpo_loss

B, G, VOCAB, STOP, MAX_NEW, UPDATES = 4, 16, 64, 0, 8, 25


def train(by_id):
    """An answer earns 1 for its stop and 1/8 for each token from 1 to 31. Stops are rare at the start."""
    policy = tiny_policy(seed=0, vocab_size=VOCAB)
    optimizer = adam(policy, lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    curves = {"share that ended": [], "length": []}
    for _ in range(UPDATES):
        prompts = torch.randint(1, VOCAB, (B, P), generator=generator)
        tokens, logp_old, mask = generate(policy, prompts, MAX_NEW, G, stop=[(STOP,)], generator=generator)
        answer = tokens[:, P:]  # (B·G, MAX_NEW)
        ended = ((answer == STOP) & mask).any(1).float()
        reward = ended + ((answer > STOP) & (answer < 32) & mask).sum(1) / MAX_NEW
        scored = mask & (answer != STOP) if by_id else mask
        logp, logp_old, scored = (x.view(B, G, MAX_NEW) for x in (score(policy, tokens, P)[0], logp_old, scored))
        loss, _ = grpo_loss(logp, logp_old, logp_old, group_advantage(reward.view(B, G)), scored,
                            OBJECTIVES["dr_grpo"])
        update(optimizer, loss)
        curves["share that ended"].append(ended.mean().item())
        curves["length"].append(mask.sum(1).float().mean().item())
    return curves


def lesson():
    return {"failure: masked by id": train(by_id=True), "cure: masked by position": train(by_id=False)}


if __name__ == "__main__":
    show(lesson)
