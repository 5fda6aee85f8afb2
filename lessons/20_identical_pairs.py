"""The reward model's loss stops at a floor, and its accuracy too. What is left to learn?

Met in: rlhf-book#503.
Trap: a pair's answers begin alike. Cut to the greatest length, they are the same answer twice.
Failure: such pairs stay. Each has the loss log 2 and the gradient 0, whatever the model says.
Cure: cut first, then compare. reward_model.py leaves out equal pairs and says how many.
What tells them apart: the last loss. Its floor is log 2 times the share of identical pairs.
Run: python lessons/20_identical_pairs.py
"""
import json
import random
import tempfile
from pathlib import Path

from shared import adam, show, tiny_policy, update  # first: it finds all below
import torch.nn.functional as F
from reward import RewardModel
from reward_model import read_pairs
from utils.tokenizer import Tokenizer

CUT = 16  # an answer's tokens that are kept


def read(cut):
    """Answers share 4 to 27 letters. Then the better one ends in "!", the other in "?". -> Pairs."""
    rng, lines = random.Random(0), []
    for _ in range(256):
        start = "".join(rng.choices("abcdefghij", k=rng.randrange(4, 28)))
        lines.append(json.dumps({"prompt": "a", "chosen": f"{start}!"[:cut], "rejected": f"{start}?"[:cut]}))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "pairs.jsonl")
        path.write_text("\n".join(lines), encoding="utf-8")
        return read_pairs(path, Tokenizer("char", list("abcdefghij!?")), block_size=32)


def train(pairs):
    """Whole answers are cut here, after they were compared."""
    tokens, mask = pairs.tokens[:, :, :1 + CUT], pairs.mask[:, :, :CUT]
    model, losses = RewardModel(tiny_policy(seed=0, block_size=32).config, pool="last"), []
    optimizer = adam(model, lr=3e-3)
    for _ in range(60):
        chosen, rejected = model(tokens.flatten(0, 1), mask.flatten(0, 1)).view(-1, 2).unbind(1)
        loss = -F.logsigmoid(chosen - rejected).mean()
        update(optimizer, loss)
        losses.append(loss.item())
    return {"pairs": len(tokens), "identical": (tokens[:, 0] == tokens[:, 1]).all(1).float().mean().item(),
            "loss": losses, "accuracy": (chosen > rejected).float().mean().item()}


def lesson():
    return {"failure: compare, then cut": train(read(cut=None)), "cure: cut, then compare": train(read(CUT))}


if __name__ == "__main__":
    show(lesson)
