"""plot.py: what is drawn against numbers worked by hand, what is written, and what is refused."""
import errno
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import plot
from utils import figure
from utils.cli import parse
from utils.log import SHARED, Log

ROOT = Path(plot.__file__).parent
OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
DESIGN_COLUMNS = ("step loss mean_r kl entropy token_adv samples tokens seconds gold length distinct "
                  "ref_logp clip_frac grad_norm frac_zero_std eval_r tokens_per_s peak_mem_mb").split()
DRAW = figure.draw  # some tests watch what it is given


def write(path, **columns):
    """A CSV with these columns; "" is a cell that wasn't measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(rows) + "\n")
    return path


def drawn(files, *metrics, x="step", smooth=1, optional=False):
    """The figure as draw() leaves it, before any file."""
    from matplotlib.figure import Figure
    fig, runs = Figure(), figure.read_runs(files)
    figure.draw(fig, runs, figure.collect(runs, metrics, x, smooth, optional), x)
    return fig


def lines(ax, thin=False):
    """The data of the runs' lines, or what is seen of the thin ones of single seeds: [(x, y)]."""
    data = [line.get_data() for line in ax.lines if (line.get_linewidth() < 1) == thin]
    return [(xs[~np.isnan(ys)], ys[~np.isnan(ys)]) for xs, ys in data]


def edges(ax, i=0):
    """The i-th band as three arrays: x, lower edge, upper edge."""
    corners = np.unique(ax.collections[i].get_paths()[0].vertices, axis=0)
    xs = np.unique(corners[:, 0])
    each = [corners[corners[:, 0] == x, 1] for x in xs]
    return xs, [ys.min() for ys in each], [ys.max() for ys in each]


def same(got, *want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plot.py", *map(str, words)])
    plot.main(parse(plot.Args))


def png_size(path):
    data = Path(path).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def headless(cwd, *words, **env):
    """plot.py as a reader starts it, where there is no display."""
    kept = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env={**kept, **env}, capture_output=True, text=True)


# ---- one run ----
def test_a_run_is_drawn_as_it_was_logged(tmp_path):
    ax, = drawn([write(tmp_path / "a.csv", step=[0, 1, 2], mean_r=[0, -1.5, 4], kl=[0, 1, 2])], "mean_r").axes
    (data,) = lines(ax)
    same(data, [0, 1, 2], [0, -1.5, 4])
    assert not ax.collections  # one seed has no band


def test_cells_that_were_not_measured_are_skipped_and_a_measured_zero_is_not(tmp_path):
    a = write(tmp_path / "a.csv", step=[0, 1, 2, 3, 4, 5], gold=[1, "", 0, "inf", "nan", 3])
    same(lines(drawn([a], "gold").axes[0])[0], [0, 2, 5], [1, 0, 3])


def test_a_point_without_an_x_is_skipped(tmp_path):
    a = write(tmp_path / "a.csv", step=[0, 1, 2], mean_r=[5, 6, 7], kl=["", 0.1, 0.2])
    same(lines(drawn([a], "mean_r", x="kl").axes[0])[0], [0.1, 0.2], [6, 7])


def test_what_the_log_writes_is_what_is_drawn(tmp_path):
    log = Log(tmp_path / "a.csv", [*SHARED, "gold"], 3)
    log.write(step=0, mean_r=0.25, gold=2.0)
    log.write(step=1, mean_r=0.5, gold=float("nan"))
    log.write(step=2, mean_r=0.125, gold=0.0)
    log.close()
    reward, gold = drawn([tmp_path / "a.csv"], "mean_r", "gold").axes
    same(lines(reward)[0], [0, 1, 2], [0.25, 0.5, 0.125])
    same(lines(gold)[0], [0, 2], [2, 0])


def test_a_run_in_progress_a_bom_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbfstep, mean_r, kl\r\n0, 1.5, 2\r\n1, 2.5")
    (frame,) = figure.read_runs([path])["a"]
    assert list(frame.columns) == ["step", "mean_r", "kl"]
    same(figure.curve(frame, "mean_r"), [0, 1], [1.5, 2.5])
    same(figure.curve(frame, "kl"), [0], [2])


# ---- the x axis ----
@pytest.mark.parametrize("x, label", [("samples", "answers sampled"), ("tokens", "tokens"),
                                      ("seconds", "time (s)")])
