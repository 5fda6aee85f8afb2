"""What sampling costs: GRPO beside the exact policy gradient, which can be enumerated over ten classes.

Four methods have the same start, images and steps: cross-entropy with the labels, the exact gradient of the
expected reward Σ_a π(a)·r(a), REINFORCE without a baseline, and GRPO with several group sizes. Then comes the
cosine between a sampled gradient and the exact one. The reward is `bandit`, without a KL term.
Run: python benchmarks/exact.py
"""
import copy
import io
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from grpo import OBJECTIVES, group_advantage, grpo_loss  # noqa: E402
from utils.cli import AtLeast, atomic_write, die, parse  # noqa: E402
from utils.device import write_run_record  # noqa: E402
from utils.figure import COLORS, DASHES, STYLE, band, curve, read_runs  # noqa: E402
from utils.log import SHARED, Log  # noqa: E402
from utils.run import step_generator  # noqa: E402
from vision.bandit import draw, entropy, exact_kl, supervised_steps  # noqa: E402
from vision.cnn import build  # noqa: E402
from vision.data import batches, digits  # noqa: E402
from vision.rewards import bandit  # noqa: E402

METHODS = {"cross-entropy": ("ce", 1), "exact gradient": ("exact", 1), "REINFORCE G=4": ("reinforce", 4),
           **{f"GRPO G={G}": ("grpo", G) for G in (2, 4, 8, 16)}}
GROUPS = (2, 4, 8, 16, 32, 64)


@dataclass
class Args:
    ALIASES: ClassVar[dict[str, str]] = {"eval_interval": "eval_every"}

    seeds: Annotated[int, AtLeast(1)] = 5  # runs of each method
    steps: Annotated[int, AtLeast(1)] = 300  # of each run
    batch_size: Annotated[int, AtLeast(2)] = 128  # images a step
    lr: Annotated[float, AtLeast(0.0)] = 1e-3  # of AdamW
    draws: Annotated[int, AtLeast(1)] = 20  # sampled gradients a point of the cosine
    eval_every: Annotated[int, AtLeast(1)] = 10  # steps
    out: str = "results/exact"  # the folder of the CSVs; the figure is written beside it
    draw_only: bool = False  # the figure alone, from CSVs of an earlier run


def start(seed):
    """The start of cnn_grpo.py on digits: a small CNN that saw three labelled images a class."""
    data = digits(8, seed)
    torch.manual_seed(step_generator(seed, 0, "start").initial_seed())
    policy = build("small", len(data.classes), "none")
    few = data.train.sample(3, step_generator(seed, 1, "start"), each_class=True)
    for _, images, label in supervised_steps(policy, few, 60, seed):
        F.cross_entropy(policy(images), label).backward()
    return data, policy


def objective_loss(method, G, logits, label, generator):
    """The loss of a method on a batch, its reward and its advantage (both None where nothing is sampled)."""
    logp_all = logits.log_softmax(1)  # (B, C)
    if method == "ce":
        return F.cross_entropy(logits, label), None, None
    if method == "exact":
        return -logp_all.exp().gather(1, label[:, None]).mean(), None, None  # Σ_a π(a)·r(a) = π(label)
    action = draw(logp_all.detach(), G, generator)  # (B, G)
    reward, objective = bandit(action, label), OBJECTIVES[method]
    adv = group_advantage(reward, objective.baseline, objective.scale)
    logp = logp_all.gather(1, action)[:, :, None]  # (B, G, 1)
    loss, _ = grpo_loss(logp, logp.detach(), logp.detach(), adv, torch.ones_like(logp), objective)
    return loss, reward, adv


def gradient(policy, loss):
    parts = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in parts])


