"""benchmarks/best_of_n.py's estimator against enumeration, its CSV; overoptimisation.py's table, by hand."""
import importlib.util
import itertools
import math
import statistics
import sys

import pytest
import torch
from helpers import ROOT, cli, read_csv, tiny


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


best_of_n, overoptimisation = load("best_of_n"), load("overoptimisation")


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_the_mean_over_all_subsets(n):
    """Six answers to each of two prompts: every subset of n is enumerated."""
    generator = torch.Generator().manual_seed(0)
    score, gold = torch.randn(2, 2, 6, generator=generator)
    picked = [max(subset, key=lambda i: score[m, i]) for m in (0, 1)
              for subset in itertools.combinations(range(6), n)]
    each = len(picked) // 2
    wanted = [statistics.mean(value[i // each, j].item() for i, j in enumerate(picked))
              for value in (score, gold)]
    assert best_of_n.best_of(n, score, score, gold) == pytest.approx(wanted)


def test_chances_add_up():
    for N, n in ((6, 6), (512, 1), (512, 256)):
        chance = best_of_n.chance_of_rank(N, n)
        assert chance.sum() == pytest.approx(1)
        assert chance[-1] == pytest.approx(n / N)  # the best of all is among the n
        assert not chance[:n - 1].any()


def test_csv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scorer = tiny() / "reward.pth"
    words = ["--policy", tiny() / "policy.pth", "--reward_model", scorer, scorer, "--log", "a.csv", "b.csv",
             "--data", "play", "--n_prompts", 3, "--pool", 16, "--largest", 8, "--prompt_len", 8,
             "--max_new", 8, "--device", "cpu"]
    cli(best_of_n, *words)
    header, rows = read_csv("a.csv")
    assert header == best_of_n.COLUMNS and (header, rows) == read_csv("b.csv")
    assert [row["n"] for row in rows] == ["1", "2", "4", "8"]
    scores = [float(row["mean_r"]) for row in rows]
    assert scores == sorted(scores) and scores[0] < scores[-1]
    for row in rows:
        n, kl, length = (float(row[name]) for name in ("n", "kl_answer", "length"))
        assert kl == pytest.approx(math.log(n) - (n - 1) / n, abs=1e-5)
        assert float(row["kl"]) == pytest.approx(kl / length, abs=1e-5) and 1 <= length <= 8


@pytest.mark.parametrize("words, says", [
    (["--pool", 4, "--largest", 8], ["--largest 8", "--pool of 4"]),
    (["--reward_model", "a.pth", "b.pth"], ["2 --reward_model", "1 --log"]),
    (["--policy", "gone.pth"], ["gone.pth", "python sft.py"])])
def test_refusals(words, says, capsys):
    with pytest.raises(SystemExit) as left:
        cli(best_of_n, *words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and all(word in error for word in says), error


def test_table_and_figure(tmp_path, monkeypatch, capsys):
    """A run of four steps, means over two: gold 0.1, 0.5, 0.3, so it rises by 0.4 and falls by 0.2."""
    monkeypatch.chdir(tmp_path)
    rows = [(0.0, 10, 0.0, 0.0), (0.2, 10, 0.2, 1.0), (0.4, 15, 0.8, 2.0), (0.6, 20, -0.2, 4.0)]
    lines = [",".join(map(str, (step, *row))) for step, row in enumerate(rows)]
    for name in ("grpo-8-s0", "grpo-8-s1", "ppo-8-s0"):
        (tmp_path / f"{name}.csv").write_text("\n".join(["step,kl,length,gold,mean_r", *lines, ""]))
    (tmp_path / "best_of_n-8-s0.csv").write_text("n,kl_answer,gold,mean_r\n1,0,0.0,0.0\n16,1.835,0.4,2.0\n")
    kl, gold, score = overoptimisation.read(tmp_path / "grpo-8-s0.csv", 2)
    assert kl.tolist() == pytest.approx([1.0, 4.0, 9.0])  # of kl times length: 0, 2, 6, 12
    assert gold.tolist() == pytest.approx([0.1, 0.5, 0.3]) and score.tolist() == [0.5, 1.5, 3.0]
    found = overoptimisation.summary(kl, gold, score)
    assert found == pytest.approx({"start": 0.1, "peak": 0.5, "end": 0.3, "kl_peak": 4.0, "kl_end": 9.0,
                                   "score_start": 0.5, "score_end": 3.0})
    assert overoptimisation.at(kl, gold, 2.5) == pytest.approx(0.3)  # half of the way from 1 to 4
    assert math.isnan(overoptimisation.at(kl, gold, 9.5))
    cli(overoptimisation, "--folder", ".", "--pairs", 8, "--smooth", 2, "--equal", 16, "--output", "a.png")
    said = capsys.readouterr().out
    assert "| GRPO, 8, 1 | 0.10 | 0.50 | 0.30 | 4.0 | 9.0 | 0.5 | 3.0 |" in said
    assert "| GRPO, 8 | 0.40 ± 0.00 | 4.00 ± 0.00 | 0.20 ± 0.00 | 3.00 ± 0.00 |" in said
    assert "| best-of-n, 8 | 0.40, 2.00 |" in said and (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(SystemExit):
        cli(overoptimisation, "--folder", ".", "--pairs", 9)
    assert "results.sh overopt" in capsys.readouterr().err
