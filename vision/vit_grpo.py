"""GRPO on a ViT that draws labels, boxes or masks with dropout on (GRPO: arXiv:2402.03300).

An answer has a dropout mask of its own (MC dropout, arXiv:1506.02142): the draw is the pair (mask, answer).
Masks have a fixed distribution, so the gradient is that of log π(answer | mask), under the mask that its seed
brings back: the first ratio is exactly 1. KL is exact given the mask, by enumeration: an upper bound of the
KL of the policies averaged over masks (convexity). --draw argmax takes a pass's most likely answer: its
probability is the share of masks that lead to it, which log π(answer | mask) is not: the gradient is biased.
Left out: several updates a rollout, several processes, several boxes an image, a reward for each pixel.
Run: python -m vision.vit_grpo --task class (or box, or mask)
"""
import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint
from utils.cli import Interrupt, at_least, die, parse, resume_command
from utils.device import peak_mem_mb, pick_autocast, pick_device, write_run_record
from utils.log import SHARED, Log, open_tracker
from utils.run import step_generator
from vision import rewards
from vision.cnn_grpo import pick_reward
from vision.data import batches, flip, load_classes
from vision.regions import load_regions
from vision.show import report
from vision.vit import ViT, ViTConfig, answers, as_actions, load_vit

METRICS = {"class": "top1", "box": "iou", "mask": "dice"}  # of the most likely answer, dropout off
REWARDS = {"class": rewards.CLASS, "box": rewards.BOX, "mask": rewards.MASK}  # the first is --reward auto
COLUMNS = [*SHARED, "samples", "seconds", "clip_frac", "ratio_max", "grad_norm", "frac_zero_std", "aux_ce",
           *METRICS.values(), "eval_r", "eval_kl", "peak_mem_mb"]
OBJECTIVE = replace(OBJECTIVES["grpo"], beta=0.0)  # the KL is exact here: added outside, with --kl_coef


@dataclass
class Args:
    task: Literal["class", "box", "mask"] = "class"
    data_root: str = "digits"  # or a folder with train/ and val/ (or eval/)
    reward: str = "auto"  # bandit, topk, margin, smooth | iou, giou | dice | FILE.py:FUNCTION for classes
    draw: Literal["sample", "argmax"] = "sample"  # from the pass's distribution, or its most likely answer
    group_size: int | None = None  # dropout passes an image; None, here and below: the task's own, in TUNED
    kl_coef: float = 0.02
    aux_ce_coef: float = 0.0  # supervised cross-entropy beside the reward
    topk: int = 5
    margin_alpha: float = 1.0
    tau: float = 0.3  # of the reward `smooth`
    temperature: float = 1.0
    lr: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int | None = None  # images
    grpo_steps: int | None = None
    init: str = ""  # a best_vit_*.pt to begin from; else a supervised start, weak on purpose:
    sft_steps: int | None = None
    sft_images: int | None = None  # labelled training images that it sees
    sft_lr: float = 1e-3
    img_size: int | None = None
    patch: int | None = None
    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.1
    bins: int = 33  # of a box's coordinate
    eval_interval: int = 50
    save_every: int = 50
    num_workers: int = 0
    bad_images: Literal["refuse", "skip"] = "refuse"
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"  # auto, bf16 where there is hardware for it: large models
    seed: int = 0
    log: str = "logs/vit.csv"
    log_dir: str = ""  # TensorBoard events in a folder of yours; --track tensorboard puts them beside the CSV
    ckpt_dir: str = "out/vit"
    track: Literal["none", "tensorboard", "wandb"] = "none"
    resume: bool = False  # go on from --ckpt_dir


TUNABLE = ("img_size", "patch", "group_size", "batch_size", "grpo_steps", "sft_steps", "sft_images")
TUNED = {"class": (8, 4, 8, 64, 250, 60, 100),  # what None stands for, on digits
         "box": (32, 8, 8, 32, 300, 60, 60),
         "mask": (16, 4, 16, 32, 150, 20, 20)}
VIT_S = Args(data_root="data", img_size=224, patch=16, width=384, depth=12, heads=6, bins=57, group_size=4,
             batch_size=16, lr=1e-5, sft_lr=3e-4, weight_decay=0.05, sft_steps=2000, sft_images=100_000,
             grpo_steps=1000, eval_interval=100, save_every=100, num_workers=4, dtype="auto")
PRESETS = {"digits": Args(), "224": VIT_S,  # data/train, data/eval, 10 classes: ViT-S/16, 64 passes
           # ViT-B/16, 256 passes: by arithmetic 15 GB of activations in bf16, not run on such a card
           "24gb": replace(VIT_S, width=768, heads=12, group_size=8, batch_size=32, num_workers=8)}


