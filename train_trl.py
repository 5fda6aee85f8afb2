"""The same run on TRL's GRPOTrainer (1.16): the way to several GPUs, to DeepSpeed, FSDP and vLLM.

`diff train_grpo.py train_trl.py` shows that the loop is TRL's. The prompts of a step, the reward, the
evaluation and the CSV are train_grpo.py's. utils/trl.py makes TRL's objective ours. TRL draws other answers.
What TRL doesn't measure stays empty: ratio_max, ref_logp, and kl with β 0.
Left out: the flags that TRL has no equal of, LoRA.
Run: python train_trl.py (several processes: accelerate launch --num_processes 2 train_trl.py)
"""
import os
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Annotated, Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

import techniques
from answers import Answers
from grpo import OBJECTIVES, group_advantage
from policy import defaults, load_policy
from rollout import COLUMNS, Environment
from utils import checkpoint, hf, ranks
from utils.cli import AtLeast, die, need, parse, program, refusing, resume_command, writing
from utils.run import Run, step_generator
from utils.trl import attach, export, given_fields, load_trl, rollout_config, trl_refusing


@dataclass
class Args(techniques.Flags):  # the flags that GRPO, PPO and TRL have alike are there
    # ---- the algorithm ----
    objective: Literal[tuple(OBJECTIVES)] = "grpo"  # a row of grpo.py's table
    prompts_per_step: Annotated[int, AtLeast(1)] = 16  # B
    group_size: Annotated[int, AtLeast(1)] = 8  # G, answers to each prompt
    beta: Annotated[float | None, AtLeast(0.0)] = 0.05  # of the KL, for every objective; None: its own
    kl_in_reward: bool = False  # TRL has no equal
    dynamic_sampling: Annotated[int, AtLeast(0)] = 0  # TRL has no equal
    lr: Annotated[float, AtLeast(0.0)] = 1.5e-4  # learning rate of AdamW
    minibatches: Annotated[int, AtLeast(1)] = 1  # optimizer steps an epoch
    trl: dict[str, str] = field(default_factory=given_fields)  # other fields of GRPOConfig: --trl.NAME VALUE
    # ---- the task ----
    log: str = "logs/trl.csv"  # the run's numbers
    out: str = "out/trl"  # the folder of the run's weights


class Loop:
    """What TRL's loop calls: the reward of its answers, and what train_grpo.py does around a step."""
    __name__ = "reward"  # TRL names its column after it

    def __init__(self, args, env, run, policy, objective):
        self.args, self.env, self.run, self.policy, self.objective = args, env, run, policy, objective

    def __call__(self, completion_ids, index, **_):
        """Token ids of b·G answers, and the rows of their prompts -> b·G rewards."""
        self.answers = Answers.of_ids(completion_ids, self.env.train.pick(torch.tensor(index)), self.env)
        self.env.drawn += torch.tensor([len(index), int(self.answers.mask.sum())])
        self.reward = self.env.reward(self.answers)  # (b, G)
        return self.reward.flatten().tolist()

    def fetch(self):
        """Our policy takes TRL's weights. All processes gather them, and those of rank 0 count."""
        weights = self.trainer.accelerator.get_state_dict(self.trainer.model_wrapped)
        if weights:  # torch.compile puts a prefix before the names
            hf.fill(self.policy, {name.removeprefix("_orig_mod."): w for name, w in weights.items()})
        return self.policy

    def begin(self, step, model):
        self.run.step, self.run.sums, self.held_out = step, {}, {}
        if step % self.args.eval_every == 0:
            self.held_out = self.env.first if step == self.run.start else self.env.evaluate(self.fetch())
        self.run.start_clock()

    def end(self):
        return max(ranks.gather([self.run.interrupt.asked]))

    def write(self, step, **numbers):
        checkpoint.finite(step, self.args.out, **numbers)
        reward = ranks.gather(self.reward)  # (B, G)
        adv = group_advantage(reward, self.objective.baseline, self.objective.scale)
        self.run.write(**numbers | self.env.measure(self.answers, reward, adv), **self.held_out)

    def save(self, step):
        self.fetch()
        self.run.save(step)


def main(args):
    # ---- set-up ----
    updates = args.epochs_per_rollout * args.minibatches
    trl, datasets = load_trl(), need("datasets", "trl")
    with refusing():
        objective, _ = techniques.pick_objective(args, updates)
        device = ranks.start(args.device)
        config = rollout_config(objective, args, device, updates)
    run = Run(args, COLUMNS, args.steps, device, program(), 0, objective=objective, trl=version("trl"))
    policy, tokenizer = load_policy(args.policy, device)
    env = Environment(args, policy, tokenizer, run)
    loop = Loop(args, env, run, policy, objective)

    # ---- TRL's trainer, from a folder: it loads the reference from where the policy came from ----
    with tempfile.TemporaryDirectory(prefix="nanogrpo-") as folder:
        reader = export(policy, tokenizer, folder)
        draws = (step_generator(args.seed, step) for step in range(args.steps))  # those of train_grpo.py
        rows = torch.cat([env.train.draw(args.prompts_per_step, draw) for draw in draws]).tolist()
        short = env.train.columns.get("short") if env.task else None
        prompts = [tokenizer.prompt(env.train.texts[i], short and short[i]) for i in rows]
        data = datasets.Dataset.from_dict({"prompt": prompts, "index": rows})
        with writing(args.out), trl_refusing():
            loop.trainer = trl.GRPOTrainer(folder, loop, config, data, processing_class=reader)
        attach(loop.trainer, loop, updates)
        run.hold(checkpoint.about(policy, tokenizer), "policy", model=policy)
        last = f"{args.out}/checkpoint-{run.start * updates}"
        if run.start and not os.path.isdir(last):
            die(f"--resume: TRL's checkpoint {last} is gone: start anew without --resume")
        env.first = env.evaluate(policy)
        next(run.steps(), None)  # the record, the CSV and Ctrl-C, but no step: the loop is TRL's
        if run.start < args.steps:
            loop.trainer.train(resume_from_checkpoint=last if run.start else None)
    if loop.end():
        run.csv.close()
        run.interrupt.leave(resume_command())
    run.finish()
    if not ranks.rank():
        policy.export_hf(f"{args.out}/hf", tokenizer)
    env.conclude(policy)
    ranks.stop()


if __name__ == "__main__":
    with ranks.one_voice():
        main(parse(Args, default=defaults(Args)))
