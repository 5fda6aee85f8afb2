"""The whole pipeline on a laptop: corpus -> π₀ -> preferences -> reward model -> GRPO, PPO -> curves.

Every stage is a command of this repository. It is printed before it runs, so that you can run it yourself.
A second run reuses what is done, and a broken one goes on where it stopped. --fresh begins anew.
Left out: tuning (results/sweep.csv has it), more than one seed (results/demo/ has three).
Run: python rlhf_demo.py
"""
import os
import shlex
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

from generate import sample_texts, score as score_answers
from policy import load_policy
from reward import load_scorer
from utils.cli import AtLeast, die, parse, run_stage
from utils.device import pick_device
from utils.figure import GRID, plot_panels
from utils.page import read_record
from utils.rewards import JUDGES
from utils.text import load_corpus, load_prompts


@dataclass
class Args:
    data: str = "auto"  # auto (Tiny Shakespeare, or the offline play), shakespeare, play, or a text file
    steps: Annotated[int, AtLeast(1)] = 25  # of GRPO and of PPO: the same number of samples
    sft_steps: Annotated[int, AtLeast(0)] = 0  # 0: 850, or 200 on a text under 300,000 characters
    eval_prompts: Annotated[int, AtLeast(4)] = 256  # held-out prompts behind the table
    seed: int = 0  # of all stages
    device: str = "auto"  # auto, cpu, cuda or mps
    fresh: bool = False  # begin anew, whatever is cached in out/ and logs/


def run(script, output, inputs, last_step, args, *flags):
    """Runs a stage unless this very command made `output` from these inputs; resumes it if it broke off.

    Results that this file hasn't started stay: a record says who did.
    """
    output = Path(output)
    log, record = Path(f"logs/{output.parts[1]}.csv"), Path(f"logs/{output.parts[1]}.json")
    script = os.path.relpath(Path(__file__).with_name(script))
    command = ["python", script, *map(str, flags), "--seed", str(args.seed), "--device", args.device]
    shown = shlex.join(command)
    about = read_record(record, [])
    about = about if isinstance(about.get("command"), str) else {}  # as where there is none, or a damaged one

    def newer(path):
        return path.is_file() and all(path.stat().st_mtime >= Path(i).stat().st_mtime for i in inputs)

    mine = about.get("command", "").removesuffix(" --resume").removesuffix(" --overwrite") == shown
    if mine and not args.fresh and newer(output) and last_of(log) >= last_step:
        print(f"\n$ {shown}\ncached: {output}")
        return
    if mine and not args.fresh and newer(output.with_name("state.pth")):
        command.append("--resume")
    elif mine or args.fresh or about.get("started_by") == "rlhf_demo.py" or record.is_file() and not about:
        command.append("--overwrite")
    elif output.is_file():
        other = about.get("command", "another command")
        die(f"{output} is not of this demo: `{other}` has made it. Move out/ and logs/ away, or give --fresh "
            "to replace it")
    run_stage(command, os.environ | {"NANOGRPO_STARTED_BY": "rlhf_demo.py"})


def last_of(log):
    """The last step in a stage's CSV; -1 where there is none, or a column that the table needs is missing."""
    try:
        return int(pd.read_csv(log)[["step", "seconds", "peak_mem_mb"]].step.max())
    except (OSError, ValueError, KeyError):
        return -1


@torch.no_grad()
def main(args):
    began = time.perf_counter()
    text, source = load_corpus(args.data)
    data = {"tinyshakespeare": "shakespeare", "bell_of_merrow.txt": "play"}.get(source, args.data)
    small = len(text) < 300_000  # characters, which are read so often that dropout helps
    sft_steps = args.sft_steps or (200 if small else 850)
    policy, reward = "out/sft/policy.pth", "out/reward/reward.pth"

    # ---- the pipeline: four commands ----
    run("sft.py", policy, [], sft_steps, args, "--data", data, "--steps", sft_steps,
        *(["--dropout", 0.1, "--muon_lr", 0.02, "--lr_end", 0.0] if small else []))
    run("reward_model.py", reward, [policy], 256, args, "--data", data)  # 2 epochs of 4,096 pairs, 32 a step
    for name in ("grpo", "ppo"):
        run(f"train_{name}.py", f"out/{name}/policy.pth", [policy, reward], args.steps - 1, args,
            "--data", data, "--steps", args.steps, "--eval_every", 5)

    # ---- the table: three policies, the same held-out prompts, the same draws ----
    device = pick_device(args.device)
    ref, tokenizer = load_policy(policy, device)
    score = load_scorer("model", reward, policy, tokenizer, device)
    prompts = load_prompts("", data, tokenizer, 32)[1]
    order = torch.randperm(len(prompts.texts), generator=torch.Generator().manual_seed(args.seed))
    prompts = prompts.pick(order[:args.eval_prompts])
    table = Table("", title=f"{len(prompts.texts)} held-out prompts of {source}, one answer each")
    for column in ("reward-model score", "gold (taste)", "KL to π₀, nats/token", "entropy, nats",
                   "length, tokens", "seconds", "peak MB"):
        table.add_column(column, justify="right")
    answers = {}
    for label, name in (("π₀", "sft"), ("GRPO", "grpo"), ("PPO", "ppo")):
        model = load_policy(f"out/{name}/policy.pth", device)[0]
        tokens, _, mask, texts = sample_texts(model, tokenizer, prompts, 48, seed=args.seed)
        logp, entropy = score_answers(model, tokens, 32)
        d = score_answers(ref, tokens, 32)[0] - logp
        gold = sum(JUDGES["taste"](texts, prompts.texts, corpus_words=prompts.corpus_words)) / len(texts)
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
    report = os.path.relpath(Path(__file__).with_name("report.py"))
    run_stage(["python", report, *files, "--output", "logs/report.html"])
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main(parse(Args))
