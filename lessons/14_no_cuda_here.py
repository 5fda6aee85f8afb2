"""It works on the author's GPU, and fails on a Mac or a laptop before its first step. Why?

Met in: nanoGPT#28, nanoGPT#150.
Trap: a script names a device, and most machines lack it.
Failure: "cuda" stands in the code. On a machine with CUDA this lesson names "mps", which is missing there.
Cure: pick_device() takes CUDA, else Apple's MPS, else the CPU. --device NAME asks for one. A missing one is
refused in one line. torch.compile is off unless --compile asks for it: it needs a C++ compiler.
What tells them apart: the steps that were done.
Run: python lessons/14_no_cuda_here.py
"""
import sys
import traceback

from shared import adam, show, tiny_policy, update  # first: it finds all below
import torch
from generate import score
from utils.device import pick_device

MISSING = "mps" if torch.cuda.is_available() else "cuda"


def train(device_of):
    """30 supervised steps on 0 1 2 … 11 0 1 … on the device that device_of() gives."""
    policy, losses, lines = tiny_policy(seed=0), [], 0
    try:
        device = device_of()
        policy.to(device)
        optimizer = adam(policy, lr=1e-2)
        tokens = ((torch.arange(12)[:, None] + torch.arange(16)) % 12).to(device)  # (12, 16)
        for _ in range(30):
            loss = -score(policy, tokens, prompt_len=1)[0].mean()
            update(optimizer, loss)
            losses.append(loss.item())
        print(f"picked by itself: {device}\n")
    except (AssertionError, RuntimeError):  # torch raises one or the other, as it was built
        message = traceback.format_exc().strip()
        lines = message.count("\n") + 1
        print(message.splitlines()[-1].partition(". ")[0], file=sys.stderr)
    except SystemExit:  # pick_device has said it, in one line
        lines = 1
    return {"steps done": len(losses), "lines of error": lines} | ({"loss": losses} if losses else {})


def lesson():
    return {"failure: the device is assumed": train(lambda: MISSING),
            "cure: it is picked": train(pick_device),
            "compare: a missing one asked for": train(lambda: pick_device(MISSING))}


if __name__ == "__main__":
    show(lesson)
