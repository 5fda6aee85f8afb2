"""A run is killed and goes on, and its curve has a jump. What did the checkpoint not hold?

Met in: trl#3179, nanoGPT#467.
Trap: weights alone look like a checkpoint. AdamW's averages and the place in the random numbers are lost.
Failure: one generator, seeded at the start; only the weights are read again. Old prompts are drawn once more.
Cure: the state holds weights, optimizer and step. A step's random numbers follow from (seed, step) alone.
What tells them apart: the distance of the last weights from an uninterrupted run's. It must be exactly 0.
Run: python lessons/15_resume_replays.py
"""
import tempfile

from shared import P, log_prob, rollout, show, start, update  # first: it finds all below
import torch
import sft
from grpo import plain_grpo
from utils.run import Run, step_generator

STEPS = 24


def train(folder, by_step, resume=False, keep_optimizer=True, killed=STEPS):
    """by_step: a step has random numbers of its own. -> each step's prompts, the weights as one vector."""
    args = sft.Args(log=f"{folder}/log.csv", out=folder, resume=resume, dtype="fp32", steps=STEPS)
    policy, optimizer, one = start(seed=0, lr=1e-2)
    new, prompts = optimizer.state_dict(), []
    run = Run(args, sft.COLUMNS, STEPS, torch.device("cpu"), "python sft.py", save_every=4)
    run.hold({}, model=policy, optimizer=optimizer)
    optimizer.load_state_dict(optimizer.state_dict() if keep_optimizer else new)
    for step in run.steps():
        if step == killed:  # as by kill -9: nothing more is saved
            return prompts, None
        tokens, reward, logp_old, mask = rollout(policy, step_generator(0, step) if by_step else one)
        prompts.append(tokens[:, :P].tolist())
        update(optimizer, plain_grpo(reward, log_prob(policy, tokens), logp_old, logp_old, mask))
    run.finish()
    return prompts, torch.nn.utils.parameters_to_vector(policy.parameters())


def resumed(by_step, keep_optimizer):
    with tempfile.TemporaryDirectory() as folder:
        _, whole = train(f"{folder}/whole", by_step)
        first, _ = train(f"{folder}/killed", by_step, killed=14)
        rest, weights = train(f"{folder}/killed", by_step, True, keep_optimizer)
    saved = first[:STEPS - len(rest)]  # the steps behind the last checkpoint are done again
    return {"steps with old prompts": sum(prompts in saved for prompts in rest),
            "distance of the weights": ((weights - whole).norm() / whole.norm()).item()}


def lesson():
    return {"failure: weights alone": resumed(False, False), "cure: all of the state": resumed(True, True),
            "compare: no optimizer state": resumed(True, False)}


if __name__ == "__main__":
    show(lesson)
