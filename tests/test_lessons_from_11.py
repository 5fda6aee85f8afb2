"""The numbers of lessons 11 to 20; test_lessons.py has what all lessons keep."""
import math
import sys

import pytest
from helpers import ROOT, quiet_signals
from test_lessons import both, rows

LOG_2 = math.log(2)


def file(number):
    path, = (ROOT / "lessons").glob(f"{number:02}_*.py")
    return path


def of(number):
    """All rows of lesson `number`."""
    return rows(file(number))


def test_11_reward_reads_padding():
    failure, cure = both(11)
    assert failure["change of a score"] > 0.1 and cure["change of a score"] < 1e-4
    assert min(failure["accuracy"], cure["accuracy"]) > 0.8  # it can't tell them apart
    assert failure["with 8 more pads"] < failure["accuracy"] - 0.03
    assert cure["with 8 more pads"] == pytest.approx(cure["accuracy"], abs=0.011)  # a tie may turn


def test_12_infinite_kl(capfd):
    failure, cure = both(12)
    ruled = of(12)["compare: float16 and the rule"]
    assert failure["greatest KL of a token"] == ruled["greatest KL of a token"] == math.inf
    assert 65504 < cure["greatest KL of a token"] < 1e30  # float16 can't hold it
    assert (failure["NaN weights"], cure["NaN weights"], ruled["NaN weights"]) == (1, 0, 0)
    assert failure["reward"][-1] == 0 and cure["reward"][-1] > 0.8 and len(ruled["reward"]) < 15


def test_13_batch_counts_answers():
    failure, cure = both(13)
    one = of(13)["compare: 8 answers, one prompt"]
    assert [row["answers"] for row in (failure, cure, one)] == [64, 64, 8]
    assert [row["answers a pass"] for row in (failure, cure, one)] == [64, 8, 8]
    assert failure["MB a pass"] > 4 * cure["MB a pass"] and one["MB a pass"] == cure["MB a pass"]
    assert cure["gradient's distance"] < 1e-5 and one["gradient's distance"] > 0.3


def test_14_no_cuda_here():
    failure, cure = both(14)
    asked = of(14)["compare: a missing one asked for"]
    assert failure["steps done"] == asked["steps done"] == 0 and cure["steps done"] == 30
    assert failure["lines of error"] > 3 and asked["lines of error"] == 1 and cure["lines of error"] == 0
    assert cure["loss"][-1] < 0.3 < 1 < cure["loss"][0]


def test_15_resume_replays():
    with quiet_signals():
        failure, cure = both(15)
    assert failure["steps with old prompts"] == 12 and failure["distance of the weights"] > 0.05
    assert cure["steps with old prompts"] == 0 and cure["distance of the weights"] == 0
    lost = of(15)["compare: no optimizer state"]
    assert lost["steps with old prompts"] == 0 and lost["distance of the weights"] > 0.01


def test_16_clip_nan_and_idle_lora():
    half, whole, by_name, split = of(16).values()
    assert half["NaN weights"] > 0.9 and not math.isfinite(half["loss"][-1])
    assert whole["NaN weights"] == 0 and whole["loss"][-1] < whole["loss"][0]
    assert by_name["with a gradient"] == pytest.approx(2 / 3) and by_name["adapters"] == 6
    assert split["with a gradient"] == 1 and split["adapters"] == 12


def test_16_without_its_packages(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit) as left:
        rows.__wrapped__(file(16))
    assert left.value.code == 2
    assert capsys.readouterr().err == ("error: this needs the package 'peft', which isn't installed: "
                                       "pip install '.[clip]'\n")


def test_17_boxes_in_another_space():
    pixels, scaled, thousandths, scaled_too = of(17).values()
    assert pixels["format"] == 1 and pixels["IoU"] < 0.02 and pixels["IoU above 0.5"] == 0
    assert thousandths["IoU"] < 0.5
    assert min(scaled["IoU"], scaled_too["IoU"]) > 0.95 and scaled["IoU above 0.5"] == 1


def test_18_frozen_yolo():
    failure, cure = both(18)
    assert failure["weights that moved"] == 0 and cure["weights that moved"] > 0.8
    assert abs(failure["reward"][-1] - 0.25) < 0.1 and cure["reward"][-1] > 0.8  # four classes by chance


def test_19_no_chat_template():
    bare, short, cure = of(19).values()
    assert bare["right"] < 0.1 and short["right"] == 0 and cure["right"] > 0.8
    assert short["cut"] == 1 and cure["cut"] < 0.1


def test_20_identical_pairs():
    failure, cure = both(20)
    share = failure["identical"]
    assert 0.3 < share < 0.7 and cure["identical"] == 0
    assert failure["pairs"] == 256 and cure["pairs"] == round(256 * (1 - share))
    assert share * LOG_2 <= failure["loss"][-1] < share * LOG_2 + 0.05 and cure["loss"][-1] < 0.05
    assert failure["accuracy"] <= 1 - share + 1e-6 and cure["accuracy"] > 0.95