def test_other_x_axes(tmp_path, x, label):
    a = write(tmp_path / "a.csv", step=[0, 1, 2], mean_r=[1, 2, 4], **{x: [128, 256, 512.5]})
    fig = drawn([a], "mean_r", x=x)
    same(lines(fig.axes[0])[0], [128, 256, 512.5], [1, 2, 4])
    assert fig.get_supxlabel() == label


def test_an_x_that_goes_back_is_sorted_and_smoothed_with_y(tmp_path):
    a = write(tmp_path / "a.csv", step=[0, 1, 2, 3], kl=[0, 0.4, 0.2, 0.6], gold=[1, 2, 3, 4])
    same(lines(drawn([a], "gold", x="kl").axes[0])[0], [0, 0.2, 0.4, 0.6], [1, 3, 2, 4])
    # averages of 2: kl 0, 0.2, 0.3, 0.4, each still paired with gold 1, 1.5, 2.5, 3.5
    same(lines(drawn([a], "gold", x="kl", smooth=2).axes[0])[0], [0, 0.2, 0.3, 0.4], [1, 1.5, 2.5, 3.5])


def test_points_of_equal_x_become_their_mean(tmp_path):
    a = write(tmp_path / "a.csv", step=[0, 1, 2], kl=[0, 0, 0.5], gold=[1, 4, 3])
    same(lines(drawn([a], "gold", x="kl").axes[0])[0], [0, 0.5], [2.5, 3])


# ---- smoothing ----
def test_smoothing_is_the_average_of_the_last_n_measured_values(tmp_path):
    a = write(tmp_path / "a.csv", step=[0, 1, 2, 3, 4], mean_r=[1, 2, "", 6, 4])
    ax, = drawn([a], "mean_r", smooth=3).axes
    # 1, (1 + 2) / 2, (1 + 2 + 6) / 3, (2 + 6 + 4) / 3, at the steps themselves
    same(lines(ax)[0], [0, 1, 3, 4], [1, 1.5, 3, 4])


def test_seeds_are_smoothed_before_the_band(tmp_path):
    for i, values in enumerate(([0, 4], [2, 2])):  # averages of 2: (0, 2) and (2, 2), so no spread at step 1
        write(tmp_path / f"a-s{i}.csv", step=[0, 1], kl=values)
    ax, = drawn(sorted(tmp_path.iterdir()), "kl", smooth=2).axes
    same(lines(ax)[0], [0, 1], [1, 2])
    same(edges(ax), [0, 1], [1 - 2 ** 0.5, 2], [1 + 2 ** 0.5, 2])


