"""CSV logs -> figures: one panel a metric, one line a run, mean and ±1 std band over the seeds of a run.

Files NAME-s0.csv, NAME-s1.csv … are the seeds of one run. Empty cells were not measured: they are skipped.
Without --output a window opens where there is a display; elsewhere a PNG lands beside the first CSV.
Left out: logarithmic axes, live updates.
Run: python plot.py --metric mean_r logs/grpo.csv logs/ppo.csv
"""
import io
import re
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import tyro

from utils.cli import at_least, atomic_write, die, parse

GRID = ["mean_r", "gold", "kl", "entropy", "loss", "length"]  # the overview of --grid
FORMATS = (".png", ".pdf", ".svg")

LABELS = {  # what a column is and its unit; a column that isn't here is labelled with its own name
    "seconds": "time (s)", "samples": "answers sampled", "mean_r": "mean reward (score)",
    "kl": "KL to π₀ (nats / token)", "entropy": "entropy (nats / token)", "token_adv": "mean |advantage|",
    "gold": "gold judge (score)", "eval_r": "held-out mean reward (score)",
    "eval_gold": "held-out gold judge (score)", "ratio_max": "largest ratio π / π_old",
    "length": "answer length (tokens)", "distinct": "distinct words (share)",
    "ref_logp": "log-probability under π₀\n(nats / token)", "clip_frac": "clipped tokens (share)",
    "frac_zero_std": "groups of equal rewards (share)", "grad_norm": "gradient norm", "lr": "learning rate",
    "tokens_per_s": "tokens / s", "peak_mem_mb": "peak memory (MB)", "value_loss": "value loss",
    "value_clip_frac": "clipped values (share)",
    "explained_variance": "explained variance (share)", "held_out": "held-out loss",
    "loss_char": "loss (nats / character)", "held_out_char": "held-out loss (nats / character)",
    "accuracy": "accuracy (share)", "held_out_accuracy": "held-out pair accuracy (share)",
    "judge_accuracy": "agreement with the judge (share)", "top1": "top-1, held out (share)",
    "top5": "top-5, held out (share)", "iou": "IoU, held out", "dice": "Dice, held out",
    "diversity": "diversity within a class", "frechet": "Fréchet distance",
    "eval_kl": "KL to π₀, held out (nats)", "entropy_norm": "entropy / log(classes)",
}

# Okabe and Ito's colours: colour-blind readers tell them apart (their yellow is too faint on white). No two
# of 35 runs share colour and dash, and in grey the dashes and markers still differ.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 2.5)))
MARKERS = "osD^vX"

STYLE = {
    "font.size": 9.5, "axes.labelsize": 9.5, "axes.edgecolor": "#888888", "axes.linewidth": 0.8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "axes.xmargin": 0.02, "axes.formatter.useoffset": False, "grid.color": "#E4E4E4", "grid.linewidth": 0.7,
    "xtick.color": "#888888", "xtick.labelcolor": "#333333", "xtick.labelsize": 8.5,
    "ytick.color": "#888888", "ytick.labelcolor": "#333333", "ytick.labelsize": 8.5,
    "legend.frameon": False, "legend.handlelength": 3.4,
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white",
    "text.parse_math": False,  # a run or a column may have a $ in its name
}


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[str, ...]] = ()  # CSVs; NAME-s0.csv, NAME-s1.csv … are one run
    metric: str = "mean_r"  # a column, or several (mean_r,gold or mean_r gold): a panel each
    x: str = "step"  # step, samples, tokens, seconds, or any other column, such as kl
    smooth: int = 1  # moving average of the last N measured values
    grid: bool = False  # the overview: reward, gold score, KL, entropy, loss and length in one figure
    output: str = ""  # where to write the figure: .png, .pdf or .svg
    title: str = ""
    dpi: int = 150  # dots per inch of a PNG


# ---- CSV -> runs ----
def read_runs(files):
    """Reads logs and groups the seeds of a run: list of paths -> {name: [DataFrame, one a seed]}.

    Runs of one name in different folders stay apart, each with its folder in its name. A frame's path is in
    .attrs["path"]. Leaves with a message (exit code 2) where a file is missing, empty or no CSV of numbers.
    """
    groups = {}
    for path in {Path(file).resolve(): Path(file) for file in files}.values():  # given twice is one seed
        seeded = re.fullmatch(r"(.+)-s\d+", path.stem)
        key = (path.parent, seeded[1] if seeded else path.stem, bool(seeded))
        groups.setdefault(key, []).append(read_csv(path))
    if not groups:
        die("no CSV given: python plot.py --metric mean_r logs/grpo.csv logs/ppo.csv")
    runs = {}
    for (parent, name, seeded), frames in groups.items():
        label = (parent / name).as_posix() if any(n == name and p != parent for p, n, _ in groups) else name
        if seeded and (parent, name, False) in groups:
            label += "-s*"  # NAME.csv may have other settings than NAME-s0.csv: no average over the two
        runs[label] = frames
    return runs


