"""Models that several processes share: DDP, FSDP2, and checkpoints that any number of processes reads.

FSDP2 is `fully_shard` (ZeRO, arXiv:1910.02054). Without torchrun each function does what one process needs.
Left out: tensor and pipeline parallelism, rank 0 reading for all. Run: torchrun -m vision.c2i_grpo
"""
import contextlib
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from utils import checkpoint
from utils.cli import atomic_write, die, writing
from utils.device import rank, world
from utils.ranks import first_on_rank_0

# torch.distributed.checkpoint warns where one process saves by itself, which is what one process needs
warnings.filterwarnings("ignore", "torch.distributed is disabled")
HOOKS = {torch.bfloat16: default_hooks.bf16_compress_hook, torch.float16: default_hooks.fp16_compress_hook}


def wrap(model, kind, dtype=torch.float32, grad_dtype=torch.float32, device=torch.device("cpu")):
    """The model for several processes; one process gets it back as it is.

    kind "ddp": each process holds all weights. "fsdp": each holds a shard. "sdp": each holds a shard, and the
    weights stay whole from the forward pass to the backward pass. "hsdp": machines hold copies, the processes
    of a machine shards.
    model has .layers. dtype is that of FSDP2's passes, grad_dtype that of the gradients that are exchanged.
    """
    frozen = not any(p.requires_grad for p in model.parameters())
    if not dist.is_initialized() or kind == "ddp" and frozen:
        return model
    if kind == "ddp":
        model = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
        if grad_dtype in HOOKS:
            model.register_comm_hook(None, HOOKS[grad_dtype])
        return model
    node = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    shape = (world() // node, node) if kind == "hsdp" else (world(),)
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")[-len(shape):])
    precision = MixedPrecisionPolicy(None if dtype == torch.float32 else dtype, grad_dtype)
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, reshard_after_forward=kind != "sdp", mp_policy=precision)
    return model


def sharded(model):
    return isinstance(model, FSDPModule)


def autocast(model, dtype, device):
    """A context in which the model's matmuls run in dtype. FSDP2 casts by itself, so it needs none."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32 and not sharded(model))


@contextlib.contextmanager
def whole(model, reshard=True):
    """Within it, FSDP2 keeps the gathered weights from pass to pass: sampling makes a pass for each code.

    reshard: whether a forward pass outside of it gives its gathered weights back (not so for "sdp").
    """
    parts = [m for m in model.modules() if sharded(m)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in parts:
        part.reshard()
        part.set_reshard_after_forward(reshard, recurse=False)


def clip(model, max_norm):
    """Scales the gradients down to the norm max_norm -> their norm before, over all shards."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()


# ---- checkpoints: each is a folder, which appears when it is complete ----
def newest(folder, made_by):
    """The folder of the last checkpoint in `folder`; where there is none, a message and exit code 2."""
    if not checkpoints(folder):
        die(f"--resume: no checkpoint in {folder}: run `{made_by}` first, or name another folder with --out")
    return checkpoints(folder)[-1]


def checkpoints(folder):
    paths = [path.parent for path in Path(folder).glob("[0-9]*/resume_step.txt")]
    return sorted(path for path in paths if path.name.isdigit())  # 0000060.bak was set aside


def last_state(out, arguments, may_change, aliases, made_by):
    """The newest checkpoint's folder and its run.pth; arguments other than it began with are refused.

    aliases: {historical name: name of an argument}, for a checkpoint that older code wrote.
    """
    folder = newest(out, made_by)
    state = checkpoint.load(folder / "run.pth", "state", made_by, ("step", "args"))
    began = {aliases.get(name, name): value for name, value in state["args"].items()}
    for name, value in arguments.items():
        if name not in may_change and began.get(name, value) != value:
            die(f"--resume: {folder} began with {name} {began.get(name)}, not {value}: give the same")
    torch.set_num_threads(state["threads"])  # sums in another order would give other last digits
    return folder, state


def save(folder, model, optimizer, step, in_shards, **content):
    """Writes the folder of one checkpoint; all processes call it together.

    It holds consolidated.pth and optimizer.pth, or (in_shards) torch.distributed.checkpoint's files. Beside
    them are run.pth with `content` and the step, state_type.txt (full or sharded) and resume_step.txt.
    """
    folder = Path(folder)
    tmp = folder.with_name(f".{folder.name}.tmp")
    options = states.StateDictOptions(full_state_dict=not in_shards, cpu_offload=not in_shards)
    state = {"model": states.get_model_state_dict(model, options=options),  # if whole, rank 0 alone has it
             "optimizer": states.get_optimizer_state_dict(model, optimizer, options=options)}
    with writing(folder):
        if rank() == 0:
            shutil.rmtree(tmp, ignore_errors=True)
            tmp.mkdir(parents=True)
        if in_shards:
            first_on_rank_0(lambda: None)
            dcp.save(state, checkpoint_id=tmp, no_dist=not dist.is_initialized())
        if rank() == 0:
            if not in_shards:
                atomic_write(tmp / "consolidated.pth", lambda file: torch.save(state["model"], file))
                atomic_write(tmp / "optimizer.pth", lambda file: torch.save(state["optimizer"], file))
            checkpoint.write(tmp / "run.pth", "state", step=step, threads=torch.get_num_threads(), **content)
            (tmp / "state_type.txt").write_text("sharded" if in_shards else "full")
            (tmp / "resume_step.txt").write_text(str(step))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(tmp, folder)
    first_on_rank_0(lambda: None)


def load(folder, model, optimizer=None):
    """Fills a model, and the optimizer if given, from what any number of processes saved."""
    full = (Path(folder) / "state_type.txt").read_text() == "full"
    options = states.StateDictOptions(full_state_dict=full, cpu_offload=full)
    state = {"model": states.get_model_state_dict(model, options=options)}
    if optimizer is not None:
        state["optimizer"] = states.get_optimizer_state_dict(model, optimizer, options=options)
    if full:
        for name, file in (("model", "consolidated.pth"), ("optimizer", "optimizer.pth")):
            state[name] = torch.load(Path(folder) / file, map_location="cpu", weights_only=True)
    else:  # a model alone (--gpt_ckpt) is read by each process for itself
        dcp.load(state, checkpoint_id=folder, no_dist=optimizer is None or not dist.is_initialized())
    states.set_model_state_dict(model, state["model"], options=options)
    if optimizer is not None:
        states.set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