def test_the_figure_says_that_it_is_smoothed(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(figure, "draw",
                        lambda fig, *rest: (DRAW(fig, *rest), seen.append(fig.get_supxlabel())))
    a = write(tmp_path / "a.csv", step=[0, 1], kl=[1, 2])
    for n in (1, 7):
        figure.plot_panels([a], ["kl"], tmp_path / "f.png", smooth=n, dpi=30)
    assert seen == ["step", "step · moving average of 7"]


# ---- seeds ----
def test_mean_and_band_of_three_seeds(tmp_path):
    for i, values in enumerate(([1, 2, 6], [3, 2, 0], [5, 2, 3])):
        write(tmp_path / f"grpo-s{i}.csv", step=[0, 1, 2], mean_r=values)
    fig = drawn([tmp_path / f"grpo-s{i}.csv" for i in range(3)], "mean_r")
    ax, = fig.axes
    assert len(lines(ax)) == 1
    # no seed goes further than the others: of each only its two ends, which are no line
    assert [list(xs) for xs, _ in lines(ax, thin=True)] == [[0, 2]] * 3
    same(lines(ax)[0], [0, 1, 2], [3, 2, 3])
    same(edges(ax), [0, 1, 2], [1, 2, 0], [5, 2, 6])  # unbiased std 2, 0, 3
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["grpo (mean ± std of 3 seeds)"]


def test_seeds_that_differ_in_x_are_interpolated(tmp_path):
    write(tmp_path / "a-s0.csv", step=[0, 1, 2], samples=[0, 10, 20], mean_r=[0, 10, 20])
    write(tmp_path / "a-s1.csv", step=[0, 1, 2], samples=[0, 5, 20], mean_r=[2, 2, 32])
    ax, = drawn(sorted(tmp_path.iterdir()), "mean_r", x="samples").axes
    # at 0, 5, 10, 20 the first is 0, 5, 10, 20, the second 2, 2, 12, 32; the std of two is distance / √2
    same(lines(ax)[0], [0, 5, 10, 20], [1, 3.5, 11, 26])
    low, high = np.array([1, 3.5, 11, 26]) + np.array([[-1], [1]]) * np.array([2, 3, 2, 12]) / 2 ** 0.5
    same(edges(ax), [0, 5, 10, 20], low, high)


def test_a_seed_that_ends_early_cuts_none_of_the_others(tmp_path):
    write(tmp_path / "a-s0.csv", step=[0, 1, 2], kl=[0, 2, 4])
    write(tmp_path / "a-s1.csv", step=[0, 1, 2, 3, 4], kl=[2, 2, 2, 8, 9])
    ax, = drawn(sorted(tmp_path.iterdir()), "kl").axes
    same(lines(ax)[0], [0, 1, 2], [1, 2, 3])
    short, long = lines(ax, thin=True)  # lone ends are no line
    same(short, [0, 2], [0, 4])
    same(long, [0, 2, 3, 4], [2, 2, 8, 9])


def test_seeds_that_share_no_x_are_drawn_each(tmp_path):
    write(tmp_path / "a-s0.csv", step=[0, 1], kl=[1, 2], gold=[5, 6])
    write(tmp_path / "a-s1.csv", step=[0, 1], kl=[3, 4], gold=[7, 8])
    ax, = drawn(sorted(tmp_path.iterdir()), "gold", x="kl").axes
    first, second = lines(ax, thin=True)
    same(first, [1, 2], [5, 6])
    same(second, [3, 4], [7, 8])
    assert len(lines(ax)[0][0]) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(1, 12), st.integers(1, 6), st.data())
def test_band_and_average_against_loops(seeds, steps, n, data):
    import pandas as pd
    cell = st.one_of(st.none(), st.integers(-1000, 1000))
    ends, middle = st.integers(-1000, 1000), st.lists(cell, min_size=steps, max_size=steps)
    columns = [[data.draw(ends), *data.draw(middle), data.draw(ends)] for _ in range(seeds)]
    curves = []
    for values in columns:
        known = [(t, v) for t, v in enumerate(values) if v is not None]
        want = [sum(v for _, v in known[max(0, i - n + 1):i + 1]) / min(n, i + 1) for i in range(len(known))]
        frame = pd.DataFrame({"step": range(steps + 2), "kl": values}, dtype=float)
        curves.append(figure.curve(frame, "kl", "step", n))
        np.testing.assert_allclose(curves[-1][0], [t for t, _ in known])
        np.testing.assert_allclose(curves[-1][1], want, atol=1e-9)
    xs, mean, std = figure.band(curves)
    assert list(xs) == sorted({x for grid, _ in curves for x in grid})
    for i, x in enumerate(xs):
        at = []
        for grid, ys in curves:  # the straight line between the neighbours
            right = next(k for k, g in enumerate(grid) if g >= x)
            left = right - (grid[right] > x)
            share = 0 if left == right else (x - grid[left]) / (grid[right] - grid[left])
            at.append(ys[left] + share * (ys[right] - ys[left]))
        centre = sum(at) / seeds
        assert mean[i] == pytest.approx(centre, abs=1e-9)
        assert std[i] == pytest.approx((sum((a - centre) ** 2 for a in at) / (seeds - 1)) ** 0.5, abs=1e-9)


# ---- grouping ----
def grouped(tmp_path, *names):
    files = [write(tmp_path / name, step=[0], kl=[i]) for i, name in enumerate(names)]
    return {name: [int(f.kl[0]) for f in frames] for name, frames in figure.read_runs(files).items()}


def test_seeds_are_grouped_by_name(tmp_path):
    names = ["grpo-s0.csv", "ppo-s0.csv", "grpo-s1.csv", "grpo-s12.csv", "dr-s.csv", "loss.csv", "x-sa.csv"]
    assert grouped(tmp_path, *names) == {"grpo": [0, 2, 3], "ppo": [1], "dr-s": [4], "loss": [5], "x-sa": [6]}


