"""CLIP as a bandit: every class's text is an arm, an image's class is drawn, GRPO moves the visual tower.

π(class | image) = softmax(s·cos(image, class text)), CLIP's zero-shot classifier (arXiv:2103.00020).
G classes are drawn for an image and compared within their group (GRPO, arXiv:2402.03300). KL to the start π₀
and entropy are exact, since the classes can be enumerated. The text tower is frozen. The banners are those of
train_grpo.py. Left out: training the text tower, augmentation beyond a flip, several processes.
Run: python clip_grpo.py (a small CLIP on digits, offline; --model ViT-B/32 for OpenAI's)
"""
import contextlib
import copy
import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint
from utils.cli import AtLeast, RunFlags, die, parse, refusing
from utils.device import pick_device
from utils.log import SHARED
from utils.run import Run, step_generator
from vision.bandit import draw, entropy, exact_kl, frac_zero_std
from vision.clip import lora
from vision.clip.data import MEASURES, evaluate, load, reward_function
from vision.clip.model import normalise, text_features
from vision.data import batches, flip
from vision.show import of_test, report

COLUMNS = [*SHARED, "samples", "seconds", "entropy_norm", "clip_frac", "ratio_max", "grad_norm",
           "frac_zero_std", "lr", "logit_scale", *MEASURES, "peak_mem_mb", *map(of_test, MEASURES)]
OBJECTIVE = replace(OBJECTIVES["grpo"], beta=0.0)  # the KL is exact here, and added in the loop with --beta


@dataclass
class Args(RunFlags):  # it has the flags of most runs
    ALIASES: ClassVar[dict[str, str]] = {
        "kl_coef": "beta", "entropy_weight": "entropy_coef", "smooth_tau": "tau", "workers": "num_workers",
        "log_interval": "log_every", "model_name": "model", "use_amp": "dtype=bf16",
        "smooth_rewards": "reward=smooth"}
    # ---- the algorithm ----
    method: Literal["grpo", "ce"] = "grpo"  # ce: cross-entropy with the labels, all else the same
    batch_size: Annotated[int, AtLeast(1)] = 128  # B, images a step
    group_size: Annotated[int, AtLeast(2)] = 8  # G, classes drawn for an image
    updates: Annotated[int, AtLeast(1)] = 1  # optimizer steps on a rollout
    beta: Annotated[float, AtLeast(0.0)] = 0.01  # weight of the exact KL
    entropy_coef: float = 0.01  # weight of the exact entropy, a bonus
    entropy_temperature: Annotated[float, AtLeast(1e-3)] = 1.0  # of the distribution in that bonus
    epochs: Annotated[int | None, AtLeast(0)] = None  # None: 5, with the small CLIP 10
    lr: Annotated[float | None, AtLeast(0.0)] = None  # None: 5e-6, small CLIP 1e-3; LoRA: ten times as much
    weight_decay: Annotated[float, AtLeast(0.0)] = 0.2  # of matrices alone
    warmup: Annotated[float, AtLeast(0.0)] = 0.1  # share of the steps; then a cosine down to 0
    grad_clip: Annotated[float, AtLeast(1e-9)] = 5.0  # greatest norm of the gradient
    freeze_logit_scale: bool = False  # s stays as it is
    use_lora: bool = False  # train low-rank adapters of the tower alone
    lora_r: Annotated[int, AtLeast(1)] = 8  # their rank
    lora_alpha: int = 16  # they are multiplied by lora_alpha / lora_r
    lora_dropout: float = 0.05  # its mask is part of the draw: the same in every update on a rollout
    seed: int = 0  # of the splits, the start, the batches and the draws
    # ---- the task ----
    model: str = ""  # one of openai-clip's names, or a file; none: a small CLIP that first learns digits
    weights: Literal["openai", "random"] = "openai"  # of a name; OpenAI's are downloaded
    lora_adapter: str = ""  # an adapter.pth to begin with; --epochs 0 evaluates it, --save_model merges it
    start_accuracy: float = 0.72  # where the small CLIP's pretraining stops (on training images)
    dataset: str = ""  # digits, mnist5k, cifar100, imagenet, a folder; none: digits, with a model cifar100
    data_path: str = ""  # where cifar100 or imagenet (train/ and val/) lies
    classnames: str = ""  # a file with a line FOLDER WORDS a class; none: the folder's name, ImageNet's words
    templates: tuple[str, ...] = ()  # class texts, averaged; none: vision/clip/model.py's
    other_templates: tuple[str, ...] = ()  # for evaluation alone
    bad_images: Literal["refuse", "skip"] = "refuse"  # files that can't be read
    reward: str = "bandit"  # bandit (1 for the label's class, else 0), smooth, or FILE.py:FUNCTION
    tau: Annotated[float | None, AtLeast(1e-6)] = None  # of smooth, exp((cos − 1)/τ); None: mean(1 − cos)/10
    eval_after_epoch: bool = True  # else only before and after
    log_every: Annotated[int, AtLeast(1)] = 10  # steps between the CSV's rows
    plot_metrics: bool = True  # a figure beside the CSV
    save_model: bool = False  # after every epoch, into --out
    log: str = "logs/clip.csv"  # the run's numbers
    out: str = "out/clip"  # the folder of the run's weights
    # ---- speed and memory: the algorithm stays the same ----
    num_workers: Annotated[int, AtLeast(0)] = 4  # processes that read image files
    dtype: Literal["auto", "fp32", "bf16"] = "fp32"  # of the tower's matrix products; all else stays fp32


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


