"""GRPO for a class-conditional image GPT of LlamaGen's: a class is the prompt, an image is the answer.

LlamaGen (arXiv:2406.06525) draws an image as T codes of a frozen tokenizer. GRPO (arXiv:2402.03300) compares
G images of a class. Without --vq-ckpt and --data-path the run is on digits, whose models it trains first.
A flag that is None takes a value of LlamaGen's or of the digits (vision/c2i/models.py). The banners are those
of train_grpo.py. Left out: text prompts, schedules. Run: python -m vision.c2i_grpo
"""
import copy
import time
from dataclasses import asdict, dataclass, replace
from typing import Annotated, ClassVar, Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint, dist, guard, ranks
from utils.cli import INPUTS, AtLeast, Interrupt, die, need, parse, resume_command
from utils.device import peak_mem_mb, write_run_record
from utils.log import SHARED, Log, add
from utils.run import step_generator
from vision.c2i.data import batches, load_data, write_codes
from vision.c2i.models import GPTS, TOKENIZERS, decode, load_models, pick_reward, picture, report, resolve
from vision.c2i.rollout import DTYPES, evaluate, roll_out, score_part, true_answers

MADE_BY = "python -m vision.c2i_grpo"
COLUMNS = [*SHARED, "samples", "seconds", "sampling_s", "clip_frac", "ratio_max", "sampler_gap_max",
           "grad_norm", "frac_zero_std", "eval_r", "accuracy", "diversity", "frechet", "peak_mem_mb",
           "test_accuracy", "test_frechet"]
# A resumed run may give these otherwise. The batch sizes may change with the number of processes.
MAY_CHANGE = {"resume", "overwrite", "epochs", "steps", "sample_batch_size", "train_batch_size", "device",
              "backend", "gradient_accumulation_steps", "data_parallel", "num_workers", "log", "log_every",
              "log_image_every", "out", "save_every", "ckpt_sharded", "track", "wandb_project",
              "wandb_entity", "wandb_run_name"}


