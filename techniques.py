"""What surrounds GRPO's loss: later papers' techniques, each a flag of train_grpo.py that is off by default.

docs/grpo.md says what each does, docs/tasks.md what some of them gained. The loss itself is in grpo.py.
`Flags` adds what the training scripts of GRPO, PPO and TRL take alike.
Left out: replay of old answers, curricula.
Run: python train_grpo.py --overlong penalty
"""
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from generate import ended
from grpo import OBJECTIVES
from utils import ranks
from utils.cli import AtLeast, RunFlags, die
from utils.rewards import JUDGES


@dataclass
class Flags(RunFlags):
    """What train_grpo.py, train_ppo.py and train_trl.py have alike; each adds flags of its own."""
    # ---- around the loss: off by default ----
    lr_end: Annotated[float, AtLeast(0.0)] = 1.0  # share of lr to which the learning rate falls, linearly
    overlong: Literal["keep", "mask", "penalty"] = "keep"  # cut answers: no loss; long ones: less reward
    overlong_tokens: Annotated[int, AtLeast(1)] = 16  # over so many last tokens the penalty grows from 0 to 1
    entropy_coef: Annotated[float, AtLeast(0.0)] = 0.0  # weight of an entropy bonus
    top_entropy: Annotated[float, AtLeast(1e-9)] = 1.0  # share of tokens, of highest entropy, that teach
    tis_cap: Annotated[float, AtLeast(0.0)] = 0.0  # truncated importance sampling: greatest weight; 0: off
    sync_ref_every: Annotated[int, AtLeast(0)] = 0  # steps after which π₀ becomes the policy; 0: never
    # ---- the algorithm ----
    steps: Annotated[int, AtLeast(1)] = 60  # rollouts
    epochs_per_rollout: Annotated[int, AtLeast(1)] = 1  # passes over a rollout's answers
    grad_clip: Annotated[float, AtLeast(1e-9)] = 1.0  # greatest norm of the gradient
    seed: int = 0  # of prompts and draws
    # ---- the task ----
    policy: str = "out/sft/policy.pth"  # π₀
    task: str = ""  # questions with a right answer: add, sort, reverse, countdown, gym:NAME, FILE.py:TASK
    reward: str = "model"  # model (with --task: the task's check), a judge of --gold, or FILE.py:FUNCTION
    reward_model: str = "out/reward/reward.pth"  # of --reward model
    gold: Literal[tuple(JUDGES)] = "taste"  # a fixed judge, measured beside the reward
    data: str = "auto"  # where prompts come from, as in sft.py
    prompts: str = ""  # your own instead: JSONL with a `prompt` a line; other keys reach the reward function
    prompt_len: Annotated[int, AtLeast(1)] = 32  # tokens; --prompts keep their own length
    max_new: Annotated[int, AtLeast(1)] = 48  # tokens of an answer
    temperature: Annotated[float, AtLeast(1e-3)] = 1.0  # of sampling and scoring alike
    eval_every: Annotated[int, AtLeast(1)] = 20  # steps
    eval_prompts: Annotated[int, AtLeast(1)] = 64  # held-out prompts
    eval_pass8: bool = True  # of a task: ask 8 answers to each of them, too
    # ---- speed and memory: the algorithm stays the same ----
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of scoring and update
    micro_batch: Annotated[int, AtLeast(0)] = 0  # prompts (PPO: answers) a backward pass; 0: all
    grad_checkpoint: bool = False  # less memory, one more forward pass
    sample_dtype: Literal["auto", "fp32", "bf16"] = "auto"  # of sampling; auto: --dtype, GPTs on a CPU fp32
    save_every: Annotated[int, AtLeast(1)] = 20  # steps


def pick_objective(args, updates=1):
    """The table's row with --beta (None: its own) -> Objective, and the β of a KL in the reward.

    Ends the run where groups of this size, or so many updates a rollout, don't go with it.
    """
    name, G = args.objective, args.group_size
    objective = OBJECTIVES[name] if args.beta is None else replace(OBJECTIVES[name], beta=args.beta)
    if G < 2 and (objective.baseline, objective.scale) != ("none", "none"):
        die(f"--group_size {G}: {name} compares answers, wanted at least 2")
    if objective.ratio == "none" and updates > 1:
        die(f"--objective {name} has no ratio: {updates} updates a rollout would be off-policy, "
            "wanted 1 epoch and 1 minibatch")
    if not args.kl_in_reward:
        return objective, 0.0
    if not objective.beta:
        die(f"--kl_in_reward with β 0 for {name}: wanted a --beta above 0")
    return replace(objective, beta=0.0), objective.beta


