"""GRPO on a ViT that draws labels, boxes or masks with dropout on (GRPO: arXiv:2402.03300).

Each answer has a dropout mask of its own (MC dropout, arXiv:1506.02142). The draw is the pair (mask, answer).
Masks have a fixed distribution, so the gradient is that of log π(answer | mask). The update replays the mask
from its seed, so the first ratio is exactly 1. The KL is exact given the mask, by enumeration. It is an upper
bound of the KL between the policies averaged over masks (convexity).
--draw argmax takes a pass's most likely answer, which depends on the mask alone: the gradient is biased.
Left out: several updates a rollout, several processes, several boxes an image, a reward for each pixel.
Run: python -m vision.vit_grpo --task class (or box, or mask)
"""
import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils.cli import AtLeast, RunFlags, die, parse, refusing
from utils.device import pick_device
from utils.log import SHARED, open_tracker
from utils.run import Run, step_generator
from vision import rewards
from vision.bandit import (
    entropy, exact_kl, frac_zero_std, keep_best, pick_reward, refuse_reward, supervised_steps)
from vision.data import batches, flip, load_classes
from vision.regions import load_regions
from vision.show import of_test, report
from vision.vit import ViT, ViTConfig, answers, as_actions, load_vit

METRICS = {"class": "top1", "box": "iou", "mask": "dice"}  # of the most likely answer, dropout off
MEASURES = [*METRICS.values(), "eval_r", "eval_kl"]
COLUMNS = [*SHARED, "samples", "seconds", "clip_frac", "ratio_max", "grad_norm", "frac_zero_std", "aux_ce",
           *MEASURES, "peak_mem_mb", *map(of_test, MEASURES)]
OBJECTIVE = replace(OBJECTIVES["grpo"], beta=0.0)  # the KL is exact here, and added in the loop with --beta


@dataclass
class Args(RunFlags):  # it has the flags of most runs
    ALIASES: ClassVar[dict[str, str]] = {"grpo_steps": "steps", "kl_coef": "beta",
                                         "eval_interval": "eval_every", "ckpt_dir": "out"}
    # ---- the algorithm ----
    batch_size: Annotated[int | None, AtLeast(1)] = None  # B, images; None (also below): see TUNED
    group_size: Annotated[int | None, AtLeast(2)] = None  # G, dropout passes over an image
    draw: Literal["sample", "argmax"] = "sample"  # from a pass's distribution, or its most likely answer
    temperature: Annotated[float, AtLeast(1e-3)] = 1.0  # of drawing and scoring alike
    beta: Annotated[float, AtLeast(0.0)] = 0.02  # weight of the exact KL
    aux_ce_coef: Annotated[float, AtLeast(0.0)] = 0.0  # weight of a cross-entropy beside the reward
    lr: Annotated[float, AtLeast(0.0)] = 1e-3  # falls linearly to 0
    weight_decay: Annotated[float, AtLeast(0.0)] = 0.0  # of AdamW
    grad_clip: Annotated[float, AtLeast(1e-9)] = 1.0  # greatest norm of the gradient
    steps: Annotated[int | None, AtLeast(1)] = None  # rollouts, and updates
    seed: int = 0  # of the splits, the start, the batches, the dropout masks and the draws
    # ---- the task ----
    task: Literal["class", "box", "mask"] = "class"  # what is drawn
    data_root: str = "digits"  # mnist5k for classes, or a folder with train/, val/ and, best, test/
    reward: str = "auto"  # bandit, topk, margin, smooth; iou, giou; dice; or FILE.py:FUNCTION for classes
    topk: int = 5  # of the reward topk
    margin_alpha: Annotated[float, AtLeast(0.0)] = 1.0  # of the reward margin
    tau: Annotated[float, AtLeast(1e-3)] = 0.3  # of the reward smooth
    init: str = ""  # a best_vit_*.pt to begin from; none: a supervised start, weak on purpose
    sft_steps: Annotated[int | None, AtLeast(0)] = None  # of the supervised start
    sft_images: Annotated[int | None, AtLeast(1)] = None  # labelled training images that the start sees
    sft_lr: Annotated[float, AtLeast(0.0)] = 1e-3  # of the supervised start
    img_size: Annotated[int | None, AtLeast(1)] = None  # pixels
    patch: Annotated[int | None, AtLeast(1)] = None  # pixels
    width: Annotated[int, AtLeast(1)] = 64  # of the residual stream
    depth: Annotated[int, AtLeast(1)] = 2  # blocks
    heads: Annotated[int, AtLeast(1)] = 4  # of attention
    dropout: float = 0.1  # the share of numbers that a pass sets to 0
    bins: Annotated[int, AtLeast(2)] = 33  # values of a box's coordinate
    bad_images: Literal["refuse", "skip"] = "refuse"  # files that can't be read
    eval_every: Annotated[int, AtLeast(1)] = 50  # steps
    log: str = "logs/vit.csv"  # the run's numbers
    log_dir: str = ""  # a folder for TensorBoard's events; --track tensorboard puts them beside the CSV
    out: str = "out/vit"  # the folder of the run's weights
    # ---- speed and memory: the algorithm stays the same ----
    num_workers: Annotated[int, AtLeast(0)] = 0  # processes that read image files
    save_every: Annotated[int, AtLeast(1)] = 50  # steps
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"  # of the policy's matrix products; auto: bf16 where fast


