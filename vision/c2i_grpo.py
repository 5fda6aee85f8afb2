"""GRPO for a class-conditional image GPT of LlamaGen's: a class is the prompt, an image the answer.

LlamaGen (arXiv:2406.06525) draws an image as T codes of a frozen tokenizer; GRPO (arXiv:2402.03300) compares
G images of a class. Without --vq-ckpt and --data-path it runs on digits, and trains what that needs first.
The same banners in the same order as train_grpo.py. Left out: text prompts, EMA, learning rate schedules.
Run: python -m vision.c2i_grpo
"""
import copy
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint, dist, ranks
from utils.cli import Interrupt, die, need, parse, resume_command
from utils.device import peak_mem_mb, write_run_record
from utils.log import SHARED, Log, add
from utils.run import step_generator
from vision.c2i.data import batches, load_data, write_codes
from vision.c2i.models import GPTS, TOKENIZERS, report, resolve
from vision.c2i.models import decode, judged, load_models, pick_reward, picture
from vision.c2i.sampling import draw, guided_logits, score

COLUMNS = [*SHARED, "samples", "seconds", "sampling_s", "clip_frac", "ratio_max", "sampler_gap_max",
           "grad_norm", "frac_zero_std", "eval_r", "accuracy", "diversity", "frechet", "peak_mem_mb"]
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAY_CHANGE = {  # in a resume
    "resume", "epochs", "max_steps", "sample_batch_size", "train_batch_size", "gradient_accumulation_steps",
    "data_parallel", "num_workers", "device", "backend", "log", "log_interval", "log_image_every", "ckpt_dir",
    "ckpt_every", "ckpt_sharded", "use_wandb", "wandb_project", "wandb_entity", "wandb_run_name"}


@dataclass
class Args:
    """Where a field is None: see the tables DIGITS and LLAMAGEN. Batch sizes count classes a process."""
    gpt_model: Literal[tuple(GPTS)] | None = None
    gpt_ckpt: str | None = None  # a file of LlamaGen's; None: random weights, on digits a GPT trained here
    from_fsdp: bool = False  # --gpt-ckpt is a folder: LlamaGen's FSDP format, or a checkpoint of this script
    vq_model: Literal[tuple(TOKENIZERS)] | None = None
    vq_ckpt: str | None = None
    codebook_size: int | None = None
    codebook_embed_dim: int | None = None
    image_size: int | None = None  # 256, 384 or 512; on digits an even number
    downsample_size: int | None = None  # 8 or 16
    num_classes: int | None = None
    cls_token_num: Literal[1] = 1
    data_path: str | None = None  # what datasets.save_to_disk wrote
    code_path: str | None = None  # code files, in place of images
    extract_codes: str | None = None  # write such files to this folder, and leave
    dataset: str | None = None  # a name for the log
    sampling: Literal["autoregressive", "teacher-forced"] = "autoregressive"
    reward: str | None = None  # classifier (autoregressive), mse (teacher-forced), FILE.py:FUNCTION
    classifier: str = "resnet50"  # torchvision's; digits have their own
    classifier_weights: str = "default"  # default: published ones; none: random; FILE
    num_generations: int = 8
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    cfg_scale: float = 1.0
    sample_batch_size: int | None = None
    train_batch_size: int | None = None  # of them, how many are scored at once
    gradient_accumulation_steps: int = 1
    adv_clip_max: float = 5.0
    clip_range: float | None = None
    beta: float = 0.1
    lr: float | None = None
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    epochs: int | None = None  # passes over the data
    max_steps: int | None = None  # rollouts at most
    global_seed: int = 0
    mixed_precision: Literal[tuple(DTYPES)] | None = None
    grad_precision: Literal["fp32", "fp16", "bf16"] = "fp32"  # of gradients between processes
    data_parallel: Literal["ddp", "sdp", "fsdp", "hsdp"] | None = None
    num_workers: int | None = None
    device: str = "auto"
    backend: Literal["auto", "gloo", "nccl"] = "auto"
    ckpt_every: int | None = None  # 0: never
    ckpt_dir: str = "checkpoints"
    ckpt_sharded: bool = False
    resume: bool = False  # go on from the newest of --ckpt-dir
    vq_steps: int = 300  # of training the digits' tokenizer
    gpt_steps: int = 400  # of its GPT: few of them leave GRPO something to do
    classifier_steps: int = 300
    log: str = "logs/c2i.csv"
    log_interval: int | None = None
    log_image_every: int = 100  # 0: never
    eval_every: int | None = None  # digits; 0: at the start and the end alone
    eval_images: int = 100  # a class
    use_wandb: bool = False  # offline unless WANDB_MODE says otherwise
    wandb_project: str = "autoreg-grpo"
    wandb_entity: str | None = None
    wandb_run_name: str | None = None


