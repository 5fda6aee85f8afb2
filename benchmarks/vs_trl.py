"""Seconds a step on the CPU: train_grpo.py against TRL's GRPOTrainer (1.16), in turn on the same machine.

Both train the same GPT-2 (4 layers, 128 wide, 4 heads, 65 characters, the same random weights) by the same
objective: 8 prompts of 32 characters, 8 answers to each, exactly 64 new tokens, a reference (beta > 0), one
update a rollout. Every turn is a process of its own that loads one engine only, and a row of the CSV: the
medians of its steps by two clocks. seconds_per_step: the engine's own step (ours: `seconds` in its CSV;
TRL's: on_step_begin to on_step_end). wall_per_step: from one call of the reward function to the next, so with
all that lies between two steps.
Left out: vLLM (it needs a GPU or a server), compiling, other sizes.
Run: python benchmarks/vs_trl.py (needs pip install -e ".[dev]"; on a machine with nothing else to do)
"""
import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import signal
import string
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import train_grpo  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from utils import checkpoint  # noqa: E402
from utils.cli import at_least, atomic_write, die, need, parse  # noqa: E402
from utils.device import pick_autocast, write_run_record  # noqa: E402
from utils.task import load_prompts  # noqa: E402
from utils.tokenizer import Tokenizer  # noqa: E402

CHARACTERS = string.ascii_letters + string.digits + " .,"  # 65; no line break, so no stop can end an answer
PROMPTS, GROUP, PROMPT_LEN, NEW = 8, 8, 32, 64
BETA, LR, CLIP = 0.04, 1e-4, 1.0
NEVER = 10**9
PHASES = ["rollout", "reference", "update"]
COLUMNS = ["run", "engine", "dtype", "seconds_per_step", "wall_per_step", "fastest", "slowest", "steps",
           "tokens_per_s", *PHASES, "other"]
TIMES = []  # when the reward function was called


@dataclass
class Args:
    steps: int = 20  # timed ones in every turn
    warmup: int = 3  # steps before them that don't count
    rounds: int = 2  # how often each engine has its turn
    threads: int = 2
    seed: int = 0
    out: str = "results/vs_trl.csv"


def letter_share(completions, prompts, **columns):
    """The reward of both engines, as cheap as one can be: the share of the letter e."""
    TIMES.append(time.perf_counter())
    short = min(map(len, completions))
    if short != NEW:  # a character is a token
        raise ValueError(f"an answer ended after {short} tokens: this comparison wants {NEW} in each")
    return [text.count("e") / NEW for text in completions]


