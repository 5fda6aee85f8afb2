"""PPO on text: a value network is the baseline, and the KL to π₀ is part of the reward (arXiv:1707.06347).

`diff train_grpo.py train_ppo.py` is the lesson: the same banners in the same order.
What surrounds the loss, each a flag that is off by default, is in techniques.py.
Run: python train_ppo.py (several processes: torchrun --nproc_per_node=2 train_ppo.py)
"""
from dataclasses import dataclass
from typing import Annotated

import utils  # before torch: it sets how OpenMP's threads wait
import torch

import techniques
from answers import minibatches
from policy import begin, defaults, load_policy
from ppo import (VALUE_COLUMNS, ValueModel, explained_variance, gae, ppo_policy_loss, token_reward,
                 value_loss, whiten)
from rollout import COLUMNS, Environment, token_stats
from utils import ranks
from utils.cli import AtLeast, parse, program
from utils.run import Run, step_generator


@dataclass
class Args(techniques.Flags):  # the flags that GRPO, PPO and TRL have alike are there
    # ---- the algorithm ----
    prompts_per_step: Annotated[int, AtLeast(1)] = 16  # B
    group_size: Annotated[int, AtLeast(1)] = 8  # G, answers to each prompt
    beta: Annotated[float, AtLeast(0.0)] = 0.05  # weight of the KL penalty in the reward
    lr: Annotated[float, AtLeast(0.0)] = 5e-5  # learning rate of AdamW
    lora_r: Annotated[int, AtLeast(0)] = 0  # rank of LoRA, for Llama's family; 0: all weights learn
    lora_alpha: Annotated[float, AtLeast(0.0)] = 32.0  # LoRA's scale is this over the rank
    value_lr: Annotated[float, AtLeast(0.0)] = 1e-3  # the critic's
    eps: Annotated[float, AtLeast(0.0)] = 0.2  # the policy's clip
    value_clip: Annotated[float, AtLeast(0.0)] = 0.5  # the critic's, in units of the reward
    gamma: Annotated[float, AtLeast(0.0)] = 1.0  # discount
    lam: Annotated[float, AtLeast(0.0)] = 0.95  # λ of GAE
    minibatches: Annotated[int, AtLeast(1)] = 4  # optimizer steps an epoch
    # ---- the task ----
    samples: Annotated[int, AtLeast(0)] = 4  # held-out prompts whose answers report.py shows; 0: none
    log: str = "logs/ppo.csv"  # the run's numbers
    out: str = "out/ppo"  # the folder of the run's weights
    # ---- speed and memory: the algorithm stays the same ----
    compile: bool = False  # scoring and update; takes two minutes first


def main(args):
    # ---- set-up ----
    updates = args.epochs_per_rollout * args.minibatches
    ranks.whole_parts(args.prompts_per_step * args.group_size, args.minibatches, "--minibatches")
    device = ranks.start(args.device)
    run = Run(args, COLUMNS + VALUE_COLUMNS, args.steps, device, program(), args.save_every)
    policy, tokenizer = load_policy(args.policy, device)
    critic = ValueModel(policy.config).to(device).eval()
    critic.trunk.load_state_dict(policy.state_dict())
    critic.trunk.checkpointing = args.grad_checkpoint
    ref, saved, about = begin(policy, tokenizer, args)
    policy.checkpointing = args.grad_checkpoint
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, (0.9, 0.99), weight_decay=0.0, fused=True)
    optimizer.add_param_group({"params": critic.parameters(), "lr": args.value_lr})
    env = Environment(args, policy, tokenizer, run)
    rescored = not env.exact  # exact: the sampler's logp is a scorer's, too
    trained = {"model": policy, "critic": critic}
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
        answers = answers.ungrouped()  # PPO compares no answers: from here on G is 1, and b counts answers

        # ---- old and reference log-probabilities ----
        with torch.no_grad():
            logp_old = env.score(policy, answers)[0] if rescored else answers.logp  # (b, G, T)
            logp_ref = env.score(ref, answers)[0]
            value_old = env.value(critic, answers)  # (b, G, T)

        # ---- advantage: what the value network did not expect ----
        earned = earned.to(device).view(-1, 1)[answers.share]  # (b, G)
        paid = token_reward(earned, logp_old, logp_ref, answers.mask, args.beta)  # (b, G, T)
        adv, returns = gae(paid, value_old, answers.mask, args.gamma, args.lam)
        adv_all = whiten(ranks.gather(adv), ranks.gather(answers.mask))  # (B, G, T)
        adv, mask_all = techniques.weighted(adv_all[answers.share], answers, args, env, policy)  # (b, G, T)

        # ---- update: the parts' losses add up, since each is divided by the whole update's totals ----
        for _ in range(args.epochs_per_rollout):
            for batch in minibatches(answers, mask_all, args, generator):
                for rows in batch.parts:
                    logp, entropy = env.score(policy, answers, rows)
                    mask = mask_all[rows]
                    loss, stats = ppo_policy_loss(logp, logp_old[rows], adv[rows], mask, args.eps)
                    loss_v, stats_v = value_loss(env.value(critic, answers, rows), value_old[rows],
                                                 returns[rows], mask, args.value_clip)
                    loss = (loss + loss_v) * (mask.sum() / batch.n_tokens)  # the networks share no weights
                    loss = loss - args.entropy_coef * entropy.masked_fill(~mask, 0).sum() / batch.n_tokens
                    loss.backward()
                    stats |= stats_v | token_stats(logp, logp_ref[rows], entropy, mask)
                    run.add(stats, mask.sum() / batch.n_scored / updates)
                    run.add({"loss": loss.detach()}, 1 / updates)
                run.update(optimizer, *trained.values(), grad_clip=args.grad_clip, weight=1 / updates)

        # ---- log ----
        _, to_come = gae(paid, value_old, answers.mask, args.gamma, 1.0)  # λ = 1: what was really earned
        explained = explained_variance(*map(ranks.gather, (value_old, to_come, answers.mask)))
        run.write(**env.measure(answers, reward, adv_all), explained_variance=explained, **held_out)
        env.samples.write()  # the evaluation's answers, scored again
    env.conclude(policy)
    run.finish()
    ranks.stop()


if __name__ == "__main__":
    with ranks.one_voice():
        main(parse(Args, default=defaults(Args)))
