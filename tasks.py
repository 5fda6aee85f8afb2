"""Tasks: questions with a right answer, and the check that an answer is right.

A task is two functions. `sample(rng)` makes a row: a dict with `prompt`, `answer` and what the check needs.
`reward(completion, row)` is 1 for a right answer, and less for any other. A chat model reads `prompt`. A
policy of sft.py reads `short` where the row has it: a nano GPT learns "23+45=" within seconds.
Left out: difficulty that grows, questions of several turns.
Run: python sft.py --data task:add --tokenizer char, then python train_grpo.py --task add
"""
import ast
import hashlib
import operator
import random
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Callable

import torch

from generate import sample_texts
from utils.cli import die
from utils.gym import gym
from utils.rewards import checked, describe, from_file
from utils.text import as_prompts


@dataclass(frozen=True)
class Task:
    sample: Callable  # random.Random -> row
    reward: Callable  # (completion, row) -> number
    name: str = "task"

    def rows(self, n, seed, held_out):
        """n different questions, or fewer: 1,000 draws without a new one end it. An eighth is held out."""
        rng, rows, misses = random.Random(seed), {}, 0
        while len(rows) < n and misses < 1000:
            try:
                row = self.sample(rng)
                prompt, _ = row["prompt"], row["answer"]
                eighth = hashlib.sha256(prompt.encode()).digest()[0] < 32  # everywhere the same
            except Exception as error:  # whatever the user's function raises is the user's to see
                die(f"--task {self.name}: sample raised {describe(error)}: wanted text as prompt and answer")
            for key in ("answer", "short"):  # a number would equal no completion
                if not isinstance(row.get(key), str | None):
                    die(f"--task {self.name}: sample gave {row[key]!r:.40} as {key}: wanted text")
            misses += 1
            if eighth == held_out and prompt not in rows:
                rows[prompt] = row
                misses = 0
        return list(rows.values()) or die(f"--task {self.name}: sample makes too few different questions")

    def worked(self, rng):
        """A solved training question, for sft.py."""
        row = self.rows(1, rng.random(), held_out=False)[0]
        if row["answer"] is None:  # then only the check can tell
            die(f"--data task:{self.name}: its questions come without answers, so none can be learnt from")
        return f"{row.get('short') or row['prompt']}{row['answer']}"

    def prompts(self, tokenizer, seed):
        """-> (training, held-out) Prompts: up to 4,096 from the seed; up to 512, the same for every seed."""
        train, held_out = self.rows(4096, seed, held_out=False), self.rows(512, 0, held_out=True)
        every = as_prompts(train + held_out, tokenizer, f"--task {self.name}", short="short")
        index = torch.arange(len(every.texts))
        return every.pick(index[:len(train)]), every.pick(index[len(train):])

    def scores(self, /, completions, prompts, **columns):
        """The task as a reward function like all others: a number for each completion."""
        def rewards(completions, prompts, **columns):
            rows = [dict(zip(("prompt", *columns), row)) for row in zip(prompts, *columns.values())]
            return [self.reward(text, row) for text, row in zip(completions, rows)]
        return checked(rewards, f"--task {self.name}: reward", completions, prompts, **columns)

    def ask(self, policy, tokenizer, prompts, max_new, n=1, temperature=1.0, seed=0):
        """n answers to each of M prompts, the greedy one if n is 1: M·n texts, and what they earn (M, n)."""
        texts = sample_texts(policy, tokenizer, prompts, max_new, temperature, seed, int(n == 1), n)[3]
        asked = prompts.pick(torch.arange(len(prompts.texts)), n)
        return texts, torch.tensor(self.scores(texts, asked.texts, **asked.columns)).view(-1, n)


# ---- what is asked ----
def add(rng, size=2):
    x, y = (rng.randint(1, 10**size - 1) for _ in range(2))
    return {"prompt": f"What is {x} + {y}? Answer with the number only.", "short": f"{x}+{y}=",
            "answer": str(x + y)}


def sort(rng, size=6):
    digits = [str(rng.randrange(10)) for _ in range(size)]
    return {"prompt": f"Sort these digits, smallest first: {' '.join(digits)}. Answer with the digits only.",
            "short": f"{''.join(digits)}>", "answer": "".join(sorted(digits))}


def reverse(rng, size=5):
    word = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(size))
    return {"prompt": f"Spell {word} backwards. Answer with the letters only.", "short": f"{word}<",
            "answer": word[::-1]}


def countdown(rng, size=3):
    """The answer is made first, and the target is its value. Other answers may be right too."""
    numbers = [rng.randint(1, 20) for _ in range(size)]
    expression = "".join(f"{number}{rng.choice('+-*/')}" for number in numbers)[:-1]
    target = value(ast.parse(expression, mode="eval").body)
    if target.denominator > 1 or not 1 <= target <= 100:
        return countdown(rng, size)
    given = ",".join(map(str, rng.sample(numbers, size)))
    return {"prompt": f"Make {target} of {given}, each used once, with + - * /. Answer with a formula only.",
            "short": f"{given}:{target}=", "answer": expression, "numbers": numbers, "target": int(target)}


# ---- what is right ----
def last(pattern):
    """A check: 1 if the pattern's last match in the completion is the answer, spaces and commas apart."""
    def reward(completion, row):
        found = re.findall(pattern, completion.lower())[-1:]
        return float([re.sub(r"[\s,]", "", text) for text in found] == [row["answer"]])
    return reward


OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(node):
    """The exact value of a parsed expression of whole numbers and + - * /; ValueError for all else."""
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](value(node.left), value(node.right))
    raise ValueError("no arithmetic")


def hits_target(completion, row):
    """1 if the last line makes the target, 0.1 if it makes another value of the same numbers, else 0."""
    expression = completion.strip().rpartition("\n")[2].partition("=")[0].strip()
    numbers = sorted(map(int, re.findall("[0-9]{1,9}", expression[:100])))
    if not re.fullmatch("[0-9+*/() -]{1,100}", expression) or numbers != sorted(row["numbers"]):
        return 0.0  # what is parsed is short and holds only the given numbers: it takes no time
    try:
        return 1.0 if value(ast.parse(expression, mode="eval").body) == row["target"] else 0.1
    except (SyntaxError, ValueError, ZeroDivisionError):
        return 0.0


# ---- by name ----
TASKS = {"add": Task(add, last("[0-9]+")), "sort": Task(sort, last(r"[0-9][0-9\s,]*")),
         "reverse": Task(reverse, last("[a-z]+")), "countdown": Task(countdown, hits_target)}


def load_task(name):
    """add, sort, reverse, countdown, with a size behind a colon if wanted (add:3); gym:NAME; FILE.py:TASK.

    gym:NAME:SETTING=VALUE sets what the question is made of. utils/gym.py has those tasks.
    """
    kind, _, size = name.partition(":")
    if kind in TASKS and re.fullmatch("[1-9]?", size):
        given = {"size": int(size)} if size else {}
        task = replace(TASKS[kind], sample=lambda rng: TASKS[kind].sample(rng, **given))
    elif kind == "gym" and size:
        task = Task(*gym(size))
    elif re.search(r"\.py(:\w+)?$", name):
        task = from_file(name if ".py:" in name else f"{name}:TASK", f"--task {name}", "task")
    else:
        die(f"--task {name!r} is unknown: wanted {', '.join(TASKS)}, add:3, gym:NAME or FILE.py:TASK")
    if not isinstance(task, Task):
        die(f"--task {name} is a {type(task).__name__}: wanted a Task of tasks.py, Task(sample, reward)")
    return replace(task, name=name)