@dataclass
class Args:
    ALIASES: ClassVar[dict[str, str]] = {
        "global_seed": "seed", "num_generations": "group_size", "max_grad_norm": "grad_clip",
        "max_steps": "steps", "ckpt_dir": "out", "ckpt_every": "save_every", "mixed_precision": "dtype",
        "clip_range": "eps", "log_interval": "log_every", "use_wandb": "track=wandb"}
    # ---- the algorithm ----
    sampling: Literal["autoregressive", "teacher-forced"] = "autoregressive"  # forced: given the true codes
    sample_batch_size: Annotated[int | None, AtLeast(1)] = None  # classes a step and process
    group_size: Annotated[int, AtLeast(2)] = 8  # images of each class
    train_batch_size: Annotated[int | None, AtLeast(1)] = None  # classes in one forward and backward pass
    gradient_accumulation_steps: Annotated[int, AtLeast(1)] = 1  # such passes in one optimizer step
    temperature: float = 1.0  # divides the logits of sampling and scoring
    top_k: int = 0  # draw from the k likeliest codes; 0: from all
    top_p: float = 1.0  # draw from the likeliest codes that hold this share of the probability
    cfg_scale: float = 1.0  # classifier-free guidance; up to 1: none
    eps: Annotated[float | None, AtLeast(0.0)] = None  # the ratio is clipped to 1 - eps … 1 + eps
    beta: Annotated[float, AtLeast(0.0)] = 0.1  # weight of the KL penalty
    adv_clip_max: Annotated[float, AtLeast(0.0)] = 5.0  # largest size of an advantage
    lr: Annotated[float | None, AtLeast(0.0)] = None  # AdamW's learning rate
    weight_decay: Annotated[float, AtLeast(0.0)] = 0.01  # AdamW's
    beta1: Annotated[float, AtLeast(0.0)] = 0.9  # AdamW's
    beta2: Annotated[float, AtLeast(0.0)] = 0.95  # AdamW's
    grad_clip: Annotated[float, AtLeast(0.0)] = 1.0  # largest norm of the gradient
    epochs: Annotated[int | None, AtLeast(1)] = None  # passes over the data
    steps: Annotated[int | None, AtLeast(1)] = None  # rollouts at most; None: those of --epochs
    seed: int = 0  # of the splits, the models trained here, the order of the data and the draws
    # ---- the task ----
    gpt_model: Literal[tuple(GPTS)] | None = None  # the policy's size
    gpt_ckpt: str | None = None  # a file of LlamaGen's; None: random weights, or a GPT of digits trained here
    from_fsdp: bool = False  # --gpt-ckpt is a folder: LlamaGen's FSDP format, or a checkpoint of this script
    vq_model: Literal[tuple(TOKENIZERS)] | None = None  # the tokenizer's size
    vq_ckpt: str | None = None  # a file of LlamaGen's
    codebook_size: Annotated[int | None, AtLeast(2)] = None  # codes of the tokenizer
    codebook_embed_dim: Annotated[int | None, AtLeast(1)] = None  # numbers in each of them
    image_size: Annotated[int | None, AtLeast(8)] = None  # 256, 384 or 512; on digits an even number
    downsample_size: int | None = None  # pixels a code, in each direction: 8 or 16
    num_classes: Annotated[int | None, AtLeast(1)] = None  # classes of the data and the policy
    cls_token_num: Literal[1] = 1  # slots of the class in the policy's sequence
    dataset: str | None = None  # a name for the run's record
    data_path: str | None = None  # a folder that datasets.save_to_disk wrote
    code_path: str | None = None  # a folder of code files, in place of images
    extract_codes: str | None = None  # write such files to this folder, and end
    reward: str | None = None  # classifier (autoregressive), mse (teacher-forced), FILE.py:FUNCTION
    classifier: str = "resnet50"  # torchvision's, for the reward; digits have their own
    classifier_weights: str = "default"  # default: published ones; none: random; FILE
    vq_steps: Annotated[int, AtLeast(1)] = 300  # of training the digits' tokenizer
    gpt_steps: Annotated[int, AtLeast(0)] = 400  # of training their GPT: few leave GRPO something to do
    classifier_steps: Annotated[int, AtLeast(1)] = 300  # of training their reward and their judges
    eval_every: Annotated[int | None, AtLeast(0)] = None  # on digits; 0: at the start and the end alone
    eval_images: Annotated[int, AtLeast(2)] = 100  # images of each class
    # ---- speed and memory: the algorithm stays the same ----
    dtype: Literal[tuple(DTYPES)] | None = None  # of the matmuls; the losses are float32
    grad_precision: Literal["fp32", "fp16", "bf16"] = "fp32"  # of gradients between processes
    data_parallel: Literal["ddp", "sdp", "fsdp", "hsdp"] | None = None  # see utils/dist.py
    num_workers: Annotated[int | None, AtLeast(0)] = None  # processes that read images
    device: str = "auto"  # auto, cpu, cuda, mps
    backend: Literal["auto", "gloo", "nccl"] = "auto"  # how processes talk; auto: nccl on GPUs
    out: str = "checkpoints"  # folder of the checkpoints, the digits' models and the sampled images
    save_every: Annotated[int | None, AtLeast(0)] = None  # steps between checkpoints; 0: write none
    ckpt_sharded: bool = False  # each process writes its own part of a checkpoint
    resume: bool = False  # go on from the last checkpoint in --out
    overwrite: bool = False  # begin anew in a finished run's place
    log: str = "logs/c2i.csv"  # the CSV of the run
    log_every: Annotated[int | None, AtLeast(1)] = None  # steps between rows of the CSV
    log_image_every: Annotated[int, AtLeast(0)] = 100  # steps between pictures of the rollout; 0: none
    track: Literal["none", "tensorboard", "wandb"] = "none"  # W&B is offline unless WANDB_MODE says otherwise
    wandb_project: str = "autoreg-grpo"  # W&B's name for a set of runs
    wandb_entity: str | None = None  # the user or team of W&B
    wandb_run_name: str | None = None  # None: the name of the CSV


