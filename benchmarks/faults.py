"""Fault injection: each training script is ended at a random moment, then resumed, and must lose nothing.

A tiny run is made once to its end. Then it begins anew in a fresh folder, and a signal ends it at a moment
drawn between the process's start and its usual end. The run that goes on with --resume must have the same CSV
and weights, but for time and memory. Where nothing was saved yet, --resume is refused with a line that names
what to do, and the command without it must have the same result.
Each try is a row of --out. The same command goes on behind the last row; delete the file to begin anew.
Left out: a machine that loses power, several processes, GPUs.
Run: python benchmarks/faults.py
"""
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402,F401  (after the path, and before torch)

import torch  # noqa: E402

from utils.cli import AtLeast, atomic_write, die, parse  # noqa: E402

COLUMNS = ["script", "signal", "n", "moment", "usual", "exit_code", "outcome", "what"]
OUTCOMES = ["equal", "refused clearly", "wrong"]
TIMING = {"seconds", "sampling_s", "tokens_per_s", "peak_mem_mb"}  # columns that two equal runs needn't share
PAIRS = "--data play --prompt_len 16 --max_new 12 --policy ../../base/sft/policy.pth".split()
RL = [*PAIRS, *"--prompts_per_step 4 --group_size 4 --eval_prompts 8 --reward_model ../../base/reward/reward.pth "
      "--steps 24 --eval_every 5 --save_every 6".split()]
SCRIPTS = {  # script: the words of a run of some seconds
    "sft": "sft.py --data play --vocab_size 300 --block_size 48 --batch_size 4 --steps 40 --warmup 5 "
           "--dropout 0.1 --eval_every 9".split(),
    "reward_model": ["reward_model.py", *PAIRS, *"--n_pairs 256 --held_out_pairs 32 --batch_size 8 "
                     "--eval_every 10".split()],
    "train_grpo": ["train_grpo.py", *RL],
    "train_ppo": ["train_ppo.py", *RL],
    "cnn_grpo": "-m vision.cnn_grpo --steps 60 --batch_size 32 --eval_every 10 --save_every 13 --eval_images 64 "
                "--sft_steps 10".split(),
    "vit_grpo": "-m vision.vit_grpo --steps 24 --batch_size 16 --group_size 4 --eval_every 5 --save_every 6 "
                "--sft_steps 10".split(),
    "clip_grpo": "clip_grpo.py --epochs 3 --start_accuracy 0.1 --save_model --num_workers 0".split(),
    "c2i_grpo": "-m vision.c2i_grpo --steps 12 --vq-steps 2 --gpt-steps 2 --classifier-steps 2 --eval-images 2 "
                "--sample-batch-size 8 --train-batch-size 8 --group-size 2 --eval-every 5 --save-every 3 "
                "--log-image-every 5".split(),
    "vlm_grpo": "-m vision.vlm_grpo --engine nano --steps 8 --sft_steps 4 --eval_every 4 --save_every 3 "
                "--eval_examples 8 --per_device_train_batch_size 8 --group_size 4 --max_new 4".split(),
}


@dataclass
class Args:
    scripts: tuple[str, ...] = tuple(SCRIPTS)  # which are tried
    signals: tuple[str, ...] = ("SIGKILL", "SIGTERM", "SIGINT")
    repeats: Annotated[int, AtLeast(1)] = 20  # moments a signal
    seed: int = 0  # of the moments
    work: str = "out/faults"  # the runs' folders; those of wrong tries stay
    out: str = "results/faults.csv"  # a row a try


# ---- runs ----
def run(name, folder, *words, number=None, moment=None):
    """One process in the folder, sent the signal after `moment` seconds -> its exit code, stdout, stderr."""
    command = [sys.executable, *SCRIPTS[name], "--log", "log.csv", "--out", "out", "--device", "cpu", *words]
    if not command[1].startswith("-"):
        command[1] = str(ROOT / command[1])
    folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": "1", "CI": "true", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=folder, env=os.environ | threads, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        output = process.communicate(timeout=moment)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
        try:
            output = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            output = "", "Traceback: it has hung for 300 s"
    return process.returncode, *output


def reference(name, args):
    """The folder of the uninterrupted run, and the seconds that it took; made once."""
    folder = Path(args.work).resolve() / name / "whole"
    stamp = folder / "seconds"
    if not stamp.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        code, _, error = run(name, folder)
        if code:
            die(f"{name} can't be tried: its uninterrupted run ended with exit code {code}: {error[-300:]}")
        atomic_write(stamp, str(time.monotonic() - began).encode())
        if name in ("sft", "reward_model"):  # what the later scripts read
            base = folder.parent.parent / "base" / name.removesuffix("_model")
            shutil.copytree(folder / "out", base, dirs_exist_ok=True)
    return folder, float(stamp.read_text())


