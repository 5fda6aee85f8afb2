"""CSV logs -> curves -> figures, for plot.py and for every script that ends with a figure.

Left out: logarithmic axes, live updates.
"""
import codecs
import io
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from utils.cli import atomic_write, die

GRID = ["mean_r", "gold", "kl", "entropy", "loss", "length"]  # the overview of --grid

LABELS = {  # what a column is and its unit; a column that isn't here is labelled with its own name
    "seconds": "time (s)", "samples": "answers sampled", "mean_r": "mean reward (score)",
    "kl": "KL to π₀ (nats / token)", "entropy": "entropy (nats / token)", "token_adv": "mean |advantage|",
    "gold": "gold judge (score)", "eval_r": "held-out mean reward (score)",
    "eval_gold": "gold judge, held out (score)",
    "eval_acc": "accuracy, held out (share)", "eval_pass8": "pass@8, held out (share)",
    "length": "answer length (tokens)", "distinct": "distinct words (share)",
    "ref_logp": "log π₀ of answers (nats / token)", "clip_frac": "clipped tokens (share)",
    "frac_zero_std": "groups of equal rewards (share)", "grad_norm": "gradient norm",
    "tokens_per_s": "tokens / s", "peak_mem_mb": "peak memory (MB)",
    "loss_char": "loss (nats / character)", "held_out_char": "held-out loss (nats / character)",
    "accuracy": "accuracy (share)", "judge_accuracy": "agreement with the judge (share)",
    "top1": "top-1, held out (share)", "top5": "top-5, held out (share)",
    "diversity": "diversity within a class", "frechet": "Fréchet distance",
    "eval_kl": "KL to π₀, held out (nats)", "entropy_norm": "entropy / log(classes)",
}

# Okabe and Ito's colours: colour-blind readers tell them apart (their yellow is too faint on white). No two
# of 35 runs share colour and dash, and in grey the dashes and markers still differ.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2.5)))
MARKERS = "osD^vX"

STYLE = {
    "font.size": 9.5, "axes.labelsize": 9.5, "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#E4E4E4", "axes.formatter.useoffset": False,
    "legend.frameon": False, "legend.handlelength": 3.4,
}


# ---- CSV -> runs ----
def without_suffix(name):
    """grpo.csv -> grpo, but lr0.1 stays: .1 is no suffix."""
    return re.sub(r"\.[A-Za-z]\w*$", "", name)


def read_runs(files):
    """Reads logs and groups the seeds of a run: list of paths -> {name: [DataFrame, one a seed]}.

    Runs whose files differ only in folder or in -sN have longer names: a/grpo-s* and b/grpo-s*. Leaves with a
    message (exit code 2) where a file is missing, empty or no CSV of numbers; a frame's .attrs hold its path.
    """
    groups = {}
    for path in {Path(file).resolve(): Path(file) for file in files}.values():  # given twice is one seed
        run = re.sub(r"-s\d+$", "-s*", without_suffix(path.as_posix()))
        groups.setdefault(run, []).append(read_csv(path))
    names = [Path(run).name.removesuffix("-s*") for run in groups]
    return {name if names.count(name) == 1 else run: groups[run] for name, run in zip(names, groups)}


def read_csv(path):
    """A log's columns as floats, NaN where nothing was measured (an empty cell, inf)."""
    try:
        content = Path(path).read_bytes()
        text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
                              else "utf-8-sig")
        lines = [line for line in text.splitlines() if line and not line.startswith(("#{", "{", "<"))]
        # a tool's notes are left out; JSON lines and HTML are no table, however many commas they have
        sep = max(",;\t", key=lines[0].count) if lines else ","
        decimal = "," if sep == ";" and "," in "".join(lines[1:]) else "."
        if len(lines) > 3 and text[-1] not in "\r\n":  # a kill or a full disk has torn it
            print(f"warning: {path} ends within a line: it is left out", file=sys.stderr)
            del lines[-1]
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header lose data
            frame = pd.read_csv(io.StringIO("\n".join(lines)), index_col=False, skipinitialspace=True,
                                sep=sep, decimal=decimal)
    except OSError as error:
        die(f"can't read {path}: {error.strerror or error}")
    except (ValueError, pd.errors.ParserWarning):  # an empty file, bytes that aren't text, ragged rows
        frame = pd.DataFrame()
    def numbers(column):  # as text, a whole number of 400 digits is infinite, not an error
        return pd.to_numeric(column.astype(str) if column.dtype == object else column, errors="coerce")
    read, frame = frame, frame.apply(numbers).astype(float)
    words = {name: read[name][frame[name].isna() & read[name].notna()].astype(str).tolist() for name in read}
    frame = frame.replace([np.inf, -np.inf], np.nan)
    if not frame.notna().any(axis=None):
        die(f"{path} holds no table of numbers: wanted a line of column names, then a line for each step")
    frame.attrs = {"path": str(path), "words": words}
    for name in ("step", "Step", "_step", "global_step"):
        steps = frame[name].dropna().tolist() if name in frame else []
        for before, now in zip(steps, steps[1:]):
            if now < before:
                die(f"{path}: {name} goes back from {before:g} to {now:g}: two runs in one file? Part them")
    return frame


