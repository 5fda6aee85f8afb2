"""Seconds and memory of a GRPO step against answer length, prompt length, group size, model, processes.

One factor at a time. Each point is train_grpo.py itself in a fresh process (several: torchrun), with random
weights, 65 characters, no early stop, beta > 0: the median of its steps behind the warm-up; the peak of its
resident memory (rank 0's) less that of the same program with next to no work; and the floor of floor.py at
the machine's measured rates. An exponent is the slope of a straight line through log(y) against log(x).
--memory: what GRPO and PPO hold instead (memory.py).
Left out: several machines, GPUs.
Run: python benchmarks/scaling.py (seven minutes on two cores with nothing else to do; --memory: one)
"""
import csv
import io
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402

import memory  # noqa: E402
from floor import floors, measure_machine, shared_by_itself  # noqa: E402
from fresh import config_of, point, program, train, weights  # noqa: E402
from model import GPT, SIZES  # noqa: E402
from utils.cli import at_least, atomic_write, die, parse  # noqa: E402
from utils.device import pick_autocast, write_run_record  # noqa: E402

PANELS = {"max_new": "answer length (tokens)", "prompt_len": "prompt length (tokens)",
          "group_size": "group size (answers), prompts of {0}, answers of {1}", "model": "model (weights)"}
COLUMNS = ["factor", "x", "model", "prompts_per_step", "group_size", "prompt_len", "max_new", "processes",
           "seconds_per_step", "fastest", "slowest", "floor_seconds", "times_floor", "mb", "peak_mem_mb"]


@dataclass
class Args:
    max_new: tuple[int, ...] = (32, 64, 128, 256, 512)
    prompt_len: tuple[int, ...] = (32, 64, 128, 256, 384)
    group_size: tuple[int, ...] = (2, 4, 8, 16, 32)
    model: tuple[Literal[tuple(SIZES)], ...] = ("nano", "micro", "mini")
    processes: tuple[int, ...] = (1, 2)
    base: tuple[int, int, int, int] = (8, 8, 32, 64)  # prompts, answers to each, lengths of prompt and answer
    group_at: tuple[int, int] = (192, 32)  # lengths of prompt and answer at which the group size varies
    steps: int = 5  # timed ones of every point
    warmup: int = 2  # steps before them that don't count
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    threads: int = 2  # of all processes together
    seed: int = 0
    memory: bool = False  # the table of what is held instead, at --base
    memory_models: tuple[Literal[tuple(SIZES)], ...] = ("nano", "gpt2")
    out: str = "results/scaling.csv"


def plan(args):
    """-> (factor, x, point) of each row; x of a model is its number of weights."""
    B, G, P, T = args.base
    rows = [("max_new", T, point("nano", B, G, P, T)) for T in args.max_new]
    rows += [("prompt_len", P, point("nano", B, G, P, T)) for P in args.prompt_len]
    rows += [("group_size", G, point("nano", B, G, *args.group_at)) for G in args.group_size]
    rows += [("model", weights(GPT, config_of(name, P + T)), point(name, B, G, P, T)) for name in args.model]
    return rows + [("processes", n, point("nano", B, G, P, T, n)) for n in args.processes]


def exponent(x, y):
    """b of the least-squares line log y = a + b·log x; None with fewer than two different x."""
    pairs = [(math.log(u), math.log(v)) for u, v in zip(x, y) if v > 0]
    if len({u for u, _ in pairs}) < 2:
        return None
    mean_x, mean_y = (sum(column) / len(pairs) for column in zip(*pairs))
    spread = sum((u - mean_x) ** 2 for u, _ in pairs)
    return sum((u - mean_x) * (v - mean_y) for u, v in pairs) / spread


