"""train_grpo.py or train_ppo.py as a whole in a fresh process, with random weights: seconds and peak memory.

Used by scaling.py and memory.py. Answers never end early: the 65 characters hold no line break.
"""
import csv
import json
import os
import random
import string
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from model import GPT, GPTConfig, SIZES
from reward import RewardModel
from utils import checkpoint
from utils.cli import die
from utils.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHARACTERS = string.printable[:65]
NEVER = 10**9


def point(model="nano", B=8, G=8, P=32, T=64, processes=1):
    return {"model": model, "prompts_per_step": B, "group_size": G, "prompt_len": P, "max_new": T,
            "processes": processes}


def config_of(name, block_size, vocab_size=len(CHARACTERS)):
    return GPTConfig(vocab_size, block_size, *SIZES[name])


def reward_config(config):
    """reward_model.py's default keeps two of the policy's layers."""
    return replace(config, n_layer=min(2, config.n_layer))


def weights(kind, *args):
    """How many a module has, without allocating any."""
    with torch.device("meta"):
        return sum(p.numel() for p in kind(*args).parameters())


def train(config, p, args, script="train_grpo.py", steps=1, words=()):
    """Runs the script in a fresh process -> seconds of each step, peak resident memory in MB (10⁶ bytes).

    p: a `point`; args: dtype, threads (of all processes together) and seed; words: further flags, among which
    --reward model gets a random reward model of two layers.
    """
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        folder = Path(name)
        torch.manual_seed(args.seed)
        draw = random.Random(args.seed)
        texts = ["".join(draw.choices(CHARACTERS, k=p["prompt_len"]))
                 for _ in range(8 * p["prompts_per_step"])]
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": s}) + "\n" for s in texts))
        (folder / "reward.py").write_text("def e(completions, prompts, **columns):\n"
                                          "    return [text.count('e') for text in completions]\n")
        tokenizer = Tokenizer("char", list(CHARACTERS))
        checkpoint.save(folder / "policy.pth", "policy", GPT(config), tokenizer)
        reward_model = RewardModel(reward_config(config))
        checkpoint.save(folder / "reward.pth", "reward", reward_model, tokenizer, pool="sum")
        run = {"policy": folder / "policy.pth", "prompts": folder / "prompts.jsonl", "steps": steps,
               "reward": f"{folder}/reward.py:e", "beta": 0.04, "eval_prompts": 1, "eval_every": NEVER,
               "save_every": NEVER, "device": "cpu", "dtype": args.dtype, "seed": args.seed,
               "reward_model": folder / "reward.pth", "log": folder / "log.csv", "out": folder / "out"}
        run |= {k: p[k] for k in ("prompts_per_step", "group_size", "prompt_len", "max_new")}
        # behind "--", or torchrun takes the script's --log for one of its own
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={p['processes']}", "--"]
        command = [sys.executable, *(several if p["processes"] > 1 else []), str(ROOT / script)]
        command += [word for k, v in run.items() for word in (f"--{k}", str(v))] + list(words)
        threads = max(1, args.threads // p["processes"])
        # Linux starts a process's peak at that of the one that started it: a shell is small
        done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *command], cwd=folder,
                              capture_output=True, text=True,
                              env=os.environ | {"OMP_NUM_THREADS": str(threads), "CI": "true"})
        if done.returncode:
            die(f"{script} at {p} ended with exit code {done.returncode}: {done.stderr.strip()[-300:]}")
        with open(folder / "log.csv", newline="") as file:
            rows = list(csv.DictReader(file))
    total = [0.0, *(float(row["seconds"]) for row in rows)]
    return [b - a for a, b in zip(total, total[1:])], float(rows[-1]["peak_mem_mb"])


def program(args, script="train_grpo.py", words=()):
    """Peak memory (MB) of the script with next to nothing to do: what Python and its libraries take."""
    return train(GPTConfig(len(CHARACTERS), 8, 1, 1, 8), point("", 4, 2, 4, 2), args, script, 1, words)[1]
