"""A run's numbers: a CSV line a step, the same numbers to TensorBoard or W&B if asked, and a progress bar."""
import csv
import json
import math
import os
import sys
from pathlib import Path

import torch

from utils.cli import atomic_write, beside, die, need, writing
from utils.device import rank

SHARED = ["step", "loss", "mean_r", "kl", "entropy", "token_adv"]  # every script's CSV begins with these
SHOWN = {"mean_r": "reward", "kl": "KL", "loss": "loss", "tokens_per_s": "tokens/s"}  # by the bar


class Log:
    """write(step=…, …) adds a row; unknown columns are an error, missing or NaN ones stay empty, never 0.

    A resume keeps the rows before `start` and appends. There is no bar in CI and where stdout is no terminal.
    """

    def __init__(self, path, columns, total, start=0, track="none", args=None):
        self.path, self.columns, self.bar = Path(path), columns, None
        if rank():  # rank 0 writes for all
            self.file, self.tracker = open(os.devnull, "w"), None
            return
        self.tracker = open_tracker(track, self.path, args and vars(args))  # it can fail: before the CSV
        rows = self.former(start) if start and self.path.is_file() else []
        lines = [",".join(row.get(name) or "" for name in self.columns) for row in rows]
        if start < total:
            cut(beside(self.path, ".samples.jsonl"), start)  # it can refuse a resume: before the CSV
        atomic_write(self.path, "".join(f"{line}\n" for line in [",".join(self.columns), *lines]).encode())
        with writing(self.path):
            self.file = open(self.path, "a")
        if sys.stdout.isatty() and not os.environ.get("CI"):
            from rich.progress import Progress
            self.bar = Progress(*Progress.get_default_columns(), "{task.completed} {task.fields[info]}")
            self.bar.start()
            self.bar.console.show_cursor()  # an end by an error or a kill would leave it hidden
            self.task = self.bar.add_task(self.path.stem, total=total, completed=start, info="")

    def former(self, start):
        """The CSV's rows before the step `start`, by name; columns that this version doesn't know stay."""
        try:  # a kill may have torn the last row; another program may have written steps as 5.0
            with open(self.path, newline="", encoding="utf-8-sig", errors="replace") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if None not in row.values() and float(row["step"]) < start]
        except (KeyError, ValueError, csv.Error) as error:
            die(f"--resume: {self.path} is no CSV of a run ({type(error).__name__}: {error}): "
                "name another --log")
        self.columns = [*self.columns, *(x for x in reader.fieldnames or [] if x not in self.columns)]
        return rows

    def write(self, **values):
        unknown = values.keys() - set(self.columns)
        if unknown:
            raise AssertionError(f"columns {sorted(unknown)} are not in {self.columns}")
        values = {k: v.item() if hasattr(v, "item") else float(v) for k, v in values.items() if v is not None}
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        with writing(self.path):
            self.file.write(",".join(f"{values[k]:.9g}" if k in values else "" for k in self.columns) + "\n")
            self.file.flush()
        if self.tracker:
            self.tracker({k: v for k, v in values.items() if k != "step"}, int(values["step"]))
        if self.bar:
            info = "  ".join(f"{label} {values[k]:.3g}" for k, label in SHOWN.items() if k in values)
            self.bar.update(self.task, completed=int(values["step"]) + 1, info=info)

    def close(self):
        self.file.close()
        if self.bar:
            self.bar.stop()


def cut(path, start):
    """Keeps the lines of steps before `start` of a run's samples, one JSON object a line; none: no file."""
    if not path.is_file():
        return
    try:  # a kill may have torn the last line
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if start else []
        kept = [line for line in lines if json.loads(line)["step"] < start]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        die(f"--resume: {path} holds no samples of a run ({type(error).__name__}): move it away")
    if kept:
        atomic_write(path, "".join(f"{line}\n" for line in kept).encode())
    else:
        path.unlink()


def add(sums, stats, weight=1.0):
    """Adds weight × stats to the dict sums; of names in _max it keeps the greatest."""
    for name, value in stats.items():
        value = torch.as_tensor(value).detach()  # a GPU's number stays there until it is written
        value = value if value.device.type == "mps" else value.double()
        if name.endswith("_max"):
            sums[name] = torch.maximum(sums.get(name, value), value)
        else:
            sums[name] = sums.get(name, 0.0) + weight * value


def open_tracker(track, path, record):
    """A function (numbers, step) for TensorBoard (events beside the CSV) or W&B, None for "none"."""
    if track == "none":
        return None
    if track == "wandb":
        os.environ.setdefault("WANDB_MODE", "offline")
        return need("wandb", "log").init(  # c2i_grpo.py has flags for the names
            project=record.get("wandb_project", "nanogrpo"), entity=record.get("wandb_entity"),
            name=record.get("wandb_run_name") or path.stem, dir=str(path.parent), config=record).log
    writer = need("torch.utils.tensorboard", "log").SummaryWriter(str(beside(path, "")))

    def to_tensorboard(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()
    return to_tensorboard
