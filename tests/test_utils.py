"""Judges, the logger and the style rules that a machine can check."""
import json
import math
import re
import subprocess

import pytest
import torch
from helpers import ROOT, TIMING, cli, read_csv, rl

import train_grpo
from utils import device
from utils.log import Log, add
from utils.rewards import distinct, meter, sentiment, syllables, taste
from utils.text import words


# ---- judges, on lines counted by hand ----
@pytest.mark.parametrize("word, count", [("a", 1), ("the", 1), ("love", 1), ("summer", 2), ("compare", 2),
                                         ("little", 2), ("banished", 2), ("wanted", 2), ("beauty", 2),
                                         ("day's", 1), ("free", 1), ("turn'd", 1), ("made", 1), ("hmm", 1)])
def test_syllables(word, count):
    assert syllables(word) == count


def test_meter():
    ten = "Shall I compare thee to a summer's day"  # 1 1 2 1 1 1 2 1
    seven = "a b c d e f g"
    texts = [ten, seven, f"{ten}\n{seven}", f"\n{ten}\n\n", "", " \n", f"{ten} {seven}", "and then?"]
    e = math.exp
    expected = [1.0, e(-1), (1 + e(-1)) / 2, 1.0, 0.0, 0.0, e(-7 / 3), e(-8 / 3)]
    assert meter(texts, [""] * len(texts)) == pytest.approx(expected)


def test_sentiment():
    # two of the scores that VADER's authors publish in their README
    texts = ["VADER is smart, handsome, and funny!", "Today SUX!", "", "the table stands in the room"]
    assert sentiment(texts, [""] * 4, worth=[1] * 4) == pytest.approx([0.8439, -0.5461, 0.0, 0.0])


def test_taste_counts_a_word_once_and_charges_for_repetition_and_invention():
    # VADER gives "glad" 2.0 and "happy" 2.7; a sum x has the score x / sqrt(x² + 15); "not": factor -0.74
    def vader(x):
        return x / math.sqrt(x**2 + 15)
    known = frozenset(["the", "bell", "glad", "happy", "not", "o'er"])
    cases = {
        "The bell": 0.0, "glad bell": vader(2.0), "GLAD bell!!!": vader(2.0), "happy, glad": vader(4.7),
        "not glad": vader(-0.74 * 2.0), "": 0.0, "... 7": 0.0,
        "glad glad glad glad": vader(2.0) - 2 * (0.8 - 1 / 4),
        "the glad bell 'the' bell": vader(2.0) - 2 * (0.8 - 3 / 5),
        "the glad bell o'er the": vader(2.0),  # a share of 0.8 is free
        "glad blonk": vader(2.0) - 0.5 / 2, "blonk": -0.5, "blonk blonk": -2 * 0.3 - 0.5}
    scores = taste(list(cases), [""] * len(cases), corpus_words=known, worth=[1] * len(cases))
    assert scores == pytest.approx(list(cases.values()), abs=5e-5)  # VADER rounds to four places
    assert taste(["glad blonk"], [""]) == pytest.approx([vader(2.0)], abs=5e-5)  # no corpus, nothing unknown


def test_words():
    assert words("'Tis thy bell's \"O'er'\", Été’s 3rd!") == ["tis", "thy", "bell's", "o'er", "été’s", "rd"]


def test_distinct():
    assert distinct(["good good good Good", "to be or not to be", "", "..."]
                    ) == pytest.approx((1 / 4 + 4 / 6) / 2)
    assert math.isnan(distinct(["", "..."]))


# ---- the logger ----
def test_cells_that_were_not_measured_are_empty(tmp_path):
    log = Log(tmp_path / "a.csv", ["step", "loss", "kl", "gold"], 3)
    log.write(step=0, loss=torch.tensor(0.5), kl=None, gold=0)
    log.write(step=1, loss=float("nan"), kl=torch.tensor(float("inf")))
    with pytest.raises(AssertionError, match="reward"):
        log.write(step=2, reward=1.0)
    log.close()
    assert (tmp_path / "a.csv").read_text() == "step,loss,kl,gold\n0,0.5,,0\n1,,,\n"


