"""SFT, supervised fine-tuning: corpus -> out/sft/policy.pth, the reference policy π₀ of all that follows.

Next-token cross-entropy on random windows, with a warm-up and a cosine, as in nanoGPT (github.com/karpathy).
With --muon_lr, Muon (kellerjordan.github.io/posts/muon) moves the blocks' matrices: singular values of an
update are then about equal. The weights of the best held-out loss are kept. Losses are logged a token and a
character, so that tokenizers compare.
Left out: several documents, packing, gradient accumulation.
Run: python sft.py (several processes: torchrun --nproc_per_node=2 sft.py)
"""
import math
import random
from dataclasses import dataclass
from typing import Annotated, Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F

from generate import sample_texts
from model import GPT, SIZES, GPTConfig
from policy import load_policy
from tasks import load_task
from utils import checkpoint, ranks
from utils.cli import AtLeast, RunFlags, die, parse, program, refusing
from utils.log import SHARED
from utils.run import Run, step_generator
from utils.text import Prompts, heading_prompts, load_corpus, split
from utils.tokenizer import train_tokenizer

COLUMNS = [*SHARED, "held_out", "loss_char", "held_out_char", "lr", "grad_norm", "tokens", "seconds",
           "tokens_per_s", "peak_mem_mb"]


@dataclass
class Args(RunFlags):  # it has the flags of most runs
    # ---- the algorithm ----
    steps: Annotated[int, AtLeast(1)] = 900  # optimizer steps
    batch_size: Annotated[int, AtLeast(1)] = 32  # windows of text
    lr: Annotated[float, AtLeast(0.0)] = 3e-3  # of AdamW, after the warm-up
    muon_lr: Annotated[float, AtLeast(0.0)] = 0.0  # of Muon, such as 0.02; 0, or torch < 2.9: AdamW for all
    lr_end: Annotated[float, AtLeast(0.0)] = 0.1  # at the end the rates are this share
    warmup: Annotated[int, AtLeast(0)] = 50  # steps
    weight_decay: float = 0.1  # of AdamW's matrices
    beta2: Annotated[float, AtLeast(0.0)] = 0.99  # of AdamW
    grad_clip: Annotated[float, AtLeast(1e-9)] = 1.0  # greatest norm of the gradient
    dropout: Annotated[float, AtLeast(0.0)] = 0.0  # share of activations that are dropped
    seed: int = 0  # of weights, windows and dropout
    # ---- the task ----
    data: str = "auto"  # auto, shakespeare, play, a plain text file with speaker headings, or task:NAME
    worked: Annotated[int, AtLeast(100)] = 2000  # solved questions to learn from, of --data task:NAME
    tokenizer: Literal["bpe", "char", "gpt2"] = "bpe"  # bpe and char are trained on the corpus
    vocab_size: int = 1024  # of bpe
    size: Literal[tuple(SIZES)] = "nano"  # layers, heads, width
    init: str = ""  # start from GPT-2's weights: a name ("gpt2") or a folder; needs --tokenizer gpt2
    block_size: Annotated[int, AtLeast(8)] = 96  # tokens of context; a prompt and its answer must fit
    eval_every: Annotated[int, AtLeast(1)] = 100  # steps
    log: str = "logs/sft.csv"  # the run's numbers
    out: str = "out/sft"  # the folder of the run's weights


PRESETS = {
    "demo": Args(),
    # nanoGPT's CPU budget for character-level Shakespeare, whose README gives a held-out loss of 1.88
    "char": Args(tokenizer="char", block_size=64, batch_size=12, steps=2000, lr=1e-3, warmup=100,
                 eval_every=250),
}


