"""Several processes, one run: who this one is, its share of the work, and how they add up their numbers.

Every process draws the same random numbers and takes its share of the prompts. So two processes sample what
one would. Gradients are added, not averaged, since the losses' denominators are of the whole step. One
exchange after the last micro-batch does it. DistributedDataParallel does the same inside the backward pass.
Without torchrun each function does what one process needs. Run: torchrun --nproc_per_node=2 train_grpo.py
"""
import contextlib
import io
import os
import socket
import sys
import time

import torch
import torch.distributed as dist

from utils.cli import die, refusing
from utils.device import pick_device, rank, world


@contextlib.contextmanager
def one_voice():
    """For what all ranks do alike: rank 0 prints, the others are silent, unless one of them ends alone."""
    errors, quiet = io.StringIO(), contextlib.ExitStack()
    try:
        with quiet, refusing(torch.OutOfMemoryError, "--micro_batch 1, --grad_checkpoint or a smaller "
                             "--max_new need less memory, and the last checkpoint stays. "):
            if rank():
                quiet.enter_context(contextlib.redirect_stdout(io.StringIO()))
                quiet.enter_context(contextlib.redirect_stderr(errors))
            yield
    except SystemExit:
        if not rank():
            raise
        # torchrun ends all with the first, so rank 0 needs time to print. If rank 0 stays, this one prints.
        where = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", 0))
        with contextlib.suppress(OSError):
            for _ in range(10):
                time.sleep(1)
                socket.create_connection(where, timeout=1).close()
            print(f"rank {rank()}: {errors.getvalue().strip()}", file=sys.stderr)
        raise


@contextlib.contextmanager
def meeting():
    """Where processes wait for each other. If one has died or isn't there, the run ends with a message."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # gloo and NCCL name a dozen ways of "the other one is gone"
        die(f"another process is gone, or can't be reached at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')} ({str(error).splitlines()[0][:100]}). Is the address in use? "
            "Name another --master_port; a run goes on from its last checkpoint with --resume.")


def start(device="auto", backend="auto"):
    """Joins the other processes, if torchrun started this one -> this process's device."""
    device = pick_device(device)
    if backend == "nccl" and device.type != "cuda":
        die(f"--backend nccl needs CUDA GPUs, this run is on {device.type}: wanted --backend gloo, or auto")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            die(f"{device.index + 1} processes on {torch.cuda.device_count()} GPUs: lower --nproc_per_node")
        torch.cuda.set_device(device)
    if os.environ.get("RANK") and not dist.is_initialized():
        auto = "nccl" if device.type == "cuda" else "gloo"
        with meeting():
            dist.init_process_group(auto if backend == "auto" else backend)
    return device


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


def first_on_rank_0(make):
    """make() on rank 0, then on the others, which find the files that it wrote."""
    made = None if rank() else make()
    if dist.is_initialized():
        dist.barrier()
    return make() if rank() else made


def share(n, what):
    """This process's part of n things, as a slice; all parts are equal."""
    if n % world():
        die(f"{what} {n} doesn't split into {world()} equal parts: wanted a multiple of their number")
    return slice(rank() * n // world(), (rank() + 1) * n // world())


def whole_parts(n, parts, flag):
    """Refuses a number of parts that doesn't divide n."""
    if n % parts:
        die(f"{flag} {parts} doesn't divide {n}: wanted equal parts")


def local(index, share, size=0):
    """Those of `index` that lie in the slice `share`, counted from its start, in parts of at most `size`."""
    index = index[(index >= share.start) & (index < share.stop)] - share.start
    return index.split(size or len(index)) if len(index) else []


def count(mask, batch, share):
    """Tokens in the rows `batch` of all processes, at least 1; mask has this one's rows, those of `share`."""
    return max(1, sum(gather([sum(int(mask[rows].sum()) for rows in local(batch, share))])))


def gather(x):
    """A list, or a tensor (n, …), of each process -> all of them, in the order of ranks, on each."""
    if not dist.is_initialized():
        return x
    every = [None] * world()
    with meeting():
        dist.all_gather_object(every, x.cpu() if torch.is_tensor(x) else x)
    return torch.cat(every).to(x.device) if torch.is_tensor(x) else sum(every, [])


def total(numbers):
    """A dict of numbers added up over the processes; names in _max: the greatest."""
    every = gather([{k: float(v) for k, v in numbers.items()}])
    return {k: (max if k.endswith("_max") else sum)(n[k] for n in every) for k in numbers}


def mean(numbers):
    """A dict of numbers averaged over the processes; names in _max: the greatest."""
    return {k: v if k.endswith("_max") else v / world() for k, v in total(numbers).items()}


def add_gradients(model):
    """Every process's gradients added up, on each; a process whose share was empty adds nothing."""
    if not dist.is_initialized():
        return
    weights = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in weights])
    with meeting():
        dist.all_reduce(flat)
    for p, grad in zip(weights, flat.split([p.numel() for p in weights])):
        p.grad = grad.view_as(p)