def metric_names(text, runs):
    """"kl,loss" -> ["kl", "loss"]; a column's name may hold commas itself."""
    columns = {name for frames in runs.values() for frame in frames for name in frame}
    parts, names = text.split(","), []
    while parts:
        n = next((n for n in range(len(parts), 0, -1) if ",".join(parts[:n]) in columns), 1)
        names.append(",".join(parts[:n]))
        del parts[:n]
    return names


# ---- runs -> curves ----
def curve(frame, metric, x="step", smooth=1):
    """One seed's line, y as a function of x: two arrays, x rising, without the cells that weren't measured.

    The average is over the last `smooth` measured values (fewer at the start), so it never looks ahead. Where
    x itself goes up and down (KL) it is averaged alike, so that the two stay a pair; the points are then
    sorted by x, and those of equal x become their mean.
    """
    for name in (x, metric):
        if name not in frame:
            die(f"{frame.attrs['path']} has no column {name!r}; it has: {', '.join(frame)}")
        for word in frame.attrs.get("words", {}).get(name, [])[:1]:
            die(f"{frame.attrs['path']}: column {name!r} holds {word[:40]!r}, which is no number")
    both = pd.DataFrame({"x": frame[x], "y": frame[metric]}).dropna()
    if both.empty:
        die(f"{frame.attrs['path']}: column {metric!r} has no measured value (against {x!r})")
    averaged = both.rolling(smooth, min_periods=1).mean() if smooth > 1 else both
    xs = both.x if both.x.is_monotonic_increasing else averaged.x
    line = averaged.y.groupby(xs.to_numpy()).mean()
    return line.index.to_numpy(), line.to_numpy()


def band(curves):
    """Mean and unbiased std over seeds at every x of any of them, within the range that all of them reach.

    A seed without a value at such an x is interpolated linearly; with equal steps nothing is. -> x, mean, std
    """
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    grid = np.unique(np.concatenate([xs for xs, _ in curves]))
    grid = grid[(grid >= low) & (grid <= high)]
    values = np.array([np.interp(grid, xs, ys) for xs, ys in curves])  # (seeds, points)
    return grid, values.mean(0), values.std(0, ddof=1)


def collect(runs, metrics, x="step", smooth=1, optional=False):
    """-> {metric: {run: its seeds' curves}}; optional: without what a run's seeds didn't all measure."""
    curves_of = {}
    for metric in metrics:
        for name, frames in runs.items():
            if not optional or all(metric in frame and frame[metric].notna().any() for frame in frames):
                curves = [curve(frame, metric, x, smooth) for frame in frames]
                curves_of.setdefault(metric, {})[name] = curves
    if not curves_of:
        die(f"none of {', '.join(metrics)} has numbers in every seed of {' or of '.join(runs)}")
    return curves_of


# ---- curves -> figure ----
def plain(name):
    """The name for matplotlib, which reads what stands between two $ as mathematics."""
    return name.replace("$", r"\$")