def schedule(step, args):
    """The share of the learning rates at a step: linear warm-up, then half a cosine from 1 to lr_end."""
    if step < args.warmup:
        return (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.lr_end + 0.5 * (1 - args.lr_end) * (1 + math.cos(math.pi * progress))


def windows(ids, starts, block_size):
    """Inputs and targets of the windows that start there: two (N, block_size)."""
    index = starts[:, None] + torch.arange(block_size + 1)
    return ids[index][:, :-1], ids[index][:, 1:]


@torch.no_grad()
def held_out_loss(model, ids, args, device, autocast):
    """Mean cross-entropy a token over the held-out text in windows side by side."""
    starts = torch.arange(0, len(ids) - args.block_size - 1, args.block_size)
    model.eval()
    total = 0.0
    for part in starts.split(256):
        x, y = windows(ids, part, args.block_size)
        with autocast():
            logits = model(x.to(device))
        total += F.cross_entropy(logits.float().flatten(0, 1), y.flatten().to(device), reduction="sum").item()
    model.train()
    return total / (len(starts) * args.block_size)


def make_optimizers(model, args):
    """-> {name: optimizer}: AdamW, with weight decay for matrices alone, and Muon for the blocks' matrices.

    A table of tokens or positions is no map from vectors to vectors, so it is AdamW's.
    """
    blocks = [p for p in model.h.parameters() if p.dim() == 2]
    with_muon = args.muon_lr > 0 and hasattr(torch.optim, "Muon")
    moved = set(blocks if with_muon else [])
    rest = [p for p in model.parameters() if p not in moved]
    groups = [{"params": [p for p in rest if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    groups = [group | {"peak_lr": args.lr} for group in groups]
    made = {"optimizer": torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, args.beta2), fused=True)}
    if with_muon:
        group = {"params": blocks, "peak_lr": args.muon_lr}
        made["muon"] = torch.optim.Muon([group], lr=args.muon_lr, weight_decay=0.0)
    return made


def main(args):
    # ---- set-up ----
    if args.dropout >= 1:
        die(f"--dropout {args.dropout} drops everything: wanted a share below 1")
    device = ranks.start(args.device)
    share = ranks.share(args.batch_size, "--batch_size")  # this process's windows
    run = Run(args, COLUMNS, args.steps, device, program(), save_every=args.eval_every)
    task = load_task(args.data.removeprefix("task:")) if args.data.startswith("task:") else None
    if task:  # solved questions, each with a blank line, the stop, behind it
        rng = random.Random(args.seed)
        text, source = "".join(f"{task.worked(rng)}\n\n" for _ in range(args.worked)), args.data
    else:
        text, source = load_corpus(args.data)
    parts = split(text)
    tokenizer = train_tokenizer(args.tokenizer, text, args.vocab_size)
    if task:
        prompts = task.prompts(tokenizer, args.seed)[1]
    else:  # no headings, no prompts later: said before training
        tokens = heading_prompts(parts[1], tokenizer, min(32, args.block_size // 2),
                                 f"the held-out last tenth of {source}")
        prompts = Prompts(tokens, None, [tokenizer.decode(row) for row in tokens.tolist()], {})
    room = args.block_size - prompts.tokens.shape[1]
    if room < 1:
        die(f"--block_size {args.block_size}: wanted more than the longest question's "
            f"{prompts.tokens.shape[1]} tokens")
    train, held_out = (torch.tensor(tokenizer.encode(part)) for part in parts)
    chars_per_token = [len(part) / len(ids) for part, ids in zip(parts, (train, held_out))]
    if len(held_out) < args.block_size + 2:
        die(f"the held-out tenth of {source} has {len(held_out)} tokens: wanted at least --block_size + 2 = "
            f"{args.block_size + 2}")
    if args.init and args.tokenizer != "gpt2":
        die(f"--init {args.init} has GPT-2's vocabulary: wanted --tokenizer gpt2, got {args.tokenizer}")
    model = GPT.from_pretrained(args.init) if args.init else GPT(
        GPTConfig(tokenizer.vocab_size, args.block_size, *SIZES[args.size], args.dropout))
    model = model.to(device).train()
    n_parameters = sum(p.numel() for p in model.parameters())
    with refusing(what="AdamW: "):
        optimizers = make_optimizers(model, args)
    run.record |= {"corpus": source, "parameters": n_parameters}
    run.hold(checkpoint.about(model, tokenizer), counts={"best": math.inf}, writes=[f"{args.out}/policy.pth"],
             model=model, **optimizers)

    def evaluate():
        """The held-out loss; its best weights are kept."""
        loss = held_out_loss(model, held_out, args, device, run.autocast)
        if loss < run.counts["best"]:
            run.counts["best"] = loss
            checkpoint.save(f"{args.out}/policy.pth", "policy", model, tokenizer, corpus=source)
        return {"held_out": loss, "held_out_char": loss / chars_per_token[1]}

    print(f"{source}: {len(train):,} + {len(held_out):,} tokens of {tokenizer.name}, "
          f"{chars_per_token[0]:.2f} characters each; {args.init or args.size}, {n_parameters:,} parameters, "
          f"{device}, {run.dtype}")
    for step in run.steps():
        # ---- evaluate, keep the best ----
        evaluated = evaluate() if step % args.eval_every == 0 else {}
        run.start_clock()

        # ---- update ----
        share_of_lr = schedule(step, args)
        for group in [group for optimizer in optimizers.values() for group in optimizer.param_groups]:
            group["lr"] = group["peak_lr"] * share_of_lr
        starts = torch.randint(len(train) - args.block_size - 1, (args.batch_size,),
                               generator=step_generator(args.seed, step))
        x, y = windows(train, starts, args.block_size)
        # dropout's masks come from the step's number, so that a resume draws the same; not the windows' seed
        torch.manual_seed(args.seed * 1_000_003 + step + (ranks.rank() + 1) * 10**15)
        with run.autocast():
            logits = model(x[share].to(device))
        loss = F.cross_entropy(logits.float().flatten(0, 1), y[share].flatten().to(device)) / ranks.world()
        loss.backward()
        run.add({"loss": loss.detach()})
        run.update(optimizers["optimizer"], model, grad_clip=args.grad_clip)  # it clips Muon's gradients, too
        if "muon" in optimizers:
            optimizers["muon"].step()
            optimizers["muon"].zero_grad()

        # ---- log ----
        run.sums["loss_char"] = run.sums["loss"] / chars_per_token[0]
        run.write(lr=args.lr * share_of_lr, tokens=y.numel(), **evaluated)
    run.finish(seconds=run.counts["seconds"], tokens=run.counts["tokens"], **evaluate())

    # ---- samples ----
    policy, tokenizer = load_policy(f"{args.out}/policy.pth", device)
    shown = prompts.pick(torch.arange(0, len(prompts.texts), max(1, len(prompts.texts) // 3))[:3])
    for prompt, answer in zip(shown.texts, sample_texts(policy, tokenizer, shown, room, seed=args.seed)[3]):
        print(f"\n{prompt.splitlines()[-1]}\n{answer}")
    if task:
        right = task.ask(policy, tokenizer, prompts, room)[1] >= 1
        print(f"\n{right.float().mean():.0%} of {len(right)} held-out questions are answered right, greedily")
    best = run.counts["best"]
    print(f"\nbest held-out loss {best:.4f} nats a token, {best / chars_per_token[1]:.4f} a character, "
          f"{run.counts['seconds']:.0f} s; wrote {args.out}/policy.pth and {args.log}")
    ranks.stop()
    return best / chars_per_token[1]


if __name__ == "__main__":
    with ranks.one_voice():
        main(parse(Args, PRESETS))