# ---- the figure ----
def draw(rows, exponents, args):
    """Four panels, seconds against a factor on logarithmic axes, the floor as a line -> PNG bytes."""
    import matplotlib
    from matplotlib.figure import Figure
    from utils.figure import COLORS, STYLE
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 6.4), layout="constrained")
        axes = figure.subplots(2, 2).flatten()
        for ax, (factor, label) in zip(axes, PANELS.items()):
            found = [row for row in rows if row["factor"] == factor]
            x = [row["x"] for row in found]
            slopes = exponents.get(factor, {})
            for key, name, color, style in (("seconds_per_step", "measured", COLORS[0], "o"),
                                            ("floor_seconds", "floor", COLORS[1], "-")):
                slope = slopes.get(key)
                name += "" if slope is None else f", slope {slope:.2f}"
                ax.plot(x, [row[key] for row in found], style, color=color, label=name)
            ax.set(xscale="log", yscale="log", xlabel=label.format(*args.group_at), ylabel="s a step")
            if factor != "model":
                ax.set_xticks(x, [str(value) for value in x])
                ax.xaxis.minorticks_off()  # those of y stay: less than a decade may hold no major one
            if found:
                ax.legend()
        image = io.BytesIO()
        figure.savefig(image, format="png", dpi=150)
    return image.getvalue()


def main(args):
    at_least(args, steps=1, warmup=0, threads=1)
    if not args.out.endswith(".csv"):
        die(f"--out {args.out}: wanted a name that ends in .csv; record and figure go beside it")
    if min([1, *args.base, *args.group_at, *args.max_new, *args.prompt_len, *args.processes]) < 1:
        die("--max_new, --prompt_len, --processes, --base and --group_at: wanted numbers of at least 1")
    if min([2, *args.group_size, args.base[1]]) < 2:
        die("--group_size, and the second of --base: wanted at least 2 answers to each prompt")
    if args.memory:
        return memory.table(args)
    device, load = torch.device("cpu"), os.getloadavg()
    torch.set_num_threads(args.threads)
    dtype = pick_autocast(device, args.dtype)[1]
    machine = measure_machine(device, dict.fromkeys(("fp32", dtype)), [(2048, 2048, 2048)], (1, 256))
    nothing, measured, rows = program(args), {}, []
    for factor, x, p in plan(args):
        B, G, P, T = (p[k] for k in ("prompts_per_step", "group_size", "prompt_len", "max_new"))
        config = config_of(p["model"], P + T)
        key = tuple(p.values())  # the base is a point of several factors
        if key not in measured:
            measured[key] = train(config, p, args, steps=args.warmup + args.steps)
        seconds, peak = measured[key][0][args.warmup:], measured[key][1]
        floor = sum(s for s, _ in floors(config, B, G, P, T, shared_by_itself(P, T), dtype, machine).values())
        rows.append({"factor": factor, "x": x, **p, "seconds_per_step": median(seconds),
                     "fastest": min(seconds), "slowest": max(seconds), "floor_seconds": floor,
                     "times_floor": median(seconds) / floor, "mb": peak - nothing, "peak_mem_mb": peak})
        print(f"{factor:10} {x:9}: {median(seconds):.3f} s a step, {median(seconds) / floor:.2f} times the "
              f"floor, {peak - nothing:.0f} MB", flush=True)
    exponents = {}
    for factor in dict.fromkeys(row["factor"] for row in rows):
        found = [row for row in rows if row["factor"] == factor]
        exponents[factor] = {key: exponent([row["x"] for row in found], [row[key] for row in found])
                             for key in ("seconds_per_step", "floor_seconds", "mb")}
        print(f"exponents in {factor}: " + ", ".join(f"{k} {v if v is None else round(v, 2)}"
                                                     for k, v in exponents[factor].items()))
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    atomic_write(args.out, table.getvalue().encode())
    figure = Path(args.out).with_suffix(".png")
    atomic_write(figure, draw(rows, exponents, args))
    write_run_record(args.out, args, device="cpu", compute=dtype, machine=machine, exponents=exponents,
                     program_mb=nothing, load_before=load)
    print(f"wrote {args.out}, {figure} and {Path(args.out).with_suffix('.json')}")


if __name__ == "__main__":
    main(parse(Args))
