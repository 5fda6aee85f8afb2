"""The vision results: each method has the same number of trials, chosen on validation, reported on the test.

A seed draws the three splits. For each seed all trials of a method run, and the one with the best validation
number is that seed's result. So a seed's test images choose nothing. results/KIND/sweep.csv keeps all trials,
without a test number. results/KIND/METHOD-sN.csv is a chosen run, and test.csv beside it has the tests.
Run: python benchmarks/sweep_vision.py cnn (or clip, clip_weak, c2i, vit, vlm)
"""
import csv
import itertools
import json
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.cli import AtLeast, atomic_write, die, parse  # noqa: E402  (after the path)

REWARD_ALONE = "--aux_ce_coef 0 --steps 1000"  # the default adds 0.1 × cross-entropy
HOT, PLAIN = "--temperature 1.5", "--temperature 1"
CNN, VIT = "-m vision.cnn_grpo", "-m vision.vit_grpo"
C2I = "-m vision.c2i_grpo --save_every 0 --log_image_every 0 --out out/sweep/c2i/models"
CLIP, WEAK = "clip_grpo.py --log_every 8", "clip_grpo.py --log_every 8 --start_accuracy 0.15"
VLM = "-m vision.vlm_grpo --engine nano --samples 0"


@dataclass
class Kind:
    """Runs that stand in one table: what is chosen by, and each method's command and trials."""
    metric: str
    seeds: int
    methods: dict[str, tuple[str, tuple[str, ...]]]


def rates(*values):
    return tuple(f"--lr {value}" for value in values)


SWEEPS = {
    "cnn": Kind("top1", 5, {
        "bandit": (f"{CNN} {REWARD_ALONE}", (f"--lr 1e-3 {HOT}", f"--lr 2e-3 {HOT}", f"--lr 1e-3 {PLAIN}")),
        "ce": (f"{CNN} {REWARD_ALONE} --method ce", rates(5e-4, 1e-3, 2e-3))}),
    "clip": Kind("top1", 5, {
        "reward01": (CLIP, rates(1e-3, 5e-4)),
        "smooth": (f"{CLIP} --reward smooth", rates(1e-3, 5e-4)),
        "lora": (f"{CLIP} --use_lora", rates(1e-2, 5e-3)),
        "ce": (f"{CLIP} --method ce", rates(1e-3, 5e-4))}),
    "clip_weak": Kind("top1", 10, {  # one trial each: it is a comparison of two rewards, all else the same
        "weak01": (WEAK, ("",)), "weaksmooth": (f"{WEAK} --reward smooth", ("",))}),
    "c2i": Kind("accuracy", 5, {
        "grpo": (C2I, rates(5e-4, 2.5e-4)),
        "beta0": (f"{C2I} --beta 0", rates(5e-4, 2.5e-4)),
        "mse": (f"{C2I} --sampling teacher-forced", rates(5e-4, 2.5e-4))}),
    "vit": Kind("eval_r", 5, {task: (f"{VIT} --task {task}", rates(1e-3, 5e-4))
                              for task in ("class", "box", "mask")}),
    "vlm": Kind("accuracy", 5, {"nano": (VLM, rates(1e-4, 5e-5))})}


@dataclass
class Args:
    kind: tyro.conf.Positional[Literal[tuple(SWEEPS)]] = "cnn"  # which table
    methods: tuple[str, ...] = ()  # some of its methods; none: all
    seeds: Annotated[int | None, AtLeast(1)] = None  # 0 … seeds − 1; None: the table's own number
    more: tuple[str, ...] = ()  # flags for every run, without dashes: steps=3 batch_size=8
    jobs: Annotated[int, AtLeast(1)] = 1  # runs side by side, of one thread each
    work: str = "out/sweep"  # CSVs and checkpoints of all trials
    out: str = "results"  # of what is kept


def rows_of(path):
    """A run's rows, or none where it hasn't ended: the last row of a run that has holds its test numbers."""
    if not Path(path).is_file():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return rows if rows and any(rows[-1][name] for name in rows[-1] if name.startswith("test_")) else []


