"""benchmarks/techniques_table.py: accuracy at equal generated answers, paired differences, what it runs.

Run: python -m pytest tests/test_technique_table.py
"""
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import tyro
from helpers import ROOT, cli

import techniques
import train_grpo

spec = importlib.util.spec_from_file_location("techniques_table", ROOT / "benchmarks/techniques_table.py")
techniques_table = importlib.util.module_from_spec(spec)
sys.modules["techniques_table"] = techniques_table
spec.loader.exec_module(techniques_table)


def write(path, samples, accuracy, seconds):
    """A CSV with a row a step; an accuracy of None is an empty cell."""
    lines = [f"{step},{n},{'' if a is None else a},{s},0.25" for step, (n, a, s) in
             enumerate(zip(samples, accuracy, seconds))]
    Path(path).write_text("\n".join(["step,samples,eval_acc,seconds,frac_cut", *lines, ""]))


@pytest.fixture
def folder(tmp_path):
    """Two seeds: plain generates 10 answers a step, dynamic_sampling 20; steps 0 and 2 evaluate."""
    for seed, (plain, dynamic) in enumerate([(0.50, 0.60), (0.60, 0.80)]):
        write(tmp_path / f"plain-s{seed}.csv", [10, 20, 30], [0.2, None, plain], [1, 2, 3])
        write(tmp_path / f"dynamic_sampling-s{seed}.csv", [20, 40, 60], [0.2, None, dynamic], [3, 6, 9])
    return tmp_path


def test_an_evaluation_comes_before_its_steps_answers(folder):
    frame = techniques_table.read_csv(folder / "dynamic_sampling-s1.csv")
    generated, accuracy = techniques_table.evaluations(frame)
    assert generated.tolist() == [0, 40] and accuracy.tolist() == [0.2, 0.8]


def test_the_table_by_hand(folder, capsys):
    """All reach 20 answers, before plain's step 2. There dynamic_sampling is half of the way to its 40.

    Its accuracy: 40 and 50 %, so gains of -10 and -10 points over 50 and 60 %; one step of 3 seconds.
    """
    cli(techniques_table, "--folder", folder, "--rows", "plain", "dynamic_sampling", "--seeds", 0, 1,
        "--table_only")
    said = capsys.readouterr().out
    assert said.startswith("At 20 generated answers")
    assert "| plain |  | 55.0 ± 7.1 |  |  | 2 | 25.0 % | 2.0 ± 0.0 |" in said
    row = "`--dynamic_sampling 2` | 45.0 ± 7.1 | -10.0 ± 0.0 | plain | 1 | 25.0 % | 3.0 ± 0.0 |"
    assert f"| dynamic_sampling | {row}" in said and "π₀'s accuracy: 20.0 %" in said


def test_the_standard_error_is_of_the_pairs():
    """Gains of 2, 4 and 9 points: mean 5, variance (9 + 1 + 16) / 2 = 13, standard error √(13 / 3)."""
    assert techniques_table.difference([0.52, 0.54, 0.59], 0.5) == "+5.0 ± 2.1"


@pytest.mark.parametrize("name", techniques_table.ROWS)
def test_a_row_changes_its_own_flags_alone(name, monkeypatch, tmp_path):
    """What a row's run is told differs from the plain one's in the row's flags, --log and --out."""
    told = {}
    monkeypatch.setattr(train_grpo, "main", lambda args: told.update({args.log: vars(args)}))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for row in ("plain", name):
        techniques_table.train(row, 3, techniques_table.Args(folder=str(tmp_path), policy="p.pth"))
    plain, other = told[f"{tmp_path}/plain-s3.csv"], told[f"{tmp_path}/{name}-s3.csv"]
    changed = {key for key in plain if plain[key] != other[key]} - {"log", "out"}
    assert changed == {word[2:] for word in techniques_table.ROWS[name].split() if word.startswith("--")}
    assert plain["seed"] == 3 and plain["policy"] == "p.pth" and plain["beta"] == 0


def test_the_penalty_spares_right_answers():
    """A right answer to `sort` has 8 tokens, stop included: only the ninth costs."""
    words = f"{techniques_table.SETTINGS} {techniques_table.ROWS['overlong_penalty']}".split()
    args = tyro.cli(train_grpo.Args, args=words)
    got = techniques.less_penalty(torch.ones(1, 2), torch.tensor([[8, 9]]), args)
    assert got.tolist() == [[1.0, 0.0]]


def test_a_complete_run_is_not_made_again(monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(train_grpo, "main", lambda args: ran.append(args.log))
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for steps in (100, 101):  # a run that was cut off, then a complete one
        write(tmp_path / "plain-s0.csv", range(steps), [0.5] * steps, range(steps))
        techniques_table.train("plain", 0, techniques_table.Args(folder=str(tmp_path)))
    assert ran == [f"{tmp_path}/plain-s0.csv"]


@pytest.mark.parametrize("words, says", [(["--rows", "plain", "magic"], ["magic", "dynamic_sampling"]),
                                         (["--table_only"], ["plain-sSEED.csv", "results.sh techniques"])])
def test_refusals(words, says, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        cli(techniques_table, "--folder", tmp_path, *words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and all(word in error for word in says), error
