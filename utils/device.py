"""Where a run computes and in which precision, its peak memory, and the record of all that beside its CSV."""
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from utils.cli import atomic_write, beside, command, die


def rank():
    return of_torchrun("RANK", 0)


def world():
    return of_torchrun("WORLD_SIZE", 1)


def of_torchrun(name, alone):
    """What torchrun says of this process. It sets four variables; a part of them is another tool's rest."""
    four = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    lacking = [name for name in four if not os.environ.get(name)]
    if {"RANK", "WORLD_SIZE"} <= set(lacking):
        return alone
    if lacking:
        given = next(name for name in four if name not in lacking)
        die(f"{given}={os.environ[given]} is set without {lacking[0]}: `unset {given}`, or start several "
            "processes with torchrun, which sets both")
    return int(os.environ[name])


def pick_device(name="auto"):
    """auto: CUDA, then Apple's MPS, then the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        die(f"--device {name!r} is unknown: wanted auto, cpu, cuda, cuda:1 or mps")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            die(f"--device {name}: this torch sees no CUDA GPU, or its driver is too old. Use --device cpu, "
                "or install a CUDA build of torch that fits the driver.")
        if (device.index or 0) >= torch.cuda.device_count():
            die(f"--device {name}: the GPUs here are cuda:0 to cuda:{torch.cuda.device_count() - 1}")
        torch.cuda.set_device(-1 if device.index is None else device.index)  # -1: it stays. Graphs need it
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN's attention makes a plan for each new shape
    if device.type == "mps" and not torch.backends.mps.is_available():
        die("--device mps: this torch sees no Apple GPU. Use --device cpu.")
    return device


def pick_autocast(device, dtype="auto"):
    """A context for the matmuls of scoring and update: bfloat16 where the hardware has it, else float32.

    Returns (context factory, "bf16" or "fp32"). Log-softmax, ratios and losses stay in float32 either way.
    """
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        caps = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        fast = device.type == "cpu" and (caps.get("avx512_bf16") or caps.get("amx_bf16"))
    if dtype == "auto":
        dtype = "bf16" if fast else "fp32"
    if dtype not in ("bf16", "fp32"):
        die(f"--dtype {dtype!r} is unknown: wanted auto, bf16 or fp32")
    if dtype == "bf16" and device.type == "cuda" and not fast:
        die(f"--dtype bf16: {torch.cuda.get_device_name(device)} has no bfloat16: wanted fp32 or auto")
    if dtype == "fp32":
        return contextlib.nullcontext, dtype
    return lambda: torch.autocast(device.type, torch.bfloat16), dtype


def check_compiler(device):
    """Compiles a line before anything is written, or says what is missing."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    try:
        subprocess.run([*shlex.split(compiler), "--version"], check=True, capture_output=True)
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=device))
    except Exception as error:  # whatever the compiler and torch's several layers raise
        die(f"--compile needs a C++ compiler and {compiler!r} can't compile here ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:150]}): install one, name it in CXX, or leave --compile away")


def peak_mem_mb(device):
    """CUDA: the most that torch held, with recordings; else the peak resident size; in MB (10⁶ bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e6
    status = Path("/proc/self/status")
    if status.is_file():  # Linux: getrusage's number would be the launching process's, if that was larger
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def git_commit():
    """The commit that made a run ("-dirty" if code had changed: results/ is none), or "unknown"."""
    root = Path(__file__).parent.parent
    git = ["git", "--no-optional-locks", "-C", root]  # status would write the index
    kw = {"capture_output": True, "text": True}
    try:
        commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], **kw)
        status = subprocess.run([*git, "status", "--porcelain", "-uno", ".", ":!results"], **kw)
    except FileNotFoundError:
        return "unknown"
    if commit.returncode:
        return "unknown"
    return commit.stdout.strip() + ("-dirty" if status.stdout.strip() else "")


def write_run_record(csv_path, args, **more):
    """Beside the CSV, with .json: arguments, command, commit, versions, machine and threads of its run."""
    if rank():
        return
    packages = ("torch", "numpy", "tiktoken", "vaderSentiment")
    versions = {name: importlib.metadata.version(name) for name in packages}
    record = {"args": dataclasses.asdict(args), "command": shlex.join(command()),
              "commit": git_commit(), "python": platform.python_version(), "versions": versions,
              "started_by": os.environ.get("NANOGRPO_STARTED_BY", ""), "machine": platform.machine(),
              "threads": torch.get_num_threads(), **more}

    def plain(value):
        return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else str(value)
    atomic_write(beside(csv_path, ".json"), json.dumps(record, indent=2, default=plain).encode())
