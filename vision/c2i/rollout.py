"""What c2i_grpo.py samples and scores: G images of each of B classes, as codes (B, G, T).

Left out: the reward and the loss, which stand in the script. Run: python -m vision.c2i_grpo
"""
from dataclasses import dataclass

import torch

from utils import dist
from utils.run import step_generator
from vision.c2i.models import decode, judged
from vision.c2i.sampling import sample_forced, score

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass
class Rollout:
    """G images of each of a process's B classes."""
    labels: torch.Tensor         # (B,)
    truth: torch.Tensor | None   # (B, T), the codes of a true image of the class (teacher forcing)
    codes: torch.Tensor          # (B, G, T), the actions
    logp: torch.Tensor           # (B, G, T), under the policy that sampled
    kept: torch.Tensor | None    # (B, G, T, V), which codes top-k and top-p left; None: all


@torch.no_grad()
def roll_out(model, args, labels, uniforms, truth=None):
    """Draws codes for labels (B,) with uniforms (B, G, T), freely or given the true codes (B, T)."""
    settings = {"cfg_scale": args.cfg_scale, "temperature": args.temperature, "top_k": args.top_k,
                "top_p": args.top_p}
    autocast = dist.autocast(model, DTYPES[args.dtype], labels.device)
    with autocast, dist.whole(model, reshard=args.data_parallel != "sdp"):
        if truth is None:
            model = getattr(model, "module", model)  # DDP keeps the model under this name
            drawn = model.sample(labels, uniforms.flatten(0, 1), uniforms.shape[1], **settings)
        else:
            parts = zip(*(x.split(args.train_batch_size) for x in (truth, labels, uniforms)))
            drawn = [sample_forced(model, *part, **settings) for part in parts]
            drawn = [None if x[0] is None else torch.cat(x) for x in zip(*drawn)]
    codes, logp, kept = (None if x is None else x.unflatten(0, uniforms.shape[:2]) for x in drawn)
    return Rollout(labels, truth, codes, logp, kept)


def true_answers(args, vq, x):
    """Teacher forcing's true codes (B, T) and images (B·G, 3, H, W) in 0 … 1; in free sampling None twice.

    A file of codes holds no image, so the tokenizer's own image of its codes stands for it.
    """
    if args.sampling == "autoregressive":
        return None, None
    codes = x if args.code_path else vq.encode(x).flatten(1)
    images = decode(vq, codes) if args.code_path else (x + 1) / 2
    return codes, images.repeat_interleave(args.group_size, 0)


def score_part(model, args, rollout, part):
    """Log-probability and entropy (b, G, T) of the classes `part`, on the support that was sampled from."""
    G, codes = args.group_size, rollout.codes[part]
    context = None if rollout.truth is None else rollout.truth[part].repeat_interleave(G, 0)
    kept = None if rollout.kept is None else rollout.kept[part].flatten(0, 1)
    with dist.autocast(model, DTYPES[args.dtype], codes.device):
        logp, entropy = score(model, codes.flatten(0, 1), rollout.labels[part].repeat_interleave(G),
                              args.cfg_scale, temperature=args.temperature, kept=kept, context=context)
    return logp.view(codes.shape), entropy.view(codes.shape)


def evaluate(model, args, vq, judge, score_images):
    """On digits: what a judge measures on the model's images, and these images, a class after the other."""
    labels = torch.arange(10, device=next(vq.parameters()).device).repeat_interleave(args.eval_images)
    generator = step_generator(args.seed, 0, "evaluation")  # the draws are the same at every call
    uniforms = torch.rand(len(labels), 1, (args.image_size // args.downsample_size) ** 2, generator=generator)
    images = decode(vq, roll_out(model, args, labels, uniforms).codes.flatten(0, 1))
    measures = judged(images, labels, *judge)
    if args.reward != "mse":
        measures["eval_r"] = score_images(images, labels, None).mean().item()
    return measures, images
