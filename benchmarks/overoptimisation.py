"""Score and gold against the KL to π₀, of GRPO, PPO and best-of-n: a table, and a figure (arXiv:2210.10760).

The x axis is the KL in nats an answer: a CSV's kl, in nats a token, times the mean length; for best-of-n
log n - (n - 1)/n. RL's numbers are means of the last --smooth steps. So a peak is the best of many noisy
means, and a little too high.
Left out: a fit of the curves.
Run: python benchmarks/overoptimisation.py (after bash benchmarks/results.sh overopt)
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import numpy as np  # noqa: E402

from utils.cli import AtLeast, atomic_write, die, parse  # noqa: E402
from utils.figure import COLORS, DASHES, MARKERS, STYLE, draw_run, read_csv  # noqa: E402

METHODS = {"grpo": "GRPO", "ppo": "PPO", "best_of_n": "best-of-n"}


@dataclass
class Args:
    folder: str = "results/overoptimisation"  # of METHOD-PAIRS-sSEED.csv
    pairs: tuple[int, ...] = (1024, 4096, 12288)  # of the reward model
    smooth: Annotated[int, AtLeast(1)] = 5  # steps of RL behind a number
    equal: tuple[int, ...] = (16, 256)  # n of best-of-n at whose KL the others are read
    output: str = "results/overoptimisation.png"  # the figure


def read(path, smooth):
    """A CSV -> its KL in nats an answer, gold and score: three arrays."""
    frame = read_csv(path)
    if "n" in frame:
        return [frame[name].to_numpy() for name in ("kl_answer", "gold", "mean_r")]
    frame = frame.assign(kl_answer=frame.kl * frame.length)[["kl_answer", "gold", "mean_r"]]
    return list(frame.rolling(smooth).mean().dropna().to_numpy().T)


def at(kl, value, wanted):
    """The value where a run first reaches this KL, between two steps on a line; NaN if it never does."""
    reached = kl >= wanted - 1e-3  # a CSV's numbers are rounded
    after = int(np.argmax(reached))
    if after == 0:
        return value[0] if reached[0] else np.nan
    return np.interp(wanted, kl[after - 1:after + 1], value[after - 1:after + 1])


def summary(kl, gold, score):
    """What a run says: start, peak and end of gold, KL at the peak and at the end, score at both ends."""
    peak = int(gold.argmax())
    return {"start": gold[0], "peak": gold[peak], "end": gold[-1], "kl_peak": kl[peak], "kl_end": kl[-1],
            "score_start": score[0], "score_end": score[-1]}


def runs_of(args):
    """-> {(method, pairs): {seed: (KL, gold, score)}} of the CSVs that are there."""
    found = {}
    for method in METHODS:
        for pairs in args.pairs:
            paths = sorted(Path(args.folder).glob(f"{method}-{pairs}-s*.csv"))
            if paths:
                found[method, pairs] = {path.stem.rpartition("-s")[2]: read(path, args.smooth)
                                        for path in paths}
    if not found:
        die(f"no METHOD-PAIRS-sSEED.csv in {args.folder}: run `bash benchmarks/results.sh overopt` first")
    return found


def table(found, args):
    """Prints three tables in Markdown: each run, the mean of the seeds, the methods at best-of-n's KL."""
    print("| method, pairs, seed | gold: start | peak | end | KL there | at the end | score: start | end |")
    print("|---" * 8 + "|")
    for (method, pairs), seeds in found.items():
        for seed, run in seeds.items():
            s = summary(*run)
            cells = [f"{s[name]:.2f}" for name in ("start", "peak", "end")]
            cells += [f"{s[name]:.1f}" for name in ("kl_peak", "kl_end", "score_start", "score_end")]
            print(f"| {METHODS[method]}, {pairs:,}, {seed} | {' | '.join(cells)} |")
    print("\n| mean ± std of the seeds | gold's rise | KL at the peak | gold's fall | score at the end |")
    print("|---" * 5 + "|")
    for (method, pairs), seeds in found.items():
        each = [summary(*run) for run in seeds.values()]
        columns = {"rise": [s["peak"] - s["start"] for s in each], "KL": [s["kl_peak"] for s in each],
                   "fall": [s["peak"] - s["end"] for s in each], "score": [s["score_end"] for s in each]}
        spread = int(len(each) > 1)  # of one seed: 0
        cells = [f"{np.mean(x):.2f} ± {np.std(x, ddof=spread):.2f}" for x in columns.values()]
        print(f"| {METHODS[method]}, {pairs:,} | {' | '.join(cells)} |")
    kls = {n: np.log(n) - (n - 1) / n for n in args.equal}
    print("\n| gold, score at the KL of |" + " |".join(f" n = {n}: {kl:.2f}" for n, kl in kls.items()) + " |")
    print("|---" * (len(kls) + 1) + "|")
    for (method, pairs), seeds in found.items():
        cells = []
        for wanted in kls.values():
            both = [[at(kl, value, wanted) for value in values] for kl, *values in seeds.values()]
            cells.append(", ".join(f"{mean:.2f}" for mean in np.mean(both, 0)))
        print(f"| {METHODS[method]}, {pairs:,} | " + " | ".join(cells) + " |")


def figure(found, args):
    """Above gold, below the score; a column for each number of pairs. Bands: std over the seeds.

    A seed that goes further than the others does so as a thin line.
    """
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(9.5, 5.0), layout="constrained")
        axes = fig.subplots(2, len(args.pairs), sharex=True, sharey="row", squeeze=False)
        for column, pairs in enumerate(args.pairs):
            axes[0, column].set_title(f"{pairs:,} pairs", fontsize=9.5)
            for i, (method, label) in enumerate(METHODS.items()):
                style = {"color": COLORS[i], "linestyle": DASHES[i], "marker": MARKERS[i], "label": label}
                seeds = found.get((method, pairs), {}).values()
                for row, which in ((0, 1), (1, 2)):
                    curves = [rising(run[0], run[which]) for run in seeds]
                    if curves:
                        draw_run(axes[row, column], curves, style, i / len(METHODS))
            axes[1, column].set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        axes[0, 0].set_ylabel("gold: the judge taste")
        axes[1, 0].set_ylabel("score: the reward model")
        axes[0, 0].legend()
        fig.supxlabel("KL to π₀, nats an answer (on a scale of square roots)",
                      fontsize=STYLE["axes.labelsize"])
        atomic_write(args.output, lambda file: fig.savefig(file, format="png", dpi=150))


def rising(kl, value):
    """A run's points in the order of their KL; those of one KL become their mean."""
    x, place = np.unique(kl, return_inverse=True)
    return x, np.bincount(place, value) / np.bincount(place)


def main(args):
    found = runs_of(args)
    table(found, args)
    figure(found, args)
    print(f"\n{args.output}")


if __name__ == "__main__":
    main(parse(Args))
