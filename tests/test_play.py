"""lessons/play.py, the marimo notebook: its numbers against grpo.py, an export, a run without marimo."""
import importlib.util
import os
import re
import subprocess
import sys
import traceback

import pytest
from helpers import ROOT, environment

NOTEBOOK = ROOT / "lessons/play.py"
FALSE_MARIMO = """
import importlib.util
import runpy
import sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "marimo" else real(name, *rest)
runpy.run_path(sys.argv[1], run_name="__main__")
"""


needs_marimo = pytest.mark.skipif(importlib.util.find_spec("marimo") is None, reason="needs marimo")


def forked(check):
    """Runs check() in a copy of this process: one that has imported marimo is a notebook to transformers."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            check()
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def export(source, folder):
    """Exports a copy of a notebook: marimo leaves a folder beside it. -> the process, and the HTML file."""
    copy = folder / "lessons/play.py"
    copy.parent.mkdir()
    copy.write_text(source, encoding="utf-8")
    command = [sys.executable, "-m", "marimo", "export", "html", str(copy), "-o", str(folder / "play.html")]
    done = subprocess.run(command, env=environment(PYTHONPATH=str(ROOT)), cwd=folder, capture_output=True,
                          text=True, timeout=300)
    return done, folder / "play.html"


def test_without_marimo_one_line_says_what_to_install(tmp_path):
    done = subprocess.run([sys.executable, "-c", FALSE_MARIMO, str(NOTEBOOK)], cwd=tmp_path,
                          env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: .*marimo.*pip install '\.\[notebook\]'.*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_the_extra_that_it_names_brings_marimo():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^notebook = \["marimo>=', text, re.MULTILINE)


@needs_marimo
@pytest.mark.slow
def test_its_numbers_are_grpos(capsys):
    forked(lambda: check_its_numbers(capsys))


def check_its_numbers(capsys):
    spec = importlib.util.spec_from_file_location("play", NOTEBOOK)
    play = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(play)
    _, found = play.app.run()
    assert capsys.readouterr().out == "this notebook is read in a browser: marimo edit lessons/play.py\n"
    reward = found["torch"].tensor([[0.25, 0.5, 0.5, 1.0]])
    assert found["rewards"].value == reward[0].tolist()
    # by hand: the mean is 0.5625 and the unbiased standard deviation √(0.296875 / 3)
    by_hand = [(r - 0.5625) / ((0.296875 / 3)**0.5 + 1e-4) for r in (0.25, 0.5, 0.5, 1.0)]
    assert found["adv"].tolist() == pytest.approx(by_hand, abs=1e-5)
    assert found["adv"].tolist() == pytest.approx(found["group_advantage"](reward)[0].tolist(), abs=1e-6)
    # r = 1.3, ε = 0.2, A = 1: the clip acts
    assert found["surrogate"] == pytest.approx(1.2) and found["slope"] == 0
    assert found["surrogate_of"](1.1) == pytest.approx((1.1, 1.1))  # inside of the clip r·A climbs with r·A
    assert found["surrogate_of"](0.5) == pytest.approx((0.5, 0.5))  # A > 0: no clip below 1 - ε
    # π ∝ e, 1, 1/e and π₀ uniform: KL = log 3 - H(π)
    e = found["torch"].tensor([1.0, 0.0, -1.0], dtype=found["torch"].float64).softmax(0)
    kl = (e * (e * 3).log()).sum().item()
    assert found["kl_exact"] == pytest.approx(kl) and found["kl_mean"]["k1"] == pytest.approx(kl)
    assert found["kl_mean"]["k3"] == pytest.approx(kl) and abs(found["kl_mean"]["k2"] - kl) > 0.01
    assert len(found["history"]) == 3 and 0.2 < found["history"][0]["reward"] < 0.5


@needs_marimo
@pytest.mark.slow
def test_its_export_has_the_outputs_and_no_error(tmp_path):
    done, file = export(NOTEBOOK.read_text(encoding="utf-8"), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    page = re.sub(r"\\u003C/?strong\\u003E", "", file.read_text(encoding="utf-8"), flags=re.IGNORECASE)
    assert page.count("data:image/png;base64") == 4  # a drawing for each part
    assert not re.search(r"Traceback|application/vnd\.marimo\+error", page)
    assert "At r = 1.30: surrogate +1.20, slope +0.00" in page
    assert re.search(r"Step 3: mean reward 0\.\d{3}, KL 0\.\d{3}", page)


@needs_marimo
@pytest.mark.slow
def test_an_export_of_a_cell_that_raises_is_refused(tmp_path):
    """What the test above leans on."""
    source = NOTEBOOK.read_text(encoding="utf-8")
    head, tail = source[:source.index("@app.cell")], source[source.rindex("\n\nif __name__"):]
    broken = f"{head}@app.cell\ndef _():\n    1 / 0\n    return\n{tail}"
    done, _ = export(broken, tmp_path)
    assert done.returncode != 0 and "division by zero" in done.stdout + done.stderr
