"""The two that vs_trl.py compares: the mains of train_grpo.py and train_trl.py (TRL 1.16) at the same work.

Both begin at one π₀ and read the same prompts in the same steps. Each turn is a process of its own that loads
one engine only.
Left out: vLLM (it needs a GPU or a server), GPUs.
Run: by vs_trl.py
"""
import contextlib
import csv
import io
import json
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import rollout  # noqa: E402
import train_grpo  # noqa: E402
import train_trl  # noqa: E402
from utils import checkpoint  # noqa: E402
from utils.rewards import JUDGES  # noqa: E402
from utils.trl import export  # noqa: E402

NEVER = 10**9
PHASES = ["rollout", "reference", "update"]
CURVE = ["step", "loss", "mean_r", "kl", "entropy", "token_adv", "samples", "seconds"]
TIMES = []  # when letter_share was called


@dataclass(frozen=True)
class Work:
    """What both engines do in a turn; the rest is their scripts' defaults, which are the same."""
    prompts_per_step: int
    group_size: int
    prompt_len: int
    max_new: int
    steps: int
    seed: int
    threads: int
    objective: str
    beta: float
    lr: float
    reward: str  # letter_share, or one of JUDGES
    device: str = "cpu"


# ---- what both begin with ----
def prepare(folder, model, tokenizer, prompts, max_new):
    """One π₀ in both formats, and the prompts, as files in `folder`; the two tokenizers must agree."""
    checkpoint.save(folder / "policy.pth", "policy", model, tokenizer)
    other = export(model, tokenizer, folder / "hf")
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    assert other(prompts)["input_ids"] == ids, "TRL's tokenizer gives other ids"
    assert other.batch_decode(ids) == prompts, "TRL's tokenizer gives another text"
    assert len(set(map(len, ids))) == 1, "the prompts are of several lengths"
    rows = [json.dumps({"prompt": prompt, "max_new": max_new}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(rows))


def letter_share(completions, prompts, max_new=(64,), **columns):
    """The reward of the comparison of speed, as cheap as one can be: the share of the letter e.

    It refuses answers that haven't max_new tokens: characters, and ids where the engine hands them over.
    """
    TIMES.append(time.perf_counter())
    for answers in (completions, columns.get("completion_ids", completions)):
        other = {len(answer) for answer in answers} - {max_new[0]}
        if other:
            raise ValueError(f"an answer has {min(other)} tokens: this comparison wants {max_new[0]} in each")
    return [text.count("e") / len(text) for text in completions]


# ---- one engine's turn ----
@contextlib.contextmanager
def phase_timers():
    """Yields a list that fills with (phase, seconds).

    Rollout: generate; reference: score without a gradient; update: from the call of score with one to the
    end of optimizer.step. Both are taken where rollout.py calls them.
    """
    spans, began = [], []
    generate, score = rollout.generate, rollout.score

    def timed_generate(*args, **kwargs):
        clock = time.perf_counter()
        result = generate(*args, **kwargs)
        spans.append(("rollout", time.perf_counter() - clock))
        return result

    def timed_score(*args, **kwargs):
        clock = time.perf_counter()
        result = score(*args, **kwargs)
        if torch.is_grad_enabled():
            began.append(clock)
        else:
            spans.append(("reference", time.perf_counter() - clock))
        return result

    def after_step(optimizer, args, kwargs):
        spans.append(("update", time.perf_counter() - began.pop()))

    hook = register_optimizer_step_post_hook(after_step)
    rollout.generate, rollout.score = timed_generate, timed_score
    try:
        yield spans
    finally:
        rollout.generate, rollout.score = generate, score
        hook.remove()


def run(script, folder, work, dtype, timers=contextlib.nullcontext, **more):
    """A script's own main -> {"seconds", "wall": of each step, "rows": of CURVE, "spans": what timers yield}.

    seconds is the script's own, of its CSV; wall the time from one call of letter_share to the next.
    """
    torch.set_num_threads(work.threads)
    out = Path(tempfile.mkdtemp(dir=folder))
    reward = work.reward if work.reward in JUDGES else f"{Path(__file__).resolve()}:{work.reward}"
    args = script.Args(
        objective=work.objective, policy=str(folder / "policy.pth"), prompts=str(folder / "prompts.jsonl"),
        reward=reward, prompts_per_step=work.prompts_per_step, group_size=work.group_size,
        prompt_len=work.prompt_len, max_new=work.max_new, beta=work.beta, lr=work.lr, grad_clip=1.0,
        steps=work.steps, eval_every=NEVER, eval_prompts=1, save_every=NEVER, device=work.device, dtype=dtype,
        seed=work.seed, log=str(out / "log.csv"), out=str(out), **more)
    with timers() as spans, contextlib.redirect_stdout(io.StringIO()):
        script.main(args)
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    result = {"seconds": differences([0.0, *(float(row["seconds"]) for row in rows)]), "wall": [],
              "rows": [{name: row[name] for name in CURVE} for row in rows]}
    if reward != work.reward:  # loaded as user_function; the first and the last call are of evaluations
        result["wall"] = differences(sys.modules["user_function"].TIMES[1:-1])
    if spans:
        result["spans"] = spans[1:-1]  # likewise
    return result


def run_ours(folder, work, dtype, compiled=False, phases=False):
    timers = phase_timers if phases else contextlib.nullcontext
    return run(train_grpo, folder, work, dtype, timers, compile=compiled, samples=0)


def run_trl(folder, work, dtype):
    return run(train_trl, folder, work, dtype)


def shares(result, warmup):
    """Each phase's share of a step, from the spans that `phase_timers` took: medians over steps."""
    spans, found = result["spans"], {}
    names = [name for name, _ in spans]
    assert names == PHASES * len(result["seconds"]), f"a step isn't {PHASES}: {names[:6]}"
    for i, name in enumerate(PHASES):
        parts = [spent / step for (_, spent), step in zip(spans[i::3], result["seconds"])]
        found[name] = median(parts[warmup:])
    return found | {"other": 1 - sum(found.values())}


def differences(times):
    return [b - a for a, b in zip(times, times[1:])]


# ---- turns ----
def alone(function, *args):
    """One turn in a fresh process, so that no engine inherits the other's threads, memory or patches."""
    [(_, result)] = side_by_side([(function, *args)], 1)
    return result


def side_by_side(calls, jobs):
    """Turns, calls = [(function, *args), …], `jobs` of them at a time -> yields (which call, its result)."""
    context = multiprocessing.get_context("spawn")
    waiting, running = list(enumerate(calls)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, call = waiting.pop(0)
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=deliver, args=(send, *call), daemon=True)
                process.start()
                send.close()  # the child's is then the only one: its death ends the wait below
                running[receive] = number, process
            for receive in multiprocessing.connection.wait(list(running)):
                number, process = running[receive]
                try:
                    result = receive.recv()
                except EOFError:
                    process.join()
                    code = process.exitcode
                    print(f"a turn ended with exit code {code} before it had a result", file=sys.stderr)
                    raise SystemExit(code if code > 0 else 1) from None
                del running[receive]
                process.kill()
                process.join()
                yield number, result
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def deliver(send, function, *args):
    send.send(function(*args))
