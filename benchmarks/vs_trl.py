"""train_grpo.py against TRL's GRPOTrainer (1.16) on the CPU of one machine: seconds a step, what is learned.

Speed: both train the same GPT-2 (4 layers, 128 wide, 4 heads, 65 characters, the same random weights) by the
same objective: 8 prompts of 32 characters, 8 answers to each, exactly 64 new tokens, a reference (beta > 0),
one update a rollout. The engines take turns, ours in each dtype and, with --compile, compiled too (that falls
into the warm-up); a turn is a row of the CSV: the medians of its steps by two clocks. seconds_per_step: the
script's own (`seconds` in its CSV; TRL's: from on_step_begin to on_log). wall_per_step: from one call of
the reward function to the next, so with all that lies between two steps.
Learning (--learn): both begin at sft.py's π₀ and are rewarded for glad words, in float32, with several seeds:
a CSV a run, their differences in summary.json, one figure. Both ask the same prompts in a step and draw
answers of their own, so the curves agree only up to chance.
Left out: vLLM (it needs a GPU or a server), other models.
Run: python benchmarks/vs_trl.py (needs pip install -e ".[dev]"; on a machine with nothing else to do)
"""
import csv
import io
import os
import random
import signal
import string
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean, median, stdev
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent))

from engines import CURVE, PHASES, ROOT, Work, alone, prepare, run_ours, run_trl, shares  # noqa: E402
from engines import side_by_side  # noqa: E402  (engines first: it puts the root on the path)

import torch  # noqa: E402

from model import GPT, GPTConfig  # noqa: E402
from policy import load_policy  # noqa: E402
from train_grpo import Args as Defaults  # noqa: E402
from utils.cli import at_least, atomic_write, die, need, parse  # noqa: E402
from utils.device import pick_autocast, write_run_record  # noqa: E402
from utils.text import heading_prompts, load_corpus, split  # noqa: E402
from utils.tokenizer import Tokenizer  # noqa: E402

CHARACTERS = string.ascii_letters + string.digits + " .,"  # 65; no line break, so no stop can end an answer
COLUMNS = ["run", "engine", "dtype", "compiled", "prompts_per_step", "group_size", "prompt_len", "max_new",
           "seconds_per_step", "wall_per_step", "fastest", "slowest", "steps", "tokens_per_s", *PHASES,
           "other"]
SIZES = COLUMNS[4:8]
LAST = 10  # steps whose mean says what a run has learned


@dataclass
class Args:
    learn: bool = False  # compare what is learned, not seconds a step
    steps: int | None = None  # 20 timed ones in every turn; with --learn 60 in all
    warmup: int = 3  # steps before them that don't count
    rounds: int = 2  # how often each engine has its turn
    compile: bool = False  # turns of ours with train_grpo.py's --compile, too
    prompt_len: int = 32
    group_size: int = 8
    prompts_per_step: int = 8
    max_new: int | None = None  # 64; with --learn 48
    policy: str = "out/sft/policy.pth"  # --learn: π₀
    data: str = "auto"  # --learn: where prompts come from, as in sft.py
    objectives: tuple[Literal["grpo", "dapo"], ...] = ("grpo", "dapo")  # --learn
    seeds: int = 3  # --learn
    jobs: int = 1  # --learn: turns side by side; they share the threads
    threads: int = 2
    seed: int = 0  # --learn: the first one
    out: str | None = None  # results/vs_trl.csv; with --learn the folder results/learn


# ---- seconds a step ----
def speed(args, folder):
    need("trl", "dev")
    work = Work(**sizes(args), steps=args.warmup + args.steps, seed=args.seed, threads=args.threads,
                objective="grpo", beta=0.04, lr=1e-4, reward="letter_share")
    draw, count = random.Random(args.seed), 10 * args.prompts_per_step
    prompts = ["".join(draw.choices(CHARACTERS, k=args.prompt_len)) for _ in range(count)]
    torch.manual_seed(args.seed)
    model = GPT(GPTConfig(len(CHARACTERS), args.prompt_len + args.max_new, n_layer=4, n_head=4, n_embd=128))
    prepare(folder, model, Tokenizer("char", list(CHARACTERS)), prompts, args.max_new)
    _, auto = pick_autocast(torch.device("cpu"))
    dtypes = list(dict.fromkeys((auto, "fp32")))  # without bf16 in the hardware ours is fp32 anyway
    plan = []
    for dtype in ("bf16", "fp32"):
        for turn in (("ours", dtype, False), ("trl", dtype, False), ("ours", dtype, True)):
            if turn[0] == "trl" or dtype in dtypes and (args.compile or not turn[2]):
                plan.append(turn)
    rows, turns, load = [], [], os.getloadavg()
    for run in range(1, args.rounds + 1):
        for engine, dtype, compiled in plan:
            function, more = (run_ours, (compiled,)) if engine == "ours" else (run_trl, ())
            result = alone(function, folder, work, dtype, *more)
            label = f"{dtype} compiled" if compiled else dtype
            turns.append((engine, label, result))
            rows.append(row_of(run, engine, dtype, compiled, result, work, args.warmup))
            print(f"run {run}  {engine:4} {label}: {rows[-1]['seconds_per_step']:.3f} s a step, "
                  f"{rows[-1]['wall_per_step']:.3f} from step to step", flush=True)
    for dtype in dtypes:  # apart from the turns above: those carry no timers
        result = alone(run_ours, folder, work, dtype, False, True)
        parts = shares(result, args.warmup)
        rows.append(row_of("phases", "ours", dtype, False, result | parts, work, args.warmup))
        shown = ", ".join(f"{name} {100 * share:.0f} %" for name, share in parts.items())
        print(f"our step in {dtype}: {shown}", flush=True)
    found = summary(turns, args.warmup)
    for clock, label in (("seconds", "a step"), ("wall", "from step to step")):
        for name, middle in found["medians"][clock].items():
            ratio = found["trl_best_over_ours"][clock].get(name)
            times = f", {ratio:.2f} times TRL's steps a second (its best dtype)" if ratio else ""
            print(f"{label}: {name} {middle:.3f} s{times}")
    atomic_write(args.out, table(COLUMNS, rows))
    write_run_record(args.out, args, **found, load_before=load, turn_threads=args.threads, auto_dtype=auto,
                     trl_versions=trl_versions(),
                     turns=[{"engine": e, "dtype": d, "seconds": result["seconds"], "wall": result["wall"]}
                            for e, d, result in turns])
    print(f"wrote {args.out} and {Path(args.out).with_suffix('.json')}")


