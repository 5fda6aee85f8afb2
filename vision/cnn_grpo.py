"""GRPO for a contextual bandit: an image is the prompt, a class drawn by a CNN is the answer, so T = 1.

One forward pass gives all of an image's G answers. The actions can be enumerated, so the KL is exact
(arXiv:2402.03300 samples it). benchmarks/exact.py compares with the exact policy gradient.
The banners of the loop are those of train_grpo.py.
Left out: several updates a rollout, several processes. Run: python -m vision.cnn_grpo
"""
import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils.cli import AtLeast, RunFlags, die, parse, refusing
from utils.device import pick_device
from utils.log import SHARED
from utils.run import Run, step_generator
from vision.bandit import (
    draw, entropy, exact_kl, frac_zero_std, keep_best, pick_reward, refuse_reward, supervised_steps)
from vision.cnn import build
from vision.data import SPLITS, batches, flip, load_classes
from vision.lite0 import LITE0
from vision.show import of_test, report

MEASURES = ["eval_r", "top1", "top5", "eval_kl"]
COLUMNS = [*SHARED, "samples", "seconds", "grad_norm", "frac_zero_std", "aux_ce", *MEASURES, "peak_mem_mb",
           *map(of_test, MEASURES)]


@dataclass
class Args(RunFlags):  # it has the flags of most runs
    ALIASES: ClassVar[dict[str, str]] = {"grpo_steps": "steps", "kl_coef": "beta",
                                         "eval_interval": "eval_every"}
    # ---- the algorithm ----
    method: Literal["grpo", "ce"] = "grpo"  # ce: cross-entropy with all labels instead, the baseline
    objective: Literal[tuple(OBJECTIVES)] = "grpo"  # a row of grpo.py's table
    batch_size: Annotated[int, AtLeast(1)] = 128  # B, images a step
    group_size: Annotated[int, AtLeast(2)] = 4  # G, classes drawn for an image
    temperature: Annotated[float, AtLeast(1e-3)] = 1.0  # of drawing and scoring alike
    beta: Annotated[float, AtLeast(0.0)] = 0.02  # weight of the exact KL
    aux_ce_coef: Annotated[float, AtLeast(0.0)] = 0.1  # weight of a cross-entropy beside the reward
    aux_ce_end: Annotated[float | None, AtLeast(0.0)] = None  # that weight falls or rises linearly to this
    head_only: bool = False  # train the last linear layer alone
    lr: Annotated[float | None, AtLeast(0.0)] = None  # None: 1e-3 for small, random or --head_only, else 1e-5
    weight_decay: Annotated[float, AtLeast(0.0)] = 0.0  # of AdamW
    grad_clip: Annotated[float, AtLeast(1e-9)] = 1.0  # greatest norm of the gradient
    steps: Annotated[int, AtLeast(1)] = 300  # rollouts, and updates
    seed: int = 0  # of the splits, the start, the batches and the draws
    # ---- the task ----
    data_root: str = "digits"  # digits, mnist5k, cifar100, or a folder with train/, val/ and, best, test/
    model: str = "small"  # small, efficientnet-lite0, torchvision's (resnet50 …), yolov8n-cls … (AGPL-3.0)
    weights: str = "default"  # default: published ones (small has none); none: random; or a file
    sft_images: Annotated[int | None, AtLeast(0)] = None  # labels a class of the start; None: 3 on digits
    sft_steps: Annotated[int, AtLeast(0)] = 60  # supervised steps of the start
    reward: str = "bandit"  # bandit, topk, margin, smooth, or FILE.py:FUNCTION (completions, prompts, label)
    topk: int = 5  # of the reward topk
    margin_alpha: Annotated[float, AtLeast(0.0)] = 1.0  # of the reward margin
    tau: Annotated[float, AtLeast(1e-3)] = 0.3  # of the reward smooth
    img_size: Annotated[int | None, AtLeast(8)] = None  # pixels; None: 8, 28 or 32, or 224 on a folder
    bad_images: Literal["refuse", "skip"] = "refuse"  # files that can't be read
    eval_every: Annotated[int, AtLeast(1)] = 25  # steps
    eval_images: Annotated[int, AtLeast(1)] = 2048  # of validation and of the test at most, drawn once
    log: str = "logs/cnn.csv"  # the run's numbers
    out: str = "out/cnn"  # the folder of the run's weights
    # ---- speed and memory: the algorithm stays the same ----
    num_workers: Annotated[int, AtLeast(0)] = 0  # processes that read image files
    save_every: Annotated[int, AtLeast(1)] = 100  # steps
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"  # of the policy's matrix products