def refuse(args):
    """Leaves with a message where the arguments don't go together."""
    at_least(args, group_size=2, batch_size=1, grpo_steps=1, temperature=1e-3, lr=0.0, kl_coef=0.0, tau=1e-3,
             aux_ce_coef=0.0, margin_alpha=0.0, weight_decay=0.0, sft_steps=0, sft_images=1, sft_lr=0.0,
             img_size=1, patch=1, width=1, depth=1, heads=1, bins=2, eval_interval=1, save_every=1,
             num_workers=0)
    if args.draw == "argmax" and args.dropout == 0:
        die("--draw argmax with --dropout 0: all of a group's answers would be the same")
    elsewhere = "".join(f"it goes with --task {t}; " for t, names in REWARDS.items() if args.reward in names)
    if args.reward not in ("auto", *REWARDS[args.task]) and (elsewhere or args.task != "class"):
        die(f"--reward {args.reward} doesn't score a {args.task}: {elsewhere}wanted auto, "
            f"{', '.join(REWARDS[args.task])}")


def begin(args, device, log_probs):
    """-> data and π₀: a checkpoint's, or one trained with labels, on so few images that it is weak."""
    data = load_classes(args.data_root, args.img_size) if args.task == "class" else \
        load_regions(args.task, args.data_root, args.img_size)
    config = ViTConfig(args.img_size, args.patch, args.width, args.depth, args.heads, args.dropout, args.task,
                       len(data.classes), args.bins)
    if args.init:
        return data, load_vit(args.init, config, data.classes).to(device)
    torch.manual_seed(args.seed)
    policy = ViT(config).to(device)
    order = torch.randperm(len(data.train), generator=step_generator(args.seed, 10**6))
    few = data.train.subset(order[:args.sft_images].tolist())
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.sft_lr)
    for step, (images, target, _) in enumerate(batches(few, min(64, len(few)), args.seed, 0, args.sft_steps,
                                                       args.num_workers, args.bad_images)):
        images = flip(images, step_generator(args.seed, step)) if data.flip else images
        logq = log_probs(policy, images.to(device), step)
        (-logq.gather(2, as_actions(config, target)[:, :, None].to(device)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return data, policy


def exact_kl(logq, logq_ref):
    """KL(π‖π₀) given the mask, Σ_a π(a)·(log π(a) - log π₀(a)): (N, T, V) x2 -> (N,), actions' mean."""
    return (logq.exp() * (logq - logq_ref)).sum(2).mean(1)


def main(args):
    # ---- set-up ----
    args = replace(args, **{k: v for k, v in zip(TUNABLE, TUNED[args.task]) if getattr(args, k) is None})
    refuse(args)
    B, G, metric = args.batch_size, args.group_size, METRICS[args.task]
    device = pick_device(args.device)
    autocast, dtype = pick_autocast(device, args.dtype)
    state = args.resume and checkpoint.load_state(f"{args.ckpt_dir}/state.pth", args,
                                                  "python -m vision.vit_grpo", ("config", "model", "ref"))

    def log_probs(model, images, seed):
        """log π of every choice, given the mask of that seed: (N, C, H, W) -> (N, T, V)."""
        with autocast():
            logits = model(images, seed)
        return (logits / args.temperature).log_softmax(2)

    def act(logq, generator):
        """(N, T, V) -> actions (N, T): by inverse CDF, or each pass's most likely ones."""
        if args.draw == "argmax":
            return logq.argmax(2)
        u = torch.rand(*logq.shape[:2], 1, generator=generator).to(logq.device)
        return (logq.exp().cumsum(2) < u).sum(2).clamp(max=logq.shape[2] - 1)

    data, policy = begin(replace(args, sft_steps=0) if state else args, device, log_probs)
    if state:
        policy.load_state_dict(state["ref"])
    ref = copy.deepcopy(policy)  # frozen by no_grad: weights without requires_grad get a kernel 1e-6 off
    reward_name = REWARDS[args.task][0] if args.reward == "auto" else args.reward
    by_class = args.task == "class" and pick_reward(replace(args, reward=reward_name), data, ref, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.99),
                                  weight_decay=args.weight_decay, fused=True)

    def score(answer, target, logq, names):
        """answer (B, G, ...), target (B, ...), logq (N, T, V) -> reward (B, G)."""
        if by_class:  # `margin` wants one policy an image: the mean of its passes
            return by_class(answer, target, logq.exp().view(*answer.shape, -1).mean(1), names)
        return getattr(rewards, reward_name)(answer, target)

    @torch.no_grad()
    def evaluate():
        """Held out: the metric without dropout, one pass's reward and exact KL; and the first answers."""
        generator, rows, first = step_generator(args.seed, 10**6), [], None
        for seed, (images, target, names) in enumerate(batches(
                data.val, B * G, num_workers=args.num_workers, bad_images=args.bad_images)):
            images, target = images.to(device), target.to(device)
            logq = log_probs(policy, images, seed)
            drawn = answers(policy.config, act(logq, generator))[:, None]  # (N, 1, ...): groups of one
            likely = answers(policy.config, log_probs(policy, images, None).argmax(2))[:, None]
            rows.append(torch.stack([getattr(rewards, REWARDS[args.task][0])(likely, target)[:, 0],
                                     score(drawn, target, logq, names)[:, 0],
                                     exact_kl(logq, log_probs(ref, images, seed))]))
            first = likely[:10, 0].cpu() if first is None else first
        return dict(zip((metric, "eval_r", "eval_kl"), torch.cat(rows, 1).mean(1).tolist())), first

    before, first_before = evaluate()
    start, seconds, samples, best = 0, 0.0, 0, -1.0
    if state:
        policy.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, samples, best = (state[k] for k in ("step", "seconds", "samples", "best"))
    record = {"device": str(device), "dtype": dtype, "objective": asdict(OBJECTIVE), "before": before}
    write_run_record(args.log, args, **record)
    log = Log(args.log, COLUMNS, args.grpo_steps, start, args.track, asdict(args))
    if args.log_dir:
        log.tracker = open_tracker("tensorboard", Path(args.log_dir, f"vit_{args.task}"), asdict(args))
    interrupt = Interrupt()

    def save(step):
        checkpoint.write(f"{args.ckpt_dir}/state.pth", "state", config=asdict(policy.config),
                         model=policy.state_dict(), ref=ref.state_dict(), optimizer=optimizer.state_dict(),
                         step=step, best=best, seconds=seconds, samples=samples, args=asdict(args),
                         threads=torch.get_num_threads())

    def keep_best(value):
        if value > best:
            checkpoint.write(f"{args.ckpt_dir}/best_vit_{args.task}_grpo.pt", "vit", classes=data.classes,
                             config=asdict(policy.config), model=policy.state_dict(), **{metric: value})
        return max(best, value)

    for step, (images, target, names) in enumerate(batches(
            data.train, B, args.seed, start, args.grpo_steps, args.num_workers, args.bad_images), start):
        row = evaluate()[0] if step % args.eval_interval == 0 else {}
        best = keep_best(row[metric]) if row else best
        if step % args.save_every == 0:
            save(step)
        clock = time.perf_counter()

        # ---- rollout: G dropout passes over each of B images, one answer each ----
        generator = step_generator(args.seed, step)
        seed = int(torch.randint(2**31, (), generator=generator))  # of the masks: it brings these passes back
        images, target = flip(images, generator) if data.flip else images, target.to(device)
        images = images.to(device).repeat_interleave(G, 0)  # N = B·G
        with torch.no_grad():
            logq_old = log_probs(policy, images, seed)  # (N, T, V)
        action = act(logq_old, generator)  # (N, T)

        # ---- reward ----
        answer = answers(policy.config, action).unflatten(0, (-1, G))  # (B, G, ...)
        reward = score(answer, target, logq_old, names)  # (B, G)

        # ---- advantage: what the group's mean says ----
        adv = group_advantage(reward, OBJECTIVE.baseline, OBJECTIVE.scale)

        # ---- old and reference log-probabilities ----
        def taken(logq):
            return logq.gather(2, action[:, :, None])[:, :, 0].unflatten(0, (-1, G))
        with torch.no_grad():
            logq_ref = log_probs(ref, images, seed)
        logp_old, logp_ref = taken(logq_old), taken(logq_ref)  # (B, G, T)

        # ---- update ----
        logq = log_probs(policy, images, seed)  # the rollout's passes again, with gradient
        pg_loss, stats = grpo_loss(taken(logq), logp_old, logp_ref, adv, torch.ones_like(logp_old), OBJECTIVE)
        true = as_actions(policy.config, target).repeat_interleave(G, 0)[:, :, None]
        kl, ce = exact_kl(logq, logq_ref).mean(), -logq.gather(2, true).mean()
        loss = pg_loss + args.kl_coef * kl + args.aux_ce_coef * ce
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        checkpoint.finite(step, args.ckpt_dir, loss=loss, grad_norm=grad_norm, **stats)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.grpo_steps)  # late noise undoes gains
        optimizer.step()
        optimizer.zero_grad()

        # ---- log ----
        seconds, samples = seconds + time.perf_counter() - clock, samples + len(action)
        log.write(step=step, loss=loss, mean_r=reward.mean(), kl=kl, token_adv=adv.abs().mean(), aux_ce=ce,
                  entropy=-(logq.exp() * logq).sum(2).mean(), samples=samples, seconds=seconds,
                  clip_frac=stats["clip_frac"], ratio_max=stats["ratio_max"], grad_norm=grad_norm,
                  frac_zero_std=(reward == reward[:, :1]).all(1).float().mean(),
                  peak_mem_mb=peak_mem_mb(device), **row)
        if interrupt.asked:
            save(step + 1)
            log.close()
            interrupt.leave(resume_command())
    after, first_after = evaluate()
    best = keep_best(after[metric])
    save(args.grpo_steps)
    log.write(step=args.grpo_steps, **after)
    log.close()
    write_run_record(args.log, args, **record, after=after)
    report(args, data, {"before": (before, first_before), "after": (after, first_after)},
           {metric: f"{metric}, dropout off", "eval_r": f"reward ({reward_name})", "eval_kl": "KL, nats"},
           ["mean_r", metric, "kl", "entropy"], [f"{args.ckpt_dir}/best_vit_{args.task}_grpo.pt"])


if __name__ == "__main__":
    main(parse(Args, PRESETS))