def test_runs_of_one_name_in_two_folders_stay_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    want = {"a/grpo-s*": [0, 2], "b/grpo-s*": [1], "ppo": [3]}
    assert grouped(Path("."), "a/grpo-s0.csv", "b/grpo-s0.csv", "a/grpo-s1.csv", "a/ppo.csv") == want


def test_a_run_without_seed_is_not_averaged_with_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    want = {"logs/grpo": [0], "logs/grpo-s*": [1, 2]}
    assert grouped(Path("logs"), "grpo.csv", "grpo-s0.csv", "grpo-s1.csv") == want


def test_a_file_named_twice_is_one_seed(tmp_path):
    path = write(tmp_path / "logs" / "a-s0.csv", step=[0], kl=[0])
    again = tmp_path / "logs" / ".." / "logs" / "a-s0.csv"
    assert [len(frames) for frames in figure.read_runs([path, str(path), again]).values()] == [1]


# ---- how it looks ----
def test_runs_differ_in_colour_and_in_grey(tmp_path):
    files = [write(tmp_path / f"r{i:02}.csv", step=[0, 1], kl=[i, i]) for i in range(35)]
    ax, = drawn(files, "kl").axes
    assert {line.get_color() for line in ax.lines} <= OKABE_ITO
    assert len({(line.get_color(), str(line._unscaled_dash_pattern)) for line in ax.lines}) == 35
    first = [(str(line._unscaled_dash_pattern), line.get_marker()) for line in ax.lines[:12]]
    assert len(set(first)) == 12 and len({marker for _, marker in first[:6]}) == 6


def test_legend_shows_each_run_in_its_own_style(tmp_path):
    files = [write(tmp_path / f"{name}.csv", step=[0, 1], kl=[i, i]) for i, name in enumerate("qp")]
    fig = drawn(files, "kl")
    (legend,) = fig.legends
    assert [t.get_text() for t in legend.get_texts()] == ["q", "p"]
    for handle, line in zip(legend.get_lines(), fig.axes[0].lines):
        assert (handle.get_color(), handle.get_marker()) == (line.get_color(), line.get_marker())


def test_axes_have_units(tmp_path):
    names = [*DESIGN_COLUMNS, "my_own"]
    a = write(tmp_path / "a.csv", **{name: [0, 1] for name in names})
    label = {name: ax.get_ylabel() for name, ax in zip(names, drawn([a], *names).axes, strict=True)}
    units = {"kl": "nats", "entropy": "nats", "ref_logp": "nats", "seconds": "(s)", "length": "tokens",
             "distinct": "share", "clip_frac": "share", "frac_zero_std": "share", "peak_mem_mb": "MB",
             "tokens_per_s": "/ s", "mean_r": "reward"}
    assert all(unit in label[name] for name, unit in units.items())
    assert label["my_own"] == "my_own" and all(label.values())
    of_clip = write(tmp_path / "clip.csv", step=[0, 1], kl=[0, 1], entropy=[0, 1], top1=[0, 1])
    assert [ax.get_ylabel() for ax in drawn([of_clip], "kl", "entropy").axes] == ["KL to π₀ (nats)",
                                                                                  "entropy (nats)"]
    assert drawn([of_clip, a], "kl").axes[0].get_ylabel() == label["kl"] == "KL to π₀ (nats / token)"


# ---- panels ----
def test_grid_is_the_overview_in_its_order_and_leaves_out_what_no_run_measured(tmp_path):
    full = write(tmp_path / "grpo.csv", step=[0, 1], **{m: [i, i] for i, m in enumerate(figure.GRID)})
    sft = write(tmp_path / "sft.csv", step=[0, 1], loss=[3, 2], entropy=["", ""])
    axes = drawn([full], *figure.GRID, optional=True).axes
    assert [lines(ax)[0][1][0] for ax in axes] == [0, 1, 2, 3, 4, 5]
    assert figure.GRID == ["mean_r", "gold", "kl", "entropy", "loss", "length"]
    both = drawn([full, sft], *figure.GRID, optional=True)
    assert [len(lines(ax)) for ax in both.axes] == [1, 1, 1, 1, 2, 1]
    late = drawn([sft, full], *figure.GRID, optional=True)  # the grid's order, whichever run comes first
    assert [ax.get_ylabel() for ax in late.axes] == [figure.LABELS.get(m, m) for m in figure.GRID]
    assert [t.get_text() for t in late.legends[0].get_texts()] == ["sft", "grpo"]
    assert [ax.get_ylabel() for ax in drawn([sft], *figure.GRID, optional=True).axes] == ["loss"]


