"""Answers of any text policy of this repository: π₀, GRPO's, PPO's.

Top-k and top-p (arXiv:1904.09751) are for this script and not for RL. In RL, an update may move a sampled
token out of the kept set, and its log-probability would be -∞.
Left out: chat templates, batches of different starts.
Run: python sample.py --policy out/sft/policy.pth --start "ROMEO:\\n" --num_samples 5 --top_k 40 --seed 1
"""
from dataclasses import dataclass
from typing import Annotated

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from generate import generate
from policy import load_policy
from utils.cli import AtLeast, die, parse
from utils.device import pick_device
from utils.text import completions


@dataclass
class Args:
    policy: str = "out/sft/policy.pth"  # a text policy of this repository
    start: str = "\\n"  # the prompt; \n stands for a new line
    num_samples: Annotated[int, AtLeast(1)] = 5  # answers
    max_new: Annotated[int, AtLeast(0)] = 0  # tokens of an answer; 0: as many as the context holds
    temperature: Annotated[float, AtLeast(1e-3)] = 0.8  # below 1: more of the likely tokens
    top_k: Annotated[int, AtLeast(0)] = 0  # draw from the k likeliest tokens; 0: from all; 1: no chance
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share of the probability
    stop: bool = True  # end an answer at the blank line; --no-stop writes on
    seed: int = 0  # of the draws
    device: str = "auto"  # auto, cpu, cuda or mps


def main(args):
    if not 0 < args.top_p <= 1:
        die(f"--top_p {args.top_p}: wanted a share in (0, 1]")
    device = pick_device(args.device)
    policy, tokenizer = load_policy(args.policy, device)
    start = args.start.replace("\\n", "\n")
    ids = tokenizer.encode(start)
    room = policy.config.block_size - len(ids)
    if not ids or room < max(1, args.max_new):
        die(f"--start of {len(ids)} tokens + --max_new {args.max_new}: wanted at least one token, such as "
            f"'ROMEO:\\n', and no more than the context of {policy.config.block_size}")
    generator = torch.Generator().manual_seed(args.seed)
    tokens, _, mask = generate(policy, torch.tensor([ids], device=device), args.max_new or room,
                                      args.num_samples, args.temperature, args.top_k, args.top_p,
                                      tokenizer.stops if args.stop else (), generator)
    texts = completions(tokens[:, len(ids):], mask, tokenizer)
    print("\n---\n".join(start + text for text in texts))


if __name__ == "__main__":
    main(parse(Args))