def began_alike(path, args, batch):
    """The state in a checkpoint; other arguments than it began with are refused, but the world may change."""
    state = checkpoint.load(path, "state", "python -m vision.c2i_grpo", ("step", "args"))
    for name, value in {**asdict(args), "the global batch": batch}.items():
        if name not in MAY_CHANGE and state["args"].get(name) != value:
            die(f"--resume: {path} began with {name} {state['args'].get(name)}, not {value}: give the same")
    torch.set_num_threads(state["threads"])
    return state


def start_wandb(args):
    os.environ.setdefault("WANDB_MODE", "offline")
    return need("wandb", "log").init(
        project=args.wandb_project, entity=args.wandb_entity, dir=str(Path(args.log).parent),
        name=args.wandb_run_name or Path(args.log).stem, config=asdict(args))


def main(args):
    # ---- set-up ----
    with ranks.one_voice():
        args, is_digits = resolve(args)
        device = ranks.start(args.device, args.backend)
        torch.set_float32_matmul_precision("high" if args.mixed_precision == "tf32" else "highest")
        dtype, grad_dtype = DTYPES[args.mixed_precision], DTYPES[args.grad_precision]
        rank, world, seed = ranks.rank(), ranks.world(), args.global_seed
        B, G = args.sample_batch_size, args.num_generations
        folder = args.resume and dist.newest(args.ckpt_dir, "python -m vision.c2i_grpo")
        state = args.resume and began_alike(folder / "run.pth", args, B * world)
        vq, bare, net, judge = ranks.first_on_rank_0(lambda: load_models(args, is_digits, device))
        T, forced = bare.config.block_size, args.sampling == "teacher-forced"
        score_images = pick_reward(args, net, is_digits)
        data = load_data(args, is_digits, T)
        if args.extract_codes:
            write_codes(data, vq, args, device, rank, world)
            print(f"wrote the codes of {len(data)} images to {args.extract_codes}")
            return
        if len(data) < B * world:
            die(f"the data hold {len(data)} images, a step takes {B * world}: lower --sample-batch-size")
        steps = min(args.epochs * (len(data) // (B * world)), args.max_steps or 10**12)
        eps = args.clip_range
        objective = replace(OBJECTIVES["grpo"], eps_low=eps, eps_high=eps, beta=args.beta)
        ref, policy = (dist.wrap(model, args.data_parallel, dtype, grad_dtype, device)
                       for model in (copy.deepcopy(bare).requires_grad_(False), bare))
        optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(args.beta1, args.beta2),
                                      weight_decay=args.weight_decay)
        start, seconds, samples = 0, 0.0, 0
        if args.resume:
            dist.load(folder, policy, optimizer)
            start, seconds, samples = (state[k] for k in ("step", "seconds", "samples"))
            steps = max(steps, start)
        if rank == 0:
            write_run_record(args.log, args, device=str(device), world=world)
            log = Log(args.log, COLUMNS, steps, start)
            run = start_wandb(args) if args.use_wandb else None
            log.tracker = run and run.log
    interrupt = Interrupt()
    parts = torch.arange(B).split(args.train_batch_size)
    updates = len(parts) // args.gradient_accumulation_steps
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    how = {"cfg_scale": args.cfg_scale, "temperature": args.temperature}

    def autocast():  # FSDP2 casts by itself
        half = dtype != torch.float32 and not dist.sharded(policy)
        return torch.autocast(device.type, dtype, enabled=half)

    @torch.no_grad()
    def sample(model, labels, G, uniforms, truth=None):
        """G images for each of labels (B,), free or on true codes (B, T): codes, logp (B·G, T), kept."""
        with autocast(), dist.whole(model, args.data_parallel != "sdp"):
            if truth is None:
                return getattr(model, "module", model).sample(  # one prefill a group
                    labels, uniforms, G, top_k=args.top_k, top_p=args.top_p, **how)
            found = []
            for part, u in zip(parts, uniforms.split(args.train_batch_size * G)):
                logits = guided_logits(model, truth[part, :-1], labels[part], args.cfg_scale)  # (b, T, V)
                logits = logits.repeat_interleave(G, 0)
                found.append(draw(logits, u, args.temperature, args.top_k, args.top_p))
            return [None if x[0] is None else torch.cat(x) for x in zip(*found)]

    def evaluate(model):
        """On digits: numbers, and the images, a class after the other; the same draws at every call."""
        labels = torch.arange(10, device=device).repeat_interleave(args.eval_images)
        uniforms = torch.rand(len(labels), T, generator=step_generator(seed, 10**6))
        images = decode(vq, sample(model, labels, 1, uniforms)[0])
        found = judged(images, labels, judge)
        if args.reward != "mse":
            found["eval_r"] = score_images(images, labels, None).mean()
        return found, images

    def save(step):
        dist.save(f"{args.ckpt_dir}/{step:07d}", policy, optimizer, step, args.ckpt_sharded,
                  args={**asdict(args), "the global batch": B * world}, seconds=seconds, samples=samples,
                  threads=torch.get_num_threads())

    before = evaluate(ref) if is_digits else None
    loader = batches(data, B * world, seed, start, steps, args.num_workers, rank, world)
    for step, (x, labels) in enumerate(loader, start):
        row = {}
        if args.ckpt_every and step % args.ckpt_every == 0 and step > start:
            save(step)
        if is_digits and args.eval_every and step % args.eval_every == 0:
            row = evaluate(policy)[0] if step else before[0]
        clock = time.perf_counter()

        # ---- rollout: G images of each of B classes ----
        labels, x, truth = labels.to(device), x.to(device), None
        uniforms = torch.rand(B * world, G, T, generator=step_generator(seed, step))
        uniforms = uniforms[rank::world].flatten(0, 1).to(device)  # (B·G, T)
        if forced:
            truth = x if args.code_path else vq.encode(x).flatten(1)  # (B, T)
        action, logp_sampled, kept = sample(policy, labels, G, uniforms, truth)
        if device.type == "cuda":
            torch.cuda.synchronize()
        sampling_s = time.perf_counter() - clock

        # ---- reward ----
        drawn, true_images = decode(vq, action), None
        if forced:  # files of codes hold no image: what the tokenizer makes of them stands for it
            true_images = decode(vq, truth) if args.code_path else (x + 1) / 2
            true_images = true_images.repeat_interleave(G, 0)
        reward = score_images(drawn, labels.repeat_interleave(G), true_images).view(B, G)

        # ---- advantage: what the group's mean says ----
        adv = group_advantage(reward, objective.baseline, objective.scale)
        adv = adv.clamp(-args.adv_clip_max, args.adv_clip_max)

        # ---- old and reference log-probabilities, on the support that was sampled from ----
        def scored(model, part):
            rows = (part[:, None] * G + torch.arange(G)).flatten().to(device)
            context = None if truth is None else truth[part].repeat_interleave(G, 0)
            with autocast():
                found = score(model, action[rows], labels[part].repeat_interleave(G), **how, context=context,
                              kept=None if kept is None else kept[rows])
            return [x.view(-1, G, T) for x in found]
        with torch.no_grad():
            logp_ref = [scored(ref, part)[0] for part in parts]
            logp_old = [scored(policy, part)[0] for part in parts] if updates > 1 else None

        # ---- update ----
        sums = {}
        for i, part in enumerate(parts):
            logp, entropy = scored(policy, part)
            old = logp.detach() if updates == 1 else logp_old[i]
            loss, stats = grpo_loss(logp, old, logp_ref[i], adv[part], torch.ones_like(logp), objective,
                                    n_answers=args.gradient_accumulation_steps * logp[:, :, 0].numel())
            scaler.scale(loss).backward()  # averaged over the processes, so n_answers is that of one
            stats |= {"loss": loss.detach() * args.gradient_accumulation_steps, "entropy": entropy.mean(),
                      "sampler_gap_max": (old - logp_sampled.view(B, G, T)[part]).abs().max()}
            add(sums, stats, 1 / len(parts))
            if (i + 1) % args.gradient_accumulation_steps == 0:
                scaler.unscale_(optimizer)
                norm = dist.clip(policy, args.max_grad_norm)
                if not scaler.is_enabled():  # it skips such a step by itself
                    with ranks.one_voice():
                        checkpoint.finite(step, args.ckpt_dir, grad_norm=norm,
                                          **ranks.mean({"loss": loss.detach()}))
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                add(sums, {"grad_norm": norm}, 1 / updates)

        # ---- log ----
        seconds, samples = seconds + time.perf_counter() - clock, samples + B * G * world
        sums.pop("pg_loss")
        sums |= {"mean_r": reward.mean(), "token_adv": adv.abs().mean(), "stop_max": float(interrupt.asked),
                 "frac_zero_std": (reward.std(1) == 0).float().mean()}
        sums = ranks.mean(sums)
        stop = sums.pop("stop_max") > 0
        if rank == 0 and (row or step % args.log_interval == 0):
            log.write(step=step, samples=samples, seconds=seconds, sampling_s=sampling_s,
                      peak_mem_mb=peak_mem_mb(device), **sums, **row)
        if rank == 0 and args.log_image_every and step % args.log_image_every == 0:
            path = picture(f"{args.ckpt_dir}/samples/{step:07d}.png", drawn[:8 * G], min(8, B))
            if run is not None:
                run.log({"images": need("wandb", "log").Image(path)}, step=step)
        if stop:
            save(step + 1)
            with ranks.one_voice():
                interrupt.leave(resume_command())
    if args.ckpt_every:
        save(steps)
    after = evaluate(policy) if is_digits else None
    if rank == 0:
        report(args, log, steps, before, after, judge)


if __name__ == "__main__":
    with ranks.one_voice():
        typed = parse(Args)
    main(typed)
    ranks.stop()