def sizes(args):
    return {name: getattr(args, name) for name in SIZES}


def row_of(run, engine, dtype, compiled, result, work, warmup):
    """The turn as a row of the CSV; its first `warmup` steps don't count."""
    seconds = result["seconds"][warmup:]
    middle, tokens = median(seconds), work.prompts_per_step * work.group_size * work.max_new
    return {"run": run, "engine": engine, "dtype": dtype, "compiled": int(compiled), **sizes(work),
            "seconds_per_step": middle, "wall_per_step": median(result["wall"][warmup:]),
            "fastest": min(seconds), "slowest": max(seconds), "steps": len(seconds),
            "tokens_per_s": tokens / middle,
            **{name: result[name] for name in (*PHASES, "other") if name in result}}


def summary(turns, warmup):
    """Turns (engine, dtype, result) -> medians over the steps of each engine and dtype, and ratios."""
    medians = {clock: {} for clock in ("seconds", "wall")}
    kinds = list(dict.fromkeys((engine, dtype) for engine, dtype, _ in turns))
    for clock, found in medians.items():
        for engine, dtype in kinds:
            steps = [s for e, d, result in turns if (e, d) == (engine, dtype) for s in result[clock][warmup:]]
            found[f"{engine} {dtype}"] = median(steps)
    ratios = {}
    for clock, found in medians.items():
        best = min(seconds for name, seconds in found.items() if name.startswith("trl"))
        ratios[clock] = {name: best / seconds for name, seconds in found.items() if name.startswith("ours")}
    return {"medians": medians, "trl_best_over_ours": ratios}