def learning_rate(step, steps, peak, warmup):
    """A linear rise over the share `warmup` of the steps, then a cosine down to 0."""
    ramp = warmup * steps
    if step < ramp:
        return peak * (step + 1) / math.ceil(ramp)
    return peak * (1 + math.cos(math.pi * (step - ramp) / (steps - ramp))) / 2


# ---- what is trained, and how it is written ----
def choose_trained(model, args, data, device):
    """Marks what is trained: the visual tower, or adapters in it, and s -> the tower, the start's tower."""
    model.requires_grad_(False)
    model.logit_scale.requires_grad_(not args.freeze_logit_scale)
    if not args.use_lora:
        base = copy.deepcopy(model.visual)
        return model.visual.requires_grad_(True), base
    visual = lora.add_lora(model.visual, args.lora_r, args.lora_alpha, args.lora_dropout).to(device)
    images, *_ = next(batches(data.train, 8, bad_images=args.bad_images))
    lora.check_gradients(visual, normalise(images.to(device)))
    if args.lora_adapter:
        lora.load_adapter(args.lora_adapter, visual, model.logit_scale)
    return visual, visual  # with the adapters off it is the start


def make_optimizer(trained, lr, weight_decay):
    """AdamW. Gains, biases and s do not decay, as in CLIP."""
    vectors = [p for p in trained if p.dim() < 2]
    matrices = [p for p in trained if p.dim() >= 2]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=lr,
                             betas=(0.9, 0.98), eps=1e-6, weight_decay=weight_decay, fused=True)


def export(args, model, visual, **about):
    """Writes the policy as a plain CLIP, adapters added in; with LoRA also the adapters alone."""
    tower = lora.merged(visual) if args.use_lora else visual.state_dict()
    whole = {k: v for k, v in model.state_dict().items() if not k.startswith("visual.")}
    whole |= {f"visual.{k}": v for k, v in tower.items()}
    checkpoint.write(f"{args.out}/policy.pth", "clip", **about, model=whole)
    if args.use_lora:
        lora.save_adapter(f"{args.out}/adapter.pth", visual, model.logit_scale)


