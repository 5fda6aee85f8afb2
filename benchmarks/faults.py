"""Fault injection: each training script is ended at a random moment, then resumed, and must lose nothing.

A tiny run is made once to its end. Then it begins anew in a fresh folder, and a signal ends it at a moment
drawn between the process's start and its usual end, in seconds of its own work. A fifth of the tries start a
new Python ("cold"). The others are forked from this process, which has imported torch already ("warm"): that
saves most of the time. The run that goes on with --resume must have the same CSV and weights, but for time
and memory. Where nothing was saved yet, --resume names what to do instead, and that must give the same.
A benchmark that was broken off goes on behind the last row of --out.
Left out: a machine that loses power, several processes, GPUs.
Run: python benchmarks/faults.py
"""
import atexit
import csv
import importlib
import os
import random
import runpy
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

os.environ |= {"OMP_NUM_THREADS": "1", "CI": "true", "PYTHONPATH": str(ROOT)}  # of the runs, too
import utils  # noqa: E402  (after the path, and before torch)
import torch  # noqa: E402
from utils.cli import AtLeast, die, parse  # noqa: E402

COLUMNS = ["script", "signal", "n", "start", "moment", "usual", "exit_code", "outcome", "what"]
TIMING = {"seconds", "sampling_s", "tokens_per_s", "peak_mem_mb"}  # columns that two equal runs needn't share
PAIRS = "--data play --prompt_len 16 --max_new 12 --policy ../../sft/whole/out/policy.pth"
RL = (f"{PAIRS} --reward_model ../../reward_model/whole/out/reward.pth --prompts_per_step 4 --group_size 4 "
      "--eval_prompts 8 --steps 24 --eval_every 5 --save_every 6")
SCRIPTS = {  # script: a run of some seconds
    "sft": "sft.py --data play --vocab_size 300 --block_size 48 --batch_size 4 --steps 40 --dropout 0.1 "
           "--eval_every 9",
    "reward_model": f"reward_model.py {PAIRS} --n_pairs 200 --held_out_pairs 9 --batch_size 8 --eval_every 9",
    "train_grpo": f"train_grpo.py {RL}",
    "train_ppo": f"train_ppo.py {RL}",
    "cnn_grpo": "-m vision.cnn_grpo --steps 60 --batch_size 32 --eval_every 10 --save_every 13",
    "vit_grpo": "-m vision.vit_grpo --steps 24 --batch_size 16 --eval_every 5 --save_every 6",
    "clip_grpo": "clip_grpo.py --epochs 3 --start_accuracy 0.1 --save_model",
    "c2i_grpo": "-m vision.c2i_grpo --steps 12 --vq_steps 2 --gpt_steps 2 --classifier_steps 2 "
                "--eval_images 2 --sample_batch_size 8 --train_batch_size 8 --group_size 2 --save_every 3",
    "vlm_grpo": "-m vision.vlm_grpo --engine nano --steps 8 --sft_steps 4 --eval_every 4 --save_every 3 "
                "--eval_examples 8 --per_device_train_batch_size 8 --max_new 4"}


@dataclass
class Args:
    scripts: tuple[Literal[tuple(SCRIPTS)], ...] = tuple(SCRIPTS)  # which are tried
    signals: tuple[Literal["SIGKILL", "SIGTERM", "SIGINT"], ...] = ("SIGKILL", "SIGTERM", "SIGINT")
    repeats: Annotated[int, AtLeast(1)] = 20  # moments a signal
    seed: int = 0  # of the moments
    work: str = "out/faults"  # the runs' folders; those of wrong tries stay
    out: str = "results/faults.csv"  # a row a try


def warm_up():
    """Imports what the scripts import, torch above all: a process that is forked from here starts at once."""
    for command in SCRIPTS.values():
        importlib.import_module(command.removeprefix("-m ").split()[0].removesuffix(".py"))
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])  # it imports half of torch
    forget()


def forget():
    """Drops this repository's modules: the next import runs their code again, as a new process does."""
    for name, module in list(sys.modules.items()):
        path = Path(getattr(module, "__file__", None) or "/")
        if name != "__main__" and path.is_relative_to(ROOT) and "site-packages" not in path.parts:
            del sys.modules[name]