# ---- comparison ----
def content(path):
    """A result as plain values; raises where it is torn."""
    if path.suffix in (".pth", ".pt"):
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".csv":
        head, *rows = csv.reader(path.read_text().splitlines())
        if any(len(row) != len(head) for row in rows):
            raise ValueError("a torn row")
        return [{k: v for k, v in zip(head, row) if k not in TIMING} for row in rows]
    return path.read_bytes()


def same(a, b):
    """Equal to the last bit; times and memory are left out."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in TIMING | {"args"})
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def results(folder):
    kinds = (".pth", ".pt", ".csv", ".jsonl", ".safetensors")
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.suffix in kinds]


def damage(folder):
    """The first result that can't be read, or None."""
    for path in results(folder):
        try:
            content(folder / path)
        except Exception as error:  # on torn bytes the readers raise nearly anything
            return f"{path} is torn ({type(error).__name__})"


def difference(folder, whole):
    """The first result that isn't the uninterrupted run's, or a file that no one needs; None: all is well."""
    for path in results(whole):
        if not (folder / path).is_file():
            return f"{path} is missing"
        if not same(content(whole / path), content(folder / path)):
            return f"{path} differs"
    left = [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name.endswith(".lock")]
    return f"{left[0].relative_to(folder)} is left" if left else None


# ---- one try ----
def attempt(name, number, moment, folder, whole):
    """-> exit code of the process that got the signal, the outcome, what was wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    code, _, error = run(name, folder, number=number, moment=moment)
    usual = {0, -number, {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number)}
    what = "a traceback at the signal" if "Traceback" in error else damage(folder)
    if what or code not in usual:
        return code, "wrong", what or f"exit code {code} at the signal"
    outcome = "equal"
    again, _, error = run(name, folder, "--resume")
    if again == 2 and error.count("\n") == 1 and ("run `" in error or "--overwrite" in error):
        outcome = "refused clearly"
        again, _, error = run(name, folder, *["--overwrite"] * ("--overwrite" in error))
    if again or "Traceback" in error:
        return code, "wrong", f"exit code {again} afterwards: {error.strip().splitlines()[-1][-200:]}"
    what = difference(folder, whole)
    return code, "wrong" if what else outcome, what or ""


def table(rows):
    """Prints a line for each script and signal."""
    print(f"\n| script | signal | runs | {' | '.join(OUTCOMES)} |\n|---|---|---|---|---|---|")
    for name, sent in dict.fromkeys((row["script"], row["signal"]) for row in rows):
        mine = [row for row in rows if (row["script"], row["signal"]) == (name, sent)]
        counts = [sum(row["outcome"] == outcome for row in mine) for outcome in OUTCOMES]
        wrong = sorted({row["what"] for row in mine if row["what"]})
        print(f"| {name} | {sent} | {len(mine)} | {counts[0]} | {counts[1]} | {counts[2]} "
              f"{'(' + '; '.join(wrong) + ')' if wrong else ''} |")


def main(args):
    if unknown := set(args.scripts) - set(SCRIPTS):
        die(f"--scripts {' '.join(sorted(unknown))}: wanted some of {', '.join(SCRIPTS)}")
    out = Path(args.out)
    rows = list(csv.DictReader(out.read_text().splitlines())) if out.is_file() else []
    done = {(row["script"], row["signal"], int(row["n"])) for row in rows}
    for name in dict.fromkeys(("sft", "reward_model", *args.scripts)):
        whole, usual = reference(name, args)
        for sent in args.signals if name in args.scripts else ():
            for n in range(args.repeats):
                if (name, sent, n) in done:
                    continue
                moment = random.Random(f"{args.seed} {name} {sent} {n}").uniform(0, usual)
                folder = whole.parent / f"{sent}-{n}"
                code, outcome, what = attempt(name, signal.Signals[sent], moment, folder, whole)
                rows.append(dict(zip(COLUMNS, (name, sent, n, f"{moment:.3f}", f"{usual:.3f}", code, outcome,
                                               what))))
                print(*rows[-1].values(), flush=True)
                lines = [COLUMNS, *(row.values() for row in rows)]
                text = "".join(",".join(f'"{cell}"' for cell in line) + "\n" for line in lines)
                atomic_write(out, text.encode())
                if outcome != "wrong":
                    shutil.rmtree(folder)
    table(rows)


if __name__ == "__main__":
    main(parse(Args))
