"""CLIP as a bandit: every class's text is an arm, an image's class is drawn, GRPO moves the visual tower.

π(class | image) = softmax(s·cos(image, class text)), CLIP's zero-shot classifier (arXiv:2103.00020); G
classes are drawn for an image and compared within their group (GRPO, arXiv:2402.03300). The classes can be
enumerated, so the KL to the start π₀ and the entropy are exact. The text tower is frozen, its features are
computed once.
The same banners in the same order as train_grpo.py: the diff between the two files is the lesson.
Left out: training the text tower, augmentation beyond a flip, several processes.
Run: python clip_grpo.py (a small CLIP on digits, offline; --model-name ViT-B/32 for OpenAI's)
"""
import contextlib
import copy
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint
from utils.cli import Interrupt, at_least, die, parse, resume_command
from utils.device import peak_mem_mb, pick_autocast, pick_device, write_run_record
from utils.log import SHARED, Log
from utils.run import step_generator
from vision import lora
from vision.clip_data import MEASURES, evaluate, load, reward_function
from vision.clip_model import normalise, text_features
from vision.cnn_grpo import draw, exact_kl
from vision.data import batches, flip
from vision.show import report

COLUMNS = [*SHARED, "samples", "seconds", "entropy_norm", "clip_frac", "ratio_max", "grad_norm",
           "frac_zero_std", "lr", "logit_scale", *MEASURES, "peak_mem_mb"]
OBJECTIVE = replace(OBJECTIVES["grpo"], beta=0.0)  # the KL is added outside, exact


@dataclass
class Args:
    method: Literal["grpo", "ce"] = "grpo"  # ce: cross-entropy with the labels, all else the same
    model_name: str = ""  # one of openai-clip's names, or a file; none: a small CLIP that first learns digits
    weights: Literal["openai", "random"] = "openai"  # of a name: OpenAI's are downloaded
    dataset: str = ""  # digits, cifar100, imagenet, FOLDER; none: digits, or with a name cifar100
    data_path: str = ""  # where cifar100 or imagenet (train/ and val/) lies
    classnames: str = ""  # a file with a line FOLDER WORDS a class; none: the folder's name, ImageNet's words
    templates: tuple[str, ...] = ()  # class texts, averaged; none: vision/clip_model.py's
    other_templates: tuple[str, ...] = ()  # for evaluation alone
    bad_images: Literal["refuse", "skip"] = "refuse"
    reward: str = "bandit"  # bandit (1 for the label's class, else 0), smooth, or FILE.py:FUNCTION
    smooth_rewards: bool = False  # the same as --reward smooth
    smooth_tau: float | None = None  # τ of exp((cos(class's text, label's) - 1)/τ); None: mean(1 - cos)/10
    group_size: int = 8  # classes drawn for each image
    updates: int = 1  # optimizer steps on a rollout
    epochs: int | None = None  # None: 5, with the small CLIP 10
    batch_size: int = 128  # images
    lr: float | None = None  # None: 5e-6, with the small CLIP 1e-3; with LoRA ten times as much
    weight_decay: float = 0.2
    warmup: float = 0.1  # share of the steps; then a cosine down to 0
    grad_clip: float = 5.0
    kl_coef: float = 0.01
    entropy_weight: float = 0.01
    entropy_temperature: float = 1.0  # of the distribution whose entropy is the bonus
    freeze_logit_scale: bool = False
    use_lora: bool = False
    lora_r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05  # its mask is part of the draw: the same in every update on a rollout
    lora_adapter: str = ""  # an adapter.pth to begin with; --epochs 0 evaluates it, --save-model merges it
    start_accuracy: float = 0.72  # where the small CLIP's pretraining stops (on training images)
    use_amp: bool = False  # bf16 matmuls; normalisation, losses and weights stay fp32
    workers: int = 4  # processes that read image files
    log_interval: int = 10  # steps between the CSV's rows
    eval_after_epoch: bool = True  # else only before and after
    plot_metrics: bool = True  # a figure beside the CSV
    save_model: bool = False  # after every epoch, into --out
    device: str = "auto"
    seed: int = 0
    log: str = "logs/clip.csv"
    out: str = "out/clip"
    resume: bool = False  # go on from --out


# ---- the policy and its losses ----
def encode(visual, images, autocast=contextlib.nullcontext):
    """Unit features of images in 0 … 1: (B, 3, R, R) -> (B, D); only the tower itself may be in bf16."""
    images = normalise(images)
    with autocast():
        features = visual(images)
    return F.normalize(features.float(), dim=1)


def class_logp(features, logit_scale, text):
    """log softmax(s·cos) over all classes, s = exp(logit_scale): (B, D), (), (C, D) -> (B, C)."""
    return F.log_softmax(logit_scale.exp() * features @ text.T, dim=1)