TUNED = {  # what None stands for: settings for digits
    "class": dict(img_size=8, patch=4, group_size=8, batch_size=64, steps=250, sft_steps=60, sft_images=100),
    "box": dict(img_size=32, patch=8, group_size=8, batch_size=32, steps=300, sft_steps=60, sft_images=60),
    "mask": dict(img_size=16, patch=4, group_size=16, batch_size=32, steps=150, sft_steps=20, sft_images=20)}
VIT_S = Args(data_root="data", img_size=224, patch=16, width=384, depth=12, heads=6, bins=57, group_size=4,
             batch_size=16, lr=1e-5, sft_lr=3e-4, weight_decay=0.05, sft_steps=2000, sft_images=100_000,
             steps=1000, eval_every=100, save_every=100, num_workers=4, dtype="auto")
PRESETS = {"digits": Args(), "224": VIT_S,  # data/train, data/eval, 10 classes: ViT-S/16, 64 passes
           # ViT-B/16, 256 passes: by arithmetic 15 GB of activations in bf16, not run on such a card
           "24gb": replace(VIT_S, width=768, heads=12, group_size=8, batch_size=32, num_workers=8)}


# ---- the policy ----
def log_probs(policy, images, seed, args, run):
    """log π of every choice, given the dropout mask of that seed: (N, C, H, W) -> (N, T, V)."""
    with run.autocast():
        logits = policy(images, seed)
    return (logits / args.temperature).log_softmax(2)


def act(logq, draw, generator):
    """(N, T, V) -> actions (N, T): sampled by inverse CDF, or each pass's most likely ones."""
    if draw == "argmax":
        return logq.argmax(2)
    u = torch.rand(*logq.shape[:2], 1, generator=generator).to(logq.device)
    return (logq.exp().cumsum(2) < u).sum(2).clamp(max=logq.shape[2] - 1)


def taken(logq, action, G):
    """The log-probabilities of the actions: (N, T, V), (N, T) -> (B, G, T)."""
    return logq.gather(2, action[:, :, None])[:, :, 0].unflatten(0, (-1, G))


def begin(args, run):
    """-> data and π₀: a checkpoint's, or one trained with labels, on so few images that it is weak."""
    data = load_classes(args.data_root, args.img_size, seed=args.seed) if args.task == "class" else \
        load_regions(args.task, args.data_root, args.img_size, args.seed)
    config = ViTConfig(args.img_size, args.patch, args.width, args.depth, args.heads, args.dropout, args.task,
                       len(data.classes), args.bins)
    if args.init:
        return data, load_vit(args.init, config, data.classes).to(run.device)
    torch.manual_seed(step_generator(args.seed, 0, "start").initial_seed())
    policy = ViT(config).to(run.device)
    train = data.train.sample(args.sft_images, step_generator(args.seed, 1, "start"))
    steps = 0 if args.resume else args.sft_steps  # the checkpoint holds the start
    for step, images, target in supervised_steps(policy, train, steps, args.seed, args.sft_lr,
                                                 num_workers=args.num_workers, bad_images=args.bad_images):
        images = flip(images, step_generator(args.seed, -1 - step, "flip")) if data.flip else images
        seed = step_generator(args.seed, -1 - step, "dropout").initial_seed()
        logq = log_probs(policy, images.to(run.device), seed, args, run)
        action = as_actions(config, target)[:, :, None].to(run.device)
        (-logq.gather(2, action).mean()).backward()
    return data, policy


@torch.no_grad()
def evaluate(policy, ref, part, reward_of, args, run):
    """On a split: the metric without dropout, one pass's reward and exact KL -> them, the first answers."""
    generator, rows, first = step_generator(args.seed, 0, "evaluation"), [], None
    metric, config = getattr(rewards, rewards.TASKS[args.task][0]), policy.config
    loader = batches(part, args.batch_size * args.group_size, num_workers=args.num_workers,
                     bad_images=args.bad_images)
    for number, (images, target, names) in enumerate(loader, 1):
        seed = step_generator(args.seed, number, "evaluation").initial_seed()
        images, target = images.to(run.device), target.to(run.device)
        logq = log_probs(policy, images, seed, args, run)
        drawn = answers(config, act(logq, args.draw, generator))[:, None]  # (N, 1, …): groups of one
        likely = answers(config, log_probs(policy, images, None, args, run).argmax(2))[:, None]
        kl = exact_kl(logq, log_probs(ref, images, seed, args, run)).mean(1)  # (N,)
        reward = reward_of(drawn, target, logq.exp()[:, 0], names)  # (N, 1)
        rows.append(torch.stack([metric(likely, target)[:, 0], reward[:, 0], kl]))
        first = likely[:10, 0].cpu() if first is None else first
    return dict(zip((METRICS[args.task], "eval_r", "eval_kl"), torch.cat(rows, 1).mean(1).tolist())), first


