"""Tuning, fairly: as many trials for GRPO as for PPO, on one seed that no result reports (seed 100).

Every trial trains from the same π₀ with the same reward model. Its row of results/sweep.csv is the highest
score, averaged over 5 steps, at which KL is still below 0.3 nats a token, and the step at which that was.
Run: python benchmarks/sweep.py
"""
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.cli import at_least, atomic_write, parse  # noqa: E402  (after the path)

TRIALS = {
    "grpo": [{"lr": lr, "epochs_per_rollout": e, "minibatches": m}
             for lr, e, m in ((1e-4, 1, 1), (3e-4, 1, 1), (1e-4, 1, 4), (1.5e-4, 1, 1), (5e-5, 1, 4))],
    "ppo": [{"lr": lr, "value_lr": v, "epochs_per_rollout": e, "minibatches": m}
            for lr, v, e, m in ((1e-4, 1e-3, 1, 4), (3e-4, 1e-3, 1, 2),
                                (3e-5, 1e-3, 1, 4), (1e-4, 1e-3, 1, 1), (5e-5, 1e-3, 1, 4))],
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


def main(args):
    at_least(args, steps=5)
    rows = []
    for name in args.algorithms:
        for i, trial in enumerate(TRIALS[name]):
            log = Path(args.work) / f"{name}-{i}.csv"
            flags = [word for key, value in trial.items() for word in (f"--{key}", str(value))]
            if not log.is_file() or len(pd.read_csv(log)) < args.steps:  # a sweep that broke off goes on
                subprocess.run([sys.executable, str(ROOT / f"train_{name}.py"), *flags,
                                "--policy", args.policy, "--reward_model", args.reward_model,
                                "--steps", str(args.steps), "--seed", str(args.seed), "--gold", "sentiment",
                                "--overwrite", "--eval_every", "1000", "--save_every", "1000",
                                "--log", str(log), "--out", str(log.with_suffix(""))], check=True)
            table = pd.read_csv(log)[["mean_r", "gold", "kl", "distinct"]].rolling(5).mean()
            best = table[table.kl <= 0.3]["mean_r"].idxmax()
            rows.append({"algorithm": name, "trial": i, "lr": "", "value_lr": "", "epochs_per_rollout": "",
                         "minibatches": ""} | trial | {"best_step": best, **table.loc[best].to_dict()})
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            atomic_write(args.out, pd.DataFrame(rows).to_csv(index=False, float_format="%.5g").encode())


if __name__ == "__main__":
    main(parse(Args))
