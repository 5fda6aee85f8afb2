"""GRPO on text: π₀ answers each prompt G times, and the group's own mean is the baseline (arXiv:2402.03300).

The same banners in the same order as train_ppo.py: the diff between the two files is the lesson.
Left out: filtering of groups (DAPO's dynamic sampling), a reference that moves.
Run: python train_grpo.py (several processes: torchrun --nproc_per_node=2 train_grpo.py)
"""
import copy
import time
from dataclasses import asdict, dataclass, replace
from typing import Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint, ranks
from utils.cli import Interrupt, at_least, die, parse, resume_command
from utils.device import compiled, peak_mem_mb, pick_autocast, write_run_record
from utils.log import SHARED, Log, add
from utils.rewards import JUDGES, distinct
from utils.task import load_prompts, load_scorer, step_generator
from utils.text import completions

COLUMNS = [*SHARED, "samples", "tokens", "seconds", "gold", "length", "distinct", "ref_logp", "clip_frac",
           "ratio_max", "grad_norm", "frac_zero_std", "eval_r", "eval_gold", "tokens_per_s", "peak_mem_mb"]


@dataclass
class Args:
    objective: Literal[tuple(OBJECTIVES)] = "grpo"
    policy: str = "out/sft/policy.pth"  # π₀
    reward: str = "model"  # model, sentiment, meter, or FILE.py:FUNCTION
    reward_model: str = "out/reward/reward.pth"
    gold: Literal[tuple(JUDGES)] = "sentiment"  # measured beside the reward, never trained on
    data: str = "auto"  # where prompts come from, as in sft.py
    prompts: str = ""  # your own instead: JSONL with a `prompt` a line; other keys reach the reward function
    prompts_per_step: int = 16
    group_size: int = 8  # answers to each prompt
    prompt_len: int = 32
    max_new: int = 48
    temperature: float = 1.0
    epochs_per_rollout: int = 1
    minibatches: int = 1  # optimizer steps an epoch
    beta: float | None = 0.05  # weight of the KL penalty; None: the objective's own
    lr: float = 1.5e-4
    steps: int = 60
    grad_clip: float = 1.0
    eval_every: int = 20
    eval_prompts: int = 64  # held-out ones
    save_every: int = 20
    share_prompt: Literal["auto", "yes", "no"] = "auto"  # read a group's prompt once; auto: if it is long
    micro_batch: int = 0  # prompts a backward pass, with all their answers; 0: all. Results stay the same
    grad_checkpoint: bool = False  # less memory, one more forward pass
    compile: bool = False  # decode and update; takes a minute first
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of scoring and update; sampling is float32
    seed: int = 0
    log: str = "logs/grpo.csv"
    out: str = "out/grpo"
    track: Literal["none", "tensorboard", "wandb"] = "none"
    resume: bool = False  # go on from --out