def load(args, device):
    """-> data and the start π₀, as weak or strong as its weights and --sft_images make it."""
    digits, raw = args.data_root in SPLITS, args.model.startswith(("yolov8", LITE0))  # pixels in 0 … 1
    size = 32 if digits or args.data_root == "cifar100" else 224
    size = {"digits": 8, "mnist5k": 28}.get(args.data_root, size) if args.model == "small" else size
    by = "bicubic" if args.model == LITE0 else "bilinear"  # as they were trained
    data = load_classes(args.data_root, args.img_size or size, not raw, args.seed, by)
    data.val, data.test = (part.sample(args.eval_images, step_generator(args.seed, 0, "evaluation"))
                           for part in (data.val, data.test))
    torch.manual_seed(step_generator(args.seed, 0, "start").initial_seed())
    policy = build(args.model, len(data.classes), args.weights).to(device)
    from_file = args.weights not in ("default", "none")  # such weights are trained already
    reading = {"num_workers": args.num_workers, "bad_images": args.bad_images}
    if args.weights == "none" or args.model == "small" and not from_file:  # BatchNorm has no statistics yet
        torch.optim.swa_utils.update_bn(batches(data.train, 32, args.seed, 0, 8, **reading), policy, device)
    few = 3 if digits and not from_file else 0
    few = few if args.sft_images is None else args.sft_images
    if few:
        train = data.train.sample(few, step_generator(args.seed, 1, "start"), each_class=True)
        for _, images, label in supervised_steps(policy, train, args.sft_steps, args.seed, **reading):
            F.cross_entropy(policy(images.to(device)), label.to(device)).backward()
    return data, policy


@torch.no_grad()
def evaluate(policy, ref, part, reward_of, args, device):
    """On a split: accuracy of the arg-max, mean reward of a draw an image, exact KL -> them, each arg-max."""
    generator, rows, guesses = step_generator(args.seed, 1, "evaluation"), [], []
    loader = batches(part, 256, num_workers=args.num_workers, bad_images=args.bad_images)
    for images, label, names in loader:
        label, logits = label.to(device), policy(images.to(device))
        logp = (logits / args.temperature).log_softmax(1)
        logp_ref = logp if ref is policy else (ref(images.to(device)) / args.temperature).log_softmax(1)
        best = logits.topk(min(5, logits.shape[1])).indices == label[:, None]
        reward = reward_of(draw(logp, 1, generator), label, logp.exp(), names)
        rows.append(torch.stack([best[:, 0], best.any(1), reward[:, 0], exact_kl(logp, logp_ref)]))
        guesses.append(logits.argmax(1))
    means = torch.cat(rows, 1).mean(1).tolist()
    return dict(zip(("top1", "top5", "eval_r", "eval_kl"), means)), torch.cat(guesses)


