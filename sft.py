"""SFT, supervised fine-tuning: corpus -> out/sft/policy.pth, the reference policy π₀ of all that follows.

Next-token cross-entropy on random windows, nanoGPT's recipe (github.com/karpathy/nanoGPT): AdamW, warm-up,
cosine decay. The weights of the best held-out loss are kept. Losses are logged per token and per character,
so that tokenizers compare.
Left out: several documents, packing, gradient accumulation.
Run: python sft.py (several processes: torchrun --nproc_per_node=2 sft.py)
"""
import math
import time
from dataclasses import asdict, dataclass
from typing import Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F

from model import GPT, SIZES, GPTConfig
from utils import checkpoint, ranks
from utils.cli import Interrupt, at_least, die, parse, resume_command
from utils.device import peak_mem_mb, pick_autocast, write_run_record
from utils.log import SHARED, Log
from utils.task import Prompts, sample_texts, step_generator
from utils.text import heading_prompts, load_corpus, split
from utils.tokenizer import train_tokenizer

COLUMNS = [*SHARED, "held_out", "loss_char", "held_out_char", "lr", "grad_norm", "tokens", "seconds",
           "tokens_per_s", "peak_mem_mb"]


@dataclass
class Args:
    data: str = "auto"  # auto, shakespeare, play, or a plain text file with speaker headings
    tokenizer: Literal["bpe", "char", "gpt2"] = "bpe"
    vocab_size: int = 1024  # of bpe
    size: Literal[tuple(SIZES)] = "nano"
    init: str = ""  # start from GPT-2's weights: a name ("gpt2") or a folder; needs --tokenizer gpt2
    block_size: int = 96  # tokens of context; a prompt and its answer must fit
    dropout: float = 0.0
    batch_size: int = 32
    steps: int = 900
    lr: float = 3e-3
    min_lr: float = 3e-4
    warmup: int = 50
    weight_decay: float = 0.1
    beta2: float = 0.99
    grad_clip: float = 1.0
    eval_every: int = 100
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    log: str = "logs/sft.csv"
    out: str = "out/sft"
    track: Literal["none", "tensorboard", "wandb"] = "none"
    resume: bool = False  # go on from --out


PRESETS = {
    "demo": Args(),
    # nanoGPT's CPU budget for character-level Shakespeare, whose README gives a held-out loss of 1.88
    "char": Args(tokenizer="char", block_size=64, batch_size=12, steps=2000, lr=1e-3, min_lr=1e-4, warmup=100,
                 eval_every=250),
}


def learning_rate(step, args):
    """Linear warm-up, then half a cosine from lr to min_lr."""
    if step < args.warmup:
        return args.lr * (step + 1) / args.warmup
    progress = (step - args.warmup) / max(1, args.steps - args.warmup)
    return args.min_lr + 0.5 * (args.lr - args.min_lr) * (1 + math.cos(math.pi * progress))


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