def main(args):
    # ---- set-up ----
    if args.lora_adapter and not args.use_lora:
        die(f"--lora_adapter {args.lora_adapter} needs --use_lora")
    small = not args.model
    epochs = args.epochs if args.epochs is not None else 10 if small else 5
    peak = (1e-3 if small else 5e-6) * (10 if args.use_lora else 1) if args.lr is None else args.lr
    device = pick_device(args.device)
    model, config, data, digits, templates, other_templates = load(args)
    model, words = model.to(device), data.classes
    text, other_text = (text_features(model, words, t) for t in (templates, other_templates))
    reward_of = reward_function(args, words, text)
    a_pass = max(1, len(data.train) // args.batch_size)
    steps = epochs * a_pass
    run = Run(args, COLUMNS, steps, device, "python clip_grpo.py --save_model",
              a_pass if args.save_model else 0, objective=OBJECTIVE, lr_used=peak,
              epochs_used=epochs, templates_used=templates, other_templates_used=other_templates)
    reading = {"num_workers": args.num_workers if data.train.read else 0, "bad_images": args.bad_images}
    scale = model.logit_scale
    scale.data.clamp_(max=math.log(100))  # as CLIP does
    scale_ref = scale.detach().clone()
    torch.manual_seed(step_generator(args.seed, 0, "start").initial_seed())  # of LoRA's adapters
    visual, base = choose_trained(model, args, data, device)
    print("visual tower: {:,} of {:,} parameters trained".format(*lora.count(visual)))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, peak, args.weight_decay)
    run.hold({"config": config}, writes=[f"{args.out}/{name}.pth" for name in ("policy", "adapter")],
             model=torch.nn.ParameterList(trained), optimizer=optimizer)

    def policy(images):
        return encode(visual, images.to(device), run.autocast)

    @torch.no_grad()
    def reference(images):
        with visual.disable_adapter() if args.use_lora else contextlib.nullcontext():
            return encode(base, images.to(device), run.autocast)

    def measure(encoder, part=data.val):
        visual.eval()
        numbers = evaluate(encoder, part, text, other_text, digits, **reading)
        visual.train(args.use_lora)  # for LoRA's dropout; a ResNet's batch statistics stay frozen
        return numbers

    about = {"config": config, "words": words, "templates": list(templates)}
    before, test_before = measure(reference), measure(reference, data.test)
    loader = batches(data.train, args.batch_size, args.seed, run.start, steps, **reading)
    for step, (images, label, names) in zip(run.steps(), loader):
        held_out = {}
        if step % a_pass == 0 and (step == 0 or args.eval_after_epoch):
            held_out = before[0] if step == 0 and not args.lora_adapter else measure(policy)[0]
        if step and step % a_pass == 0 and args.save_model:
            export(args, model, visual, **about)
        run.start_clock()

        # ---- rollout: G classes drawn for each of B images ----
        images, label = images.to(device), label.to(device)
        images = flip(images, step_generator(args.seed, step, "flip")) if data.flip else images
        dropout_seed = step_generator(args.seed, step, "dropout").initial_seed()
        torch.manual_seed(dropout_seed)  # again in each update: the mask is part of the draw
        logp_all = class_logp(policy(images), scale, text)  # (B, C)
        checkpoint.finite(step, args.out, logp=logp_all.min())
        action = draw(logp_all, args.group_size, step_generator(args.seed, step))  # (B, G)

        # ---- reward ----
        reward = reward_of(action, label, logp_all.detach().exp(), names)  # (B, G)

        # ---- advantage: how much better an answer is than its group ----
        adv = group_advantage(reward, OBJECTIVE.baseline, OBJECTIVE.scale)

        # ---- old and reference log-probabilities ----
        logp_old = logp_all.detach().gather(1, action)[:, :, None]  # (B, G, 1)
        ref_all = class_logp(reference(images), scale_ref, text)

        # ---- update ----
        for update in range(args.updates):
            if update:
                torch.manual_seed(dropout_seed)
                logp_all = class_logp(policy(images), scale, text)
            if args.method == "ce":
                loss, stats = F.nll_loss(logp_all, label), {}
            else:
                loss, stats = bandit_loss(logp_all, logp_old, action, adv)
            kl = exact_kl(logp_all, ref_all).mean()
            bonus = entropy(logp_all, args.entropy_temperature).mean()
            loss = loss + args.beta * kl - args.entropy_coef * bonus
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, args.warmup)
            stats |= {"loss": loss.detach(), "kl": kl.detach(), "entropy": entropy(logp_all.detach()).mean()}
            run.add(stats, 1 / args.updates)
            run.update(optimizer, model, grad_clip=args.grad_clip, weight=1 / args.updates)
            scale.data.clamp_(max=math.log(100))

        # ---- log ----
        run.write(samples=action.numel(), due=held_out or step % args.log_every == 0, mean_r=reward.mean(),
                  token_adv=adv.abs().mean() if args.method == "grpo" else None, logit_scale=scale.exp(),
                  entropy_norm=run.sums["entropy"] / math.log(len(words)), lr=optimizer.param_groups[0]["lr"],
                  frac_zero_std=frac_zero_std(reward), **held_out)

    if args.save_model:
        export(args, model, visual, **about)
    after, test_after = measure(policy), measure(policy, data.test)
    run.record["class_accuracy"] = {word: {"before": old, "after": new} for word, old, new in
                                    zip(words, test_before[1], test_after[1])}
    report(run, data, [before[::2], after[::2]], [test_before[::2], test_after[::2]],
           {name: name for name in before[0]},
           ["mean_r", "top1", "kl", "entropy_norm"] if args.plot_metrics else [],
           [f"{args.out}/policy.pth"] if args.save_model else [])


if __name__ == "__main__":
    refusing(torch.OutOfMemoryError, "a smaller --batch_size needs less memory: ")(main)(parse(Args))
