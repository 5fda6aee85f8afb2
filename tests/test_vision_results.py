"""benchmarks/sweep_vision.py: as many trials for each method, chosen on validation, the test in no choice."""
import json
import re
import sys
from pathlib import Path

import pytest
from helpers import ROOT, cli, read_csv

sys.path.append(str(ROOT / "benchmarks"))
import sweep_vision  # noqa: E402


def test_each_method_of_a_table_has_as_many_trials():
    for kind in sweep_vision.SWEEPS.values():
        assert len({len(trials) for _, trials in kind.methods.values()}) == 1
        assert all(len(set(trials)) == len(trials) for _, trials in kind.methods.values())


def test_the_paired_test_by_hand():
    """Differences 1, 2, 3: of 8 ways to flip signs, +++ and --- are as far from 0; t = 2 / (1 / √3)."""
    mean, std, t, p = sweep_vision.paired([2, 4, 6], [1, 2, 3])
    assert (mean, std, p) == (2, 1, 0.25) and t == pytest.approx(2 * 3 ** 0.5)
    assert sweep_vision.paired([1, 0], [0, 1])[3] == 1


def of_run(path, validation, test):
    """A CSV of two steps and a last row, as a run writes it, and its record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ["step,kl,top1,test_top1", "0,0,0.1,", "1,0.1,,", f"2,,{validation},{test}"]
    path.write_text("\n".join(rows) + "\n")
    path.with_suffix(".json").write_text(json.dumps({"test_before": {"top1": 0.2, "eval_r": 0.3}}))


def test_validation_chooses_and_the_test_is_reported(tmp_path, monkeypatch, capsys):
    """Runs that have ended are not run again. Seed 0 chooses trial 1, seed 1 trial 0, against the test."""
    kind = sweep_vision.Kind("top1", 2, {name: ("no.py", ("--lr 1", "--lr 2")) for name in "ab"})
    monkeypatch.setitem(sweep_vision.SWEEPS, "cnn", kind)
    numbers = {"a-t0-s0": (0.5, 0.9), "a-t1-s0": (0.6, 0.4), "a-t0-s1": (0.8, 0.6), "a-t1-s1": (0.7, 0.9),
               "b-t0-s0": (0.5, 0.1), "b-t1-s0": (0.4, 0.8), "b-t0-s1": (0.5, 0.3), "b-t1-s1": (0.4, 0.8)}
    for name, values in numbers.items():
        of_run(tmp_path / f"work/cnn/{name}.csv", *values)
    cli(sweep_vision, "cnn", "--work", tmp_path / "work", "--out", tmp_path)
    header, rows = read_csv(tmp_path / "cnn/sweep.csv")
    assert header == ["method", "trial", "seed", "metric", "flags", "validation", "chosen"] and len(rows) == 8
    chosen = {(row["method"], row["trial"], row["seed"]) for row in rows if row["chosen"] == "1"}
    assert chosen == {("a", "1", "0"), ("a", "0", "1"), ("b", "0", "0"), ("b", "0", "1")}
    header, rows = read_csv(tmp_path / "cnn/test.csv")
    assert header == ["method", "seed", "trial", "start_top1", "start_r", "test_top1"]
    assert [row["test_top1"] for row in rows] == ["0.4", "0.6", "0.1", "0.3"]
    assert "a − b: +0.3000 ± 0.0000" in capsys.readouterr().out
    kept = read_csv(tmp_path / "cnn/a-s0.csv")[1]
    assert [row["step"] for row in kept] == ["0", "2"] and kept[1]["test_top1"] == "0.4"


@pytest.mark.slow
def test_a_sweep_runs_its_trials(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    kind = sweep_vision.SWEEPS["cnn"]
    kind = sweep_vision.Kind(kind.metric, 1, {"ce": (kind.methods["ce"][0], ("--lr 1e-3",))})
    monkeypatch.setitem(sweep_vision.SWEEPS, "cnn", kind)
    words = ["cnn", "--work", tmp_path / "work", "--out", tmp_path, "--methods", "ce"]
    cli(sweep_vision, *words, "--more", "steps=2", "sft_steps=2", "batch_size=8")
    header, rows = read_csv(tmp_path / "cnn/test.csv")
    assert {"test_top1", "test_r", "test_kl", "start_top1"} <= set(header) and len(rows) == 1


def test_every_figure_of_the_results_has_a_command():
    commands = (ROOT / "benchmarks/results.sh").read_text()
    names = [path.name for path in Path(ROOT, "results").glob("*.png")]
    assert names and not [name for name in names if not re.search(rf"results/{re.escape(name)}\b", commands)]
