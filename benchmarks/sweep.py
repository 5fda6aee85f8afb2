"""Tuning, fairly: as many trials for GRPO as for PPO, on one seed that no result reports (seed 100).

Every trial trains from the same π₀ with the same reward model; a row of results/sweep.csv is the mean of its
last 5 steps. The defaults of the scripts are each algorithm's trial of the highest score with KL below 0.3.
Run: python benchmarks/sweep.py
"""
import csv
import io
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.cli import at_least, atomic_write, parse  # noqa: E402  (after the path)

TRIALS = {
    "grpo": [{"lr": lr, "epochs_per_rollout": e, "minibatches": m}
             for lr, e, m in ((1e-4, 1, 1), (3e-4, 1, 1), (1e-4, 1, 4), (1.5e-4, 1, 1), (5e-5, 1, 4))],
    "ppo": [{"lr": lr, "value_lr": v, "epochs_per_rollout": e, "minibatches": m}
            for lr, v, e, m in ((1e-4, 1e-3, 1, 4), (3e-4, 1e-3, 1, 2),
                                (3e-5, 1e-3, 1, 4),
                                (1e-4, 1e-3, 1, 1), (5e-5, 1e-3, 1, 4))],
}


@dataclass
class Args:
    policy: str = "out/sft/policy.pth"
    reward_model: str = "out/reward/reward.pth"
    algorithms: tuple[str, ...] = ("grpo", "ppo")
    steps: int = 30
    seed: int = 100
    work: str = "out/sweep"  # CSVs and checkpoints of the trials
    out: str = "results/sweep.csv"


def read(log):
    """Rows of a trial's CSV, none if it isn't there."""
    if not log.is_file():
        return []
    with open(log, newline="") as file:
        return list(csv.DictReader(file))


def main(args):
    at_least(args, steps=5)
    rows = []
    for name in args.algorithms:
        for i, trial in enumerate(TRIALS[name]):
            log = Path(args.work) / f"{name}-{i}.csv"
            flags = [word for key, value in trial.items() for word in (f"--{key}", str(value))]
            trained = read(log)
            if not trained or int(trained[-1]["step"]) != args.steps - 1:  # a sweep that broke off goes on
                subprocess.run([sys.executable, str(ROOT / f"train_{name}.py"), *flags,
                                "--policy", args.policy, "--reward_model", args.reward_model, "--steps", str(args.steps),
                                "--seed", str(args.seed), "--eval_every", "1000", "--save_every", "1000",
                                "--log", str(log), "--out", str(log.with_suffix(""))], check=True)
            last = read(log)[-5:]
            mean = {k: sum(float(row[k]) for row in last) / len(last)
                    for k in ("mean_r", "gold", "kl", "entropy", "distinct")}
            rows.append({"algorithm": name, "trial": i, "lr": "", "value_lr": "", "epochs_per_rollout": "",
                         "minibatches": ""} | trial | mean | {"seconds": float(last[-1]["seconds"])})
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            table = io.StringIO()
            writer = csv.DictWriter(table, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            atomic_write(args.out, table.getvalue().encode())


if __name__ == "__main__":
    main(parse(Args))
