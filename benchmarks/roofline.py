"""Each phase of a GRPO step against its floor: arithmetic and bytes counted, the machine's rates measured.

A phase can't be faster than max(operations / matmul rate, bytes / copy bandwidth); formulas are in floor.py.
The matmul rate is that of the large product (--large) in the phase's precision, the bandwidth that of the
copy whose size is nearer, by ratio, to what the phase holds. Counted is what the algorithm needs: of the
causal square the half that is looked at, every tensor once. Phases are timed in turn, each is the median of
the rounds: prefill (one prompt a group, and the first draw), decode (a rollout less its prefill), reference,
update (score, loss, backward, clip, AdamW). Rows of bf16 sample in float32 too, as train_grpo.py does.
Left out: operations that are no matmul: their time is in the measured seconds, not in the floor.
Run: python benchmarks/roofline.py (a minute, on a machine with nothing else to do; --compile: two more)
"""
import copy
import csv
import functools
import io
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402

from floor import bytes_moved, floors, flops, measure_machine, shared_by_itself, timed  # noqa: E402
from generate import generate, score  # noqa: E402
from grpo import OBJECTIVES, grpo_loss  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from utils.cli import at_least, atomic_write, die, parse  # noqa: E402
from utils.device import pick_autocast, pick_device, write_run_record  # noqa: E402

COLUMNS = ["mode", "dtype", "phase", "gflop", "gflop_done", "mb", "seconds", "floor_seconds", "bound",
           "times_floor", "share_of_rate"]


@dataclass
class Args:
    layers: int = 4
    heads: int = 4
    width: int = 128
    vocab: int = 65
    prompts_per_step: int = 8
    group_size: int = 8
    prompt_len: int = 32
    max_new: int = 64
    share_prompt: Literal["auto", "yes", "no"] = "auto"  # as in train_grpo.py
    repeats: int = 20  # timed rounds
    warmup: int = 3  # rounds before them that don't count
    large: int = 2048  # rows and columns of the matmul that is the roof
    copy_mb: tuple[int, int] = (1, 256)  # copied in the cache, and out of it
    compile: bool = False  # measure reference and update compiled, too
    device: str = "auto"
    threads: int = 2
    seed: int = 0
    out: str = "results/roofline.csv"


# ---- what the phases take ----
def work(config, B, G, P, T, shared, device, dtype, fast=False):
    """The phases as functions without arguments, the same calls as in train_grpo.py: {name: function}."""
    autocast, _ = pick_autocast(device, dtype)
    policy = GPT(config).to(device).eval()
    ref = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4, weight_decay=0.0, fused=True)
    score_policy, score_ref = (functools.partial(score, model) for model in (policy, ref))
    if fast:
        score_policy, score_ref = (torch.compile(by, dynamic=True) for by in (score_policy, score_ref))
    tokens = torch.randint(config.vocab_size, (B * G, P + T), device=device)
    tokens[:, :P] = tokens[::G, :P].repeat_interleave(G, 0)
    uniforms, mask = torch.rand(B * G, T, device=device), torch.ones(B, G, T, dtype=torch.bool, device=device)
    adv, group, objective = torch.randn(B, G, device=device), G if shared else 1, OBJECTIVES["grpo"]
    logp_ref = []

    def rollout(length):
        generate(policy, tokens[::G, :P], length, G, uniforms=uniforms[:, :length])

    def reference():
        with torch.no_grad(), autocast():
            logp_ref[:] = [score_ref(tokens, P, 1.0, None, group)[0].view(B, G, T)]

    def update():
        with autocast():
            logp = score_policy(tokens, P, 1.0, None, group)[0].view(B, G, T)
        loss, _ = grpo_loss(logp, logp.detach(), logp_ref[0], adv, mask, objective, max_len=T,
                            n_tokens=mask.sum(), n_answers=B * G)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"prefill": lambda: rollout(1), "rollout": lambda: rollout(T), "reference": reference,
            "update": update}


def measure(phases, rounds, warmup, device):
    """Median seconds of each phase, timed in turn; decode is a round's rollout less its prefill."""
    times = [{name: timed(phase, device) for name, phase in phases.items()} for _ in range(warmup + rounds)]
    for found in times:
        if "rollout" in found:
            found["decode"] = found.pop("rollout") - found["prefill"]
    return {name: median(found[name] for found in times[warmup:]) for name in times[0]}


def decode_rest(config, args, step, floor, device):
    """Where a decode step's seconds go -> {what: seconds}.

    Dispatch is the time of the same calls with next to no arithmetic: one answer, one number a head. Not in a
    layer are embedding, output head and draw: what a model of one layer takes, less the time of a layer.
    """
    B, G, P, T = args.prompts_per_step, args.group_size, args.prompt_len, args.max_new

    def seconds(c, B, G):
        phases = work(c, B, G, P, T, True, device, "fp32")
        phases = {name: phases[name] for name in ("prefill", "rollout")}
        return measure(phases, args.repeats, args.warmup, device)["decode"] / (T - 1)
    found = {"a decode step": step, "its floor": floor,
             "dispatch and Python": seconds(replace(config, n_embd=config.n_head), 1, 1)}
    found["operations above the floor"] = step - floor - found["dispatch and Python"]
    if config.n_layer > 1:
        one = seconds(replace(config, n_layer=1), B, G)
        found["of the step, not in a layer"] = one - (step - one) / (config.n_layer - 1)
    return found