def main(args):
    # ---- set-up ----
    at_least(args, prompts_per_step=1, group_size=1, prompt_len=1, max_new=1, temperature=1e-3,
             epochs_per_rollout=1, minibatches=1, beta=0.0, lr=0.0, steps=1, eval_every=1,
             eval_prompts=1, save_every=1, micro_batch=0)
    B, G = args.prompts_per_step, args.group_size
    objective = OBJECTIVES[args.objective]
    if args.beta is not None:
        objective = replace(objective, beta=args.beta)
    updates = args.epochs_per_rollout * args.minibatches
    if G < 2 and objective.baseline != "none":
        die(f"--group_size {G}: {args.objective} compares answers to one prompt, wanted at least 2")
    if objective.ratio == "none" and updates > 1:
        die(f"--objective {args.objective} has no ratio: {updates} updates a rollout would be off-policy, "
            "wanted 1 epoch and 1 minibatch")
    if B % args.minibatches:
        die(f"--minibatches {args.minibatches} doesn't divide --prompts_per_step {B}")
    device, mine = ranks.start(args.device), ranks.share(B, "--prompts_per_step")
    autocast, dtype = pick_autocast(device, args.dtype)
    torch.manual_seed(args.seed)
    policy, tokenizer = checkpoint.load_policy(args.policy, device)
    ref = copy.deepcopy(policy).requires_grad_(False)
    prompts, held_out = load_prompts(args.prompts, args.data, tokenizer, args.prompt_len)
    P, T = prompts.tokens.shape[1], args.max_new
    if P + T > policy.config.block_size:
        die(f"prompts of {P} tokens + --max_new {T} don't fit the policy's context of "
            f"{policy.config.block_size} tokens: shorten one, or train π₀ with a larger --block_size")
    score = load_scorer(args.reward, args.reward_model, args.policy, tokenizer, device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0,
                                  fused=True)
    start, seconds, samples, tokens_seen = 0, 0.0, 0, 0
    if args.resume:
        state = checkpoint.load_state(f"{args.out}/state.pth", args, "python train_grpo.py")
        checkpoint.restore(state, args.out, model=policy, optimizer=optimizer)
        start, seconds, samples, tokens_seen = (state[k] for k in ("step", "seconds", "samples", "tokens"))
    policy.checkpointing = args.grad_checkpoint
    shared = G if args.share_prompt == "yes" or args.share_prompt == "auto" and 2 * P >= T else 1
    fast = {"step": compiled(policy.next_token, device), "score": compiled(policy.score, device),
            "ref": compiled(ref.score, device)} if args.compile else {}
    score_policy, score_ref = fast.get("score", policy.score), fast.get("ref", ref.score)

    def sample(asked, group_size, uniforms, step=None):
        """Answers in float32: tokens (N, P + T), logp (N, T), mask (N, T), and their texts."""
        pad = None if asked.pad is None else asked.pad.to(device)
        tokens, logp, mask = policy.generate(
            asked.tokens.to(device), T, group_size, args.temperature, stop=tokenizer.stops,
            uniforms=uniforms.to(device), pad=pad, compiled=step)
        return tokens, logp, mask, completions(tokens[:, P:], mask, tokenizer)

    def evaluate():
        """Mean reward and gold score of one answer each to held-out prompts, always the same draws."""
        asked = held_out.pick(torch.arange(len(held_out.texts))[:args.eval_prompts])
        uniforms = torch.rand(len(asked.texts), T, generator=step_generator(args.seed, 10**6))
        tokens, _, mask, texts = sample(asked, 1, uniforms)
        gold = JUDGES[args.gold](texts, asked.texts)
        return {"eval_r": score(tokens, mask, asked, texts).mean(), "eval_gold": sum(gold) / len(gold)}

    def save(step):
        common = {"model": policy, "tokenizer": tokenizer}
        checkpoint.save(f"{args.out}/policy.pth", "policy", **common)
        checkpoint.save(f"{args.out}/state.pth", "state", **common,
                        optimizer=optimizer.state_dict(), step=step, seconds=seconds, samples=samples,
                        tokens=tokens_seen, args=asdict(args), threads=torch.get_num_threads())

    first = evaluate()  # before anything is written: the reward is the user's, and may fail
    write_run_record(args.log, args, device=str(device), dtype=dtype, objective=asdict(objective))
    log = Log(args.log, COLUMNS, args.steps, start, args.track, asdict(args))
    interrupt = Interrupt()
    for step in range(start, args.steps):
        if step % args.save_every == 0:
            save(step)
        row = {}
        if step % args.eval_every == 0:
            row = first if step == start else evaluate()
        clock = time.perf_counter()

        # ---- rollout: G answers to each of B prompts, of which `mine` are this process's ----
        generator = step_generator(args.seed, step)
        index = torch.randperm(len(prompts.texts), generator=generator)[:B]
        if len(index) < B:
            index = torch.randint(len(prompts.texts), (B,), generator=generator)
        uniforms = torch.rand(B, G, T, generator=generator)[mine].flatten(0, 1)
        asked, asked_each = prompts.pick(index[mine]), prompts.pick(index[mine], G)
        tokens, logp_old, mask, texts = sample(asked, G, uniforms, fast.get("step"))
        length = T if fast else max(ranks.gather([int(mask.any(0).sum())]))  # nothing lies behind the longest
        tokens, logp_old, mask = tokens[:, :P + length], logp_old[:, :length], mask[:, :length]
        pad = None if asked_each.pad is None else asked_each.pad.to(device)

        # ---- reward ----
        reward = ranks.gather(score(tokens, mask, asked_each, texts).view(-1, G))  # (B, G)

        # ---- advantage: what the group's mean says ----
        adv_all = group_advantage(reward, objective.baseline, objective.scale).to(device)
        adv, mask_all = adv_all[mine], ranks.gather(mask.view(-1, G, length))
        mask = mask_all[mine]

        # ---- old and reference log-probabilities ----
        def scored(by, part):
            """Log-probability and entropy, (b, G, T) each, of the answers to the prompts `part`."""
            rows = (part[:, None] * G + torch.arange(G)).flatten()
            with autocast():
                found = by(tokens[rows], P, args.temperature, None if pad is None else pad[rows], shared)
            return [x.view(-1, G, length) for x in found]
        mine_in_parts = torch.arange(len(mask)).split(args.micro_batch or B)
        with torch.no_grad():
            logp_ref = torch.cat([scored(score_ref, part)[0] for part in mine_in_parts])
            logp_old = logp_old.view(-1, G, length)
            if updates > 1 and dtype != "fp32":  # in float32 the sampler's own are these to 1e-5
                logp_old = torch.cat([scored(score_policy, part)[0] for part in mine_in_parts])

        # ---- update: losses of micro-batches and processes add up, the denominators are those of all ----
        sums = {}
        for epoch in range(args.epochs_per_rollout):
            for batch in torch.randperm(B, generator=generator).chunk(args.minibatches):
                n_tokens, losses = mask_all[batch].sum(), {}
                for part in ranks.local(batch, mine, args.micro_batch):
                    logp, entropy = scored(score_policy, part)
                    m, old = mask[part], logp.detach() if updates == 1 else logp_old[part]
                    loss, stats = grpo_loss(logp, old, logp_ref[part], adv[part], m, objective, max_len=T,
                                            n_tokens=n_tokens, n_answers=len(batch) * G)
                    loss.backward()
                    add(losses, {"loss": loss.detach()})
                    add(sums, stats | {"entropy": entropy[m].mean(), "ref_logp": logp_ref[part][m].mean()},
                        m.sum() / n_tokens / updates)
                ranks.add_gradients(policy)
                grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.grad_clip)
                checkpoint.finite(step, args.out, grad_norm=grad_norm, **losses)
                optimizer.step()
                optimizer.zero_grad()
                add(sums, losses, 1 / updates)
                add(sums, {"grad_norm": grad_norm}, 1 / updates / ranks.world())

        # ---- log ----
        elapsed = time.perf_counter() - clock
        new_tokens, texts = int(mask_all.sum()), ranks.gather(texts)
        seconds, samples, tokens_seen = seconds + elapsed, samples + B * G, tokens_seen + new_tokens
        gold = JUDGES[args.gold](texts, prompts.pick(index, G).texts)
        frac_zero_std = None if G == 1 else (reward == reward[:, :1]).all(1).float().mean()
        sums = ranks.total(sums)
        sums.pop("pg_loss")
        log.write(step=step, mean_r=reward.mean(), token_adv=adv_all.abs().mean(), samples=samples,
                  tokens=tokens_seen, seconds=seconds, gold=sum(gold) / len(gold),
                  length=new_tokens / (B * G), distinct=distinct(texts), frac_zero_std=frac_zero_std,
                  tokens_per_s=new_tokens / elapsed, peak_mem_mb=peak_mem_mb(device), **sums, **row)
        if max(ranks.gather([interrupt.asked])):
            save(step + 1)
            log.close()
            interrupt.leave(resume_command())
    save(args.steps)
    log.close()
    last = evaluate()
    print(f"{args.objective}: {args.steps} steps, {seconds:.0f} s; held-out reward {last['eval_r']:.2f}, "
          f"{args.gold} {last['eval_gold']:.2f}; wrote {args.log} and {args.out}/policy.pth")
    ranks.stop()


if __name__ == "__main__":
    with ranks.one_voice():
        main(parse(Args))