def optimizer_groups(model, weight_decay):
    """Weight decay for matrices, none for biases and norms."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}]


def main(args):
    # ---- set-up ----
    at_least(args, lr=0.0, dropout=0.0, steps=1, batch_size=1, block_size=8, eval_every=1, warmup=0)
    if args.dropout >= 1:
        die(f"--dropout {args.dropout} drops everything: wanted a share below 1")
    device, mine = ranks.start(args.device), ranks.share(args.batch_size, "--batch_size")
    autocast, dtype = pick_autocast(device, args.dtype)
    torch.manual_seed(args.seed)
    text, source = load_corpus(args.data)
    parts = split(text)
    tokenizer = train_tokenizer(args.tokenizer, text, args.vocab_size)
    heading_prompts(parts[1], tokenizer, 8, source)  # no headings, no prompts later: say so before training
    train, held_out = (torch.tensor(tokenizer.encode(part)) for part in parts)
    chars_per_token = [len(part) / len(ids) for part, ids in zip(parts, (train, held_out))]
    if len(held_out) < args.block_size + 2:
        die(f"the held-out tenth of {source} has {len(held_out)} tokens: wanted at least --block_size + 2 = "
            f"{args.block_size + 2}")
    if args.init and args.tokenizer != "gpt2":
        die(f"--init {args.init} has GPT-2's vocabulary: wanted --tokenizer gpt2, got {args.tokenizer}")
    layers, heads, width = SIZES[args.size]
    model = GPT.from_pretrained(args.init) if args.init else GPT(
        GPTConfig(tokenizer.vocab_size, args.block_size, layers, heads, width, args.dropout))
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(optimizer_groups(model, args.weight_decay), lr=args.lr,
                                  betas=(0.9, args.beta2), fused=True)
    start, seconds, best = 0, 0.0, math.inf
    if args.resume:
        state = checkpoint.load_state(f"{args.out}/state.pth", args, "python sft.py")
        checkpoint.restore(state, args.out, model=model, optimizer=optimizer)
        start, seconds, best = state["step"], state["seconds"], state["best"]
    write_run_record(args.log, args, device=str(device), dtype=dtype, corpus=source,
                     parameters=sum(p.numel() for p in model.parameters()))
    log = Log(args.log, COLUMNS, args.steps, start, args.track, asdict(args))
    interrupt = Interrupt()
    print(f"{source}: {len(train):,} + {len(held_out):,} tokens of {tokenizer.name}, "
          f"{chars_per_token[0]:.2f} characters each; "
          f"{args.init or args.size}, {sum(p.numel() for p in model.parameters()):,} parameters, "
          f"{device}, {dtype}")

    def save(step):
        checkpoint.save(f"{args.out}/state.pth", "state", model, tokenizer, optimizer=optimizer.state_dict(),
                        step=step, seconds=seconds, best=best, args=asdict(args),
                        threads=torch.get_num_threads())

    for step in range(start, args.steps + 1):
        # ---- evaluate, keep the best ----
        row = {}
        if step % args.eval_every == 0 or step == args.steps:
            save(step)
            loss_out = held_out_loss(model, held_out, args, device, autocast)
            row = {"held_out": loss_out, "held_out_char": loss_out / chars_per_token[1]}
            if loss_out < best:
                best = loss_out
                checkpoint.save(f"{args.out}/policy.pth", "policy", model, tokenizer, corpus=source)
        if step == args.steps:
            log.write(step=step, seconds=seconds, tokens=step * args.batch_size * args.block_size, **row)
            break

        # ---- update ----
        clock = time.perf_counter()
        lr = learning_rate(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        starts = torch.randint(len(train) - args.block_size - 1, (args.batch_size,),
                               generator=step_generator(args.seed, step))
        x, y = windows(train, starts, args.block_size)
        # dropout's masks, so that a resume draws the same
        torch.manual_seed(args.seed * 1_000_003 + step + ranks.rank() * 10**15)
        with autocast():
            logits = model(x[mine].to(device))
        loss = F.cross_entropy(logits.float().flatten(0, 1), y[mine].flatten().to(device)) / ranks.world()
        loss.backward()
        ranks.add_gradients(model)
        loss = ranks.total({"loss": loss.detach()})["loss"]
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        checkpoint.finite(step, args.out, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log ----
        elapsed = time.perf_counter() - clock
        seconds += elapsed
        log.write(step=step, loss=loss, loss_char=loss / chars_per_token[0], lr=lr, grad_norm=grad_norm,
                  tokens=(step + 1) * y.numel(), seconds=seconds, tokens_per_s=y.numel() / elapsed,
                  peak_mem_mb=peak_mem_mb(device), **row)
        if interrupt.asked:
            save(step + 1)
            log.close()
            interrupt.leave(resume_command())
    log.close()

    # ---- samples ----
    policy, tokenizer = checkpoint.load_policy(f"{args.out}/policy.pth", device)
    prompt_len = min(32, args.block_size // 2)
    tokens = heading_prompts(parts[1], tokenizer, prompt_len, source)
    tokens = tokens[:: max(1, len(tokens) // 3)][:3]
    prompts = Prompts(tokens, None, [tokenizer.decode(row) for row in tokens.tolist()], {})
    answers = sample_texts(policy, tokenizer, prompts, args.block_size - prompt_len, seed=args.seed)[3]
    for prompt, answer in zip(prompts.texts, answers):
        print(f"\n{prompt.splitlines()[-1]}\n{answer}")
    print(f"\nbest held-out loss {best:.4f} nats a token, {best / chars_per_token[1]:.4f} a character, "
          f"{seconds:.0f} s; wrote {args.out}/policy.pth and {args.log}")
    ranks.stop()
    return best / chars_per_token[1]


if __name__ == "__main__":
    with ranks.one_voice():
        main(parse(Args, PRESETS))