def main(args):
    # ---- set-up ----
    args = replace(args, **{k: v for k, v in TUNED[args.task].items() if getattr(args, k) is None})
    reward_name = rewards.TASKS[args.task][0] if args.reward == "auto" else args.reward
    refuse_reward(reward_name, args.task)
    if args.draw == "argmax" and args.dropout == 0:
        die("--draw argmax with --dropout 0: all of a group's answers would be the same")
    B, G, metric = args.batch_size, args.group_size, METRICS[args.task]
    run = Run(args, COLUMNS, args.steps, pick_device(args.device), "python -m vision.vit_grpo",
              args.save_every, objective=OBJECTIVE)
    device = run.device
    data, policy = begin(args, run)
    ref = copy.deepcopy(policy)  # frozen by no_grad: weights without requires_grad get a kernel 1e-6 off
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.99),
                                  weight_decay=args.weight_decay, fused=True)
    about = {"config": asdict(policy.config), "classes": data.classes}
    best_file = f"{args.out}/best_vit_{args.task}_grpo.pt"
    run.hold(about, counts={"best": -1.0}, writes=[best_file], model=policy, ref=ref, optimizer=optimizer)
    reward_of = pick_reward(reward_name, args, data, ref, device)
    before, test_before = (evaluate(ref, ref, part, reward_of, args, run) for part in (data.val, data.test))
    run.record["before"] = before[0]

    loader = batches(data.train, B, args.seed, run.start, args.steps, args.num_workers, args.bad_images)
    for step, (images, target, names) in zip(run.steps(), loader):
        held_out = {}
        if step % args.eval_every == 0:
            held_out, _ = evaluate(policy, ref, data.val, reward_of, args, run)
            keep_best(run, policy, best_file, "vit", held_out, metric, **about)
        if args.log_dir and step == run.start:
            run.csv.tracker = open_tracker("tensorboard", Path(args.log_dir, f"vit_{args.task}"), vars(args))
        run.start_clock()

        # ---- rollout: G dropout passes over each of B images, one answer each ----
        seed = step_generator(args.seed, step, "dropout").initial_seed()  # it brings these passes back
        images = flip(images, step_generator(args.seed, step, "flip")) if data.flip else images
        images, target = images.to(device).repeat_interleave(G, 0), target.to(device)  # N = B·G images
        with torch.no_grad():
            logq_old = log_probs(policy, images, seed, args, run)  # (N, T, V)
        action = act(logq_old, args.draw, step_generator(args.seed, step))  # (N, T)

        # ---- reward ----
        answer = answers(policy.config, action).unflatten(0, (-1, G))  # (B, G, …)
        probability = logq_old.exp().unflatten(0, (-1, G)).mean(1)[:, 0]  # (B, V), of an image's passes
        reward = reward_of(answer, target, probability, names)  # (B, G)

        # ---- advantage: how much better an answer is than its group ----
        adv = group_advantage(reward, OBJECTIVE.baseline, OBJECTIVE.scale)

        # ---- old and reference log-probabilities ----
        with torch.no_grad():
            logq_ref = log_probs(ref, images, seed, args, run)
        logp_old, logp_ref = taken(logq_old, action, G), taken(logq_ref, action, G)  # (B, G, T)

        # ---- update ----
        logq = log_probs(policy, images, seed, args, run)  # the rollout's passes again, with gradient
        logp = taken(logq, action, G)
        pg_loss, stats = grpo_loss(logp, logp_old, logp_ref, adv, torch.ones_like(logp_old), OBJECTIVE)
        true = as_actions(policy.config, target).repeat_interleave(G, 0)[:, :, None]
        kl, ce = exact_kl(logq, logq_ref).mean(1).mean(), -logq.gather(2, true).mean()
        loss = pg_loss + args.beta * kl + args.aux_ce_coef * ce
        loss.backward()
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)  # late noise undoes gains
        run.add({**stats, "loss": loss.detach()})
        run.update(optimizer, policy, grad_clip=args.grad_clip)

        # ---- log ----
        run.write(samples=len(action), mean_r=reward.mean(), kl=kl, entropy=entropy(logq).mean(),
                  token_adv=adv.abs().mean(), aux_ce=ce, frac_zero_std=frac_zero_std(reward), **held_out)

    after = evaluate(policy, ref, data.val, reward_of, args, run)
    keep_best(run, policy, best_file, "vit", after[0], metric, **about)
    run.save(args.steps)  # again, with the number of the best policy
    test_after = evaluate(policy, ref, data.test, reward_of, args, run)
    report(run, data, [before, after], [test_before, test_after],
           {metric: f"{metric}, dropout off", "eval_r": f"reward ({reward_name})", "eval_kl": "KL, nats"},
           ["mean_r", metric, "kl", "entropy"], [best_file])


if __name__ == "__main__":
    refusing(torch.OutOfMemoryError, "a smaller --batch_size needs less memory: ")(main)(parse(Args, PRESETS))
