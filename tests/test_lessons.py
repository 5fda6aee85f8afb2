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
        return runpy.run_path(str(path))["lesson"]()
    finally:
        sys.path.remove(str(ROOT / "lessons"))


def both(number):
    """The failure's row and the cure's of lesson `number`."""
    path, = (ROOT / "lessons").glob(f"{number:02}_*.py")
    return [next(row for name, row in rows(path).items() if name.startswith(kind))
            for kind in ("failure: ", "cure: ")]


# ---- the number of each ----
def test_01_loss_is_zero():
    failure, cure = both(1)
    assert abs(failure["loss"][0]) < 1e-6 and abs(cure["loss"][0]) < 1e-6  # the loss can't tell them apart
    assert failure["grad_norm"][0] < 1e-6 and cure["grad_norm"][0] > 0.1
    assert failure["reward"][-1] < 0.65 and cure["reward"][-1] > 0.9
    assert cure["loss"][-1] > 1e-3  # it rises while the reward does


# ---- what all of them keep ----
@every_lesson
def test_a_lesson_has_a_failure_a_cure_and_numbers(path):
    kinds = [name.partition(": ")[0] for name in rows(path)]
    assert "failure" in kinds and "cure" in kinds
    for row in rows(path).values():
        numbers = [x for cell in row.values() for x in (cell if isinstance(cell, list) else [cell])]
        assert numbers and all(isinstance(x, (int, float)) for x in numbers)


@every_lesson
def test_a_lesson_says_what_it_is_about(path):
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    for part in ("Met in: ", "Trap: ", "Failure: ", "Cure: ", "What tells them apart: "):
        assert f"\n{part}" in doc, f"no {part!r}"
    assert doc.rstrip().endswith(f"Run: python lessons/{path.name}")


def run(*words, cwd):
    return subprocess.run([sys.executable, *map(str, words)], env=environment(), cwd=cwd, capture_output=True,
                          text=True, timeout=300)


def test_a_lesson_runs_from_any_folder_and_draws(tmp_path):
    done = run(LESSONS[0], "--plot", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^failure: .* -> .*\ncure: .* -> ", done.stdout, re.MULTILINE)
    assert (tmp_path / "logs" / f"{LESSONS[0].stem}.png").read_bytes().startswith(b"\x89PNG")


def test_a_lesson_refuses_an_argument(tmp_path):
    done = run(LESSONS[0], "--steps", "3", cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout and list(tmp_path.iterdir()) == []
    assert re.fullmatch(r"error: \S+ --steps 3: wanted no argument, or --plot\n", done.stderr)