# ---- what is learned ----
def learn(args, folder):
    model, tokenizer = load_policy(args.policy)
    if tokenizer.name != "bpe":
        die(f"--policy {args.policy} has the tokenizer {tokenizer.name!r}: wanted bpe, whose stop is one "
            "token as TRL's must be: run `python sft.py`")
    if args.prompt_len + args.max_new > model.config.block_size:
        die(f"--prompt_len {args.prompt_len} + --max_new {args.max_new} don't fit the policy's context of "
            f"{model.config.block_size} tokens: shorten one")
    need("trl", "dev")
    text, source = load_corpus(args.data)
    rows = heading_prompts(split(text)[0], tokenizer, args.prompt_len, source).tolist()
    texts = {tokenizer.decode(row): row for row in rows}  # once each; the first word may be a part of one
    prompts = [prompt for prompt, row in texts.items() if tokenizer.encode(prompt) == row]
    if len(prompts) < 2 * args.prompts_per_step:
        die(f"--prompts_per_step {args.prompts_per_step}: wanted at most half of the {len(prompts)} prompts "
            f"of {source}")
    prepare(folder, model, tokenizer, prompts, args.max_new)
    calls, names = [], []
    for objective in args.objectives:
        for seed in range(args.seed, args.seed + args.seeds):
            work = Work(**sizes(args), steps=args.steps, seed=seed, threads=max(1, args.threads // args.jobs),
                        objective=objective, beta=0.05, lr=Defaults.lr, reward="sentiment")
            for engine, function in (("ours", run_ours), ("trl", run_trl)):
                calls.append((function, folder, work, "fp32"))
                names.append((engine, objective, seed))
    print(f"{len(prompts):,} prompts of {source}, {len(calls)} runs of {args.steps} steps", flush=True)
    runs, files = {}, []
    for number, result in side_by_side(calls, args.jobs):
        (engine, objective, seed), rows = names[number], result["rows"]
        runs[names[number]] = rows
        files.append(f"{args.out}/{engine}-{objective}-s{seed}.csv")
        atomic_write(files[-1], table(CURVE, rows))
        write_run_record(files[-1], args, engine=engine, work=asdict(calls[number][2]), dtype="fp32",
                         trl_versions=trl_versions())
        print(f"{files[-1]}: reward {last(rows, 'mean_r'):.3f}, KL {last(rows, 'kl'):.3f} in the last {LAST} "
              f"steps, {float(rows[-1]['seconds']):.0f} s", flush=True)
    found = compare(runs)
    for row in found:
        errors = "no standard error of one seed"
        if row["standard_errors"] is not None:
            errors = f"{row['standard_errors']:+.2f} standard errors"
        print(f"{row['objective']} {row['metric']}: ours {row['ours']:.4f}, TRL {row['trl']:.4f}, difference "
              f"{row['difference']:+.4f} ({errors}, {100 * row['of_rise']:+.1f} % of the rise); TRL took "
              f"{row['seconds_trl_over_ours']:.2f} times our seconds")
    write_run_record(f"{args.out}/summary.csv", args, comparison=found, trl_versions=trl_versions())
    draw(sorted(files), Path(args.out).with_suffix(".png"), folder)
    print(f"wrote {args.out}/summary.json and {Path(args.out).with_suffix('.png')}")


def last(rows, metric):
    return mean(float(row[metric]) for row in rows[-LAST:])


def compare(runs):
    """{(engine, objective, seed): rows of CURVE} -> a dict for each objective and metric, by the rule of two.

    A run's result is its mean over the last steps. difference: ours - TRL's, means over seeds;
    standard_error: √(s²/n + s²/n), each s an engine's unbiased std over its n seeds; of_rise: the difference
    over the mean result less the first step's mean, of all runs. agree: |difference| is at most two standard
    errors and 10 % of the rise.
    """
    found = []
    for objective in dict.fromkeys(o for _, o, _ in runs):
        picked = {e: [rows for (engine, o, _), rows in sorted(runs.items()) if (engine, o) == (e, objective)]
                  for e in ("ours", "trl")}
        took = {e: mean(float(rows[-1]["seconds"]) for rows in picked[e]) for e in picked}
        for metric in ("mean_r", "kl"):
            ends = {e: [last(rows, metric) for rows in picked[e]] for e in picked}
            began = mean(float(rows[0][metric]) for e in picked for rows in picked[e])
            ours, trl = mean(ends["ours"]), mean(ends["trl"])
            many = len(ends["ours"]) > 1
            error = sum(stdev(x) ** 2 / len(x) for x in ends.values()) ** 0.5 if many else None
            errors = (ours - trl) / error if error else None
            of_rise = (ours - trl) / ((ours + trl) / 2 - began)
            found.append({
                "objective": objective, "metric": metric, "ours": ours, "trl": trl,
                "seeds_ours": ends["ours"], "seeds_trl": ends["trl"], "first_step": began,
                "difference": ours - trl,
                "standard_error": error, "standard_errors": errors, "of_rise": of_rise,
                "agree": abs(errors) <= 2 and abs(of_rise) <= 0.1 if error else None,
                "seconds_trl_over_ours": took["trl"] / took["ours"]})
    return found


def draw(files, output, folder):
    """One figure of two that plot.py draws: against answers sampled, and below it against seconds."""
    from PIL import Image
    halves = []
    for x in ("samples", "seconds"):
        half = folder / f"{x}.png"
        subprocess.run([sys.executable, str(ROOT / "plot.py"), "--metric", "mean_r,kl", "--x", x, "--output",
                        str(half), *files], check=True, stdout=subprocess.DEVNULL)
        halves.append(Image.open(half).convert("RGB"))
    both = Image.new("RGB", (max(i.width for i in halves), sum(i.height for i in halves)), "white")
    both.paste(halves[0], (0, 0))
    both.paste(halves[1], (0, halves[0].height))
    atomic_write(output, lambda file: both.save(file, "png"))


# ---- both ----
def trl_versions():
    return {name: version(name) for name in ("trl", "transformers", "accelerate")}


def table(columns, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue().encode()


def main(args):
    default = (60, 48, "results/learn") if args.learn else (20, 64, "results/vs_trl.csv")
    for name, value in zip(("steps", "max_new", "out"), default):
        if getattr(args, name) is None:
            setattr(args, name, value)
    at_least(args, steps=LAST + 1 if args.learn else 2, warmup=0, rounds=1, threads=1, prompt_len=1,
             group_size=2, prompts_per_step=1, max_new=1, seeds=1, jobs=1)
    if args.learn and (args.out.endswith(".csv") or not Path(args.out).name):
        die(f"--out {args.out}: with --learn wanted a folder; the figure goes beside it as .png")
    if not args.learn and not args.out.endswith(".csv"):
        die(f"--out {args.out}: wanted a name that ends in .csv; the record goes beside it as .json")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the temporary folder goes
    with tempfile.TemporaryDirectory(prefix="vs_trl-") as name:
        os.environ.update(TMPDIR=name, HF_HOME=f"{name}/cache", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="",
                          TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(args.threads))  # for the turns
        (learn if args.learn else speed)(args, Path(name))


if __name__ == "__main__":
    main(parse(Args))
