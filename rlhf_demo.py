"""The whole pipeline on a laptop: corpus -> π₀ -> preferences -> reward model -> GRPO, PPO -> curves.

Every stage is a command of this repository. It is printed before it runs, so that you can run it yourself.
A second run reuses what is done, and a broken one goes on where it stopped. --fresh begins anew.
Left out: tuning (results/sweep.csv has it), more than one seed (results/demo/ has three).
Run: python rlhf_demo.py
"""
import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import utils  # before torch: it sets how OpenMP's threads wait

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

from generate import sample_texts
from generate import score as score_answers
from policy import load_policy
from reward import load_scorer
from utils.cli import AtLeast, parse, resume_command
from utils.device import pick_device
from utils.figure import GRID, plot_panels
from utils.rewards import JUDGES
from utils.text import load_corpus, load_prompts


@dataclass
class Args:
    data: str = "auto"  # auto (Tiny Shakespeare, or the offline play), shakespeare, play, or a text file
    steps: Annotated[int, AtLeast(1)] = 25  # of GRPO and of PPO: the same number of samples
    sft_steps: Annotated[int, AtLeast(0)] = 0  # 0: 850, or 300 on a text under 300,000 characters
    eval_prompts: Annotated[int, AtLeast(4)] = 256  # held-out prompts behind the table
    seed: int = 0  # of all stages
    device: str = "auto"  # auto, cpu, cuda or mps
    fresh: bool = False  # begin anew, whatever is cached in out/ and logs/


def run(script, output, inputs, last_step, args, *flags):
    """Runs a stage unless this very command made `output` from these inputs; resumes it if it broke off."""
    output = Path(output)
    log, record = Path(f"logs/{output.parts[1]}.csv"), Path(f"logs/{output.parts[1]}.json")
    command = ["python", script, *map(str, flags), "--seed", str(args.seed), "--device", args.device]
    shown = " ".join(command)

    def newer(path):
        return path.is_file() and all(path.stat().st_mtime >= Path(i).stat().st_mtime for i in inputs)

    if not args.fresh and log.is_file() and record.is_file() and \
            json.loads(record.read_text())["command"].removesuffix(" --resume") == shown:
        if newer(output) and pd.read_csv(log).step.max() >= last_step:
            print(f"\n$ {shown}\ncached: {output}")
            return
        if newer(output.with_name("state.pth")):
            command.append("--resume")
    print(f"\n$ {' '.join(command)}", flush=True)
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the stage too, which saves
    stage = subprocess.run([sys.executable, *command[1:]])
    signal.signal(signal.SIGINT, before)
    if stage.returncode == 130:
        print("the demo goes on with:", resume_command().removesuffix(" --resume"))
    if stage.returncode:
        raise SystemExit(stage.returncode)


@torch.no_grad()
def main(args):
    began = time.perf_counter()
    text, source = load_corpus(args.data)
    data = {"tinyshakespeare": "shakespeare", "bell_of_merrow.txt": "play"}.get(source, args.data)
    sft_steps = args.sft_steps or (850 if len(text) > 300_000 else 300)
    policy, reward = "out/sft/policy.pth", "out/reward/reward.pth"

    # ---- the pipeline: four commands ----
    run("sft.py", policy, [], sft_steps, args, "--data", data, "--steps", sft_steps)
    run("reward_model.py", reward, [policy], 256, args, "--data", data)  # 2 epochs of 4,096 pairs, 32 a step
    for name in ("grpo", "ppo"):
        run(f"train_{name}.py", f"out/{name}/policy.pth", [policy, reward], args.steps - 1, args,
            "--data", data, "--steps", args.steps)

    # ---- the table: three policies, the same held-out prompts, the same draws ----
    device = pick_device(args.device)
    ref, tokenizer = load_policy(policy, device)
    score = load_scorer("model", reward, policy, tokenizer, device)
    prompts = load_prompts("", data, tokenizer, 32)[1]
    order = torch.randperm(len(prompts.texts), generator=torch.Generator().manual_seed(args.seed))
    prompts = prompts.pick(order[:args.eval_prompts])
    table = Table("", title=f"{len(prompts.texts)} held-out prompts of {source}, one answer each")
    for column in ("reward-model score", "gold (sentiment)", "KL to π₀, nats/token", "entropy, nats",
                   "length, tokens", "seconds", "peak MB"):
        table.add_column(column, justify="right")
    answers = {}
    for label, name in (("π₀", "sft"), ("GRPO", "grpo"), ("PPO", "ppo")):
        model = load_policy(f"out/{name}/policy.pth", device)[0]
        tokens, _, mask, texts = sample_texts(model, tokenizer, prompts, 48, seed=args.seed)
        logp, entropy = score_answers(model, tokens, 32)
        d = score_answers(ref, tokens, 32)[0] - logp
        gold = sum(JUDGES["sentiment"](texts, prompts.texts)) / len(texts)
        cost = pd.read_csv(f"logs/{name}.csv")
        table.add_row(label, f"{score(tokens, mask, prompts, texts).mean():+.2f}", f"{gold:+.2f}",
                      f"{(torch.expm1(d) - d)[mask].mean():.3f}", f"{entropy[mask].mean():.2f}",
                      f"{mask.sum(1).float().mean():.1f}", f"{cost.seconds.iloc[-1]:.0f}",
                      f"{cost.peak_mem_mb.max():.0f}")
        answers[label] = texts

    # ---- samples: the same four prompts, never chosen ----
    side = Table(title="the first four of these prompts", show_lines=True)
    for column in ("prompt", *answers):
        side.add_column(column, ratio=1)
    for i in range(min(4, len(prompts.texts))):
        side.add_row(prompts.texts[i].splitlines()[-1], *(texts[i] for texts in answers.values()))
    console = Console(width=None if sys.stdout.isatty() else 110)
    console.print(side, markup=False)
    console.print(table)

    # ---- figures ----
    files = ["logs/grpo.csv", "logs/ppo.csv"]
    for metric, name in (("mean_r", "reward"), ("kl", "kl"), ("entropy", "entropy"), ("loss", "loss")):
        print(f"figure: {plot_panels(files, [metric], f'logs/{name}_comparison.png')}")
    print(f"figure: {plot_panels(files, GRID, 'logs/overview.png', optional=True)}")
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(parse(Args))