def train(command, log, seed, more):
    """One run, unless it has ended already: a sweep that broke off goes on."""
    if rows_of(log):
        return
    out = [] if "--out" in command else ["--out", str(log.with_suffix(""))]
    words = [*command.split(), *(f"--{flag}" for flag in more), "--seed", str(seed), "--log", str(log), *out,
             "--overwrite"]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        die(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def keep(log, target, metric):
    """Copies a chosen run: its record, its picture, its CSV; of a long one the rows that have the metric."""
    rows = rows_of(log)
    rows = [row for row in rows if row[metric] or len(rows) < 400]
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    atomic_write(target, "".join(f"{line}\n" for line in lines).encode())
    shutil.copy(log.with_suffix(".json"), target.with_suffix(".json"))
    for picture in (log.with_suffix(".png"), log.with_name(f"{log.stem}_images.png")):
        if picture.is_file() and target.stem.endswith("-s0"):
            shutil.copy(picture, target.with_name(picture.name.replace(log.stem, target.stem)))


def numbers_of_test(log):
    """-> the last row's test numbers, and those of the start where the record has them as start_NAME."""
    last, record = rows_of(log)[-1], json.loads(log.with_suffix(".json").read_text())
    start = record.get("test_before") or record.get("measured", {}).get("test, before", {})
    ends = {name: float(value) for name, value in last.items() if name.startswith("test_") and value}
    return {f"start_{name.removeprefix('eval_')}": value for name, value in start.items()} | ends


def paired(first, second):
    """Of numbers with equal seeds: the mean difference, its std, t, and p of the sign-flip test, enumerated.

    p: the share of all 2ⁿ ways to flip the differences' signs whose mean is as far from 0 as the true one.
    """
    difference = np.array(first) - np.array(second)
    flipped = np.array(list(itertools.product((1, -1), repeat=len(difference)))) @ difference
    std = difference.std(ddof=1)
    t = difference.mean() / (std / len(difference) ** 0.5) if std > 1e-12 else float("nan")
    return difference.mean(), std, t, (abs(flipped) >= abs(difference.sum()) - 1e-12).mean()


def report(table, metric):
    """Prints mean ± std over seeds of each test number, and the paired test of every two methods."""
    numbers = table.drop(columns=["seed", "trial"]).groupby("method", sort=False)
    print(numbers.agg(lambda x: f"{x.mean():.4f} ± {x.std():.4f}").to_string())
    of = {name: part.set_index("seed")[f"test_{metric.removeprefix('eval_')}"]
          for name, part in table.groupby("method", sort=False)}
    for one, other in itertools.combinations(of, 2):
        both = of[one].align(of[other], join="inner")
        if len(both[0].dropna()) > 1:
            print("{} − {}: {:+.4f} ± {:.4f}, t {:.2f}, p {:.4f}, {} seeds".format(
                one, other, *paired(*both), len(both[0])))


def main(args):
    kind = SWEEPS[args.kind]
    methods = args.methods or tuple(kind.methods)
    if unknown := set(methods) - set(kind.methods):
        die(f"--methods {', '.join(sorted(unknown))}: wanted some of {', '.join(kind.methods)}")
    if args.jobs > 1 and args.kind == "c2i":
        die("--jobs: c2i's runs of a seed share the models that the first one trains, so they go one by one")
    log_of = {(name, trial, seed): Path(args.work, args.kind, f"{name}-t{trial}-s{seed}.csv")
              for seed in range(args.seeds or kind.seeds) for name in methods
              for trial in range(len(kind.methods[name][1]))}
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in [pool.submit(train, f"{kind.methods[name][0]} {kind.methods[name][1][trial]}", log, seed,
                                 args.more) for (name, trial, seed), log in log_of.items()]:
            done.result()
    trials = pd.DataFrame([{"method": name, "trial": trial, "seed": seed, "metric": kind.metric,
                            "flags": kind.methods[name][1][trial],
                            "validation": float(rows_of(log)[-1][kind.metric])}
                           for (name, trial, seed), log in log_of.items()])
    best = trials.loc[trials.groupby(["method", "seed"])["validation"].idxmax()]
    trials["chosen"] = trials.index.isin(best.index).astype(int)
    folder = Path(args.out, "clip" if args.kind == "clip_weak" else args.kind)
    ending = "_weak" if args.kind == "clip_weak" else ""
    tested = []
    for row in best.itertuples():
        log = log_of[row.method, row.trial, row.seed]
        keep(log, folder / f"{row.method}-s{row.seed}.csv", kind.metric)
        tested.append({"method": row.method, "seed": row.seed, "trial": row.trial, **numbers_of_test(log)})
    for name, table in (("sweep", trials), ("test", pd.DataFrame(tested))):
        atomic_write(folder / f"{name}{ending}.csv", table.to_csv(index=False, float_format="%.5g").encode())
    report(pd.DataFrame(tested), kind.metric)


if __name__ == "__main__":
    main(parse(Args))
