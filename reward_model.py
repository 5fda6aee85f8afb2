"""Reward model: pairs of answers, labelled by a judge -> out/reward/reward.pth, one number an answer.

π₀ answers a prompt twice, a gold judge prefers one through a Bradley-Terry draw,
P(a ≻ b) = σ((g_a - g_b) / temperature), and a GPT trunk with one scalar a token learns to agree:
-log σ(r_chosen - r_rejected) (Ouyang et al., arXiv:2203.02155, eq. 1). Scores are shifted and scaled to
mean 0, std 1 on the held-out pairs' answers.
Left out: ensembles, margins, more than two answers a prompt.
Run: python reward_model.py
"""
import json
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import GPT, GPTConfig
from utils import checkpoint
from utils.cli import Interrupt, at_least, atomic_write, die, parse, resume_command
from utils.device import peak_mem_mb, pick_autocast, pick_device, write_run_record
from utils.log import SHARED, Log
from utils.rewards import JUDGES
from utils.task import load_prompts, step_generator
from utils.text import completions, left_pad, read_jsonl

COLUMNS = [*SHARED, "accuracy", "held_out", "held_out_accuracy", "judge_accuracy", "untied", "lr",
           "grad_norm", "seconds", "peak_mem_mb"]
MADE_BY = "python reward_model.py"


@dataclass
class Args:
    policy: str = "out/sft/policy.pth"  # π₀: samples the pairs, lends its tokenizer and its trunk
    pairs: str = ""  # your own preferences instead: JSONL with prompt, chosen, rejected
    data: str = "auto"  # where the prompts come from, as in sft.py
    judge: Literal[tuple(JUDGES)] = "sentiment"
    label_temperature: float = 0.1  # of the Bradley-Terry draw, in the judge's unit; 0 labels without noise
    n_pairs: int = 4096
    held_out_pairs: int = 1024  # on held-out prompts
    prompt_len: int = 32
    max_new: int = 48
    pool: Literal["sum", "last"] = "sum"
    layers: int = 2  # blocks of π₀ that the trunk keeps: fewer learn by heart later, and cost less
    epochs: int = 2
    batch_size: int = 32  # pairs
    lr: float = 3e-4  # of the trunk
    head_lr: float = 1e-4  # a step moves every token's score at once, and a sum adds them up
    word_lr: float = 3e-2
    eval_every: int = 64
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    seed: int = 0
    log: str = "logs/reward.csv"
    out: str = "out/reward"
    track: Literal["none", "tensorboard", "wandb"] = "none"
    resume: bool = False  # go on from --out


class RewardModel(nn.Module):
    """A GPT trunk and one scalar a token, pooled over the answer's real tokens: the sum, or the last one's.

    The scalar is head(hidden) + word[token]. π₀'s features say what comes next, hardly what a reader feels
    (linear probes order 59 % of the pairs, on bare token ids 69 %), so each token also has its own number.
    """

    def __init__(self, config, pool="sum"):
        super().__init__()
        self.config, self.pool = config, pool
        self.trunk = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        self.word = nn.Embedding(config.vocab_size, 1)
        for p in (self.head.weight, self.head.bias, self.word.weight):
            nn.init.zeros_(p)
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    def forward(self, tokens, mask, pad=None):
        """tokens (N, P + T), mask (N, T) of the answer's real tokens -> normalised score (N,), float32."""
        T = mask.shape[1]
        hidden = self.trunk.hidden(tokens, pad)[:, -T:]
        score = (self.head(hidden).float() + self.word(tokens[:, -T:])).squeeze(-1)  # (N, T)
        score = torch.where(mask, score, 0.0)
        if self.pool == "last":
            score = score.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
        return (score.sum(1) - self.mean) / self.std


def load_reward_model(path, device="cpu"):
    """-> (RewardModel in eval mode, the checkpoint's content)."""
    content = checkpoint.load(path, "reward", MADE_BY)
    model = checkpoint.build(
        path, content, lambda: RewardModel(GPTConfig(**content["config"]), content["pool"]), MADE_BY)
    return model.to(device).eval(), content


