"""Checkpoints: one dict of tensors and plain values a file, written atomically, read with weights_only=True.

Every file holds format, kind (policy, reward, state; in vision/ others), config and model, those of text
models a tokenizer too (ranks included); a reward adds pool, a state what a resume needs.
weights_only=True runs no code that a file may hold; a file of another format or kind is refused.
"""
import io
import json
import math
import os
import shutil
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch

from utils import guard
from utils.cli import atomic_write, beside, die
from utils.device import check_compiler, pick_device, rank

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
    if kind == "state":  # sums in another order would have other last digits
        content = {"threads": torch.get_num_threads(), **content}
    torch.save({"format": FORMAT, "kind": kind, **content}, buffer)
    atomic_write(path, buffer.getbuffer())


def load(path, kind, made_by, wanted=("config", "tokenizer", "model")):
    """The dict in the file, or a clear message; made_by: the command that writes such a file."""
    if not Path(path).is_file():
        die(f"no {kind} at {path}: run `{made_by}` first, or name another file")
    try:
        with zipfile.ZipFile(path) as file:  # torch doesn't compare the sums of the parts
            if file.testzip():
                raise zipfile.BadZipFile
        content = torch.load(path, map_location="cpu", weights_only=True)
        parts = [content["format"], content["kind"], *(part for part in wanted if part in content)]
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything, IndexError included
        parts = type(error).__name__
    if parts != [FORMAT, kind, *wanted]:
        die(f"{path} is not a {kind} of this repository: found {parts}, wanted {[FORMAT, kind, *wanted]}. "
            f"Make it again with `{made_by}`.")
    if kind != "state":
        guard.note(f"{kind} {path}", Path(path))
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


# arguments that a resume may give otherwise than the run began with
MAY_CHANGE = {"resume", "overwrite", "steps", "save_every", "eval_every", "samples", "num_workers", "track",
              "log", "log_dir", "out", "device"}


def script(args):
    """The file that these arguments belong to: sft.py."""
    return Path(sys.modules[type(args).__module__].__file__).name


def plain(args):
    """A dataclass or a dict of arguments as JSON would give it back."""
    return json.loads(json.dumps(args if isinstance(args, dict) else asdict(args), default=str))


def differing(began, args):
    """-> [(name, value in the dict `began`, value now)]; what an older version lacked has its default."""
    began = plain(type(args)()) | plain(began)
    return [(name, began[name], value) for name, value in plain(args).items()
            if name not in MAY_CHANGE and began[name] != value]


def load_state(path, args, made_by, wanted=("config", "tokenizer", "model")):
    """The state to go on from; refuses another script's and other arguments than the run began with."""
    state = load(path, "state", made_by, (*wanted, "args"))
    if state.get("script", script(args)) != script(args):
        die(f"--resume: {path} is a state of {state['script']}, not of {script(args)}: name another --out")
    for name, began, value in differing(state["args"], args):
        die(f"--resume: {path} began with --{name} {began}, not {value}: give the same, or drop --resume")
    if getattr(args, "lr_end", 1.0) != 1.0 and state["args"]["steps"] != args.steps:
        print(f"--resume: {path} began with --steps {state['args']['steps']}: from here on the learning rate "
              f"falls to its --lr_end {args.lr_end:g} at step {args.steps}, and not at the former end")
    torch.set_num_threads(state.get("threads", torch.get_num_threads()))  # another order, other last digits
    return state


def start(args, made_by, writes, wanted, total):
    """Where a run of `total` steps begins: the state that --resume goes on from, or None. It touches nothing.

    writes: its results, state.pth first. Call it when all inputs have been read.
    """
    earlier(args, writes)
    if getattr(args, "compile", False):
        check_compiler(pick_device(args.device))
    if not args.resume:
        return None
    path = f"{args.out}/state.pth"
    state = load_state(path, args, made_by, wanted)
    guard.same_inputs(state.get("inputs", {}), path)
    left(path, state["step"], total)
    return state


def left(path, step, total):
    """Refuses a resume of fewer steps than are done, and says where none is left."""
    if step > total:
        die(f"--resume: {path} has done {step} steps, this command wants {total}: its weights would pass for "
            "earlier ones. Give at least as many steps")
    if step == total:
        print(f"nothing to do: {path} has done all {total} steps")


def take(args, writes):
    """Locks --out and --log, and sets an earlier run's files aside. Call it when nothing else can fail."""
    guard.lock(args.out, args.log)
    guard.set_aside(earlier(args, writes))
    if args.overwrite and not args.resume and not rank():  # a folder of more steps would pass for the newest
        for folder in filter(os.path.isdir, writes):
            shutil.rmtree(folder)


def earlier(args, writes):
    """The files of a run with other arguments in this one's place; [] with --resume or --overwrite.

    Refused where a run of these very arguments is there, or one of another script.
    """
    beside_log = [beside(args.log, ending) for ending in (".json", ".samples.jsonl")]
    files = [file for file in (args.log, *beside_log, *writes) if os.path.exists(file)]
    if rank() or args.resume or args.overwrite or not files:
        return []
    before = about_run(f"{args.out}/state.pth") or about_run(beside(args.log, ".json")) or {"args": {}}
    same_script = before.get("script", script(args)) == script(args)
    if same_script and before["args"] and differing(before["args"], args):
        return files
    whose = "this command" if same_script else before["script"]
    resume = "--resume to go on, " if files[-1] in writes else ""  # else nothing was saved
    die(f"{files[0]} is there already, of {whose}: give {resume}--overwrite to begin anew in its place, or "
        "another --out and --log")


def about_run(path):
    """What a state or a record says of its run's arguments; None where there is none, or none whole."""
    try:
        if Path(path).suffix == ".json":
            about = json.loads(Path(path).read_text(encoding="utf-8"))
        else:
            about = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {"args": dict(about["args"]), **{k: about[k] for k in ("script",) if k in about}}
    except Exception:  # whatever a damaged file raises
        return None


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
