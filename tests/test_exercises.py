"""docs/exercises.md: every solution is taken from the page, run, and compared with the page's own tables.

A solution is a row of code blocks. A `diff` begins a run in a fresh copy of the repository's files; patches
alone mean that micro_grpo.py is run. The table of a run says what is printed, and between which numbers.
"""
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, quiet_signals

PAGE = ROOT / "docs/exercises.md"
COPIED = ("*.py", "utils/*.py")


def exercises():
    """-> {number: its text}; 0 is what stands before exercise 1."""
    parts = re.split(r"^## (\d+)\. .*$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {0: parts[0]} | {int(number): text for number, text in zip(parts[1::2], parts[2::2])}


def tables(text):
    """-> for each table with the columns printed, from, to: {what is printed: (from, to)}."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("| printed |"):
            found.append({})
        elif found and line.startswith("| ") and len(cells) == 4:
            found[-1][cells[0]] = (number(cells[1]), number(cells[2]))
    return found


def number(text):
    return float(text.replace("%", "").replace(",", "").replace("−", "-"))


def runs(text):
    """-> for each run its blocks (kind, code); kind: diff, bash, python, or the name of a file to save."""
    found = []
    for block in re.finditer(r"^```(\w+)\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL):
        (language, code), before = block.groups(), text[:block.start()].rstrip().rpartition("\n")[2]
        if language not in ("diff", "python", "bash") or "pip install" in code:
            continue
        name = re.fullmatch(r"`(\w+\.py)`:", before)
        if language == "diff" or not found:
            found.append([])
        found[-1].append((name[1] if name else language, code + "\n"))
    return found


@contextlib.contextmanager
def modules_of(folder):
    """Imports find the folder's modules, and none that is loaded; afterwards all is as before."""
    names = {path.stem for path in ROOT.glob("*.py")} | {"utils"}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] in names}
    path = list(sys.path)

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in names]:
            del sys.modules[name]
    forget()
    sys.path[:] = [str(folder), *(entry for entry in path if Path(entry or ".").resolve() != ROOT)]
    try:
        yield
    finally:
        forget()
        sys.modules.update(before)
        sys.path[:] = path


def run_script(folder, words):
    """Runs `python WORDS` in the folder, in this process: a new one costs seconds of imports."""
    argv, sys.argv = sys.argv, words
    said = io.StringIO()
    try:
        with modules_of(folder), contextlib.redirect_stdout(said), quiet_signals():
            runpy.run_path(str(folder / words[0]), run_name="__main__")
    finally:
        sys.argv = argv
    return said.getvalue()


def solve(blocks, folder, seed=0):
    """Carries out the blocks of one run in a copy of the repository's files -> all that was printed."""
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / path.relative_to(ROOT))
    printed = ""
    for kind, code in blocks:
        if kind == "diff":
            done = subprocess.run(["git", "apply", "-"], input=code, cwd=folder, capture_output=True,
                                  text=True)
            assert done.returncode == 0, f"the patch doesn't fit: {done.stderr}"
        elif kind == "bash":
            for line in code.replace("\\\n", "").splitlines():
                python, *words = shlex.split(line)
                assert python == "python"
                printed += run_script(folder, [*words, "--seed", str(seed)])
        else:
            name = "solution.py" if kind == "python" else kind
            (folder / name).write_text(code, encoding="utf-8")
            printed += run_script(folder, [name, str(seed)]) if kind == "python" else ""
    if {kind for kind, _ in blocks} == {"diff"}:
        printed += run_script(folder, ["micro_grpo.py", str(seed)])
    return printed


def value_of(name, printed):
    """The number that is printed last behind a name."""
    found = re.findall(rf"(?:^|\s){re.escape(name)}:? +(-?[\d.]+)", printed, re.MULTILINE)
    assert found, f"{name!r} isn't printed:\n{printed}"
    return float(found[-1])


# ---- the page itself ----
def test_there_are_twelve_with_a_number_and_a_solution_for_each():
    texts = exercises()
    assert list(texts) == list(range(13))
    for given, text in texts.items():
        assert runs(text) and len(runs(text)) == len(tables(text)), f"exercise {given}"
        assert all(tables(text)) and text.count("<details markdown=\"1\">") == text.count("</details>")
        assert given == 0 or ("**Guess.**" in text and re.search(r"\*(\d+ minutes|An evening), `", text))


def test_every_number_lies_in_its_range_on_the_page():
    """The last column has what three seeds gave."""
    for text in exercises().values():
        for line in re.findall(r"^\| `.*\|$", text, re.MULTILINE):
            _, low, high, seen = [cell.strip() for cell in line.strip("|").split("|")]
            values = [] if seen == "exact" else [number(value) for value in seen.split(", ")]
            assert number(low) <= number(high) and seen == "exact" or len(values) == 3, line
            assert all(number(low) <= value <= number(high) for value in values), line


def test_the_unchanged_file_is_outside_of_the_tables():
    """Else a solution without its change would pass: of each table, a row that all three seeds miss."""
    texts = exercises()
    rows = re.findall(r"^\| `(.*?)` \| .* \| (.*?) \|$", texts[0], re.MULTILINE)
    plain = {name: [number(value) for value in seen.split(", ")] for name, seen in rows}
    compared = 0
    for given in (1, 2, 3, 4, 6):
        for table in tables(texts[given]):
            shared = plain.keys() & table.keys()
            compared += bool(shared)
            missed = [name for name in shared
                      if not any(table[name][0] <= value <= table[name][1] for value in plain[name])]
            assert missed or not shared, f"exercise {given}: {table}"
    assert compared == 7


# ---- the solutions ----
SECONDS = {8, 9, 10}  # exercises that take no longer than a second; the others train something


@pytest.mark.parametrize("given", [pytest.param(n, marks=[] if n in SECONDS else pytest.mark.slow)
                                   for n in range(13)])
def test_a_solution_prints_what_the_page_expects(given, tmp_path, monkeypatch):
    text = exercises()[given]
    for index, (blocks, rows) in enumerate(zip(runs(text), tables(text))):
        folder = tmp_path / str(index)
        folder.mkdir()
        monkeypatch.chdir(folder)
        printed = solve(blocks, folder)
        wrong = {name: value for name, (low, high) in rows.items()
                 if not low <= (value := value_of(name, printed)) <= high}
        assert not wrong, f"exercise {given}: {wrong}, wanted {rows}; printed:\n{printed}"
