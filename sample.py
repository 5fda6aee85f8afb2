"""Answers of any text policy of this repository: π₀, GRPO's, PPO's.

Top-k and top-p (arXiv:1904.09751) are for this script and not for RL. In RL, an update may move a sampled
token out of the kept set, and its log-probability would be -∞.
With --task it asks a task's held-out questions instead, greedily, and says which answers are right.
Left out: batches of different starts.
Run: python sample.py --policy out/sft/policy.pth --start "ROMEO:\\n" --num_samples 5 --top_k 40 --seed 1
"""
import json
import math
from dataclasses import dataclass
from typing import Annotated

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from generate import generate
from policy import load_policy
from tasks import load_task
from utils.cli import AtLeast, atomic_write, die, parse
from utils.device import pick_device
from utils.text import completions


@dataclass
class Args:
    policy: str = "out/sft/policy.pth"  # a text policy of this repository
    start: str = "\\n"  # the prompt; \n stands for a new line
    task: str = ""  # ask its held-out questions: add, sort, reverse, countdown, gym:NAME, FILE.py:TASK
    answers_out: str = ""  # with --task: a JSONL file of question, answer and verdict
    num_samples: Annotated[int, AtLeast(1)] = 5  # answers
    max_new: Annotated[int, AtLeast(0)] = 0  # tokens of an answer; 0: what fits, at most 512, with --task 64
    temperature: Annotated[float, AtLeast(1e-3)] = 0.8  # below 1: more of the likely tokens
    top_k: Annotated[int, AtLeast(0)] = 0  # draw from the k likeliest tokens; 0: from all; 1: no chance
    top_p: float = 1.0  # draw from the likeliest tokens that hold this share of the probability
    stop: bool = True  # end an answer at the blank line; --no-stop writes on
    seed: int = 0  # of the draws
    device: str = "auto"  # auto, cpu, cuda or mps


def examine(args, policy, tokenizer):
    """Asks every held-out question of the task, and prints the accuracy with its standard error."""
    task = load_task(args.task)
    prompts = task.prompts(tokenizer, args.seed)[1]
    room = policy.config.block_size - prompts.tokens.shape[1]
    if room < max(1, args.max_new):
        die(f"questions of {prompts.tokens.shape[1]} tokens + --max_new {max(1, args.max_new)} don't fit the "
            f"policy's context of {policy.config.block_size}: ask shorter questions, or lower --max_new")
    texts, reward = task.ask(policy, tokenizer, prompts, args.max_new or min(room, 64))
    verdicts = ["right" if r >= 1 else "wrong" for r in reward[:, 0]]
    rows = [{"question": question, "answer": text, "verdict": verdict}
            for question, text, verdict in zip(prompts.texts, texts, verdicts)]
    if args.answers_out:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        atomic_write(args.answers_out, "".join(lines).encode())
    for row in rows[:args.num_samples]:
        print(f"{row['question']}\n{row['answer']}  ({row['verdict']})\n")
    share = verdicts.count("right") / len(rows)
    print(f"{share:.1%} ± {math.sqrt(share * (1 - share) / len(rows)):.1%} of {len(rows)} held-out questions "
          "are answered right (greedy answers; mean ± standard error)")


def main(args):
    if args.answers_out and not args.task:
        die(f"--answers_out {args.answers_out} holds verdicts: name a task with --task")
    if not 0 < args.top_p <= 1:
        die(f"--top_p {args.top_p}: wanted a share in (0, 1]")
    device = pick_device(args.device)
    policy, tokenizer = load_policy(args.policy, device)
    if args.task:
        return examine(args, policy, tokenizer)
    start = args.start.replace("\\n", "\n")
    ids = tokenizer.encode_prompt(start)
    room = policy.config.block_size - len(ids)
    if not ids or room < max(1, args.max_new):
        die(f"--start of {len(ids)} tokens + --max_new {args.max_new}: wanted at least one token, such as "
            f"'ROMEO:\\n', and no more than the context of {policy.config.block_size}")
    generator = torch.Generator().manual_seed(args.seed)
    tokens, _, mask = generate(policy, torch.tensor([ids], device=device), args.max_new or min(room, 512),
                                      args.num_samples, args.temperature, args.top_k, args.top_p,
                                      tokenizer.stops if args.stop else (), generator)
    texts = completions(tokens[:, len(ids):], mask, tokenizer)
    between = "" if tokenizer.prompt(start) == start else "\n"  # a chat model's answer is a turn of its own
    print("\n---\n".join(start + between + text for text in texts))


if __name__ == "__main__":
    main(parse(Args))
