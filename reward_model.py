"""Reward model: pairs of answers, labelled by a judge -> out/reward/reward.pth, one number an answer.

π₀ answers a prompt twice, a gold judge prefers one through a Bradley-Terry draw,
P(a ≻ b) = σ((g_a - g_b) / temperature), and a GPT trunk with one scalar a token learns to agree:
-log σ(r_chosen - r_rejected) (Ouyang et al., arXiv:2203.02155, eq. 1). Scores are shifted and scaled to
mean 0, std 1 on the held-out pairs' answers.
Left out: ensembles, margins, more than two answers a prompt.
Run: python reward_model.py
"""
import json
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

import utils  # before torch: it sets how OpenMP's threads wait

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from generate import generate
from policy import load_policy
from reward import RewardModel
from utils import checkpoint
from utils.cli import AtLeast, RunFlags, at_least, atomic_write, die, parse, program
from utils.device import pick_device
from utils.log import SHARED
from utils.rewards import JUDGES
from utils.run import Run, step_generator
from utils.text import completions, left_pad, load_prompts, read_jsonl, split_by_prompt

COLUMNS = [*SHARED, "accuracy", "held_out", "held_out_accuracy", "judge_accuracy", "untied", "lr",
           "grad_norm", "seconds", "peak_mem_mb"]


@dataclass
class Args(RunFlags):  # it has the flags of most runs
    # ---- the algorithm ----
    label_temperature: Annotated[float, AtLeast(0.0)] = 0.1  # of the Bradley-Terry draw, in the judge's unit
    pool: Literal["sum", "last"] = "sum"  # over an answer's tokens
    layers: Annotated[int, AtLeast(1)] = 2  # blocks of π₀ that the trunk keeps; more overfit sooner
    epochs: Annotated[int, AtLeast(1)] = 2  # passes over the pairs
    batch_size: Annotated[int, AtLeast(1)] = 32  # pairs
    lr: Annotated[float, AtLeast(0.0)] = 3e-4  # of the trunk
    head_lr: float = 1e-4  # of the head: a step moves every token's score at once, and a sum adds them up
    word_lr: float = 3e-2  # of the table with a number for each token
    seed: int = 0  # of pairs, labels and order
    # ---- the task ----
    policy: str = "out/sft/policy.pth"  # π₀: samples the pairs, lends its tokenizer and its trunk
    pairs: str = ""  # your own preferences instead: JSONL with prompt, chosen, rejected
    data: str = "auto"  # where the prompts come from, as in sft.py
    judge: Literal[tuple(JUDGES)] = "taste"  # it labels the pairs
    n_pairs: int = 4096  # at least --batch_size
    held_out_pairs: Annotated[int, AtLeast(2)] = 1024  # on held-out prompts
    prompt_len: Annotated[int, AtLeast(1)] = 32  # tokens
    max_new: Annotated[int, AtLeast(1)] = 48  # tokens of an answer
    eval_every: Annotated[int, AtLeast(1)] = 64  # steps
    log: str = "logs/reward.csv"  # the run's numbers
    out: str = "out/reward"  # the folder of the run's weights


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
    drawn = prompts.pick(index)
    device = next(policy.parameters()).device
    parts = [generate(policy, part.to(device), args.max_new, 2, stop=tokenizer.stops, generator=generator)
             for part in drawn.tokens.split(256)]
    tokens, _, mask = (torch.cat(part).cpu() for part in zip(*parts))
    texts = completions(tokens[:, -args.max_new:], mask, tokenizer)
    asked = [prompt for prompt in drawn.texts for _ in "ab"]
    gold = torch.tensor(JUDGES[args.judge](texts, asked, corpus_words=drawn.corpus_words)).view(n, 2)
    gap = gold[:, 0] - gold[:, 1]
    odds = torch.sigmoid(gap / args.label_temperature) if args.label_temperature > 0 else (gap.sign() + 1) / 2
    chosen = (torch.rand(n, generator=generator) >= odds).long()  # 0: the first answer was preferred
    order = torch.arange(n)[:, None], torch.stack([chosen, 1 - chosen], dim=1)
    rows = [{"prompt": prompt, "chosen": texts[2 * i + c], "rejected": texts[2 * i + 1 - c]}
            for i, (prompt, c) in enumerate(zip(drawn.texts, chosen.tolist()))]
    return Pairs(tokens.view(n, 2, -1)[order], mask.view(n, 2, -1)[order], None, gold[order]), rows


