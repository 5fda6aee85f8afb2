"""Best-of-n: π₀ answers n times and the reward model picks one. Its score and gold against KL, n = 1 … 256.

Nothing is trained. Picking moves π₀ by at most log n - (n - 1)/n nats an answer, and by that much where no
two answers tie (arXiv:2210.10760, arXiv:2401.01879). A pool of N answers to a prompt gives the mean over all
subsets of n. RL's `kl` is in nats a token, so the KL is divided by the mean length of the picked answers.
Left out: the spread over pools; run it with several seeds.
Run: python benchmarks/best_of_n.py --reward_model out/reward/reward.pth --log logs/best_of_n.csv
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402

from generate import sample_texts  # noqa: E402
from policy import load_policy  # noqa: E402
from reward import load_scorer  # noqa: E402
from utils.cli import AtLeast, atomic_write, die, parse  # noqa: E402
from utils.device import pick_device, write_run_record  # noqa: E402
from utils.rewards import JUDGES  # noqa: E402
from utils.text import load_prompts, words  # noqa: E402

COLUMNS = ["n", "kl_answer", "kl", "mean_r", "gold", "length", "distinct"]


@dataclass
class Args:
    policy: str = "out/sft/policy.pth"  # π₀
    reward_model: tuple[str, ...] = ("out/reward/reward.pth",)  # one or several: all pick from the same pool
    log: tuple[str, ...] = ("logs/best_of_n.csv",)  # a CSV for each of them
    gold: Literal[tuple(JUDGES)] = "taste"  # the fixed judge
    data: str = "auto"  # where the prompts come from, as in sft.py
    n_prompts: Annotated[int, AtLeast(1)] = 32  # training prompts
    pool: Annotated[int, AtLeast(1)] = 512  # answers to each of them
    largest: Annotated[int, AtLeast(1)] = 256  # n is 1, 2, 4 … up to this
    prompt_len: Annotated[int, AtLeast(1)] = 32  # tokens
    max_new: Annotated[int, AtLeast(1)] = 48  # tokens of an answer
    seed: int = 0  # of prompts and draws
    device: str = "auto"  # auto, cpu, cuda or mps


def chance_of_rank(N, n):
    """The chance that the answer of rank 1 … N, the last the best, is the best of n drawn from N: (N,).

    Of the C(N, n) subsets, C(rank - 1, n - 1) have it as their best.
    """
    rank = torch.arange(1, N + 1, dtype=torch.float64)
    log_subsets = torch.lgamma(rank) - math.lgamma(n) - torch.lgamma((rank - n + 1).clamp(min=1))
    log_all = math.lgamma(N + 1) - math.lgamma(n + 1) - math.lgamma(N - n + 1)
    return torch.where(rank >= n, torch.exp(log_subsets - log_all), 0.0)


def best_of(n, score, *values):
    """score (M, N) of M pools -> the mean of each value (M, N) over the answers that the score picks of n."""
    order = score.argsort(1)
    chance = chance_of_rank(score.shape[1], n)
    return [(value.double().gather(1, order) @ chance).mean().item() for value in values]


@torch.no_grad()
def main(args):
    if len(args.log) != len(args.reward_model):
        die(f"{len(args.reward_model)} --reward_model and {len(args.log)} --log: wanted a CSV for each")
    if args.largest > args.pool:
        die(f"--largest {args.largest} can't be drawn from a --pool of {args.pool}: wanted at most as many")
    device = pick_device(args.device)
    policy, tokenizer = load_policy(args.policy, device)
    scorers = [load_scorer("model", path, args.policy, tokenizer, device) for path in args.reward_model]
    prompts = load_prompts("", args.data, tokenizer, args.prompt_len)[0]
    drawn = prompts.draw(args.n_prompts, torch.Generator().manual_seed(args.seed))

    # ---- the pool: --pool answers to each prompt, a prompt at a time ----
    pools = []
    for i, row in enumerate(drawn):
        one, asked = prompts.pick(row[None]), prompts.pick(row[None], args.pool)
        tokens, _, mask, texts = sample_texts(policy, tokenizer, one, args.max_new, seed=args.seed * 1000 + i,
                                              group_size=args.pool)
        said = [words(text) for text in texts]
        pools.append({
            "score": torch.stack([score(tokens, mask, asked, texts) for score in scorers]),  # (models, N)
            "gold": torch.tensor(JUDGES[args.gold](texts, asked.texts, corpus_words=asked.corpus_words)),
            "length": mask.sum(1).cpu().float(),
            "distinct": torch.tensor([len(set(w)) / len(w) if w else 1.0 for w in said])})
    pool = {name: torch.stack([each[name] for each in pools]) for name in pools[0]}

    # ---- a CSV for each reward model ----
    for k, log in enumerate(args.log):
        rows = [",".join(COLUMNS)]
        for n in [2**i for i in range(args.largest.bit_length())]:
            score = pool["score"][:, k]
            values = best_of(n, score, score, pool["gold"], pool["length"], pool["distinct"])
            kl = math.log(n) - (n - 1) / n
            rows.append(",".join(f"{x:.6g}" for x in (n, kl, kl / values[2], *values)))
        atomic_write(log, "".join(f"{row}\n" for row in rows).encode())
        write_run_record(log, args, device=str(device))
        print(f"{log}: {rows[-1]}")


if __name__ == "__main__":
    main(parse(Args))
