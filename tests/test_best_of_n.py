"""benchmarks/best_of_n.py: its estimator against enumeration, its CSV on a tiny policy, what it refuses."""
import importlib.util
import itertools
import math
import statistics
import sys

import pytest
import torch
from helpers import ROOT, cli, read_csv, tiny

spec = importlib.util.spec_from_file_location("best_of_n", ROOT / "benchmarks" / "best_of_n.py")
best_of_n = importlib.util.module_from_spec(spec)
sys.modules["best_of_n"] = best_of_n
spec.loader.exec_module(best_of_n)


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
