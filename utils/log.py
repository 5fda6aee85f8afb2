"""A run's numbers: a CSV line a step, the same numbers to TensorBoard or W&B if asked, and a progress bar."""
import csv
import io
import math
import os
import sys
from pathlib import Path

from utils.cli import atomic_write, need, writing
from utils.device import rank

SHARED = ["step", "loss", "mean_r", "kl", "entropy", "token_adv"]  # every script's CSV begins with these


class Log:
    """write(step=…, …) adds a row; unknown columns are an error, missing or NaN ones stay empty, never 0.

    A resume keeps the rows before `start` and appends. The bar shows reward, KL, loss, speed and time left;
    there is none in CI and where stdout is no terminal.
    """

    def __init__(self, path, columns, total, start=0, track="none", record=None):
        self.path, self.columns = Path(path), columns
        if rank():  # rank 0 writes for all
            self.file, self.tracker, self.bar = open(os.devnull, "w"), None, None
            return
        rows = []
        if start and self.path.is_file():
            with open(self.path, newline="") as file:
                rows = [r for r in list(csv.reader(file))[1:] if len(r) == len(columns) and int(r[0]) < start]
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([columns, *rows])
        atomic_write(self.path, out.getvalue().encode())
        with writing(self.path):
            self.file = open(self.path, "a", newline="")
        self.tracker = open_tracker(track, self.path, record)
        self.bar = None
        if sys.stdout.isatty() and not os.environ.get("CI"):
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
            self.bar = Progress(TextColumn(self.path.stem), BarColumn(), MofNCompleteColumn(),
                                TextColumn("{task.fields[info]}"), TimeRemainingColumn())
            self.bar.start()
            self.task = self.bar.add_task("", total=total, completed=start, info="")

    def write(self, **values):
        unknown = values.keys() - set(self.columns)
        assert not unknown, f"columns {sorted(unknown)} are not in {self.columns}"
        values = {k: v.item() if hasattr(v, "item") else float(v) for k, v in values.items() if v is not None}
        values = {k: v for k, v in values.items() if math.isfinite(v)}
        cells = [f"{values[k]:.9g}" if k in values else "" for k in self.columns]
        with writing(self.path):
            self.file.write(",".join(cells) + "\n")
            self.file.flush()
        if self.tracker:
            self.tracker({k: v for k, v in values.items() if k != "step"}, int(values["step"]))
        if self.bar:
            shown = {"mean_r": "reward", "kl": "KL", "loss": "loss", "tokens_per_s": "tokens/s"}
            info = "  ".join(f"{label} {values[k]:.3g}" for k, label in shown.items() if k in values)
            self.bar.update(self.task, completed=values["step"] + 1, info=info)

    def close(self):
        self.file.close()
        if self.bar:
            self.bar.stop()


def add(sums, stats, weight=1.0):
    """Adds weight × stats to the dict sums; of names in _max it keeps the greatest."""
    for name, value in stats.items():
        value = float(value)
        greatest = name.endswith("_max")
        sums[name] = max(sums.get(name, value), value) if greatest else sums.get(name, 0.0) + weight * value


def open_tracker(track, path, record):
    """A function (numbers, step) for TensorBoard or W&B, None for "none".

    TensorBoard's events lie beside the CSV; W&B stays offline unless WANDB_MODE says otherwise.
    """
    if track == "none":
        return None
    if track == "tensorboard":
        writer = need("torch.utils.tensorboard", "log").SummaryWriter(str(path.with_suffix("")))

        def to_tensorboard(values, step):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()
        return to_tensorboard
    os.environ.setdefault("WANDB_MODE", "offline")
    run = need("wandb", "log").init(project="nanogrpo", name=path.stem, config=record, dir=str(path.parent))
    return lambda values, step: run.log(values, step=step)