def read_csv(path):
    wanted = "wanted a line of column names, then a line of numbers for each step"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header lose data
            frame = pd.read_csv(path, index_col=False, compression=None)
    except OSError as error:
        die(f"can't read {path}: {error.strerror or error}")
    except pd.errors.EmptyDataError:
        die(f"{path} is empty: {wanted}")
    except (ValueError, pd.errors.ParserWarning):  # bytes that aren't text, or ragged rows
        die(f"{path} is no CSV: {wanted}")
    frame.columns = frame.columns.str.strip()
    if frame.empty:
        die(f"{path} has no line of numbers yet: {wanted}")
    if not any(pd.to_numeric(frame[name], errors="coerce").notna().any() for name in frame):
        die(f"{path} is no CSV of numbers: {wanted}")
    frame.attrs["path"] = str(path)
    return frame


def column(frame, name):
    """A column as floats, NaN where it wasn't measured (an empty cell, inf); or leaves with a message."""
    if name not in frame.columns:
        has = ", ".join(textwrap.shorten(other, 40) for other in frame.columns)
        die(f"{frame.attrs['path']} has no column {name!r}; it has: {has}")
    values = pd.to_numeric(frame[name], errors="coerce")
    text = frame[name][values.isna() & frame[name].notna()]
    if len(text):
        die(f"{frame.attrs['path']}: column {name!r} holds {str(text.iloc[0])[:40]!r}, which is no number")
    return values.astype(float).replace([np.inf, -np.inf], np.nan)


# ---- runs -> curves ----
def curve(frame, metric, x="step", smooth=1):
    """One seed's line, y as a function of x: two arrays, x rising, without the cells that weren't measured.

    The average is over the last `smooth` measured values (fewer at the start), so it never looks ahead. Where
    x itself goes up and down (KL) it is averaged alike, so that the two stay a pair; the points are then
    sorted by x, and those of equal x become their mean.
    """
    both = pd.DataFrame({"x": column(frame, x), "y": column(frame, metric)}).dropna()
    averaged = both.rolling(smooth, min_periods=1).mean() if smooth > 1 else both
    xs = both.x if both.x.is_monotonic_increasing else averaged.x
    line = averaged.y.groupby(xs.to_numpy()).mean()
    return line.index.to_numpy(), line.to_numpy()


def shared_range(curves):
    return max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)


def band(curves):
    """Mean and unbiased std over seeds at every x of any of them, within the range that all of them reach.

    A seed without a value at such an x is interpolated linearly; with equal steps nothing is. -> x, mean, std
    """
    low, high = shared_range(curves)
    grid = np.unique(np.concatenate([xs for xs, _ in curves]))
    grid = grid[(grid >= low) & (grid <= high)]
    values = np.array([np.interp(grid, xs, ys) for xs, ys in curves])  # (seeds, points)
    return grid, values.mean(0), values.std(0, ddof=1)


def collect(runs, metrics, x="step", smooth=1, optional=False):
    """-> {metric: {run: its seeds' curves}}; with `optional`, but for what a run didn't measure."""
    found = {}
    for name, frames in runs.items():
        for metric in metrics:
            if optional and any(metric not in frame.columns for frame in frames):
                continue
            curves = [curve(frame, metric, x, smooth) for frame in frames]
            empty = [frame.attrs["path"] for frame, (xs, _) in zip(frames, curves) if not len(xs)]
            if empty and not optional:
                die(f"{empty[0]}: column {metric!r} has no measured value (against {x!r})")
            if not empty:
                found.setdefault(metric, {})[name] = curves
        if not any(name in drawn for drawn in found.values()):
            die(f"{frames[0].attrs['path']}: not every seed of {name} measured any of {', '.join(metrics)}")
    return {metric: found[metric] for metric in metrics if metric in found}


