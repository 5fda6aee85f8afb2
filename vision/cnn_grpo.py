"""GRPO for a contextual bandit: an image is the prompt, a class drawn by a CNN the answer, so T = 1.

One forward pass gives all of an image's G answers, and because the actions can be enumerated, KL is exact
(arXiv:2402.03300 with a sampled KL; vision/exact.py compares with the exact policy gradient).
The same banners in the same order as train_grpo.py. Left out: several updates a rollout, several processes.
Run: python -m vision.cnn_grpo
"""
import copy
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint
from utils.cli import Interrupt, at_least, die, parse, resume_command
from utils.device import peak_mem_mb, pick_autocast, pick_device, write_run_record
from utils.log import SHARED, Log
from utils.rewards import load_reward
from utils.run import step_generator
from vision import rewards
from vision.cnn import build
from vision.data import batches, flip, load_classes
from vision.show import report

COLUMNS = [*SHARED, "samples", "seconds", "grad_norm", "frac_zero_std", "aux_ce", "eval_r", "top1",
           "top5", "eval_kl", "peak_mem_mb"]


@dataclass
class Args:
    model: str = "small"  # small, one of torchvision's (resnet50, …), yolov8n-cls … yolov8x-cls (AGPL-3.0)
    data_root: str = "digits"  # digits, cifar100, or a folder with train/ and val/ (or eval/)
    weights: str = "default"  # default: published ones (small has none); none: random; FILE
    sft_images: int | None = None  # labelled images a class of the start; None: 3 on digits, else 0
    sft_steps: int = 60
    method: Literal["grpo", "ce"] = "grpo"  # ce: cross-entropy with all labels instead, the baseline
    objective: Literal[tuple(OBJECTIVES)] = "grpo"
    reward: str = "bandit"  # bandit, topk, margin, smooth, or FILE.py:FUNCTION (completions, prompts, label)
    topk: int = 5
    margin_alpha: float = 1.0
    tau: float = 0.3  # of the reward `smooth`
    group_size: int = 4
    batch_size: int = 128
    grpo_steps: int = 300
    head_only: bool = False  # train the last linear layer alone
    temperature: float = 1.0
    kl_coef: float = 0.02  # weight of the exact KL
    aux_ce_coef: float = 0.1  # weight of a cross-entropy beside the reward
    aux_ce_end: float | None = None  # annealed linearly to this
    lr: float | None = None  # None: 1e-3 for `small`, for --head_only and for random weights, else 1e-5
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    img_size: int | None = None  # None: 8 (small) or 32 on digits, 32 on cifar100, else 224
    bad_images: Literal["refuse", "skip"] = "refuse"
    num_workers: int = 0
    eval_interval: int = 25
    eval_images: int = 2048  # held-out ones, drawn once
    save_every: int = 100
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"
    seed: int = 0
    log: str = "logs/cnn.csv"
    out: str = "out/cnn"
    track: Literal["none", "tensorboard", "wandb"] = "none"
    resume: bool = False  # go on from --out


def load(args, device):
    """-> data and the start π₀, as weak or strong as its weights and --sft_images make it."""
    digits, yolo = args.data_root == "digits", args.model.startswith("yolov8")
    size = args.img_size or ((8 if args.model == "small" else 32) if digits else
                             32 if args.data_root == "cifar100" else 224)
    data = load_classes(args.data_root, size, normalise=not yolo)  # yolov8-cls was trained on 0 … 1
    order = torch.randperm(len(data.val), generator=step_generator(0, 0))
    data.val = data.val.subset(order[:args.eval_images].tolist())
    torch.manual_seed(args.seed)
    policy = build(args.model, len(data.classes), args.weights).to(device)
    begun = args.weights not in ("default", "none")  # from a file: trained already
    few = args.sft_images if args.sft_images is not None else 3 * (digits and not begun)
    if args.weights == "none" or args.model == "small" and not begun:
        policy.calibrate(x.to(device) for x, *_ in batches(data.train, 32, args.seed, 0, 8, args.num_workers,
                                                           args.bad_images))
    if few:
        supervise(policy, few_labels(data.train, few, args.seed), args, device)
    return data, policy


def few_labels(train, few, seed):
    """The first `few` images a class in an order drawn from the seed: all that the supervised start sees."""
    order = torch.randperm(len(train), generator=step_generator(seed, 10**6))
    labels = torch.stack([train.targets[i] for i in order])
    return train.subset(torch.cat([order[labels == c][:few] for c in labels.unique()]).tolist())


