"""GRPO on text: G answers to each prompt, and the group's mean is the baseline (arXiv:2402.03300).

`diff train_grpo.py train_ppo.py` is the lesson: the same banners in the same order.
What surrounds the loss, each a flag that is off by default, is in techniques.py.
Run: python train_grpo.py (several processes: torchrun --nproc_per_node=2 train_grpo.py)
"""
from dataclasses import dataclass
from typing import Annotated, Literal

import utils  # before torch: it sets how OpenMP's threads wait
import torch

import techniques
from answers import minibatches
from grpo import OBJECTIVES, group_advantage, grpo_loss
from policy import begin, defaults, load_policy
from rollout import COLUMNS, Environment, token_stats
from utils import ranks
from utils.cli import AtLeast, parse, program
from utils.run import Run, step_generator


@dataclass
class Args(techniques.Flags):  # the flags that GRPO, PPO and TRL have alike are there
    # ---- the algorithm ----
    objective: Literal[tuple(OBJECTIVES)] = "grpo"  # a row of grpo.py's table
    prompts_per_step: Annotated[int, AtLeast(1)] = 16  # B
    group_size: Annotated[int, AtLeast(1)] = 8  # G, answers to each prompt
    beta: Annotated[float | None, AtLeast(0.0)] = 0.05  # of the KL, for every objective; None: its own
    kl_in_reward: bool = False  # β·KL is taken from the reward, not added to the loss
    dynamic_sampling: Annotated[int, AtLeast(0)] = 0  # rounds in which groups of equal rewards are drawn anew
    lr: Annotated[float, AtLeast(0.0)] = 1.5e-4  # learning rate of AdamW
    lora_r: Annotated[int, AtLeast(0)] = 0  # rank of LoRA, for Llama's family; 0: all weights learn
    lora_alpha: Annotated[float, AtLeast(0.0)] = 32.0  # LoRA's scale is this over the rank
    minibatches: Annotated[int, AtLeast(1)] = 1  # optimizer steps an epoch
    # ---- the task ----
    samples: Annotated[int, AtLeast(0)] = 4  # held-out prompts whose answers report.py shows; 0: none
    log: str = "logs/grpo.csv"  # the run's numbers
    out: str = "out/grpo"  # the folder of the run's weights
    # ---- speed and memory: the algorithm stays the same ----
    share_prompt: Literal["auto", "yes", "no"] = "auto"  # read a group's prompt once; auto: if it is long
    compile: bool = False  # scoring and update; takes two minutes first


def main(args):
    # ---- set-up ----
    updates = args.epochs_per_rollout * args.minibatches
    objective, kl_weight = techniques.pick_objective(args, updates)  # kl_weight: β of a KL in the reward
    with_kl = objective.beta or kl_weight  # else only evaluated steps ask the reference
    ranks.whole_parts(args.prompts_per_step, args.minibatches, "--minibatches")
    device = ranks.start(args.device)
    run = Run(args, COLUMNS, args.steps, device, program(), args.save_every, objective=objective)
    policy, tokenizer = load_policy(args.policy, device)
    ref, saved, about = begin(policy, tokenizer, args)
    policy.checkpointing = args.grad_checkpoint
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, (0.9, 0.99), weight_decay=0.0, fused=True)
    env = Environment(args, policy, tokenizer, run)
    rescored = (updates > 1 or kl_weight) and not env.exact  # exact: the sampler's logp is a scorer's, too
    trained = {"model": policy}
    run.hold(about, "policy", **(trained | saved), optimizer=optimizer)  # saved: LoRA's adapters, for one
    env.first = env.evaluate(policy)  # before anything is written: the reward is the user's, and may fail

    for step in run.steps():
        held_out = techniques.before_step(step, env, trained, ref, optimizer)

        # ---- rollout: G answers to each of B prompts ----
        generator = step_generator(args.seed, step)
        answers = env.rollout(policy, generator)  # tokens (b, G, P + T), logp and mask (b, G, T)

        # ---- reward ----
        answers, reward = techniques.rewarded(answers, env, policy, generator)  # (B, G), of all processes
        earned = techniques.shaped(reward, answers, args)  # the same, but for a flag

        # ---- old and reference log-probabilities ----
        with torch.no_grad():
            logp_old = env.score(policy, answers)[0] if rescored else answers.logp  # (b, G, T)
            logp_ref = env.score(ref, answers)[0] if with_kl or held_out else logp_old * torch.nan

        # ---- advantage: how much better an answer is than its group ----
        earned = techniques.less_kl(earned, answers, logp_old, logp_ref, kl_weight)  # (B, G)
        adv_all = group_advantage(earned, objective.baseline, objective.scale).to(device)  # (B, G)
        answers.useful = techniques.groups_with_gradient(adv_all, objective, args)  # (B,)
        adv, mask_all = techniques.weighted(adv_all[answers.share], answers, args, env, policy)  # (b, G, T)

        # ---- update: the parts' losses add up, since each is divided by the whole update's totals ----
        for _ in range(args.epochs_per_rollout):
            for batch in minibatches(answers, mask_all, args, generator):
                for rows in batch.parts:
                    logp, entropy = env.score(policy, answers, rows)
                    mask = mask_all[rows]
                    old = logp_old[rows] if updates > 1 else logp.detach()  # then the ratio is exactly 1
                    loss, stats = grpo_loss(logp, old, logp_ref[rows], adv[rows], mask, objective, env.T,
                                            n_tokens=batch.n_tokens, n_answers=batch.n_answers)
                    loss = loss - args.entropy_coef * entropy.masked_fill(~mask, 0).sum() / batch.n_tokens
                    loss.backward()
                    stats |= token_stats(logp, logp_ref[rows], entropy, mask)
                    run.add(stats, mask.sum() / batch.n_scored / updates)
                    run.add({"loss": loss.detach()}, 1 / updates)
                run.update(optimizer, *trained.values(), grad_clip=args.grad_clip, weight=1 / updates)

        # ---- log ----
        run.write(**env.measure(answers, reward, adv_all), **held_out)
        env.samples.write()  # the evaluation's answers, scored again
    env.conclude(policy)
    run.finish()
    ranks.stop()


if __name__ == "__main__":
    with ranks.one_voice():
        main(parse(Args, default=defaults(Args)))