def prepare(folder, seed):
    """One π₀ in both formats, and the prompts, as files in `folder`."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(len(CHARACTERS), PROMPT_LEN + NEW, n_layer=4, n_head=4, n_embd=128))
    checkpoint.save(folder / "policy.pth", "policy", model, Tokenizer("char", list(CHARACTERS)))
    model.export_hf(folder / "hf")
    config = json.loads((folder / "hf/config.json").read_text())
    config |= {"bos_token_id": None, "eos_token_id": None}  # no answer ends early
    (folder / "hf/config.json").write_text(json.dumps(config))
    draw = random.Random(seed)
    rows = [{"prompt": "".join(draw.choices(CHARACTERS, k=PROMPT_LEN))} for _ in range(10 * PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextlib.contextmanager
def phase_timers():
    """Yields a list that fills with (phase, seconds).

    Rollout: GPT.generate; reference: GPT.score without a gradient; update: from the call of GPT.score with
    one to the end of optimizer.step.
    """
    spans, began = [], []
    generate, score = GPT.generate, GPT.score

    def timed_generate(self, *args, **kwargs):
        clock = time.perf_counter()
        result = generate(self, *args, **kwargs)
        spans.append(("rollout", time.perf_counter() - clock))
        return result

    def timed_score(self, *args, **kwargs):
        clock = time.perf_counter()
        result = score(self, *args, **kwargs)
        if torch.is_grad_enabled():
            began.append(clock)
        else:
            spans.append(("reference", time.perf_counter() - clock))
        return result

    def after_step(optimizer, args, kwargs):
        spans.append(("update", time.perf_counter() - began.pop()))

    hook = register_optimizer_step_post_hook(after_step)
    GPT.generate, GPT.score = timed_generate, timed_score
    try:
        yield spans
    finally:
        GPT.generate, GPT.score = generate, score
        hook.remove()


def run_ours(folder, dtype, args, phases=False):
    """Runs train_grpo.py's own main -> seconds and wall seconds of each step, and shares of the phases."""
    torch.set_num_threads(args.threads)
    steps, log = args.warmup + args.steps, folder / "ours.csv"
    run = train_grpo.Args(policy=str(folder / "policy.pth"), prompts=str(folder / "prompts.jsonl"),
                          reward=f"{Path(__file__).resolve()}:letter_share", prompts_per_step=PROMPTS,
                          group_size=GROUP, prompt_len=PROMPT_LEN, max_new=NEW, beta=BETA, lr=LR,
                          grad_clip=CLIP, steps=steps, eval_every=NEVER, eval_prompts=1, save_every=NEVER,
                          device="cpu", dtype=dtype, seed=args.seed, log=str(log), out=str(folder / "ours"))
    with phase_timers() if phases else contextlib.nullcontext() as spans:
        with contextlib.redirect_stdout(io.StringIO()):
            train_grpo.main(run)
    with open(log, newline="") as file:
        total = [0.0, *(float(row["seconds"]) for row in csv.DictReader(file))]
    times = sys.modules["user_reward"].TIMES[1:-1]  # without the evaluations at the start and the end
    result = {"seconds": differences(total), "wall": differences(times)}
    if phases:
        spans = spans[1:-1]  # likewise
        assert [name for name, _ in spans] == PHASES * steps, f"a step isn't {PHASES}: {spans[:6]}"
        for i, name in enumerate(PHASES):
            shares = [spent / step for (_, spent), step in zip(spans[i::3], result["seconds"])]
            result[name] = median(shares[args.warmup:])
        result["other"] = 1 - sum(result[name] for name in PHASES)
    return result


