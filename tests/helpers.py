"""What the tests of the scripts share: a tiny π₀ and reward model, command lines, CSVs to compare.

A subprocess costs three seconds of imports, so most tests call main() with the words that a user would type.
"""
import contextlib
import csv
import functools
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import model
import reward_model
import sft
from utils.cli import parse

ROOT = Path(__file__).parent.parent
TIMING = {"seconds", "tokens_per_s", "peak_mem_mb"}  # columns that two equal runs needn't share
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda:0", marks=[gpu, pytest.mark.gpu])]
TINY = (1, 2, 32)  # layers, heads, width
# small enough for a step in hundredths of a second
RL = ["--data", "play", "--prompts_per_step", "4", "--group_size", "4", "--prompt_len", "16",
      "--max_new", "12", "--eval_prompts", "4", "--dtype", "fp32", "--device", "cpu"]

REWARD_FILE = '''
import json
import os
import signal

calls = 0


def share_of_e(completions, prompts, **columns):
    """How often the letter e stands in an answer; may end or interrupt its own process, to order."""
    global calls
    calls += 1
    if str(calls) == os.environ.get("KILL_AT_CALL"):
        os.kill(os.getpid(), getattr(signal, os.environ["KILL_WITH"]))
    return [text.count("e") / max(1, len(text)) for text in completions]


def of_prompt(completions, prompts, worth, **columns):
    """What the prompt's own column says; remembers what it was asked."""
    with open("asked.jsonl", "a") as file:
        file.write(json.dumps([prompts, worth, columns]) + "\\n")
    return worth


def constant(completions, prompts, **columns):
    return [0.1] * len(completions)


def short(completions, prompts, **columns):
    return [1.0] * (len(completions) - 1)


def nan(completions, prompts, **columns):
    return [float("nan")] * len(completions)


def nothing(completions, prompts, **columns):
    return None


def words(completions, prompts, **columns):
    return ["good"] * len(completions)


def raises(completions, prompts, **columns):
    return [{}["score"] for _ in completions]


def leaves(completions, prompts, **columns):
    raise SystemExit("bye")
'''


@contextlib.contextmanager
def quiet_signals():
    """The scripts take SIGINT and SIGTERM over; pytest wants its own back."""
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def refused(capsys, call, *wanted):
    """call() leaves with code 2 and one line on stderr that holds all of `wanted`."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        call()
    message = capsys.readouterr().err.strip()
    assert left.value.code == 2
    assert message.startswith("error: ") and "\n" not in message
    assert all(part in plain(message) for part in wanted), message


def cli(module, *words):
    """Runs a script's main() in this process as if `words` had been typed behind its name."""
    argv, sys.argv = sys.argv, [f"{module.__name__}.py", *map(str, words)]
    try:
        with quiet_signals():
            return module.main(parse(module.Args, getattr(module, "PRESETS", None)))
    finally:
        sys.argv = argv


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "CI": "true", **more}


def script(name, *words, **kw):
    """Runs a script as a user does, in the current folder; output as text."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, words)], env=environment(),
                          capture_output=True, text=True, timeout=300, **kw)


def read_csv(path):
    """-> (header, rows as dicts of strings)."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    with open(path, newline="") as file:
        return next(csv.reader(file)), rows


def numbers(path):
    """The CSV but for the timing columns, as text: what must be the same bit for bit."""
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_csv(path)[1]]


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def plain(text):
    """A message without the box that tyro draws around its own, its lines joined."""
    return re.sub(r"[\s│┃╭╮╰╯─]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", text)).strip()


@functools.cache
def tiny():
    """A folder with policy.pth, reward.pth and their CSVs, of the offline play; made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="nanogrpo-tiny-"))
    nano, model.SIZES["nano"] = model.SIZES["nano"], TINY
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            cli(sft, "--data", "play", "--vocab_size", 300, "--block_size", 48, "--batch_size", 16,
                "--steps", 80, "--eval_every", 40, "--warmup", 10, "--lr", 1e-2,
                "--dtype", "fp32", "--device", "cpu",
                "--log", folder / "sft.csv", "--out", folder)
            cli(reward_model, "--data", "play", "--policy", folder / "policy.pth", "--n_pairs", 128,
                "--held_out_pairs", 64, "--prompt_len", 16, "--max_new", 12, "--batch_size", 32,
                "--epochs", 1, "--eval_every", 2, "--dtype", "fp32", "--device", "cpu",
                "--log", folder / "reward.csv", "--out", folder, "--overwrite")
    finally:
        model.SIZES["nano"] = nano
    (folder / "rewards.py").write_text(REWARD_FILE)
    return folder


def rl(*words, reward=None):
    """The words of a tiny RL run on the tiny π₀; reward: "model", or a function of REWARD_FILE."""
    where = tiny()
    chosen = f"{where}/rewards.py:{reward}" if reward in re.findall(
        r"def (\w+)", REWARD_FILE) else reward or "model"
    return ["--policy", where / "policy.pth", "--reward_model",
        where / "reward.pth", "--reward", chosen, *RL, *words]


def weights(path):
    """All of a checkpoint's weights as one vector."""
    content = torch.load(path, weights_only=True)
    return torch.cat([w.flatten().float() for w in content["model"].values()])