def supervise(policy, train, args, device):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for images, labels, _ in batches(train, min(64, len(train)), args.seed, 0, args.sft_steps,
                                     args.num_workers, args.bad_images):
        F.cross_entropy(policy(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()


def pick_reward(args, data, ref, device):
    """-> function (action (B, G), label (B,), probability (B, C), names) -> reward (B, G)."""
    if args.reward in (*rewards.BOX, *rewards.MASK):
        task = "box" if args.reward in rewards.BOX else "mask"
        die(f"--reward {args.reward} scores a {task}, but here a class is drawn: wanted "
            f"{', '.join(rewards.CLASS)}, or `python -m vision.vit_grpo --task {task}`")
    n = len(data.classes)
    if args.reward == "topk" and not 1 <= args.topk <= n:
        die(f"--topk {args.topk}: wanted 1 to {n}, the number of classes")
    if args.reward in ("topk", "smooth"):
        seen, labels = [], []
        with torch.no_grad():
            for images, label, _ in batches(data.train, 64, 0, 0, 32, args.num_workers, args.bad_images):
                seen.append(ref.features(images.to(device)))
                labels.append(label.to(device))
        similarity = rewards.class_similarity(torch.cat(seen), torch.cat(labels), n)
    if args.reward == "bandit":
        return lambda action, label, probability, names: rewards.bandit(action, label)
    if args.reward == "topk":
        return lambda action, label, probability, names: rewards.topk(action, label, similarity, args.topk)
    if args.reward == "margin":
        return lambda action, label, probability, names: rewards.margin(action, label, probability,
                                                                        args.margin_alpha)
    if args.reward == "smooth":
        return lambda action, label, probability, names: rewards.smooth(action, label, similarity, args.tau)
    function = load_reward(args.reward, rewards.CLASS)

    def by_function(action, label, probability, names):
        G = action.shape[1]
        said = [data.classes[a] for a in action.flatten().tolist()]
        true = [data.classes[y] for y in label.tolist() for _ in range(G)]
        scores = function(completions=said, prompts=[name for name in names for _ in range(G)], label=true)
        return torch.tensor(scores, device=action.device).view(action.shape)
    return by_function


def draw(logp, group_size, generator):
    """G classes an image from log-probabilities (B, C) -> (B, G), from the generator's numbers alone."""
    if logp.isnan().any():
        die("the policy gives no probabilities any more (NaN): lower --lr, go on from the last checkpoint")
    drawn = torch.multinomial(logp.exp().cpu(), group_size, replacement=True, generator=generator)
    return drawn.to(logp.device)


def exact_kl(logp, logp_ref):
    """KL(π‖π₀) = Σ_a π(a)·(log π(a) - log π₀(a)), over all C actions: (B, C) x2 -> (B,)."""
    return (logp.exp() * (logp - logp_ref)).sum(1)


@torch.no_grad()
def evaluate(policy, ref, data, score, args, device):
    """Held out: accuracy of the arg-max, mean reward of a draw an image, exact KL; and each arg-max."""
    generator, rows, guesses = step_generator(args.seed, 10**6), [], []
    for images, label, names in batches(data.val, 256, num_workers=args.num_workers,
                                        bad_images=args.bad_images):
        label, logits = label.to(device), policy(images.to(device))
        logp = (logits / args.temperature).log_softmax(1)
        logp_ref = (ref(images.to(device)) / args.temperature).log_softmax(1)
        best = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
        reward = score(draw(logp, 1, generator), label, logp.exp(), names)
        rows.append(torch.stack([best[:, 0], best.any(1), reward[:, 0], exact_kl(logp, logp_ref)]))
        guesses.append(logits.argmax(1))
    means = torch.cat(rows, 1).mean(1).tolist()
    return dict(zip(("top1", "top5", "eval_r", "eval_kl"), means)), torch.cat(guesses)


def main(args):
    # ---- set-up ----
    at_least(args, sft_images=0, sft_steps=0, group_size=2, batch_size=1, grpo_steps=1, temperature=1e-3,
             kl_coef=0.0, aux_ce_coef=0.0, aux_ce_end=0.0, lr=0.0, margin_alpha=0.0, weight_decay=0.0,
             grad_clip=1e-9, tau=1e-3, img_size=8,
             num_workers=0, eval_interval=1, eval_images=1, save_every=1)
    device = pick_device(args.device)
    autocast, dtype = pick_autocast(device, args.dtype)
    G, objective = args.group_size, replace(OBJECTIVES[args.objective], beta=0.0)  # exact KL is added outside
    state = args.resume and checkpoint.load_state(f"{args.out}/state.pth", args, "python -m vision.cnn_grpo",
                                                  ("model", "classes"))
    data, policy = load(args, device)
    score = pick_reward(args, data, policy, device)
    fresh = args.model == "small" or args.weights == "none" or args.head_only
    lr = args.lr if args.lr is not None else 1e-3 if fresh else 1e-5
    trained = policy.head if args.head_only else policy
    policy.requires_grad_(False)
    trained.requires_grad_(True)
    ref = copy.deepcopy(policy)  # same requires_grad: else the CPU takes other kernels, KL begins at 1e-9
    optimizer = torch.optim.AdamW(trained.parameters(), lr=lr, betas=(0.9, 0.99),
                                  weight_decay=args.weight_decay)
    best_file = f"{args.out}/best_{Path(args.model).name}_grpo.pt"
    start, seconds, samples, best = 0, 0.0, 0, -1.0
    before, guess_before = evaluate(ref, ref, data, score, args, device)
    if args.resume:
        if state["classes"] != data.classes:
            die(f"--resume: {args.out}/state.pth knows {len(state['classes'])} classes, {args.data_root} has "
                f"{len(data.classes)}, or others: give the same images, or start anew without --resume")
        policy.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, samples, best = (state[k] for k in ("step", "seconds", "samples", "best"))
    record = {"device": str(device), "dtype": dtype, "objective": asdict(objective), "lr_used": lr,
              "before": before}
    write_run_record(args.log, args, **record)
    log = Log(args.log, COLUMNS, args.grpo_steps, start, args.track, asdict(args))
    interrupt = Interrupt()

    def save(step):
        checkpoint.write(f"{args.out}/state.pth", "state", model=policy.state_dict(),
                         optimizer=optimizer.state_dict(), step=step, seconds=seconds, samples=samples,
                         best=best, classes=data.classes,
                         args=asdict(args), threads=torch.get_num_threads())

    def keep_best(top1):
        checkpoint.write(best_file, "classifier", model=policy.state_dict(), top1=top1, classes=data.classes,
                         config={"model": args.model, **asdict(args)})

    loader = batches(data.train, args.batch_size, args.seed, start, args.grpo_steps, args.num_workers,
                     args.bad_images)
    for step, (images, label, names) in enumerate(loader, start):
        row = {}
        if step % args.save_every == 0:
            save(step)
        if step % args.eval_interval == 0:
            row, _ = evaluate(policy, ref, data, score, args, device)
            if row["top1"] > best:
                best = row["top1"]
                keep_best(best)
        clock = time.perf_counter()

        # ---- rollout: one forward pass, G classes an image ----
        generator = step_generator(args.seed, step)
        images = flip(images, generator) if data.flip else images
        images, label = images.to(device), label.to(device)
        with autocast():
            logits = policy(images)
        logp_all = (logits.float() / args.temperature).log_softmax(1)  # (B, C)
        action = draw(logp_all.detach(), G, generator)  # (B, G)

        # ---- reward ----
        reward = score(action, label, logp_all.detach().exp(), names)

        # ---- advantage: what the group's mean says ----
        adv = group_advantage(reward, objective.baseline, objective.scale)

        # ---- old and reference log-probabilities ----
        with torch.no_grad(), autocast():
            ref_all = (ref(images).float() / args.temperature).log_softmax(1)
        logp = logp_all.gather(1, action)[:, :, None]  # (B, G, 1)
        logp_ref = ref_all.gather(1, action)[:, :, None]

        # ---- update ----
        mask = torch.ones_like(logp, dtype=torch.bool)
        pg_loss, stats = grpo_loss(logp, logp.detach(), logp_ref, adv, mask, objective, max_len=1)
        kl, ce = exact_kl(logp_all, ref_all).mean(), F.cross_entropy(logits.float(), label)
        coef = args.aux_ce_coef
        if args.aux_ce_end is not None:
            coef += (args.aux_ce_end - coef) * step / max(1, args.grpo_steps - 1)
        loss = ce if args.method == "ce" else pg_loss + args.kl_coef * kl + coef * ce
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), args.grad_clip)
        checkpoint.finite(step, args.out, loss=loss, grad_norm=grad_norm, **stats)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log ----
        seconds, samples = seconds + time.perf_counter() - clock, samples + action.numel()
        entropy = -(logp_all.exp() * logp_all).sum(1).mean()
        log.write(step=step, loss=loss, mean_r=reward.mean(), kl=kl, entropy=entropy,
                  token_adv=adv.abs().mean(), samples=samples, seconds=seconds, grad_norm=grad_norm,
                  aux_ce=ce,
                  frac_zero_std=(reward == reward[:, :1]).all(1).float().mean(),
                  peak_mem_mb=peak_mem_mb(device), **row)
        if interrupt.asked:
            save(step + 1)
            log.close()
            interrupt.leave(resume_command())
    save(args.grpo_steps)
    after, guess_after = evaluate(policy, ref, data, score, args, device)
    log.write(step=args.grpo_steps, **after)
    log.close()
    if after["top1"] > best:
        keep_best(after["top1"])
    write_run_record(args.log, args, **record, after=after)
    report(args, data, {"before": (before, guess_before), "after": (after, guess_after)},
           {"top1": "top-1", "top5": "top-5", "eval_r": f"reward ({args.reward})", "eval_kl": "KL, nats"},
           ["mean_r", "top1", "kl", "entropy"], [best_file])


if __name__ == "__main__":
    main(parse(Args))
