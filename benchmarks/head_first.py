"""The table of docs/vision/lite0.md from the CSVs of `results.sh lite0`: is "the head first" good advice?

Top-1 on the test before and after, mean ± std over the seeds that are there. Seconds of the updates are those
of the fastest seed, since other programs may share the machine.
Left out: the runs themselves. Run: python benchmarks/head_first.py
"""
import itertools
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.cli import die, parse  # noqa: E402
from utils.figure import read_csv  # noqa: E402

DATA, STARTS = ("mnist5k", "photographs"), ("published", "random")
WAYS = {  # what is trained: the runs that it is made of, one after the other
    "the head alone": ("head",), "all weights": ("all",), "the head, then all weights": ("first", "then")}


@dataclass
class Args:
    folder: str = "results/lite0"  # of the CSVs and their records
    seeds: int = 3  # the first so many


def finished(folder, names):
    """Whether all these runs have come to their test."""
    records = [folder / f"{name}.json" for name in names]
    return all(record.is_file() and "test_after" in record.read_text(encoding="utf-8") for record in records)


def one_seed(folder, names):
    """The runs of one seed, one after the other -> top-1 on the test before and after in %, seconds."""
    records = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names]
    seconds = sum(read_csv(folder / f"{name}.csv")["seconds"].max() for name in names)
    return 100 * records[0]["test_before"]["top1"], 100 * records[-1]["test_after"]["top1"], seconds


def mean_std(values):
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def main(args):
    folder, lines = Path(args.folder), []
    for data, start, way in itertools.product(DATA, STARTS, WAYS):
        every = [[f"{part}-{start}-{data}-s{seed}" for part in WAYS[way]] for seed in range(args.seeds)]
        runs = [one_seed(folder, names) for names in every if finished(folder, names)]
        if runs:
            before, after, seconds = zip(*runs)
            lines.append(f"| {data} | {start} | {way} | {mean_std(before)} % | {mean_std(after)} % | "
                         f"{min(seconds):.0f} | {len(runs)} |")
    if not lines:
        die(f"no finished runs in {folder}: bash benchmarks/results.sh lite0")
    print("| data | weights | what is trained | top-1 before | top-1 after | seconds | seeds |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))


if __name__ == "__main__":
    main(parse(Args))