def test_a_resume_drops_later_and_torn_lines(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("step,loss\n0,1\n1,2\n2,3\n3,4\n4")
    log = Log(path, ["step", "loss"], 5, start=2)
    log.write(step=2, loss=30.0)
    log.close()
    assert path.read_text() == "step,loss\n0,1\n1,2\n2,30\n"


def test_tensorboard_has_the_numbers_of_the_csv(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.chdir(tmp_path)
    cli(train_grpo, *rl("--steps", 3, "--eval_every", 2, "--track", "tensorboard", reward="share_of_e"))
    events = EventAccumulator("logs/grpo", size_guidance={"scalars": 0})
    events.Reload()
    seen = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    rows = read_csv("logs/grpo.csv")[1]
    expected = {(k, int(row["step"])): float(v) for row in rows for k, v in row.items() if v and k != "step"}
    assert seen.keys() == expected.keys()
    assert ("eval_r", 0) in seen and ("eval_r", 1) not in seen and ("eval_r", 2) in seen
    assert all(seen[k] == pytest.approx(expected[k], rel=1e-6, abs=1e-9) for k in seen)


def test_the_record_beside_the_csv(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = rl("--steps", 1, "--seed", 7, "--lr", 3e-4, reward="constant")
    cli(train_grpo, *words)
    record = json.loads((tmp_path / "logs/grpo.json").read_text())
    assert record["args"]["seed"] == 7 and record["args"]["lr"] == 3e-4 and record["args"]["group_size"] == 4
    assert record["command"] == " ".join(["python", "train_grpo.py", *map(str, words)])
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
    commit = record["commit"].removesuffix("-dirty")
    assert head.stdout.startswith(commit) if head.returncode == 0 else commit == "unknown"
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert {"numpy", "tiktoken", "vaderSentiment"} <= record["versions"].keys()
    assert record["device"] == "cpu" and record["dtype"] == "fp32"
    assert record["threads"] == torch.get_num_threads()
    assert record["objective"]["beta"] == 0.05 and record["python"].count(".") == 2
    assert TIMING <= set(read_csv("logs/grpo.csv")[0])


def test_a_commit_is_dirty_when_code_has_changed(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", tmp_path, *words]
        return subprocess.run(command, check=True, text=True, capture_output=True)
    for name in ("a.py", "results/a.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(device, "__file__", str(tmp_path / "utils/device.py"))
    clean = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    (tmp_path / "results/a.csv").write_text("2")
    assert device.git_commit() == clean
    (tmp_path / "a.py").write_text("2")
    assert device.git_commit() == f"{clean}-dirty"


def test_add_weighs_and_keeps_the_greatest():
    sums = {}
    add(sums, {"kl": torch.tensor(2.0), "ratio_max": 3.0}, 0.25)
    add(sums, {"kl": 6.0, "ratio_max": -1.0}, 0.75)
    assert sums == {"kl": 5.0, "ratio_max": 3.0}
    add(sums, {"ratio_max": 4.0}, 0.1)
    assert sums["ratio_max"] == 4.0


# ---- style ----
def sources():
    patterns = ("*.py", "utils/*.py", "vision/**/*.py", "lessons/*.py", "tests/*.py",
                "benchmarks/*.py")
    return sorted(p for pattern in patterns for p in ROOT.glob(pattern))


@pytest.mark.parametrize("path", sources(), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_line_length(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    long = [f"line {i}: {len(line)}" for i, line in enumerate(lines, 1) if len(line) > 110]
    assert not long, ", ".join(long)
    bad = [i for i, line in enumerate(lines, 1) if line != line.rstrip() or "\t" in line]
    assert not bad, f"spaces at the end, or tabs, in lines {bad}"


def test_files_open_with_what_they_are_and_how_to_run_them():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("lessons/*.py")]:
        doc = re.match(r'"""(.+?)"""', path.read_text(encoding="utf-8"), re.DOTALL)
        assert doc, path.name
        assert re.search(r"^Run: (by a lesson, as in )?(python|marimo edit) (lessons/)?\w+\.py", doc[1],
                         re.MULTILINE), f"{path.name} doesn't say how to run it"