def test_grid_does_not_count_a_seed_that_did_not_measure(tmp_path):
    write(tmp_path / "a-s0.csv", step=[0, 1], kl=[1, 2], gold=[1, 2])
    write(tmp_path / "a-s1.csv", step=[0, 1], kl=[1, 2], gold=["", ""])
    axes = drawn(sorted(tmp_path.iterdir()), "gold", "kl", optional=True).axes
    assert [ax.get_ylabel() for ax in axes] == ["KL to π₀ (nats / token)"]


@pytest.mark.parametrize("words, panels", [
    (["--metric", "gold", "a.csv"], ["gold"]),
    (["--metric", "gold,kl", "a.csv"], ["gold", "kl"]),
    (["--metric", "gold,kl,mean_r", "a.csv", "b.csv"], ["gold", "kl", "mean_r"]),
    (["a.csv", "b.csv", "--metric", "kl"], ["kl"]),
    (["a.csv"], ["mean_r"]),
    (["--grid", "a.csv"], ["mean_r", "gold", "kl"]),
    (["--metric", "gold,gold", "a.csv"], ["gold"]),
])
def test_metrics_of_the_command_line(tmp_path, monkeypatch, capsys, words, panels):
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write(Path(f"{name}.csv"), step=[0, 1], mean_r=[1, 2], gold=[1, 2], kl=[1, 2])
    seen = []
    monkeypatch.setattr(figure, "draw", lambda *given: (DRAW(*given), seen.extend(given[2])))
    run_main(monkeypatch, *words, "--output", "f.png", "--dpi", "30")
    assert seen == panels and capsys.readouterr().out == "f.png\n" and png_size("f.png")


# ---- files and windows ----
def test_without_display_the_readme_command_writes_a_png_beside_the_first_csv(tmp_path):
    for name in ("grpo", "ppo"):
        write(tmp_path / "logs" / f"{name}.csv", step=[0, 1, 2], mean_r=[0, 1, 3])
    command = "--metric mean_r logs/grpo.csv logs/ppo.csv".split()
    done = headless(tmp_path, ROOT / "plot.py", *command)
    assert (done.returncode, done.stdout) == (0, str(Path("logs/grpo_mean_r.png")) + "\n"), done.stderr
    assert png_size(tmp_path / "logs/grpo_mean_r.png") == (960, 585)  # 6.4 x 3.9 inches at 150 dots
    assert sorted(p.name for p in (tmp_path / "logs").iterdir()) == ["grpo.csv", "grpo_mean_r.png", "ppo.csv"]
    import matplotlib.image
    pixels = (matplotlib.image.imread(tmp_path / "logs/grpo_mean_r.png")[:, :, :3] * 255).round().astype(int)
    for color in figure.COLORS[:2]:  # both lines are really on it
        assert (pixels == [int(color[i:i + 2], 16) for i in (1, 3, 5)]).all(2).sum() > 300