def draw(fig, runs, curves_of, x="step", note=""):
    """Draws what `collect` returned, a panel a metric. A run with `top1` has one action: no "/ token"."""
    from matplotlib.lines import Line2D
    styles = {name: {"color": COLORS[i % 7], "linestyle": DASHES[i % 5], "marker": MARKERS[i % 6]}
              for i, name in enumerate(runs)}
    names = [plain(f"{name} (mean ± std of {len(frames)} seeds)" if len(frames) > 1 else name)
             for name, frames in runs.items()]
    unit = "" if all("top1" in frame for frames in runs.values() for frame in frames) else " / token"
    columns = 2 if len(curves_of) == 4 else min(len(curves_of), 3)
    rows = -(-len(curves_of) // columns)
    width, height = (6.4, 3.66) if len(curves_of) == 1 else (3.5 * columns, 2.5 * rows + 0.36)
    fit = max(1, min(len(names), int(width * 13 / (max(map(len, names)) + 9))))  # 13 letters an inch
    fig.set_size_inches(width, height + 0.24 * -(-len(names) // fit))
    fig.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    fig.legend([Line2D([], [], markersize=4, **style) for style in styles.values()], names, ncols=fit,
               loc="outside upper left", borderaxespad=0.2, borderpad=0.2)
    for i, (y, drawn) in enumerate(curves_of.items()):
        ax = fig.add_subplot(rows, columns, i + 1, ylabel=plain(LABELS.get(y, y).replace(" / token", unit)))
        for name, curves in drawn.items():
            draw_run(ax, curves, styles[name], list(runs).index(name) / len(runs))
        if x in ("step", "samples", "tokens"):
            ax.locator_params(axis="x", nbins=7, integer=True)
    fig.supxlabel(plain(LABELS.get(x, x)) + note, fontsize=STYLE["axes.labelsize"])


def draw_run(ax, curves, style, shift):
    """The run's line and band; seeds that go further than the others do so as thin lines: none is cut."""
    xs, ys = curves[0]
    if len(curves) > 1:
        xs, ys, std = band(curves)
        ax.fill_between(xs, ys - std, ys + std, color=style["color"], alpha=0.18, linewidth=0, zorder=1.5)
        for seed_x, seed_y in curves:  # without a shared range xs is empty, and all of a seed lies outside
            outside = (seed_x <= xs.min(initial=np.inf)) | (seed_x >= xs.max(initial=-np.inf))
            ax.plot(seed_x, np.where(outside, seed_y, np.nan), color=style["color"], linewidth=0.8, alpha=0.6)
    marks = None
    if len(xs) > 16:  # eight markers at equal distances in x, those of two runs apart
        places = xs[0] + (xs[-1] - xs[0]) / 8 * (np.arange(8) + shift)
        marks = np.unique(np.searchsorted(xs, places).clip(max=len(xs) - 1)).tolist()
    ax.plot(xs, ys, **style, linewidth=1.8, markersize=4, markevery=marks, zorder=2.5)


# ---- figure -> file or window ----
def plot_panels(files, metrics, output=None, x="step", smooth=1, dpi=150, optional=False):
    """Draws a panel a metric; a file is written whole or not at all: -> its path, or None after a window.

    metrics: names of columns, or one string of them with commas between.
    """
    import matplotlib
    from matplotlib.figure import Figure
    if not files:
        die("no CSV given: python plot.py --metric mean_r logs/grpo.csv logs/ppo.csv")
    if output and Path(output).suffix.lower() not in (".png", ".pdf", ".svg"):
        die(f"--output {output}: the name must end in one of .png, .pdf, .svg")
    runs = read_runs(files)
    metrics = metric_names(metrics, runs) if isinstance(metrics, str) else metrics
    name = "_".join([without_suffix(Path(files[0]).name), *(["overview"] if optional else metrics)])
    path = Path(output or Path(files[0]).with_name(re.sub(r"[^\w.-]+", "-", name) + ".png"))
    curves_of = collect(runs, metrics, x, smooth, optional)
    with matplotlib.rc_context(STYLE):
        if output:
            fig = Figure()  # pyplot picks a backend for the whole process: only for a window
        else:
            import matplotlib.pyplot as plt
            try:
                fig = plt.figure()
            except ImportError:  # MPLBACKEND names a window's backend, and there is no display
                fig = Figure()
        draw(fig, runs, curves_of, x, f" · moving average of {smooth}" if smooth > 1 else "")
        if not output and fig.canvas.required_interactive_framework:
            plt.show()
            return None
        atomic_write(path, lambda file: fig.savefig(file, format=path.suffix[1:].lower(), dpi=dpi))
    return path