def main(args):
    # ---- set-up ----
    refuse_reward(args.reward, "class")
    device = pick_device(args.device)
    objective = replace(OBJECTIVES[args.objective], beta=0.0)  # the KL is exact here, and added below
    untrained = args.model == "small" or args.weights == "none" or args.head_only
    lr = args.lr if args.lr is not None else 1e-3 if untrained else 1e-5
    run = Run(args, COLUMNS, args.steps, device, "python -m vision.cnn_grpo", args.save_every,
              objective=objective, lr_used=lr)
    data, policy = load(replace(args, sft_steps=0) if args.resume else args, device)
    trained = policy.head if args.head_only else policy
    policy.requires_grad_(False)
    trained.requires_grad_(True)
    ref = copy.deepcopy(policy)  # same requires_grad: else the CPU takes other kernels, KL begins at 1e-9
    optimizer = torch.optim.AdamW(trained.parameters(), lr, (0.9, 0.99), weight_decay=args.weight_decay)
    best_file = f"{args.out}/best_{Path(args.model).name}_grpo.pt"
    state = run.hold({"classes": data.classes}, counts={"best": -1.0}, writes=[best_file],
                     model=policy, ref=ref, optimizer=optimizer)
    if state and state["classes"] != data.classes:
        die(f"--resume: {args.data_root} has other classes than {args.out}/state.pth: give the same images")
    reward_of = pick_reward(args.reward, args, data, ref, device)
    before, test_before = (evaluate(ref, ref, part, reward_of, args, device)
                           for part in (data.val, data.test))
    run.record["before"] = before[0]
    about = {"classes": data.classes, "config": asdict(args)}

    loader = batches(data.train, args.batch_size, args.seed, run.start, args.steps, args.num_workers,
                     args.bad_images)
    for step, (images, label, names) in zip(run.steps(), loader):
        held_out = {}
        if step % args.eval_every == 0:
            held_out, _ = evaluate(policy, ref, data.val, reward_of, args, device)
            keep_best(run, policy, best_file, "classifier", held_out, "top1", **about)
        run.start_clock()

        # ---- rollout: one forward pass, G classes an image ----
        images = flip(images, step_generator(args.seed, step, "flip")) if data.flip else images
        images, label = images.to(device), label.to(device)
        with run.autocast():
            logits = policy(images)
        logp_all = (logits.float() / args.temperature).log_softmax(1)  # (B, C)
        action = draw(logp_all.detach(), args.group_size, step_generator(args.seed, step))  # (B, G)

        # ---- reward ----
        reward = reward_of(action, label, logp_all.detach().exp(), names)  # (B, G)

        # ---- advantage: how much better an answer is than its group ----
        adv = group_advantage(reward, objective.baseline, objective.scale)

        # ---- old and reference log-probabilities ----
        with torch.no_grad(), run.autocast():
            ref_all = (ref(images).float() / args.temperature).log_softmax(1)
        logp = logp_all.gather(1, action)[:, :, None]  # (B, G, 1)
        logp_ref = ref_all.gather(1, action)[:, :, None]

        # ---- update ----
        mask = torch.ones_like(logp, dtype=torch.bool)
        # one update a rollout: the policy has not moved since it drew, so the ratio is exactly 1
        pg_loss, stats = grpo_loss(logp, logp.detach(), logp_ref, adv, mask, objective, max_len=1)
        kl, ce = exact_kl(logp_all, ref_all).mean(), F.cross_entropy(logits.float(), label)
        ce_coef = args.aux_ce_coef
        if args.aux_ce_end is not None:
            ce_coef += (args.aux_ce_end - ce_coef) * step / max(1, args.steps - 1)
        loss = ce if args.method == "ce" else pg_loss + args.beta * kl + ce_coef * ce
        loss.backward()
        run.add({**stats, "loss": loss.detach()})
        run.update(optimizer, trained, grad_clip=args.grad_clip)

        # ---- log ----
        run.write(samples=action.numel(), mean_r=reward.mean(), kl=kl, entropy=entropy(logp_all).mean(),
                  token_adv=adv.abs().mean(), aux_ce=ce, frac_zero_std=frac_zero_std(reward), **held_out)

    after = evaluate(policy, ref, data.val, reward_of, args, device)
    keep_best(run, policy, best_file, "classifier", after[0], "top1", **about)
    run.save(args.steps)  # again, with the number of the best policy
    test_after = evaluate(policy, ref, data.test, reward_of, args, device)
    report(run, data, [before, after], [test_before, test_after],
           {"top1": "top-1", "top5": "top-5", "eval_r": f"reward ({args.reward})", "eval_kl": "KL, nats"},
           ["mean_r", "top1", "kl", "entropy"], [best_file])


if __name__ == "__main__":
    refusing(torch.OutOfMemoryError, "a smaller --batch_size needs less memory: ")(main)(parse(Args))
