"""What a lesson shows: its text, its table and, with --plot, its figure.

A lesson is a function `lesson()` -> {row: {column: number}}. A row's name begins with "failure: " or
"cure: ", but for rows that only compare. A list of numbers is a curve.
Run: by a lesson, as in python lessons/01_loss_is_zero.py --plot
"""
import sys
from pathlib import Path

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from utils.cli import atomic_write, die
from utils.figure import COLORS, DASHES, STYLE


def note(curves, **numbers):
    """Adds a step's numbers to their curves."""
    for name, x in numbers.items():
        curves.setdefault(name, []).append(x.item())


def table(rows):
    """Rows -> text. A number has three digits; a curve is its first and its last number."""
    text = {name: {column: " -> ".join(f"{y:.3g}" for y in ((x[0], x[-1]) if isinstance(x, list) else [x]))
                   for column, x in row.items()} for name, row in rows.items()}
    return pd.DataFrame.from_dict(text, orient="index").fillna("").to_string()


def figure(rows, path):
    """A panel a column: curves as lines, single numbers as bars. A row keeps its colour."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    with rc_context(STYLE):
        fig = Figure(figsize=(max(6.4, 3.2 * len(columns)), 3.2), layout="constrained")
        for i, column in enumerate(columns):
            ax = fig.add_subplot(1, len(columns), i + 1, title=column)
            for k, (name, row) in enumerate(rows.items()):
                if isinstance(row.get(column), list):
                    ax.plot(row[column], color=COLORS[k % 7], linestyle=DASHES[k % 5], label=name)
                    ax.set_xlabel("step")
                    ax.locator_params(axis="x", integer=True)
                elif column in row and abs(row[column]) < float("inf"):  # no bar of an inf or a NaN
                    ax.bar(k, row[column], color=COLORS[k % 7], label=name)
                    ax.set_xticks([])
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        atomic_write(path, lambda file: fig.savefig(file, format="png", dpi=150))


def show(lesson):
    """Prints what the lesson says and its table; with --plot it also draws logs/NAME.png."""
    script = Path(sys.argv[0])
    if sys.argv[1:] not in ([], ["--plot"]):
        die(f"{script.name} {' '.join(sys.argv[1:])}: wanted no argument, or --plot")
    print(lesson.__globals__["__doc__"].strip(), end="\n\n", flush=True)
    rows = lesson()
    print(table(rows))
    if sys.argv[1:]:
        figure(rows, f"logs/{script.stem}.png")
        print(f"wrote logs/{script.stem}.png")