def train(name, seed, args):
    """One method from the seed's start; a CSV with the expected reward π(label) every few steps.

    The columns mean_r and top1 are of the validation images. The last row has the test's.
    """
    method, G = METHODS[name]
    data, policy = start(seed)
    ref = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    path = f"{args.out}/{name.replace(' ', '_')}-s{seed}.csv"
    log = Log(path, [*SHARED, "samples", "seconds", "top1", "test_r", "test_top1"], args.steps)
    write_run_record(log.path, args, method=method, G=G)
    seconds = 0.0
    for step, (images, label, _) in enumerate(batches(data.train, args.batch_size, seed, 0, args.steps)):
        clock = time.perf_counter()
        logits = policy(images)
        loss, reward, adv = objective_loss(method, G, logits, label, step_generator(seed, step))
        loss.backward()
        seconds += time.perf_counter() - clock
        if step % args.eval_every == 0:
            log.write(step=step, loss=loss, token_adv=None if adv is None else adv.abs().mean(),
                      samples=None if adv is None else (step + 1) * adv.numel(), seconds=seconds,
                      **measured(policy, ref, data.val))
        optimizer.step()
        optimizer.zero_grad()
    test = measured(policy, ref, data.test)
    log.write(step=args.steps, test_r=test["mean_r"], test_top1=test["top1"],
              **measured(policy, ref, data.val))
    log.close()


@torch.no_grad()
def measured(policy, ref, part):
    """On a split: the expected reward π(label), the exact KL, the entropy, the accuracy of the arg-max."""
    images, label, _ = next(batches(part, len(part)))
    logp, logp_ref = policy(images).log_softmax(1), ref(images).log_softmax(1)
    return {"mean_r": logp.exp().gather(1, label[:, None]).mean(), "kl": exact_kl(logp, logp_ref).mean(),
            "entropy": entropy(logp).mean(), "top1": (logp.argmax(1) == label).float().mean()}


def cosines(seed, args):
    """At the start, on one batch: the mean cosine between one draw's gradient and the exact one, by G."""
    data, policy = start(seed)
    images, label, _ = next(batches(data.train, args.batch_size, seed, 0, 1))
    logits = policy(images)
    exact = gradient(policy, objective_loss("exact", 1, logits, label, None)[0])
    for method in ("grpo", "dr_grpo", "reinforce"):
        log = Log(f"{args.out}/cosine_{method}-s{seed}.csv", ["step", "cosine"], 0)  # step: G
        for G in GROUPS:
            similarity = []
            for i in range(args.draws):
                loss, *_ = objective_loss(method, G, logits, label, step_generator(seed, i))
                similarity.append(F.cosine_similarity(gradient(policy, loss), exact, 0))
            log.write(step=G, cosine=torch.stack(similarity).mean())
        log.close()


def figure(args):
    """Left: expected reward, on validation, against steps; right: cosine against G. Bands: std over seeds."""
    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(9.5, 3.9), layout="constrained")
        left, right = fig.subplots(1, 2)
        for ax, names, metric in ((left, [n.replace(" ", "_") for n in METHODS], "mean_r"),
                                  (right, ["cosine_grpo", "cosine_dr_grpo", "cosine_reinforce"], "cosine")):
            for i, name in enumerate(names):
                paths = sorted(Path(args.out).glob(f"{name}-s*.csv"))
                if not paths:
                    die(f"--draw_only: no {args.out}/{name}-s*.csv: run `python benchmarks/exact.py` first")
                curves = [curve(frame, metric) for frame in read_runs(paths)[name]]
                x, mean, std = band(curves) if len(curves) > 1 else (*curves[0], 0)
                style = {"color": COLORS[i % 7], "linestyle": DASHES[i % 5], "linewidth": 1.6}
                ax.plot(x, mean, label=name.removeprefix("cosine_").replace("_", " "), **style)
                ax.fill_between(x, mean - std, mean + std, color=COLORS[i % 7], alpha=0.15, linewidth=0)
            ax.legend(fontsize=8)
        left.set(xlabel="step", ylabel="expected reward, validation", title="same start, same steps")
        right.set(xlabel="G, answers an image", ylabel="cosine with the exact gradient",
                  title="one batch's gradient at the start")
        right.set_xscale("log", base=2)
        right.set_xticks(GROUPS, GROUPS)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=150)
    atomic_write(f"{args.out}.png", buffer.getvalue())
    print(f"wrote {args.out}.png")


def main(args):
    for seed in range(0 if args.draw_only else args.seeds):
        for name in METHODS:
            train(name, seed, args)
        cosines(seed, args)
    figure(args)


if __name__ == "__main__":
    main(parse(Args))