def become(command):
    """In a forked process: does what `python COMMAND` does after its imports, to its exit."""
    for number in utils.STOPS:  # at first: the handlers of the process that forked are not this one's
        signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    forget()
    atexit._clear()
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    sys.excepthook, sys.unraisablehook = sys.__excepthook__, sys.__unraisablehook__
    code = 0
    try:
        try:
            if command[0] == "-m":
                sys.argv = command[1:]
                runpy.run_module(command[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = command
                runpy.run_path(command[0], run_name="__main__")
        except SystemExit:
            raise
        except BaseException:
            code = 1
            sys.excepthook(*sys.exc_info())
    except SystemExit as ended:
        code = ended.code or 0
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(name, folder, *words, number=None, moment=None, cold=False):
    """One process in the folder, sent the signal after `moment` seconds -> its stderr, exit code and seconds.

    Seconds are those that a core works for it: other work on the machine doesn't shift them.
    cold: a new Python, whose imports take seconds. Otherwise it is forked from this one.
    """
    script = SCRIPTS[name] if SCRIPTS[name].startswith("-m") else f"{ROOT}/{SCRIPTS[name]}"
    command = [*script.split(), *"--log log.csv --out out --device cpu".split(), *words]
    folder.mkdir(parents=True, exist_ok=True)
    errors = folder.with_name(f"{folder.name}.err")
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if cold:
            os.execv(sys.executable, [sys.executable, *command])
        become(command)
    ended, status, used = os.wait4(pid, os.WNOHANG if moment is not None else 0)
    while not ended and worked(pid) < moment:
        time.sleep(0.002)
        ended, status, used = os.wait4(pid, os.WNOHANG)
    if not ended:
        os.kill(pid, number)
        _, status, used = os.wait4(pid, 0)
    seconds = used.ru_utime + used.ru_stime
    return errors.read_text(errors="replace"), os.waitstatus_to_exitcode(status), seconds


def worked(pid):
    """The seconds that a core has worked for a process so far (proc_pid_stat(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def reference(name, args):
    """The folder of the uninterrupted run; the seconds that a cold and a warm one took. Made once."""
    folder = Path(args.work).resolve() / name / "whole"
    stamp = folder / "seconds"
    if not stamp.is_file():
        seconds = []
        for cold in (True, False):
            shutil.rmtree(folder, ignore_errors=True)
            error, code, used = run(name, folder, cold=cold)
            if code:
                die(f"the uninterrupted run of {name} ended with exit code {code}: {error[-300:]}")
            seconds.append(f"{used:.3f}")
        stamp.write_text(" ".join(seconds))
    return folder, [float(x) for x in stamp.read_text().split()]


def content(path):
    """A result as plain values; raises where it is torn."""
    if path.suffix in (".pth", ".pt"):
        return torch.load(path, map_location="cpu", weights_only=True)
    if path.suffix == ".csv":
        head, *rows = csv.reader(path.read_text().splitlines())
        if any(len(row) != len(head) for row in rows):
            raise ValueError("a torn row")
        return [{k: v for k, v in zip(head, row) if k not in TIMING} for row in rows]
    return path.read_bytes()


def same(a, b):
    """Equal to the last bit, but for times, memory and the arguments of a run that was resumed."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        compared = a.keys() - TIMING - {"args", "resume"}
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in compared)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def fault(folder, whole=None):
    """The first file that is torn or, if `whole` is given, not as there, or left over; None: all is well."""
    for path in sorted((whole or folder).rglob("*")):
        if path.suffix in (".pth", ".pt", ".csv", ".jsonl", ".safetensors"):
            name = path.relative_to(whole or folder)
            try:
                if not same(content(path), content(folder / name)):
                    return f"{name} differs"
            except Exception as error:  # on torn bytes the readers raise nearly anything
                return f"{name} can't be read ({type(error).__name__})"
    left = [path.name for path in folder.rglob(".*") if whole and path.name.endswith((".tmp", "lock"))]
    return f"{left[0]} is left" if left else None


def attempt(name, number, moment, folder, whole, cold):
    """-> exit code of the process that got the signal, the outcome, what was wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    error, code, _ = run(name, folder, number=number, moment=moment, cold=cold)
    if "Traceback" in error or code not in {0, -number, utils.STOPS.get(number)}:
        return code, "wrong", f"at the signal: {' '.join(error.split())[-200:]}"
    if what := fault(folder):
        return code, "wrong", what
    outcome = "equal"
    error, again, _ = run(name, folder, "--resume")
    if again == 2 and error.count("\n") == 1 and "run `" in error:
        outcome = "refused clearly"
        error, again, _ = run(name, folder)
        if again == 2 and "--overwrite" in error:
            error, again, _ = run(name, folder, "--overwrite")
    if again or "Traceback" in error:
        return code, "wrong", f"exit code {again} afterwards: {' '.join(error.split())[-200:]}"
    what = fault(folder, whole) or ""
    return code, "wrong" if what else outcome, what


def main(args):
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    for number in utils.STOPS:  # a job in the background ignores Ctrl-C, and its tries would inherit that
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    warm_up()
    with open(args.out, "a+", newline="", buffering=1) as file:  # a row a line, at once
        file.seek(0)
        rows = list(csv.DictReader(file))
        done = {(row["script"], row["signal"], int(row["n"])) for row in rows}
        writer = csv.DictWriter(file, COLUMNS)
        if not rows:
            writer.writeheader()
        for name in dict.fromkeys(("sft", "reward_model", *args.scripts)):  # the first two make RL's inputs
            whole, usual = reference(name, args)
            tries = {(name, sent, n) for sent in args.signals for n in range(args.repeats)} - done
            for _, sent, n in sorted(tries) if name in args.scripts else ():
                start = "cold" if n % 5 == 0 else "warm"
                end = usual[start == "warm"]
                moment = random.Random(f"{args.seed} {name} {sent} {n}").uniform(0, end)
                folder = whole.parent / f"{sent}-{n}"
                tried = attempt(name, signal.Signals[sent], moment, folder, whole, start == "cold")
                about = name, sent, n, start, f"{moment:.3f}", f"{end:.3f}"
                rows.append(dict(zip(COLUMNS, (*about, *tried))))
                writer.writerow(rows[-1])
                print(*rows[-1].values(), flush=True)
                if tried[1] != "wrong":
                    shutil.rmtree(folder)
    print("\n| script | signal | runs | equal | refused clearly | wrong |\n|---|---|---|---|---|---|")
    for name, sent in dict.fromkeys((row["script"], row["signal"]) for row in rows):
        mine = [row for row in rows if (row["script"], row["signal"]) == (name, sent)]
        counts = Counter(row["outcome"] for row in mine)
        what = "; ".join(sorted({row["what"] for row in mine} - {""}))
        print(f"| {name} | {sent} | {len(mine)} | {counts['equal']} | {counts['refused clearly']} | "
              f"{counts['wrong']} {what} |")


if __name__ == "__main__":
    main(parse(Args))