def bandit_loss(logp_all, logp_old, action, adv, objective=OBJECTIVE):
    """grpo.py's loss with T = 1; logp_old (B, G, 1) is also the reference, since β = 0. -> loss, stats"""
    logp = logp_all.gather(1, action)[:, :, None]  # (B, G, 1)
    return grpo_loss(logp, logp_old, logp_old, adv, torch.ones_like(logp_old, dtype=torch.bool), objective)


def entropy(logp_all, temperature=1.0):
    """-Σ_c π(c)·log π(c) of π at a temperature, mean over images, in nats: (B, C) -> ()."""
    logp_all = F.log_softmax(logp_all / temperature, dim=1)
    return -(logp_all.exp() * logp_all).sum(1).mean()


def learning_rate(step, steps, peak, warmup):
    ramp = warmup * steps
    if step < ramp:
        return peak * (step + 1) / math.ceil(ramp)
    return peak * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp))) / 2


def main(args):
    # ---- set-up ----
    at_least(args, smooth_tau=1e-6, group_size=2, updates=1, epochs=0, batch_size=1, lr=0.0, weight_decay=0.0,
             warmup=0.0, grad_clip=1e-9, kl_coef=0.0, entropy_temperature=1e-3, lora_r=1, workers=0,
             log_interval=1)
    small, ten = not args.model_name, 10 if args.use_lora else 1
    epochs = args.epochs if args.epochs is not None else 10 if small else 5
    peak = args.lr if args.lr is not None else (1e-3 if small else 5e-6) * ten
    device = pick_device(args.device)
    autocast, dtype = pick_autocast(device, "bf16" if args.use_amp else "fp32")
    if args.lora_adapter and not args.use_lora:
        die(f"--lora-adapter {args.lora_adapter} needs --use-lora")
    model, config, data, digits, templates, other_templates = load(args)
    words = data.classes
    model.to(device).requires_grad_(False)
    text, other_text = (text_features(model, words, t) for t in (templates, other_templates))
    reward_of = reward_function(args, words, text)
    visual, scale = model.visual, model.logit_scale
    scale.data.clamp_(max=math.log(100))  # as CLIP does
    scale_ref = scale.detach().clone()
    scale.requires_grad_(not args.freeze_logit_scale)
    torch.manual_seed(args.seed)
    if args.use_lora:
        visual = base = lora.add_lora(visual, args.lora_r, args.lora_alpha, args.lora_dropout).to(device)
        first, *_ = next(batches(data.train, 8, bad_images=args.bad_images))
        lora.check_gradients(visual, normalise(first.to(device)))
        if args.lora_adapter:
            lora.load_adapter(args.lora_adapter, visual, scale)
    else:
        base = copy.deepcopy(visual)
        visual.requires_grad_(True)
    print("visual tower: {:,} of {:,} parameters trained".format(*lora.count(visual)))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    plain = [p for p in trained.values() if p.dim() < 2]  # gains, biases, the scale: no decay, as in CLIP
    matrices = [p for p in trained.values() if p.dim() >= 2]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": plain, "weight_decay": 0.0}], lr=peak,
                                  betas=(0.9, 0.98), eps=1e-6, weight_decay=args.weight_decay, fused=True)
    start, seconds, samples = 0, 0.0, 0
    if args.resume:
        state = checkpoint.load_state(f"{args.out}/state.pth", args, "python clip_grpo.py --save-model",
                                      ("config", "model"))
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["model"][name])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds, samples = (state[k] for k in ("step", "seconds", "samples"))
    a_pass = max(1, len(data.train) // args.batch_size)
    steps = epochs * a_pass
    reading = {"num_workers": args.workers if data.train.read else 0, "bad_images": args.bad_images}

    def policy(images):
        return encode(visual, images.to(device), autocast)

    @torch.no_grad()
    def reference(images):
        """The start's features: the same network with its adapters off, or a frozen copy."""
        with visual.disable_adapter() if args.use_lora else contextlib.nullcontext():
            return encode(base, images.to(device), autocast)

    def measure(encoder):
        visual.eval()
        found = evaluate(encoder, data.val, text, other_text, digits, **reading)
        visual.train(args.use_lora)  # for LoRA's dropout; a ResNet's batch statistics stay frozen
        return found

    def save(step):
        """The policy as a plain CLIP (adapters added in), the adapters alone, the state to resume from."""
        tower = lora.merged(visual) if args.use_lora else visual.state_dict()
        whole = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
        whole |= {f"visual.{k}": v for k, v in tower.items()}
        checkpoint.write(f"{args.out}/policy.pth", "clip", config=config, words=words,
                         templates=list(templates), model=whole)
        if args.use_lora:
            lora.save_adapter(f"{args.out}/adapter.pth", visual, scale)
        now = {name: p.detach() for name, p in trained.items()}
        checkpoint.write(f"{args.out}/state.pth", "state", config=config, model=now, step=step,
                         seconds=seconds, samples=samples, optimizer=optimizer.state_dict(),
                         args=asdict(args), threads=torch.get_num_threads())

    before = measure(reference)
    record = {"device": str(device), "dtype": dtype, "objective": asdict(OBJECTIVE), "lr_used": peak,
              "epochs_used": epochs, "templates_used": templates, "other_templates_used": other_templates}
    write_run_record(args.log, args, **record)
    log = Log(args.log, COLUMNS, steps, start)
    interrupt = Interrupt()
    visual.train(args.use_lora)
    loader = batches(data.train, args.batch_size, args.seed, start, steps, **reading)
    for step, (images, label, names) in enumerate(loader, start):
        row = {}
        if step % a_pass == 0 and (step == 0 or args.eval_after_epoch):
            row = before[0] if step == 0 and not args.lora_adapter else measure(policy)[0]
        clock = time.perf_counter()

        # ---- rollout: G classes drawn for each of B images ----
        generator = step_generator(args.seed, step)
        images, label = images.to(device), label.to(device)
        images = flip(images, generator) if data.flip else images
        torch.manual_seed(args.seed * 1_000_003 + step)  # dropout's, alike after a resume and in an update
        logp_all = class_logp(policy(images), scale, text)
        checkpoint.finite(step, args.out, logp=logp_all.min())
        action = draw(logp_all, args.group_size, generator)

        # ---- reward ----
        reward = reward_of(action, label, names)

        # ---- advantage: what the group's mean says ----
        adv = group_advantage(reward, OBJECTIVE.baseline, OBJECTIVE.scale)

        # ---- old and reference log-probabilities ----
        logp_old = logp_all.detach().gather(1, action)[:, :, None]
        ref_all = class_logp(reference(images), scale_ref, text)

        # ---- update ----
        sums = {}
        for update in range(args.updates):
            if update:
                torch.manual_seed(args.seed * 1_000_003 + step)
                logp_all = class_logp(policy(images), scale, text)
            if args.method == "ce":
                loss, stats = F.nll_loss(logp_all, label), {}
            else:
                loss, stats = bandit_loss(logp_all, logp_old, action, adv)
            kl, bonus = exact_kl(logp_all, ref_all).mean(), entropy(logp_all, args.entropy_temperature)
            loss = loss + args.kl_coef * kl - args.entropy_weight * bonus
            optimizer.zero_grad()
            loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), args.grad_clip)
            checkpoint.finite(step, args.out, loss=loss, grad_norm=grad_norm, kl=kl)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, args.warmup)
            optimizer.step()
            scale.data.clamp_(max=math.log(100))
            stats |= {"loss": loss, "kl": kl, "entropy": entropy(logp_all), "grad_norm": grad_norm}
            ratio_max = max(sums.get("ratio_max", 0.0), stats.get("ratio_max", torch.tensor(0.0)).item())
            sums = {k: sums.get(k, 0.0) + v.item() / args.updates for k, v in stats.items() if k != "pg_loss"}
            sums |= {"ratio_max": ratio_max} if args.method == "grpo" else {}

        # ---- log ----
        seconds, samples = seconds + time.perf_counter() - clock, samples + action.numel()
        if row or step % args.log_interval == 0:
            token_adv = adv.abs().mean() if args.method == "grpo" else None
            log.write(step=step, mean_r=reward.mean(), token_adv=token_adv, samples=samples, seconds=seconds,
                      entropy_norm=sums["entropy"] / math.log(len(words)), lr=optimizer.param_groups[0]["lr"],
                      frac_zero_std=(reward == reward[:, :1]).all(1).float().mean(), logit_scale=scale.exp(),
                      peak_mem_mb=peak_mem_mb(device), **sums, **row)
        if args.save_model and (step + 1) % a_pass == 0 or interrupt.asked:
            save(step + 1)
        if interrupt.asked:
            log.close()
            interrupt.leave(resume_command())
    if args.save_model and not steps:  # --epochs 0 --lora-adapter FILE: the adapters merged into policy.pth
        save(0)
    after = measure(policy)
    log.write(step=steps, samples=samples, seconds=seconds, peak_mem_mb=peak_mem_mb(device), **after[0])
    log.close()
    classes = {word: {"before": old, "after": new} for word, old, new in zip(words, before[1], after[1])}
    write_run_record(args.log, args, **record, before=before[0], after=after[0], class_accuracy=classes)
    report(args, data, {"before": before[::2], "after": after[::2]}, {name: name for name in before[0]},
           ["mean_r", "top1", "kl", "entropy_norm"] if args.plot_metrics else [],
           [f"{args.out}/policy.pth"] if args.save_model else [])


if __name__ == "__main__":
    main(parse(Args))