def row_of(mode, dtype, phase, seconds, counted, done, moved, floor, rate):
    return {"mode": mode, "dtype": dtype, "phase": phase, "gflop": counted / 1e9, "gflop_done": done / 1e9,
            "mb": moved / 1e6, "seconds": seconds, "floor_seconds": floor[0], "bound": floor[1],
            "times_floor": seconds / floor[0], "share_of_rate": counted / seconds / rate}


def main(args):
    at_least(args, layers=1, heads=1, width=1, vocab=2, prompts_per_step=1, group_size=1, prompt_len=1,
             max_new=2, repeats=1, warmup=0, large=16, threads=1)
    if not args.out.endswith(".csv"):
        die(f"--out {args.out}: wanted a name that ends in .csv; the record goes beside it as .json")
    if args.width % args.heads:
        die(f"--heads {args.heads} doesn't divide --width {args.width}")
    if min(args.copy_mb) < 1:
        die(f"--copy_mb {args.copy_mb}: wanted two sizes of at least 1 MB")
    device, load = pick_device(args.device), os.getloadavg()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    B, G, P, T = args.prompts_per_step, args.group_size, args.prompt_len, args.max_new
    config = GPTConfig(args.vocab, P + T, args.layers, args.heads, args.width)
    shared = shared_by_itself(P, T) if args.share_prompt == "auto" else args.share_prompt == "yes"
    _, auto = pick_autocast(device)
    dtypes = list(dict.fromkeys(("fp32", auto)))
    C, tokens = args.width, B * P + B * G * (T - 1) if shared else B * G * (P + T - 1)
    products = [(tokens, C, 4 * C), (tokens, 4 * C, C), (B * G, C, 4 * C), (B * G * T, C, args.vocab),
                (args.large, args.large, args.large)]
    machine = measure_machine(device, dtypes, products, args.copy_mb)
    for found in machine["products"]:
        shape = f"({found['m']} x {found['k']}) · ({found['k']} x {found['n']})"
        print(f"matmul {found['dtype']} {shape:28} {found['rate'] / 1e9:8.1f} GFLOP/s")
    print("the last of each precision is the roof; copies, read + written: " + ", ".join(
        f"{found['bytes'] / 1e6:.0f} MB at {found['rate'] / 1e9:.1f} GB/s" for found in machine["copies"]))
    rows = []
    modes = ("eager", "compiled") if args.compile else ("eager",)
    for mode, dtype in [(mode, dtype) for mode in modes for dtype in dtypes]:
        phases = work(config, B, G, P, T, shared, device, dtype, mode == "compiled")
        seconds = measure(phases, args.repeats, args.warmup, device)
        counted, done = (flops(config, B, G, P, T, shared, d) for d in (False, True))
        moved = bytes_moved(config, B, G, P, T, shared, 2 if dtype == "bf16" else 4)
        floor = floors(config, B, G, P, T, shared, dtype, machine)
        timed_now = [phase for phase in floor if mode == "eager" or phase in ("reference", "update")]
        for phase in timed_now:
            fp32 = phase in ("prefill", "decode")
            rows.append(row_of(mode, dtype, phase, seconds[phase], counted[phase], done[phase],
                               moved[phase][0], floor[phase], machine["fp32" if fp32 else dtype]))
        total = sum(seconds[phase] for phase in timed_now), sum(floor[phase][0] for phase in timed_now)
        print(f"\n{mode}, {dtype}: {1e3 * total[0]:.1f} ms for {', '.join(timed_now)}, "
              f"{total[0] / total[1]:.2f} times the floor")
        for row in rows[-len(timed_now):]:
            print(f"  {row['phase']:9} {row['gflop']:7.2f} GFLOP {row['mb']:7.1f} MB "
                  f"{1e3 * row['seconds']:8.2f} ms, floor {1e3 * row['floor_seconds']:7.2f} "
                  f"({row['bound']}): x {row['times_floor']:.2f}, {100 * row['share_of_rate']:.0f} % "
                  "of the matmul rate")
    step, bound = (rows[1][key] / (T - 1) for key in ("seconds", "floor_seconds"))
    rest = decode_rest(config, args, step, bound, device)
    print("\nwhere an eager decode step's time goes:")
    for name, seconds in rest.items():
        print(f"  {name:28} {1e3 * seconds:7.3f} ms {100 * seconds / step:4.0f} %")
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    atomic_write(args.out, table.getvalue().encode())
    write_run_record(args.out, args, device=str(device), shared=shared, machine=machine, decode_step=rest,
                     load_before=load)
    print(f"wrote {args.out} and {Path(args.out).with_suffix('.json')}")


if __name__ == "__main__":
    main(parse(Args))
