"""Checkpoints: one dict of tensors and plain values a file, written atomically, read with weights_only=True.

Every file holds format, kind (policy, reward, state; in vision/ others), config and model, those of text
models a tokenizer too (ranks included); a reward adds pool, a state what a resume needs.
weights_only=True runs no code that a file may hold; a file of another format or kind is refused.
"""
import io
import math
from dataclasses import asdict
from pathlib import Path

import torch

from utils.cli import atomic_write, die
from utils.device import rank

FORMAT = "nanogrpo-1"


def about(model, tokenizer):
    """What makes a text model's file readable: a module's .config and the tokenizer, ranks included."""
    return {"config": asdict(model.config), "tokenizer": tokenizer.state()}


def save(path, kind, model, tokenizer, **more):
    """model: a module with .config; tokenizer: a Tokenizer of utils; more: further entries of the dict."""
    if rank() == 0:  # it writes for all
        write(path, kind, **about(model, tokenizer), model=model.state_dict(), **more)


def write(path, kind, **content):
    buffer = io.BytesIO()  # torch.save hides a full disk's OSError behind a RuntimeError of its own
    torch.save({"format": FORMAT, "kind": kind, **content}, buffer)
    atomic_write(path, buffer.getbuffer())


def load(path, kind, made_by, wanted=("config", "tokenizer", "model")):
    """The dict in the file, or a clear message; made_by: the command that writes such a file."""
    if not Path(path).is_file():
        die(f"no {kind} at {path}: run `{made_by}` first, or name another file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        parts = [content["format"], content["kind"], *(part for part in wanted if part in content)]
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything, IndexError included
        parts = type(error).__name__
    if parts != [FORMAT, kind, *wanted]:
        die(f"{path} is not a {kind} of this repository: found {parts}, wanted {[FORMAT, kind, *wanted]}. "
            f"Make it again with `{made_by}`.")
    return content


def build(path, content, make, made_by):
    """make() filled with the file's weights; a file whose config and weights don't fit is refused."""
    try:
        model = make()
        model.load_state_dict(content["model"])
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError) as error:
        why = str(error).splitlines()[0]
        die(f"{path}: its config and its weights don't fit ({why}): make it again with `{made_by}`")
    return model


def same_tokenizer(path, content, tokenizer, policy_path):
    """π₀ fixes the tokenizer for all that follows: ids of another one would be read as other words."""
    if content["tokenizer"] != tokenizer.state():
        die(f"{path} was made with another tokenizer than {policy_path} ({tokenizer.name}): make it again")


# arguments that a resume may give otherwise than the run began with
MAY_CHANGE = {"resume", "steps", "grpo_steps", "save_every", "eval_every", "eval_interval", "num_workers",
              "track", "log", "log_dir", "out", "output_dir", "ckpt_dir", "device"}


def load_state(path, args, made_by, wanted=("config", "tokenizer", "model")):
    """The state to go on from; refuses other arguments than the run began with."""
    state = load(path, "state", made_by, wanted)
    for name, value in asdict(args).items():
        began = state["args"].get(name)
        if name not in MAY_CHANGE and began != value:
            die(f"--resume: {path} began with --{name} {began}, not {value}: give the same, or drop --resume")
    torch.set_num_threads(state["threads"])  # sums in another order would give other last digits
    return state


def restore(state, path, **parts):
    """Fills modules and optimizers from the state's entries of the same names; other sizes are refused."""
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError) as error:
        die(f"--resume: {path} holds a model of other sizes than this run's ({str(error).splitlines()[0]}): "
            "start anew without --resume")


def finite(step, out, **stats):
    """Ends the run at a non-finite loss or gradient, before it reaches the weights or a checkpoint."""
    values = {name: float(torch.as_tensor(value).detach()) for name, value in stats.items()}
    if not all(math.isfinite(value) for value in values.values()):
        shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        die(f"step {step}: not finite ({shown}). The last good checkpoint stays in {out}: lower --lr.")