def read_pairs(path, tokenizer, block_size):
    """A user's JSONL -> Pairs without gold; an answer gets the stop that ends a speech."""
    rows = read_jsonl(path, ("prompt", "chosen", "rejected"), "--pairs")
    stop = list(tokenizer.stops[0]) if tokenizer.stops else []
    answers = [[tokenizer.encode(row[key]) + stop for key in ("chosen", "rejected")] for row in rows]
    different = [i for i, (chosen, rejected) in enumerate(answers) if chosen != rejected]
    if len(different) < len(rows):
        print(f"--pairs {path}: {len(rows) - len(different)} of {len(rows)} pairs have two equal answers and "
              "are left out")
    if not different:
        die(f"--pairs {path}: the answers of each pair are equal: wanted a better and a worse one")
    rows, answers = [rows[i] for i in different], [answer for i in different for answer in answers[i]]
    lengths = torch.tensor([len(answer) for answer in answers])
    room = block_size - int(lengths.max())  # for the prompts, of which the last tokens stay
    if room < 1:
        example = different[lengths.argmax() // 2] + 1
        die(f"--pairs {path}: an answer of example {example} has {lengths.max()} tokens, which with a prompt "
            f"don't fit the context of {block_size}")
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


def load_pairs(args, policy, tokenizer):
    """-> training and held-out Pairs, a user's or π₀'s answers; of those the texts, for OUT/pairs.jsonl."""
    if args.pairs:
        every = read_pairs(args.pairs, tokenizer, policy.config.block_size)
        if len(every.tokens) < 2:
            die(f"--pairs {args.pairs} holds 1 pair: wanted at least 2, one is held out")
        prompts = [tuple(row) for row in every.tokens[:, 0, :-every.mask.shape[2]].tolist()]
        return *map(every.pick, split_by_prompt(prompts, step_generator(args.seed, 0), "--pairs")), []
    if args.prompt_len + args.max_new > policy.config.block_size:
        die(f"--prompt_len {args.prompt_len} + --max_new {args.max_new} don't fit the policy's "
            f"{policy.config.block_size} tokens: shorten one")
    prompts = load_prompts("", args.data, tokenizer, args.prompt_len)
    train, rows = sample_pairs(policy, tokenizer, prompts[0], args.n_pairs, args, 0)
    held_out, _ = sample_pairs(policy, tokenizer, prompts[1], args.held_out_pairs, args, 1)
    return train, held_out, [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]


def main(args):
    # ---- set-up ----
    at_least(args, n_pairs=args.batch_size)
    device = pick_device(args.device)
    run = Run(args, COLUMNS, 0, device, program(), save_every=args.eval_every)
    policy, tokenizer = load_policy(args.policy, device)
    layers = min(args.layers, policy.config.n_layer)
    model = RewardModel(replace(policy.config, n_layer=layers), args.pool).to(device).eval()  # no dropout
    model.trunk.load_state_dict(policy.state_dict(), strict=False)  # π₀ may have more blocks

    # ---- pairs ----
    train, held_out, lines = load_pairs(args, policy, tokenizer)
    groups = [{"params": part.parameters(), "peak_lr": lr} for part, lr in
              ((model.trunk, args.lr), (model.head, args.head_lr), (model.word, args.word_lr))]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    per_epoch = max(1, len(train.tokens) // args.batch_size)
    total = run.total = args.epochs * per_epoch
    run.hold(checkpoint.about(model, tokenizer), model=model, optimizer=optimizer,
             writes=[f"{args.out}/reward.pth", f"{args.out}/pairs.jsonl"])
    print(f"{len(train.tokens):,} + {len(held_out.tokens):,} pairs, {device}, {run.dtype}")
    for step in run.steps():
        # ---- evaluate ----
        due = step % args.eval_every == 0
        evaluated = evaluate(model, held_out, device, run.autocast)[0] if due else {}
        run.start_clock()

        # ---- update ----
        warmup = max(1, total // 10)
        share = min((step + 1) / warmup, (total - step) / (total - warmup + 1))  # straight up, then down
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * share
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(train.tokens), generator=step_generator(args.seed, 2 + epoch))
        rows = order[place * args.batch_size:(place + 1) * args.batch_size]
        with run.autocast():
            score = model(*train.pick(rows).batch(device))
        chosen, rejected = score.view(-1, 2).unbind(1)  # (batch,)
        loss = -F.logsigmoid(chosen - rejected).mean()
        loss.backward()
        run.add({"loss": loss.detach()})
        run.update(optimizer, model, grad_clip=1.0)

        # ---- log ----
        run.write(mean_r=score.mean(), accuracy=(chosen > rejected).float().mean(), lr=args.lr * share,
                  **evaluated)
    last, scores = evaluate(model, held_out, device, run.autocast)

    # ---- normalise on the held-out answers, save ----
    model.mean.copy_(scores.mean())
    model.std.copy_(scores.std().clamp(min=1e-6))
    if lines:
        atomic_write(f"{args.out}/pairs.jsonl", "".join(lines).encode())
    checkpoint.save(f"{args.out}/reward.pth", "reward", model, tokenizer, pool=args.pool,
                    judge="" if args.pairs else args.judge)
    run.finish(seconds=run.counts["seconds"], **last)
    judged = "" if args.pairs else f", {last['judge_accuracy']:.3f} against the judge on untied pairs"
    print(f"held-out accuracy {last['held_out_accuracy']:.3f} against the noisy labels{judged}; "
          f"{run.counts['seconds']:.0f} s; wrote {args.out}/reward.pth and {args.log}")
    return last


if __name__ == "__main__":
    main(parse(Args))