def before_step(step, env, trained, ref, optimizer):
    """Before a step: evaluates and samples if due, sets the learning rate, may move π₀, starts the clock.

    -> what held-out answers earn, every --eval_every steps, else {}.
    """
    args, policy, due = env.args, trained["model"], step % env.args.eval_every == 0
    first = step == env.run.start
    held_out = (env.first if first else env.evaluate(policy)) if due else {}
    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] * (1 - (1 - args.lr_end) * step / args.steps)
    if args.sync_ref_every and step and step % args.sync_ref_every == 0:
        ref.load_state_dict(policy.state_dict())
    env.samples.draw(step, env, trained, ref, due)
    env.run.start_clock()
    return held_out


def rewarded(answers, env, policy, generator):
    """Answers of this process's b groups -> the same, and the reward (B, G) of all processes' answers.

    --dynamic_sampling N (DAPO, arXiv:2503.14476): fresh prompts replace groups of equal rewards, N times.
    """
    reward = ranks.gather(env.reward(answers))
    for _ in range(getattr(env.args, "dynamic_sampling", 0)):
        equal = (reward == reward[:, :1]).all(1)
        if not equal.any():
            break
        rows = equal[answers.share].nonzero()[:, 0]
        fresh = env.rollout(policy, generator, rows)
        reward = reward.index_put((equal,), ranks.gather(env.reward(fresh)))
        answers = answers.with_rows(rows, fresh)
    return answers, reward


def cut_off(answers, stops, max_new):
    """Which answers --max_new cut before they came to a stop: (b, G) bool."""
    b, G, T = answers.mask.shape
    stopped = ended(answers.tokens[:, :, -T:].flatten(0, 1), stops)[:, -1].view(b, G)
    return (answers.mask.sum(2) == max_new) & ~stopped


def shaped(reward, answers, args):
    """The reward (B, G) of all processes' answers, less the penalty of long ones."""
    length = ranks.gather(answers.mask.sum(2)).cpu() if args.overlong == "penalty" else None
    return less_penalty(reward, length, args)


def less_penalty(reward, length, args):
    """The reward (B, G) less the penalty of long answers (B, G). A run of maxrl ends at a result below 0.

    --overlong penalty, DAPO eq. 13: 0 up to max_new - overlong_tokens tokens, then in equal steps up to 1.
    """
    if args.overlong == "penalty":
        reward = reward - (1 + (length - args.max_new) / args.overlong_tokens).clamp(min=0)
    if getattr(args, "objective", "") == "maxrl" and (reward < 0).any():
        die(f"--objective maxrl divides by a group's mean reward, got {reward.min():.4g}: wanted rewards "
            "of at least 0, such as a task's")
    return reward


def less_kl(reward, answers, logp_old, logp_ref, weight):
    """R - β · Σ_t (logp_old - logp_ref), k1 summed over an answer (RLOO, arXiv:2402.14740); (B, G)."""
    if not weight:
        return reward
    kl = torch.where(answers.mask, logp_old - logp_ref, 0.0).sum(2)
    return reward - weight * ranks.gather(kl).cpu()


def groups_with_gradient(adv, objective, args):
    """(B, G) -> (B,) bool: a group whose advantages are all 0 has the gradient of KL and entropy alone."""
    return ((adv != 0) | bool(objective.beta or args.entropy_coef)).any(1).cpu()


def weighted(adv, answers, args, env, policy):
    """An advantage and a mask for each token, (b, G, T) each; adv (b, G), one an answer, or (b, G, T).

    --tis_cap C: times min(exp(logp - logp_sampler), C), where scoring and sampling differ in precision
    (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    --top_entropy ρ: 0 but at the ρ share of the step's tokens of highest entropy (arXiv:2506.01939).
    --overlong mask: an answer that max_new cut has no token in the loss (DAPO's overlong filtering).
    """
    adv = adv if adv.dim() == 3 else adv[:, :, None].expand_as(answers.logp)
    mask = answers.mask
    if args.tis_cap or args.top_entropy < 1:
        with torch.no_grad():
            logp, entropy = env.score(policy, answers)
    if args.tis_cap:
        adv = adv * torch.exp(logp - answers.logp).clamp(max=args.tis_cap)
    if args.top_entropy < 1:
        every = ranks.gather(entropy[mask])
        least = every.sort(descending=True).values[max(1, round(args.top_entropy * len(every))) - 1]
        adv = adv.masked_fill(entropy < least, 0.0)
    if args.overlong == "mask":
        mask = mask & ~cut_off(answers, env.tokenizer.stops, env.T)[:, :, None]
    return adv, mask
