"""Every lesson runs and shows its number: a failure, its cure, and what tells them apart."""
import ast
import functools
import re
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT, environment

LESSONS = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
every_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


@functools.cache
def rows(path):
    """A lesson's {row: {column: number}}, computed once a process."""
    sys.path.insert(0, str(ROOT / "lessons"))
    try:
        result = runpy.run_path(str(path))["lesson"]()
    finally:
        sys.path.remove(str(ROOT / "lessons"))
    assert {"failure", "cure"} <= {name.partition(": ")[0] for name in result}
    cells = [cell for row in result.values() for cell in row.values()]
    numbers = [x for cell in cells for x in (cell if isinstance(cell, list) else [cell])]
    assert numbers and all(isinstance(x, (int, float)) for x in numbers)
    return result


def test_a_lesson_is_a_module_too(monkeypatch):
    """python -m lessons.02_clip_never_acts, as vision's scripts are started."""
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    for name in ("shared", "lessons"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert callable(runpy.run_module("lessons.02_clip_never_acts")["lesson"])


def row(number, begin):
    path, = (ROOT / "lessons").glob(f"{number:02}_*.py")
    return next(cells for name, cells in rows(path).items() if name.startswith(begin))


def both(number):
    """The first failure's row and the first cure's of lesson `number`."""
    return row(number, "failure: "), row(number, "cure: ")


# ---- the number of each: seeds are fixed, and the margins are wide ----
def test_01_loss_is_zero():
    failure, cure = both(1)
    assert abs(failure["loss"][0]) < 1e-6 and abs(cure["loss"][0]) < 1e-6  # the loss can't tell them apart
    assert failure["grad_norm"][0] < 1e-6 and cure["grad_norm"][0] > 0.1
    assert failure["reward"][-1] < 0.65 and cure["reward"][-1] > 0.9
    assert cure["loss"][-1] > 1e-3  # it rises while the reward does


def test_02_clip_never_acts():
    failure, cure = both(2)
    compare = row(2, "compare: 1 update, ε 0.001")
    assert failure == compare  # ε has no influence, to the last bit
    assert max(failure["clip_frac"]) == 0 and max(failure["ratio_max"]) < 1.0001
    assert min(cure["clip_frac"][:5]) > 0.05 and max(cure["ratio_max"]) > 1.5
    assert failure["reward"][-1] > 0.9  # it learns all the same


def test_03_kl_that_does_nothing():
    failure, cure = both(3)
    kl, cosine = "KL(π‖π₀)", "its cosine to KL's"
    assert failure[kl][-1] > 0.8 * failure[kl][0] and failure["mean gradient"] < 1e-6
    assert cure[kl][-1] < 0.05 * cure[kl][0] and 0.5 < cure[cosine] < 0.95  # it falls, by another way
    for name in ("cure: k2", "cure: ratio · k3"):
        assert row(3, name)[cosine] == pytest.approx(1, abs=1e-5)
        assert row(3, name)[kl][-1] < 0.05 * cure[kl][0]


@pytest.mark.slow
def test_04_mixed_groups():
    failure, cure = both(4)
    assert min(failure["correlation"]) > 0.9 and max(map(abs, cure["correlation"])) < 1e-6
    assert failure["right_tokens"][-1] < 0.75 and cure["right_tokens"][-1] > 0.9


def test_05_equal_rewards():
    failure, cure = both(5)
    assert failure["kl"][-1] > 0.1 and 0 < max(failure["max_adv"]) < 0.01
    assert max(cure["kl"]) == max(cure["max_adv"]) == 0  # exactly
    assert min(failure["frac_zero_std"]) == min(cure["frac_zero_std"]) == 1
    assert row(5, "compare: rewards that differ")["kl"][-1] > 0.1


def test_06_dropout():
    failure, cure = both(6)
    assert failure["KL at step 0"] > 0.005 and failure["ratio_max"] > 1.2 and failure["clip_frac"] > 0.02
    assert cure["KL at step 0"] < 1e-9 and abs(cure["ratio_max"] - 1) < 1e-4 and cure["clip_frac"] == 0
    assert cure["grad_norm"] > 0.1  # eval mode has gradients


def test_07_stop_not_scored():
    failure, cure = both(7)
    ended, length = "share_ended", "length"
    assert failure[ended][0] == cure[ended][0] < 0.2
    assert failure[ended][-1] < 0.4 and cure[ended][-1] > 0.8
    assert failure[length][-1] > 6.5 and cure[length][-1] < 5


def test_08_micro_batches():
    failure, cure = both(8)
    for size in (1, 2, 4):
        assert failure[f"prompts a piece: {size}"] > 0.01
    assert max(cure.values()) < 1e-5 and failure["prompts a piece: 8"] < 1e-5


def test_09_temperature():
    failure, cure = both(9)
    assert failure["ratio_max"] > 2 and failure["ratios beyond 0.8 to 1.2"] > 0.1 < 10 * failure["clip_frac"]
    assert abs(cure["ratio_max"] - 1) < 1e-3 and cure["ratios beyond 0.8 to 1.2"] == cure["clip_frac"] == 0


def test_10_dead_critic():
    failure, cure = both(10)
    explained = "explained_variance"
    assert max(map(abs, failure[explained])) < 1e-6 and cure[explained][0] == failure[explained][0]
    assert cure[explained][-1] > 0.5 and cure["value_loss"][-1] < 0.5 * failure["value_loss"][-1]


# ---- what all of them keep ----
@every_lesson
def test_a_lesson_has_a_test_of_its_number(path):
    """Each lesson runs in that test alone: rows() also checks what all of them return."""
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").glob("test_lessons*.py"))
    assert re.search(rf"^def test_{path.stem}\(", tests, re.MULTILINE)


@every_lesson
def test_a_lesson_says_what_it_is_about(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for part in ("Met in: ", "Trap: ", "Failure: ", "Cure: ", "What tells them apart: "):
        assert f"\n{part}" in doc, f"no {part!r}"
    assert doc.rstrip().endswith(f"Run: python lessons/{path.name}")


def run(*words, cwd):
    return subprocess.run([sys.executable, *map(str, words)], env=environment(), cwd=cwd, capture_output=True,
                          text=True, timeout=300)


@pytest.mark.slow
def test_a_lesson_runs_from_any_folder_and_draws(tmp_path):
    done = run(LESSONS[0], "--plot", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^failure: .* -> .*\ncure: .* -> ", done.stdout, re.MULTILINE)
    assert (tmp_path / "logs" / f"{LESSONS[0].stem}.png").read_bytes().startswith(b"\x89PNG")


def test_a_lesson_refuses_an_argument(tmp_path):
    done = run(LESSONS[0], "--steps", "3", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and list(tmp_path.iterdir()) == []
    assert re.fullmatch(r"error: \S+ --steps 3: wanted no argument, or --plot\n", done.stderr)
