"""Chance: what guesses earn on the held-out questions of tasks, with no policy asked.

Two guesses, from the answers to a run's training questions: the commonest of them, and eight drawn at random
for each question. The second is what pass@8 has to be compared with.
Run: python benchmarks/chance.py gym:count_primes:max_n=100 add
"""
import csv
import io
import random
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks import load_task  # noqa: E402  (after the path)
from utils.cli import atomic_write, die, parse  # noqa: E402


@dataclass
class Args:
    tasks: tyro.conf.Positional[tuple[str, ...]] = ()  # as behind --task
    seed: int = 0  # of the training questions and of the draws
    out: str = "results/chance.csv"


def rates(scores):
    """Scores, a list of guesses a question -> accuracy and mean reward of a guess, share with a hit."""
    every = [score for row in scores for score in row]
    return {"acc": sum(score >= 1 for score in every) / len(every), "mean_r": sum(every) / len(every),
            "any_right": sum(max(row) >= 1 for row in scores) / len(scores)}


def chance(name, seed=0):
    """-> a dict for each of the two guesses."""
    task, rng = load_task(name), random.Random(seed)
    answers = [row["answer"] for row in task.rows(4096, seed, held_out=False)]
    if None in answers:
        die(f"--task {name} gives no answers to guess from: wanted a task whose answers are known")
    held_out = task.rows(512, 0, held_out=True)
    commonest = Counter(answers).most_common(1)[0][0]
    guesses = {repr(commonest): lambda: [commonest], "8 drawn": lambda: rng.choices(answers, k=8)}
    return [{"task": name, "guess": guess, "questions": len(held_out),
             **rates([[float(task.reward(text, row)) for text in draw()] for row in held_out])}
            for guess, draw in guesses.items()]


def main(args):
    if not args.tasks:
        die("no task is named: wanted some, such as gym:count_primes:max_n=100")
    rows = [row for name in args.tasks for row in chance(name, args.seed)]
    file = io.StringIO()
    table = csv.DictWriter(file, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    atomic_write(args.out, file.getvalue().encode())
    print(file.getvalue(), end="")


if __name__ == "__main__":
    main(parse(Args))
