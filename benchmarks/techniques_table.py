"""techniques.py on a nano task, one technique at a time: runs, then a table at equal generated answers.

Each run is train_grpo.py with SETTINGS and a row's flags, from one π₀. Accuracy is read where all runs have
generated the same number of answers, on a line between two evaluations. --dynamic_sampling generates more
answers a step, so it is read at an earlier step. The `seconds` of these CSVs are this process's own
processor time: other programs on the machine don't count.
Left out: techniques together, a search over their settings.
Run: python benchmarks/techniques_table.py (after bash benchmarks/results.sh tasks)
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import numpy as np  # noqa: E402

import train_grpo  # noqa: E402
import utils.run  # noqa: E402
from policy import defaults  # noqa: E402
from utils.cli import die, parse  # noqa: E402
from utils.figure import read_csv  # noqa: E402

# a right answer is 6 digits and 2 tokens of stop; the ninth token is the first that is too much
# scoring and update in bf16 and sampling in fp32 is what `auto` is on a CPU that has bf16
SETTINGS = ("--task sort --max_new 9 --prompts_per_step 16 --beta 0 --lr 1e-4 --minibatches 4 --steps 101 "
            "--eval_every 25 --eval_prompts 512 --no_eval_pass8 --samples 0 --dtype bf16")
ROWS = {  # name: flags
    "plain": "",
    "dynamic_sampling": "--dynamic_sampling 2",
    "overlong_mask": "--overlong mask",
    "overlong_penalty": "--overlong penalty --overlong_tokens 1",
    "entropy_bonus": "--entropy_coef 0.01",
    "tis": "--tis_cap 2",
    "bf16": "--sample_dtype bf16",
    "bf16_tis": "--sample_dtype bf16 --tis_cap 2",
    "maxrl": "--objective maxrl"}
BESIDE = {"bf16_tis": "bf16"}  # the row that a row is compared with, where it isn't the plain one


@dataclass
class Args:
    folder: str = "results/techniques"  # of NAME-sSEED.csv
    policy: str = "out/r-sft-sort/policy.pth"  # π₀
    rows: tuple[str, ...] = tuple(ROWS)  # which techniques are run
    seeds: tuple[int, ...] = (0, 1, 2)
    table_only: bool = False  # read the CSVs that are there; no run


def train(name, seed, args):
    """One run, unless its CSV is complete. The record beside the CSV has the flags."""
    log = Path(args.folder, f"{name}-s{seed}.csv")
    words = f"{SETTINGS} {ROWS[name]} --seed {seed} --policy {args.policy}"
    words += f" --log {log} --out out/r-techniques-{name}-s{seed} --overwrite"
    sys.argv = ["train_grpo.py", *words.split()]
    flags = parse(train_grpo.Args, default=defaults(train_grpo.Args))
    if not (log.exists() and read_csv(log).step.max() == flags.steps - 1):
        train_grpo.main(flags)


def evaluations(frame):
    """A CSV -> answers generated before an evaluation, and its accuracy: two arrays.

    An evaluation comes before its step's answers, so the row before has the count.
    """
    before = frame.samples.shift(fill_value=0.0)
    measured = frame.eval_acc.notna()
    return before[measured].to_numpy(), frame.eval_acc[measured].to_numpy()


def at(answers, samples, count):
    """A count that grows with the steps from 0, where so many answers had been generated."""
    return np.interp(answers, [0.0, *samples], [0.0, *count])


def read(args):
    """-> {name: [DataFrame, one a seed]} of the rows whose CSVs are there."""
    paths = {name: [Path(args.folder, f"{name}-s{seed}.csv") for seed in args.seeds] for name in args.rows}
    runs = {name: [read_csv(path) for path in some] for name, some in paths.items()
            if all(path.exists() for path in some)}
    if "plain" not in runs:
        die(f"{args.folder} lacks plain-sSEED.csv of seeds {', '.join(map(str, args.seeds))}: run "
            "`bash benchmarks/results.sh techniques` first")
    return runs


def spread(values, places):
    """Mean ± std of the seeds, unbiased."""
    return f"{np.mean(values):.{places}f} ± {np.std(values, ddof=int(len(values) > 1)):.{places}f}"


def difference(values, plain):
    """Mean of the seeds' differences ± its standard error, in points."""
    gain = 100 * (np.asarray(values) - plain)
    return f"{gain.mean():+.1f} ± {gain.std(ddof=int(len(gain) > 1)) / len(gain) ** 0.5:.1f}"


def table(runs):
    """Prints a row a technique, at the greatest number of generated answers that all runs reach."""
    curves = {name: [evaluations(frame) for frame in frames] for name, frames in runs.items()}
    equal = min(generated[-1] for seeds in curves.values() for generated, _ in seeds)
    accuracy = {name: [np.interp(equal, *both) for both in seeds] for name, seeds in curves.items()}
    print(f"At {equal:,.0f} generated answers; accuracy in percent, mean ± std of the seeds; gain in points, "
          "mean ± standard error of the paired differences.\n")
    print("| technique | flags | accuracy | gain | over | steps | cut | seconds |")
    print("|---" * 8 + "|")
    for name, frames in runs.items():
        beside = BESIDE.get(name, "plain") if name != "plain" else ""
        gain = difference(accuracy[name], accuracy[beside]) if beside in accuracy else ""
        steps = np.mean([at(equal, frame.samples, frame.step + 1) for frame in frames])
        cut = 100 * np.mean([f.frac_cut.mean() for f in frames])
        reached = spread([100 * share for share in accuracy[name]], 1)
        seconds = spread([at(equal, frame.samples, frame.seconds) for frame in frames], 1)
        flags = f"`{ROWS[name]}`" if ROWS[name] else ""
        print(f"| {name} | {flags} | {reached} | {gain} | {beside} | {steps:.0f} | {cut:.1f} % | "
              f"{seconds} |")
    start = np.mean([measured[0] for _, measured in curves["plain"]])
    print(f"\nπ₀'s accuracy: {100 * start:.1f} %")


def main(args):
    unknown = [name for name in args.rows if name not in ROWS]
    if unknown:
        die(f"--rows {' '.join(unknown)}: wanted some of {', '.join(ROWS)}")
    if not args.table_only:
        utils.run.time = SimpleNamespace(perf_counter=time.process_time)  # the clock of every CSV's seconds
        for seed in args.seeds:  # the rows of a seed one after the other: a slow hour slows all of them
            for name in args.rows:
                train(name, seed, args)
    table(read(args))


if __name__ == "__main__":
    main(parse(Args))