def step_optimizer(step, args, policy, optimizer, scaler, loss):
    """Clips the gradients, moves the weights -> the gradients' norm. A non-finite one ends the run."""
    scaler.unscale_(optimizer)
    norm = dist.clip(policy, args.grad_clip)
    if not scaler.is_enabled():  # the scaler of fp16 leaves out a non-finite step by itself
        checkpoint.finite(step, args.out, grad_norm=norm, **ranks.mean({"loss": loss.detach()}))
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return norm


def save(args, policy, optimizer, counts, arguments):
    dist.save(f"{args.out}/{counts['step']:07d}", policy, optimizer, in_shards=args.ckpt_sharded, **counts,
              args=arguments, inputs=dict(INPUTS))


def log_picture(args, log, step, images):
    """Every so many steps: the first images of a rollout as a PNG, a line a class; W&B gets it too."""
    if ranks.rank() or not args.log_image_every or step % args.log_image_every:
        return
    path = picture(f"{args.out}/samples/{step:07d}.png", images[:8 * args.group_size],
                   rows=min(8, args.sample_batch_size))
    if args.track == "wandb":
        log.tracker({"images": need("wandb", "log").Image(path)}, step)


@ranks.one_voice()
def main(args):
    # ---- set-up ----
    args, is_digits = resolve(args)
    device, rank, world = ranks.start(args.device, args.backend), ranks.rank(), ranks.world()
    torch.set_float32_matmul_precision("high" if args.dtype == "tf32" else "highest")
    B, G = args.sample_batch_size, args.group_size
    arguments = asdict(args) | {"the global batch": B * world}  # a resume compares them
    if args.resume:
        folder, state = dist.last_state(args.out, arguments, MAY_CHANGE, args.ALIASES, MADE_BY)
    checkpoint.earlier(args, dist.checkpoints(args.out))
    vq, policy, classifier, judges = ranks.first_on_rank_0(lambda: load_models(args, is_digits, device))
    T = policy.config.block_size
    score_images = pick_reward(args, classifier, is_digits)
    data = load_data(args, is_digits, T)
    if args.extract_codes:
        write_codes(data, vq, args, device, rank, world)
        return
    if len(data) < B * world:
        die(f"the data hold {len(data)} images, a step takes {B * world}: lower --sample-batch-size")
    objective = replace(OBJECTIVES["grpo"], eps_low=args.eps, eps_high=args.eps, beta=args.beta)
    ref = copy.deepcopy(policy).requires_grad_(False)
    precision = DTYPES[args.dtype], DTYPES[args.grad_precision]
    ref, policy = (dist.wrap(model, args.data_parallel, *precision, device) for model in (ref, policy))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(args.beta1, args.beta2),
                                  weight_decay=args.weight_decay)
    counts = {"step": 0, "seconds": 0.0, "samples": 0}
    if args.resume:
        guard.same_inputs(state.get("inputs", {}), folder)
        dist.load(folder, policy, optimizer)
        counts = {name: state[name] for name in counts}
    start = counts["step"]
    total = max(start, min(args.epochs * (len(data) // (B * world)), args.steps or 10**12))
    checkpoint.take(args, dist.checkpoints(args.out))
    write_run_record(args.log, args, device=str(device), world=world)
    log = Log(args.log, COLUMNS, total, start, args.track, args)
    interrupt = Interrupt()
    parts = torch.arange(B).split(args.train_batch_size)  # the classes of one forward and backward pass
    passes = args.gradient_accumulation_steps
    updates = len(parts) // passes
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16")
    before = evaluate(ref, args, vq, judges[0], score_images) if is_digits else None

    loader = batches(data, B * world, args.seed, start, total, args.num_workers, rank, world)
    for step, (x, labels) in enumerate(loader, start):
        if args.save_every and step % args.save_every == 0 and step > start:
            save(args, policy, optimizer, counts, arguments)
        measures = {}
        if is_digits and args.eval_every and step % args.eval_every == 0:
            measures = evaluate(policy, args, vq, judges[0], score_images)[0] if step else before[0]
        clock = time.perf_counter()

        # ---- rollout: G images of each of B classes ----
        x, labels = x.to(device), labels.to(device)
        truth, true_images = true_answers(args, vq, x)  # None where codes are drawn freely
        uniforms = torch.rand(B * world, G, T, generator=step_generator(args.seed, step))
        rollout = roll_out(policy, args, labels, uniforms[rank::world].to(device), truth)
        if device.type == "cuda":
            torch.cuda.synchronize()
        sampling_s = time.perf_counter() - clock

        # ---- reward ----
        images = decode(vq, rollout.codes.flatten(0, 1))  # (B·G, 3, H, W)
        reward = score_images(images, labels.repeat_interleave(G), true_images).view(B, G)

        # ---- advantage: what the group's mean says ----
        adv = group_advantage(reward, objective.baseline, objective.scale)
        adv = adv.clamp(-args.adv_clip_max, args.adv_clip_max)

        # ---- old and reference log-probabilities, on the support that was sampled from ----
        with torch.no_grad():
            logp_ref = [score_part(ref, args, rollout, part)[0] for part in parts]
            logp_old = [score_part(policy, args, rollout, part)[0] for part in parts] if updates > 1 else None

        # ---- update ----
        sums = {}
        for i, part in enumerate(parts):
            logp, entropy = score_part(policy, args, rollout, part)  # (b, G, T)
            # with one update a rollout the policy is still the one that sampled: the ratio is exactly 1
            old = logp.detach() if updates == 1 else logp_old[i]
            loss, stats = grpo_loss(logp, old, logp_ref[i], adv[part], torch.ones_like(logp), objective,
                                    n_answers=passes * logp[:, :, 0].numel())
            scaler.scale(loss).backward()  # processes average their gradients: n_answers is that of one
            stats |= {"loss": loss.detach() * passes, "entropy": entropy.mean(),
                      "sampler_gap_max": (old - rollout.logp[part]).abs().max()}
            add(sums, stats, 1 / len(parts))
            if (i + 1) % passes == 0:
                grad_norm = step_optimizer(step, args, policy, optimizer, scaler, loss)
                add(sums, {"grad_norm": grad_norm}, 1 / updates)

        # ---- log ----
        counts = {"step": step + 1, "seconds": counts["seconds"] + time.perf_counter() - clock,
                  "samples": counts["samples"] + B * G * world}
        sums.pop("pg_loss")  # it is near 0 whatever is learnt: advantages are centred
        sums |= {"mean_r": reward.mean(), "token_adv": adv.abs().mean(), "stop_max": float(interrupt.asked),
                 "frac_zero_std": (reward == reward[:, :1]).all(1).float().mean()}
        numbers = ranks.mean(sums)
        stop = numbers.pop("stop_max") > 0
        if measures or step % args.log_every == 0:
            log.write(**counts | {"step": step}, sampling_s=sampling_s, peak_mem_mb=peak_mem_mb(device),
                      **numbers, **measures)
        log_picture(args, log, step, images)
        if stop:
            save(args, policy, optimizer, counts, arguments)
            interrupt.leave(resume_command())
    if args.save_every:
        save(args, policy, optimizer, counts, arguments)
    after = evaluate(policy, args, vq, judges[0], score_images) if is_digits else None
    if rank == 0:
        report(args, log, total, before, after, judges, device=str(device), world=world)
    guard.release()


if __name__ == "__main__":
    with ranks.one_voice():
        typed = parse(Args)
    main(typed)
    ranks.stop()