# ---- curves -> figure ----
def draw(fig, runs, found, title="", x="step", note=""):
    """Draws what `collect` found: a panel a metric, one legend above them, one label of x below."""
    from matplotlib.lines import Line2D
    styles = {name: {"color": COLORS[i % 7], "linestyle": DASHES[i % 5], "marker": MARKERS[i % 6]}
              for i, name in enumerate(runs)}
    columns = len(found) if len(found) < 4 else 2 if len(found) == 4 else 3
    rows = -(-len(found) // columns)
    width, height = (6.4, 3.9) if len(found) == 1 else (3.5 * columns, 2.5 * rows + 0.6)
    fig.set_size_inches(width, height)
    fig.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
    for i, (metric, drawn) in enumerate(found.items()):
        ax = fig.add_subplot(rows, columns, i + 1, ylabel=LABELS.get(metric, metric))
        for name, curves in drawn.items():
            draw_run(ax, curves, styles[name], list(runs).index(name) / len(runs))
        round_ticks(ax, x)
    fig.align_ylabels()
    fig.supxlabel(LABELS.get(x, x).replace("\n", " ") + note, fontsize=STYLE["axes.labelsize"])
    names = [f"{name} (mean ± std of {len(frames)} seeds)" if len(frames) > 1 else name
             for name, frames in runs.items()]
    fit = max(1, int(width * 13 / (max(map(len, names)) + 9)))  # 13 letters an inch, 9 for handle and gap
    fig.set_figheight(height + 0.24 * max(0, -(-len(names) // fit) - 2))  # panels keep their room
    fig.legend([Line2D([], [], markersize=4, **style) for style in styles.values()], names, alignment="left",
               loc="outside upper left", ncols=min(fit, len(names)), borderaxespad=0.2, borderpad=0.2,
               title=title or None, title_fontproperties={"size": 11, "weight": "bold"})


def draw_run(ax, curves, style, shift):
    """The run's line and band; seeds that go further than the others do so as thin lines: none is cut."""
    xs, ys = curves[0]
    if len(curves) > 1:
        xs, ys, std = band(curves)
        ax.fill_between(xs, ys - std, ys + std, color=style["color"], alpha=0.18, linewidth=0, zorder=1.5)
        low, high = shared_range(curves)
        for seed_x, seed_y in curves:
            thin_x = np.union1d(seed_x, np.clip([low, high], seed_x[0], seed_x[-1]))
            thin_y = np.interp(thin_x, seed_x, seed_y)
            for side in (thin_x <= low, thin_x >= high):
                if side.sum() > 1:
                    thin = {"color": style["color"], "linewidth": 0.8, "alpha": 0.6, "zorder": 1}
                    ax.plot(thin_x[side], thin_y[side], **thin)
    marks = list(range(len(xs)))
    if len(xs) > 16:  # eight markers at equal distances in x, those of different runs apart
        places = xs[0] + (xs[-1] - xs[0]) / 8 * (np.arange(8) + shift)
        marks = np.unique(np.searchsorted(xs, places).clip(max=len(xs) - 1)).tolist()
    ax.plot(xs, ys, **style, linewidth=1.8, markersize=4, markevery=marks, zorder=2)


def round_ticks(ax, x):
    from matplotlib.ticker import EngFormatter, MaxNLocator
    if x in ("step", "samples", "tokens"):
        ax.xaxis.set_major_locator(MaxNLocator(7, steps=[1, 2, 2.5, 5, 10], integer=True))
        if ax.get_xlim()[1] >= 1e4:
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))  # 50k rather than 50000


# ---- figure -> file or window ----
def plot_panels(files, metrics, output=None, x="step", smooth=1, title="", dpi=150, optional=False):
    """Draws a panel a metric; a file is written whole or not at all: -> its path, or None after a window."""
    import matplotlib
    from matplotlib.figure import Figure
    if output and Path(output).suffix.lower() not in FORMATS:
        die(f"--output {output}: the name must end in one of {', '.join(FORMATS)}")
    runs = read_runs(files)
    found = collect(runs, metrics, x, smooth, optional)
    with matplotlib.rc_context(STYLE):
        window = None if output else open_window()
        fig = window or Figure()  # pyplot picks a backend for the whole process: only for a window
        draw(fig, runs, found, title, x, f" · moving average of {smooth}" if smooth > 1 else "")
        if window:
            import matplotlib.pyplot as plt
            plt.show()
            return None
        path, image = Path(output or beside(files[0], metrics, x, optional)), io.BytesIO()
        fig.savefig(image, format=path.suffix[1:].lower(), dpi=dpi)
    atomic_write(path, image.getvalue())
    return path


def plot_metric(files, metric, output=None, x="step", smooth=1, title="", dpi=150):
    """Draws one column of each run against x: -> the path written, or None where a window showed it."""
    return plot_panels(files, [metric], output, x, smooth, title, dpi)


def open_window():
    """An empty figure that a window can show, or None where there is no display or no GUI toolkit."""
    import matplotlib.pyplot as plt
    try:
        fig = plt.figure()
    except ImportError:  # MPLBACKEND names a toolkit that can't be had here
        return None
    if fig.canvas.required_interactive_framework:
        return fig
    plt.close(fig)
    return None


def beside(file, metrics, x, overview):
    words = [Path(file).stem, *(["overview"] if overview else metrics), *([] if x == "step" else ["vs", x])]
    return Path(file).with_name(re.sub(r"[^\w.-]+", "-", "_".join(words)) + ".png")


def main(args):
    at_least(args, smooth=1, dpi=20)
    if args.dpi > 600:
        die(f"--dpi {args.dpi} is too large: wanted at most 600")
    # `--metric mean_r gold a.csv`: the parser takes gold for a file, but it neither looks like one nor exists
    more = [w for w in args.files if not (Path(w).suffix or len(Path(w).parts) > 1 or Path(w).exists())]
    files = [w for w in args.files if w not in more]
    metrics = [word.strip() for word in args.metric.split(",") if word.strip()] + more
    if args.grid and metrics != ["mean_r"]:
        die(f"--grid draws {', '.join(GRID)}: leave out --grid or {', '.join(metrics)}")
    metrics = GRID if args.grid else metrics or ["mean_r"]
    path = plot_panels(files, metrics, args.output, args.x, args.smooth, args.title, args.dpi, args.grid)
    if path:
        print(path)


if __name__ == "__main__":
    main(parse(Args))
