"""What sampling costs: GRPO beside the exact policy gradient, which ten classes allow to be enumerated.

The same start, images and steps for each of: cross-entropy with the labels, the exact gradient of the
expected reward Σ_a π(a)·r(a), REINFORCE without a baseline, and GRPO with 2, 4, 8 and 16 answers an image;
then the cosine between a sampled gradient and the exact one. Reward `bandit`, no KL term, no auxiliary loss.
Run: python -m vision.exact
"""
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils.figure import COLORS, DASHES, STYLE, band, curve, read_runs
from utils.cli import at_least, atomic_write, die, parse
from utils.device import write_run_record
from utils.log import SHARED, Log
from utils.run import step_generator
from vision import cnn_grpo
from vision.data import batches
from vision.rewards import bandit

METHODS = {"cross-entropy": ("ce", 1), "exact gradient": ("exact", 1), "REINFORCE G=4": ("reinforce", 4),
           **{f"GRPO G={G}": ("grpo", G) for G in (2, 4, 8, 16)}}
GROUPS = (2, 4, 8, 16, 32, 64)


@dataclass
class Args:
    seeds: int = 5
    steps: int = 300
    batch_size: int = 128
    lr: float = 1e-3
    draws: int = 20  # sampled gradients a point of the cosine
    eval_interval: int = 10
    out: str = "results/exact"  # CSVs, and the figure beside this folder
    draw_only: bool = False  # the figure from the CSVs that are there


def objective_loss(method, G, logits, label, generator):
    """The loss of a method on a batch, and its reward and advantage (None where nothing is sampled)."""
    logp_all = logits.log_softmax(1)  # (B, C)
    if method == "ce":
        return F.cross_entropy(logits, label), None, None
    if method == "exact":
        return -logp_all.exp().gather(1, label[:, None]).mean(), None, None  # Σ_a π(a)·r(a) = π(label)
    action = cnn_grpo.draw(logp_all.detach(), G, generator)  # (B, G)
    reward, row = bandit(action, label), OBJECTIVES[method]
    adv = group_advantage(reward, row.baseline, row.scale)
    logp = logp_all.gather(1, action)[:, :, None]  # (B, G, 1)
    loss, _ = grpo_loss(logp, logp.detach(), logp.detach(), adv, torch.ones_like(logp), row)
    return loss, reward, adv


def gradient(policy, loss):
    parts = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in parts])


def train(name, seed, args):
    """One method from the seed's start; a CSV with the expected reward π(label) every few steps."""
    method, G = METHODS[name]
    data, policy = cnn_grpo.load(cnn_grpo.Args(seed=seed), torch.device("cpu"))
    ref = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0)
    path = f"{args.out}/{name.replace(' ', '_')}-s{seed}.csv"
    log = Log(path, [*SHARED, "samples", "seconds", "top1"], args.steps)
    write_run_record(log.path, args, method=method, G=G)
    held, labels, _ = next(batches(data.val, len(data.val)))
    seconds = 0.0
    for step, (images, label, _) in enumerate(batches(data.train, args.batch_size, seed, 0, args.steps)):
        clock = time.perf_counter()
        logits = policy(images)
        loss, reward, adv = objective_loss(method, G, logits, label, step_generator(seed, step))
        loss.backward()
        seconds += time.perf_counter() - clock
        if step % args.eval_interval == 0:
            with torch.no_grad():
                logp, logp_ref = policy(held).log_softmax(1), ref(held).log_softmax(1)
            log.write(step=step, loss=loss, mean_r=logp.exp().gather(1, labels[:, None]).mean(),
                      kl=cnn_grpo.exact_kl(logp, logp_ref).mean(), entropy=-(logp.exp() * logp).sum(1).mean(),
                      token_adv=None if adv is None else adv.abs().mean(), seconds=seconds,
                      samples=None if adv is None else (step + 1) * adv.numel(),
                      top1=(logp.argmax(1) == labels).float().mean())
        optimizer.step()
        optimizer.zero_grad()
    log.close()


def cosines(seed, args):
    """At the start, on one batch: the mean cosine between one draw's gradient and the exact one, by G."""
    data, policy = cnn_grpo.load(cnn_grpo.Args(seed=seed), torch.device("cpu"))
    images, label, _ = next(batches(data.train, args.batch_size, seed, 0, 1))
    logits = policy(images)
    exact = gradient(policy, objective_loss("exact", 1, logits, label, None)[0])
    for method in ("grpo", "dr_grpo", "reinforce"):
        log = Log(f"{args.out}/cosine_{method}-s{seed}.csv", ["step", "cosine"], 0)  # step: G
        for G in GROUPS:
            found = [gradient(policy, objective_loss(method, G, logits, label, step_generator(seed, i))[0])
                     for i in range(args.draws)]
            log.write(step=G, cosine=torch.stack([F.cosine_similarity(g, exact, 0) for g in found]).mean())
        log.close()


def figure(args):
    """Left: expected reward, held out, against steps; right: cosine against G. Bands: std over seeds."""
    import io

    import matplotlib
    from matplotlib.figure import Figure
    with matplotlib.rc_context(STYLE):
        fig = Figure(figsize=(9.5, 3.9), layout="constrained")
        left, right = fig.subplots(1, 2)
        for ax, names, metric in ((left, [n.replace(" ", "_") for n in METHODS], "mean_r"),
                                  (right, ["cosine_grpo", "cosine_dr_grpo", "cosine_reinforce"], "cosine")):
            for i, name in enumerate(names):
                found = sorted(Path(args.out).glob(f"{name}-s*.csv"))
                if not found:
                    die(f"--draw_only: no {args.out}/{name}-s*.csv: run `python -m vision.exact` first")
                curves = [curve(frame, metric) for frame in read_runs(found)[name]]
                x, mean, std = band(curves) if len(curves) > 1 else (*curves[0], 0)
                style = {"color": COLORS[i % 7], "linestyle": DASHES[i % 5], "linewidth": 1.6}
                ax.plot(x, mean, label=name.removeprefix("cosine_").replace("_", " "), **style)
                ax.fill_between(x, mean - std, mean + std, color=COLORS[i % 7], alpha=0.15, linewidth=0)
            ax.legend(fontsize=8)
        left.set(xlabel="step", ylabel="expected reward, held out", title="same start, same steps")
        right.set(xlabel="G, answers an image", ylabel="cosine with the exact gradient",
                  title="one batch's gradient at the start")
        right.set_xscale("log", base=2)
        right.set_xticks(GROUPS, GROUPS)
        buffer = io.BytesIO()
        fig.savefig(buffer, format="png", dpi=150)
    atomic_write(f"{args.out}.png", buffer.getvalue())
    print(f"wrote {args.out}.png")


def main(args):
    at_least(args, seeds=1, steps=1, batch_size=2, draws=1, eval_interval=1, lr=0.0)
    for seed in range(0 if args.draw_only else args.seeds):
        for name in METHODS:
            train(name, seed, args)
        cosines(seed, args)
    figure(args)


if __name__ == "__main__":
    main(parse(Args))