def run_trl(folder, dtype, args):
    """The same work by GRPOTrainer, without logging or saving -> seconds and wall seconds of each step."""
    torch.set_num_threads(args.threads)
    import transformers
    from datasets import Dataset
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Characters
    from trl import GRPOConfig, GRPOTrainer
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # a name of an argument that TRL still takes
    vocabulary = {c: i for i, c in enumerate([*CHARACTERS, "<eos>"])}  # TRL wants an <eos>; no answer has it
    characters = Characters(models.WordLevel(vocabulary, unk_token="<eos>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    characters.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>",
                                                     pad_token="<eos>")
    ours = Tokenizer("char", list(CHARACTERS))
    prompts, _ = load_prompts(str(folder / "prompts.jsonl"), "auto", ours, PROMPT_LEN)
    config = GRPOConfig(
        str(folder / "trl"), use_cpu=True, bf16=dtype == "bf16", seed=args.seed,
        max_steps=args.warmup + args.steps, per_device_train_batch_size=PROMPTS * GROUP,
        gradient_accumulation_steps=1, steps_per_generation=1, num_generations=GROUP, num_iterations=1,
        max_completion_length=NEW, temperature=1.0, top_p=1.0, top_k=0, loss_type="grpo", beta=BETA,
        use_bias_correction_kl=False, epsilon=0.2, scale_rewards="group",
        learning_rate=LR, lr_scheduler_type="constant", adam_beta1=0.9, adam_beta2=0.99, weight_decay=0.0,
        max_grad_norm=CLIP, optim="adamw_torch_fused", disable_dropout=True, gradient_checkpointing=False,
        use_vllm=False, dataloader_num_workers=0, dataloader_pin_memory=False, logging_strategy="no",
        save_strategy="no", report_to="none", disable_tqdm=True)

    class Clock(transformers.TrainerCallback):
        seconds = []

        def on_step_begin(self, *args, **kwargs):
            self.seconds.append(-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            self.seconds[-1] += time.perf_counter()

    data = Dataset.from_dict({"prompt": prompts.texts})
    trainer = GRPOTrainer(str(folder / "hf"), letter_share, config, data, processing_class=tokenizer,
                          callbacks=[Clock])
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters()), "TRL's weights aren't float32"
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return {"seconds": Clock.seconds, "wall": differences(TIMES)}


def differences(times):
    return [b - a for a, b in zip(times, times[1:])]


def alone(function, *args):
    """One turn in a fresh process, so that no engine inherits the other's threads, memory or patches."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=deliver, args=(send, function, *args), daemon=True)
    process.start()
    send.close()  # the child's is then the only one: its death ends the wait below
    try:
        return receive.recv()
    except EOFError:
        process.join()
        print(f"a turn ended with exit code {process.exitcode} before it had a result", file=sys.stderr)
        raise SystemExit(process.exitcode if process.exitcode > 0 else 1) from None
    finally:
        process.kill()
        process.join()


def deliver(send, function, *args):
    send.send(function(*args))


def row_of(run, engine, dtype, result, warmup):
    """The turn as a row of the CSV; its first `warmup` steps don't count."""
    seconds = result["seconds"][warmup:]
    middle = median(seconds)
    return {"run": run, "engine": engine, "dtype": dtype, "seconds_per_step": middle,
            "wall_per_step": median(result["wall"][warmup:]), "fastest": min(seconds),
            "slowest": max(seconds), "steps": len(seconds), "tokens_per_s": PROMPTS * GROUP * NEW / middle,
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


def main(args):
    at_least(args, steps=2, warmup=0, rounds=1, threads=1)
    if not args.out.endswith(".csv"):
        die(f"--out {args.out}: wanted a name that ends in .csv; the record goes beside it as .json")
    need("trl", "dev")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the temporary folder goes
    _, auto = pick_autocast(torch.device("cpu"))
    plan = [("ours", auto), ("trl", "bf16"), ("ours", "fp32"), ("trl", "fp32")]
    if auto == "fp32":
        plan = plan[1:]  # no bf16 in the hardware: ours is fp32 anyway
    rows, turns, load = [], [], os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="vs_trl-") as name:
        folder = Path(name)
        os.environ.update(TMPDIR=name, HF_HOME=f"{name}/cache", HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="",
                          TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS=str(args.threads))  # for the turns
        prepare(folder, args.seed)
        for run in range(1, args.rounds + 1):
            for engine, dtype in plan:
                result = alone(run_ours if engine == "ours" else run_trl, folder, dtype, args)
                turns.append((engine, dtype, result))
                rows.append(row_of(run, engine, dtype, result, args.warmup))
                print(f"run {run}  {engine:4} {dtype}: {rows[-1]['seconds_per_step']:.3f} s a step, "
                      f"{rows[-1]['wall_per_step']:.3f} from step to step", flush=True)
        for dtype in dict.fromkeys((auto, "fp32")):  # apart from the turns above: those carry no timers
            result = alone(run_ours, folder, dtype, args, True)
            rows.append(row_of("phases", "ours", dtype, result, args.warmup))
            shares = ", ".join(f"{name} {100 * result[name]:.0f} %" for name in (*PHASES, "other"))
            print(f"our step in {dtype}: {shares}", flush=True)
    found = summary(turns, args.warmup)
    for clock, label in (("seconds", "a step"), ("wall", "from step to step")):
        for name, ratio in found["trl_best_over_ours"][clock].items():
            middle = found["medians"][clock][name]
            print(f"{label}: {name} {middle:.3f} s, {ratio:.2f} times TRL's steps a second (its best dtype)")
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    atomic_write(args.out, table.getvalue().encode())
    write_run_record(args.out, args, **found, load_before=load, turn_threads=args.threads, auto_dtype=auto,
                     trl_versions={name: version(name) for name in ("trl", "transformers", "accelerate")},
                     turns=[{"engine": e, "dtype": d, **result} for e, d, result in turns])
    print(f"wrote {args.out} and {Path(args.out).with_suffix('.json')}")


if __name__ == "__main__":
    main(parse(Args))