class Pairs(NamedTuple):
    tokens: torch.Tensor  # (M, 2, P + T): chosen, rejected
    mask: torch.Tensor  # (M, 2, T)
    pad: torch.Tensor | None  # (M,)
    gold: torch.Tensor | None  # (M, 2), the judge's own scores

    def pick(self, rows):
        """The pairs of these rows."""
        return Pairs(*(part if part is None else part[rows] for part in self))

    def batch(self, device):
        """For the model: tokens (2M, P + T), mask (2M, T), pad (2M,) or None; pairs stay neighbours."""
        tokens, mask = self.tokens.flatten(0, 1), self.mask.flatten(0, 1)
        pad = None if self.pad is None else self.pad.repeat_interleave(2).to(device)
        longest = int(mask.sum(1).max())
        end = tokens.shape[1] - mask.shape[1] + longest  # no token behind the longest answer
        return tokens[:, :end].to(device), mask[:, :longest].to(device), pad


def sample_pairs(policy, tokenizer, prompts, n, args, seed):
    """n pairs of answers to prompts drawn at random, labelled by the judge -> Pairs, and their texts."""
    generator = step_generator(args.seed, seed)
    index = torch.cat([torch.randperm(len(prompts.texts), generator=generator)
                       for _ in range(-(-n // len(prompts.texts)))])[:n]
    asked = prompts.pick(index)
    parts = [policy.generate(part.to(policy.wte.weight.device), args.max_new, 2, stop=tokenizer.stops,
                             generator=generator) for part in asked.tokens.split(256)]
    tokens = torch.cat([tokens for tokens, _, _ in parts]).cpu()
    mask = torch.cat([mask for _, _, mask in parts]).cpu()
    texts = completions(tokens[:, -args.max_new:], mask, tokenizer)
    gold = torch.tensor(JUDGES[args.judge](texts, [p for p in asked.texts for _ in "ab"])).view(n, 2)
    gap = gold[:, 0] - gold[:, 1]
    odds = torch.sigmoid(gap / args.label_temperature) if args.label_temperature > 0 else (gap.sign() + 1) / 2
    chosen = (torch.rand(n, generator=generator) >= odds).long()  # 0: the first answer was preferred
    order = torch.arange(n)[:, None], torch.stack([chosen, 1 - chosen], dim=1)
    rows = [{"prompt": prompt, "chosen": texts[2 * i + c], "rejected": texts[2 * i + 1 - c]}
            for i, (prompt, c) in enumerate(zip(asked.texts, chosen.tolist()))]
    return Pairs(tokens.view(n, 2, -1)[order], mask.view(n, 2, -1)[order], None, gold[order]), rows


def read_pairs(path, tokenizer, block_size):
    """A user's JSONL -> Pairs without gold; an answer gets the stop that ends a speech."""
    rows = read_jsonl(path, ("prompt", "chosen", "rejected"), "--pairs")
    stop = list(tokenizer.stops[0]) if tokenizer.stops else []
    answers = [tokenizer.encode(row[key]) + stop for row in rows for key in ("chosen", "rejected")]
    lengths = torch.tensor([len(answer) for answer in answers])
    room = block_size - int(lengths.max())  # for the prompts, of which the last tokens stay
    if room < 1:
        die(f"--pairs {path}: an answer of example {lengths.argmax() // 2 + 1} has {lengths.max()} tokens, "
            f"which with a prompt don't fit the context of {block_size}")
    prompts, pad = left_pad([tokenizer.encode(row["prompt"])[-room:] or [0] for row in rows])
    answers = pad_sequence([torch.tensor(answer) for answer in answers], batch_first=True)
    tokens = torch.cat([prompts.repeat_interleave(2, 0), answers], 1)
    mask = torch.arange(answers.shape[1]) < lengths[:, None]
    return Pairs(tokens.view(len(rows), 2, -1), mask.view(len(rows), 2, -1), pad, None)


@torch.no_grad()
def evaluate(model, pairs, device, autocast):
    """-> numbers on held-out pairs, and their scores (M, 2)."""
    parts = torch.arange(len(pairs.tokens)).split(256)
    with autocast():
        scores = torch.cat([model(*pairs.pick(rows).batch(device)) for rows in parts]).view(-1, 2).cpu()
    gap = scores[:, 0] - scores[:, 1]
    row = {"held_out": F.softplus(-gap).mean(), "held_out_accuracy": (gap > 0).float().mean()}
    if pairs.gold is not None:
        gold_gap = pairs.gold[:, 0] - pairs.gold[:, 1]
        untied = gold_gap != 0
        row["judge_accuracy"] = (gap.sign() == gold_gap.sign())[untied].float().mean()
        row["untied"] = untied.float().mean()
    return row, scores


def main(args):
    # ---- set-up ----
    at_least(args, lr=0.0, layers=1, n_pairs=args.batch_size, batch_size=1, epochs=1,
             held_out_pairs=2, max_new=1, prompt_len=1, label_temperature=0.0, eval_every=1)
    device = pick_device(args.device)
    autocast, dtype = pick_autocast(device, args.dtype)
    torch.manual_seed(args.seed)
    policy, tokenizer = checkpoint.load_policy(args.policy, device)
    layers = min(args.layers, policy.config.n_layer)
    model = RewardModel(replace(policy.config, n_layer=layers), args.pool).to(device)
    model.trunk.load_state_dict(policy.state_dict(), strict=False)  # π₀ may have more blocks

    # ---- pairs ----
    if args.pairs:
        every = read_pairs(args.pairs, tokenizer, policy.config.block_size)
        order = torch.randperm(len(every.tokens), generator=step_generator(args.seed, 0))
        if len(order) < 2:
            die(f"--pairs {args.pairs} holds 1 pair: wanted at least 2, one is held out")
        cut = max(1, len(order) // 10)
        train, held_out = every.pick(order[cut:]), every.pick(order[:cut])
    else:
        if args.prompt_len + args.max_new > policy.config.block_size:
            die(f"--prompt_len {args.prompt_len} + --max_new {args.max_new} don't fit the policy's "
                f"{policy.config.block_size} tokens: shorten one")
        prompts = load_prompts("", args.data, tokenizer, args.prompt_len)
        train, rows = sample_pairs(policy, tokenizer, prompts[0], args.n_pairs, args, 0)
        held_out, _ = sample_pairs(policy, tokenizer, prompts[1], args.held_out_pairs, args, 1)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        atomic_write(f"{args.out}/pairs.jsonl", "".join(lines).encode())
    print(f"{len(train.tokens):,} + {len(held_out.tokens):,} pairs, {device}, {dtype}")

    groups = [{"params": part.parameters(), "peak_lr": lr} for part, lr in
              ((model.trunk, args.lr), (model.head, args.head_lr), (model.word, args.word_lr))]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    per_epoch = max(1, len(train.tokens) // args.batch_size)
    total, start, seconds = args.epochs * per_epoch, 0, 0.0
    if args.resume:
        state = checkpoint.load_state(f"{args.out}/state.pth", args, MADE_BY)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start, seconds = state["step"], state["seconds"]
    write_run_record(args.log, args, device=str(device), dtype=dtype)
    log = Log(args.log, COLUMNS, total, start, args.track, asdict(args))
    interrupt = Interrupt()

    def save(step):
        checkpoint.save(f"{args.out}/state.pth", "state", model, tokenizer, optimizer=optimizer.state_dict(),
                        step=step, seconds=seconds, args=asdict(args), threads=torch.get_num_threads())

    for step in range(start, total + 1):
        # ---- evaluate ----
        row = {}
        if step % args.eval_every == 0 or step == total:
            save(step)
            row, scores = evaluate(model, held_out, device, autocast)
        if step == total:
            log.write(step=step, seconds=seconds, **row)
            break

        # ---- update ----
        clock = time.perf_counter()
        warmup = max(1, total // 10)
        share = min((step + 1) / warmup, (total - step) / (total - warmup + 1))  # straight up, then down
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(train.tokens), generator=step_generator(args.seed, 2 + epoch))
        rows = order[place * args.batch_size:(place + 1) * args.batch_size]
        with autocast():
            score = model(*train.pick(rows).batch(device))
        chosen, rejected = score.view(-1, 2).unbind(1)  # (batch,)
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        checkpoint.finite(step, args.out, loss=loss, grad_norm=grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log ----
        seconds += time.perf_counter() - clock
        log.write(step=step, loss=loss, mean_r=score.mean(), accuracy=(chosen > rejected).float().mean(),
                  lr=args.lr * share, grad_norm=grad_norm, seconds=seconds, peak_mem_mb=peak_mem_mb(device),
                  **row)
        if interrupt.asked:
            save(step + 1)
            log.close()
            interrupt.leave(resume_command())
    log.close()

    # ---- normalise on the held-out answers, save ----
    model.mean.copy_(scores.mean())
    model.std.copy_(scores.std().clamp(min=1e-6))
    checkpoint.save(f"{args.out}/reward.pth", "reward", model, tokenizer, pool=args.pool,
                    judge="" if args.pairs else args.judge)
    judged = "" if args.pairs else f", {row['judge_accuracy']:.3f} against the judge on untied pairs"
    print(f"held-out accuracy {row['held_out_accuracy']:.3f} against the noisy labels{judged}; "
          f"{seconds:.0f} s; wrote {args.out}/reward.pth and {args.log}")
    return row


if __name__ == "__main__":
    main(parse(Args))