def test_import_and_files_leave_matplotlib_as_it_was(tmp_path):
    write(tmp_path / "a.csv", step=[0, 1], kl=[0, 1])
    code = """import sys, plot
from utils import figure
assert not any(name.startswith("matplotlib") for name in sys.modules), "importing plot imports matplotlib"
import matplotlib
before = matplotlib.rcParams.copy()
figure.plot_panels(["a.csv"], ["kl"], "f.png", dpi=30)
assert dict.items(before) == dict.items(matplotlib.rcParams), "settings changed"
assert "matplotlib.pyplot" not in sys.modules, "pyplot picks a backend"
"""
    done = headless(tmp_path, "-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0 and done.stdout == "", done.stderr


def test_where_there_is_a_display_a_window_shows_it_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    import matplotlib.pyplot as plt
    a = write(tmp_path / "a.csv", step=[0, 1], kl=[0, 1])
    figure, shown = plt.figure(), []
    monkeypatch.setattr(type(figure.canvas), "required_interactive_framework", "tk")
    monkeypatch.setattr(plt, "figure", lambda: figure)
    monkeypatch.setattr(plt, "show", lambda: shown.append(len(figure.axes)))
    run_main(monkeypatch, "--metric", "kl", a)
    plt.close(figure)
    assert shown == [1] and list(tmp_path.iterdir()) == [a] and capsys.readouterr().out == ""


@pytest.mark.parametrize("words, name", [
    (["--metric", "kl"], "a-s0_kl.png"),
    (["--metric", "gold,kl", "--x", "kl"], "a-s0_gold_kl.png"),
    (["--metric", "r/m"], "a-s0_r-m.png"),
    (["--grid"], "a-s0_overview.png"),
])
def test_default_names(tmp_path, monkeypatch, capsys, words, name):
    a = write(tmp_path / "a-s0.csv", **{"step": [0, 1], "kl": [0, 1], "gold": [0, 1], "r/m": [0, 1]})
    run_main(monkeypatch, *words, a, "--dpi", 30)
    assert capsys.readouterr().out == f"{tmp_path / name}\n" and png_size(tmp_path / name)


@pytest.mark.parametrize("name, start", [("f.png", b"\x89PNG"), ("f.PNG", b"\x89PNG"), ("new/f.pdf", b"%PDF"),
                                         ("f.svg", b"<?xml")])
def test_output_formats(tmp_path, name, start):
    a = write(tmp_path / "a.csv", step=[0, 1], kl=[0, 1])
    path = figure.plot_panels([a], ["kl"], output=str(tmp_path / name), dpi=30)
    assert path == tmp_path / name and path.read_bytes().startswith(start)


def test_dpi(tmp_path):
    a = write(tmp_path / "a.csv", step=[0, 1], kl=[0, 1])
    assert png_size(figure.plot_panels([a], ["kl"], tmp_path / "f.png", dpi=100)) == (640, 390)


@pytest.mark.parametrize("function, code", [("fsync", errno.ENOSPC), ("replace", errno.EACCES)])
def test_a_write_that_fails_leaves_the_old_figure(tmp_path, monkeypatch, capsys, function, code):
    a, old = write(tmp_path / "a.csv", step=[0, 1], kl=[0, 1]), tmp_path / "f.png"
    old.write_bytes(b"old")

    def fail(*_):
        raise OSError(code, os.strerror(code))
    monkeypatch.setattr(os, function, fail)
    with pytest.raises(SystemExit) as left:
        figure.plot_panels([a], ["kl"], old, dpi=30)
    assert left.value.code == 2 and os.strerror(code) in capsys.readouterr().err
    assert old.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["a.csv", "f.png"]


# ---- bad input ----
GOOD = "step,loss,mean_r,note,gold\n0,1,2,hello,\n1,2,3,there,\n"
BAD = {  # what a.csv holds, the words after plot.py, what the message must say
    "missing": (None, ["a.csv"], ["a.csv", "No such file"]),
    "folder": (None, ["folder.csv"], ["folder.csv", "directory"]),
    "empty": ("", ["a.csv"], ["a.csv holds no table of numbers"]),
    "only a header": ("step,mean_r\n", ["a.csv"], ["a.csv holds no table of numbers"]),
    "binary": (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", ["a.csv"], ["a.csv holds no table of numbers"]),
    "zeros": (b"\x00" * 500, ["a.csv"], ["a.csv holds no table of numbers"]),
    "prose": ("To be, or not to be\nthat is the question\n", ["a.csv"], ["a.csv holds no table of numbers"]),
    "json": ('{"step": [0, 1],\n "mean_r": "x"}\n', ["a.csv"], ["a.csv holds no table of numbers"]),
    "long rows": ("step,mean_r\n0,1,5\n1,2,6\n", ["a.csv"], ["a.csv holds no table of numbers"]),
    "one long row": ("step,mean_r\n0,1\n1,2,6\n", ["a.csv"], ["a.csv holds no table of numbers"]),
    "no such metric": (GOOD, ["a.csv", "--metric", "golden"],
                       ["a.csv", "'golden'", "it has: step, loss, mean_r, note, gold"]),
    "second metric": (GOOD, ["--metric", "loss,kl", "a.csv"], ["a.csv", "'kl'", "it has: step, loss"]),
    "no such x": (GOOD, ["a.csv", "--x", "samples"], ["a.csv", "'samples'", "it has: step, loss, mean_r"]),
    "no such x for grid": (GOOD, ["a.csv", "--x", "samples", "--grid"], ["a.csv", "'samples'"]),
    "text": (GOOD, ["a.csv", "--metric", "note"], ["a.csv", "'note'", "'hello'", "no number"]),
    "never measured": (GOOD, ["a.csv", "--metric", "gold"], ["a.csv", "'gold'", "no measured value"]),
    "nothing for the grid": ("step,lr\n0,1\n", ["a.csv", "--grid"], ["seed of a", "mean_r, gold, kl"]),
    "extension": (GOOD, ["a.csv", "--output", "f.jpeg"], ["f.jpeg", ".png, .pdf, .svg"]),
    "no extension": (GOOD, ["a.csv", "--output", "figure"], ["figure", ".png, .pdf, .svg"]),
    "a file as folder": (GOOD, ["a.csv", "--output", "a.csv/f.png"], ["can't write a.csv/f.png"]),
    "a folder as file": (GOOD, ["a.csv", "--output", "folder.png"], ["can't write folder.png"]),
    "no file": (GOOD, ["--metric", "mean_r"], ["no CSV given"]),
    "no file, a typo": (GOOD, ["--metric", "mean_r", "a"], ["can't read a:"]),
    "smooth": (GOOD, ["a.csv", "--smooth", "0"], ["--smooth 0", "at least 1"]),
    "grid and metric": (GOOD, ["a.csv", "--grid", "--metric", "loss"], ["--grid", "loss"]),
    "low dpi": (GOOD, ["a.csv", "--dpi", "0"], ["--dpi 0", "20 to 600"]),
    "high dpi": (GOOD, ["a.csv", "--dpi", "99999"], ["--dpi 99999", "20 to 600"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, monkeypatch, capsys, case):
    content, words, says = BAD[case]
    monkeypatch.chdir(tmp_path)
    Path("folder.csv").mkdir()
    Path("folder.png").mkdir()
    if content is not None:
        Path("a.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(Path(".").rglob("*"))
    with pytest.raises(SystemExit) as left:
        run_main(monkeypatch, *words)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    assert all(part in err for part in says), err
    assert sorted(Path(".").rglob("*")) == before


@pytest.mark.parametrize("name", ["a.zip", "a.csv.gz", "a.csv.xz"])
def test_a_name_that_looks_compressed_is_read_as_it_is(tmp_path, capsys, name):
    path = write(tmp_path / name, step=[0, 1], kl=[3, 4])
    same(figure.curve(figure.read_runs([path])[path.stem][0], "kl"), [0, 1], [3, 4])
    path.write_bytes(b"PK\x03\x04\xff\xfe")
    with pytest.raises(SystemExit) as left:
        figure.read_runs([path])
    assert left.value.code == 2 and "holds no table of numbers" in capsys.readouterr().err


def test_a_second_file_that_is_bad_is_named(tmp_path, capsys):
    good = write(tmp_path / "a-s0.csv", step=[0, 1], kl=[1, 2])
    lacks = write(tmp_path / "a-s1.csv", step=[0], loss=[1])
    empty = write(tmp_path / "b.csv", step=[0], kl=[""], loss=[1])
    for bad in (lacks, empty):
        with pytest.raises(SystemExit) as left:
            figure.plot_panels([good, bad], ["kl"], tmp_path / "f.png")
        assert left.value.code == 2 and str(bad) in capsys.readouterr().err
        assert not (tmp_path / "f.png").exists()


def test_no_write_permission(tmp_path, capsys):
    a = write(tmp_path / "a.csv", step=[0, 1], kl=[0, 1])
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write anywhere")
    with pytest.raises(SystemExit) as left:
        figure.plot_panels([a], ["kl"], tmp_path / "f.png")
    tmp_path.chmod(0o700)
    assert left.value.code == 2 and "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["nowhere.csv"], ["--colour", "red", "a.csv"]])
def test_a_reader_sees_no_traceback(tmp_path, words):
    done = headless(tmp_path, ROOT / "plot.py", *words)
    assert done.returncode == 2 and words[0] in done.stderr and "Traceback" not in done.stderr
