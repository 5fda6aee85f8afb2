"""The pages: links lead somewhere, commands parse, counts of lines are right, sentences are short.

README.md and docs/ are read as a code host shows them. A command line is parsed by the script's own `parse`,
in this process, and nothing runs. `mkdocs build --strict` is the last test.
"""
import contextlib
import functools
import importlib.util
import io
import os
import posixpath
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import unicodedata
import warnings
from pathlib import Path

import pytest
from helpers import ROOT

import utils.cli

PAGES = [ROOT / "README.md", ROOT / "lessons/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


# ---- a page's parts ----
@functools.cache
def parts(page):
    """-> lines outside of code blocks (number, text), and code blocks (first line's number, info, text)."""
    prose, blocks, fence, block = [], [], None, None
    for number, line in enumerate(page.read_text(encoding="utf-8").split("\n"), 1):
        opened = re.match(r"\s*(```+|~~~+)\s*(.*)", line)
        if fence is None and opened:
            fence, block = opened[1], (number + 1, opened[2].strip(), [])
            prose.append((number, ""))
        elif fence is not None and line.strip() == fence:
            blocks.append((block[0], block[1], "\n".join(block[2])))
            fence = None
        elif fence is not None:
            block[2].append(line)
        else:
            prose.append((number, line))
    assert fence is None, f"{page.name}: the code block at line {block[0]} has no end"
    return prose, blocks


def paragraphs(page):
    """Runs of prose lines -> (first line's number, text); each list item, heading and table row is one."""
    found, run = [], []

    def close():
        if run:
            found.append((run[0][0], "\n".join(line.strip() for _, line in run)))
            run.clear()
    for number, line in parts(page)[0]:
        begins = re.match(r"\s*([-*+] |\d+\. |\||#|>)", line)
        if begins or not line.strip():
            close()
        if line.strip():
            run.append((number, line))
        if re.match(r"\s*[|#]", line):
            close()
    close()
    return found


CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)", re.DOTALL)
TARGET = re.compile(r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|(?:src|href)=[\"']([^\"']+)")


def line_of(start, text, at):
    return start + text.count("\n", 0, at)


def links(page):
    """-> (line, target) of every link and picture, code apart."""
    for start, text in paragraphs(page):
        text = CODE.sub(lambda found: re.sub(r"[^\n]", "x", found[0]), text)
        for found in TARGET.finditer(text):
            yield line_of(start, text, found.start()), found[1] or found[2]


def code_spans(page):
    """-> (line, text) of every `code` in the prose, its line breaks as spaces."""
    for start, text in paragraphs(page):
        for found in CODE.finditer(text):
            yield line_of(start, text, found.start()), " ".join(found[2].split()).replace("\\|", "|")


# ---- links and anchors ----
def slug(heading):
    """The anchor that a code host gives a heading: letters, marks, decimal digits, "_", "-"; " " as "-"."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link's text
    text = re.sub(r"[*`]", "", text).strip().lower()
    good = ("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc")  # Unicode's categories
    return "".join(c for c in text if c in "- " or unicodedata.category(c) in good).replace(" ", "-")


@functools.cache
def anchors(page):
    found, seen = set(), {}
    for _, line in parts(page)[0]:
        heading = re.match(r"#{1,6}\s+(.+?)\s*#*$", line)
        if heading:
            name = slug(heading[1])
            found.add(f"{name}-{seen[name]}" if name in seen else name)
            seen[name] = seen.get(name, 0) + 1
        found |= set(re.findall(r"<a (?:name|id)=[\"']([^\"']+)", line))
    return found


def broken_link(page, target):
    """What is wrong with it, or None."""
    if re.match(r"[a-z][a-z+.-]*:", target):
        return None
    path, _, anchor = target.partition("#")
    if path.startswith("/"):
        return "begins at the root of a host"
    file = page if not path else page.parent / path
    if not file.exists():
        return "there is no such file"
    if not file.resolve().is_relative_to(ROOT):
        return "leads out of the repository"
    if anchor and file.suffix == ".md" and anchor not in anchors(file):
        return f"{file.name} has no such heading; it has {', '.join(sorted(anchors(file)))}"
    return None


@every_page
def test_links_and_anchors_lead_somewhere(page):
    wrong = [f"{page.relative_to(ROOT)}:{line}: {target}: {why}" for line, target in links(page)
             if (why := broken_link(page, target))]
    assert not wrong, "\n".join(wrong)


def test_slugs_are_those_of_a_code_host():
    assert slug("Speed, memory, several processes") == "speed-memory-several-processes"
    assert slug("What `--beta` does: β > 0") == "what---beta-does-β--0"
    assert slug("SFT: the reference π₀") == "sft-the-reference-π"  # a subscript is no decimal digit
    assert slug("[A link](x.md) and *stress*") == "a-link-and-stress"
    if importlib.util.find_spec("mkdocs"):  # and the site's are the same
        of_site = runpy.run_path(str(ROOT / "docs/hooks.py"))["slug"]
        for page in PAGES:
            for _, line in parts(page)[0]:
                if line.startswith("#"):
                    heading = re.sub(r"[*`]|\]\([^)]*\)|\[", "", line.lstrip("# "))
                    assert of_site(heading) == slug(line.lstrip("# "))


# ---- commands ----
class Parsed(BaseException):
    """Ends a script when its command line is read; no `except Exception` of a script catches it."""


HARMLESS = {"cd", "cp", "mv", "mkdir", "ls", "cat", "git", "export", "source", "wait", "diff", "echo", "head",
            "tail", "less", "hf", "true"}
KEYWORDS = {"for", "done", "while", "if", "fi", "else", "then"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9_]*|\$\{?\w+\}?")  # FILE, or a variable of the shell
# what mkdocs, torchrun and accelerate take before the script's name
LAUNCHERS = {"torchrun": 1, "accelerate": 2}


def test_the_parser_of_commands_is_strict():
    """It must see what it is for: else a page full of wrong commands would pass."""
    good = ["python sft.py --data play --steps 20", "make test",
            "torchrun --nproc_per_node=2 -- sft.py --seed 1",
            "OMP_NUM_THREADS=1 python plot.py --metric mean_r logs/*.csv && make check",
            "python sft.py --data FILE --steps N", "for s in 0 1; do python sft.py --seed $s; done",
            "pip install '.[vision]'", "bash benchmarks/results.sh cnn",
            "python -m pytest tests/test_docs.py"]
    bad = ["python sft.py --no_such_flag 1", "python no_such.py", "make no_such", "python -m vision.no_such",
           "torchrun -m vision.vlm_grpo --no_such 1", "bash benchmarks/results.sh no_such",
           "pip install '.[no_such]'", "pytest tests/no_such.py", "no_such_program",
           "marimo edit lessons/no_such.py", "marimo no_such lessons/play.py",
           "python sft.py --steps x",
           "make test && python sft.py --no_such_flag 1"]
    assert {line: what_is_wrong(line) for line in good} == dict.fromkeys(good)
    assert [line for line in bad if not what_is_wrong(line)] == []


def commands(page):
    """-> (line, command) of every line of a bash block, and of every code span that begins as one."""
    for start, info, text in parts(page)[1]:
        if info.split(" ")[0] not in ("bash", "sh", "shell", "console"):
            continue
        joined, first = "", start
        for number, line in enumerate(text.split("\n"), start):
            first = first if joined else number
            joined += line.removeprefix("$ ").removesuffix("\\")
            if not line.endswith("\\"):
                if joined.strip() and not joined.strip().startswith("#"):
                    yield first, joined.strip()
                joined = ""
    for line, span in code_spans(page):
        if re.match(r"(\w+=\S* )*((?:\.venv/bin/)?python3?|torchrun|accelerate launch|make|bash|pytest"
                    r"|pip install|uv run) ", span):
            yield line, span


@functools.cache
def what_is_wrong(line):
    """A shell line -> what is wrong with one of its commands, or None."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError as error:
        return f"no shell can read it ({error})"
    single, redirected = [], False
    for word in [*words, ";"]:
        if redirected:
            redirected = False
        elif set(word) <= set(";&|"):
            if single and (why := wrong_command(single)):
                return why
            single = []
        elif set(word) <= set("<>"):
            redirected = True
        else:
            single.append(word)
    return None


def wrong_command(words):
    words = [word for word in words if word not in ("…", "...")]
    while words and (words[0] in ("do", "then", "time") or re.match(r"\w+=", words[0])):
        words = words[1:]
    if not words or words[0] in HARMLESS | KEYWORDS:
        return None
    name, rest = words[0], words[1:]
    if name in LAUNCHERS:
        rest = rest[LAUNCHERS[name] - 1:]
        while rest and rest[0] != "-m" and not rest[0].endswith(".py"):
            rest = rest[1:]
        return wrong_python(rest) if rest else f"{name} starts no script"
    if re.fullmatch(r"(\.venv/bin/)?python3?", name):
        return wrong_python(rest)
    if name == "uv":
        return wrong_python(rest[1:])
    if name == "make":
        targets = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        odd = [w for w in rest if not w.startswith("-") and "=" not in w and w not in targets]
        return f"the Makefile has no {', '.join(odd)}" if odd else None
    if name == "bash":
        return wrong_bash(rest)
    if name == "pytest":
        return wrong_pytest(rest)
    if name == "marimo":
        return wrong_marimo(rest)
    if name == "pip":
        return wrong_pip(rest)
    return f"{name}: the test knows no such command"


def wrong_bash(rest):
    if not rest or not (ROOT / rest[0]).is_file():
        return f"there is no {' '.join(rest[:1]) or 'script'}"
    subjects = re.findall(r"^if want (\w+)", (ROOT / rest[0]).read_text(), re.MULTILINE)
    odd = [w for w in rest[1:] if w not in (*subjects, "all")]
    return f"{rest[0]} knows no {', '.join(odd)}" if odd else None


def wrong_pytest(rest):
    odd = [w for w in rest if w.startswith("tests/") and not (ROOT / w.partition("::")[0]).exists()]
    return f"there is no {', '.join(odd)}" if odd else None


def wrong_marimo(rest):
    good = len(rest) == 2 and rest[0] in ("edit", "run") and (ROOT / rest[1]).is_file()
    return None if good else f"marimo {' '.join(rest)}: wanted edit or run, and a notebook"


def wrong_pip(rest):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = [extra for w in rest for found in re.findall(r"^(?:\.|nanogrpo)\[(.+)\]$", w)
             for extra in found.split(",")]
    files = [after for before, after in zip(rest, rest[1:]) if before in ("-r", "-c")]
    odd = [e for e in asked if e not in extras] + [f for f in files if not (ROOT / f).is_file()]
    return f"there is no extra or file {', '.join(odd)}" if odd else None


def test_the_package_has_every_file():
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert sorted(modules) == sorted(path.stem for path in ROOT.glob("*.py"))


def wrong_python(rest):
    """What follows `python`: FILE.py WORDS, -m MODULE WORDS."""
    if rest[:1] == ["-c"]:
        return None
    if rest[:1] == ["-m"]:
        module, words = rest[1], rest[2:]
        known = {"pytest": wrong_pytest, "pip": wrong_pip, "venv": lambda _: None, "mkdocs": lambda _: None}
        if module in known:
            return known[module](words)
        script = ROOT / f"{module.replace('.', '/')}.py"
    else:
        if not rest or not rest[0].endswith(".py"):
            return f"python {' '.join(rest[:1])}: wanted a script or -m"
        script, words = ROOT / rest[0], rest[1:]
    if not script.is_file():
        return f"there is no {script.relative_to(ROOT)}"
    why = refusal(script, tuple(words))
    if why and any(PLACEHOLDER.fullmatch(w) for w in words):  # a placeholder may stand for a number
        why = refusal(script, tuple("1" if PLACEHOLDER.fullmatch(w) else w for w in words))
    return why


def refusal(script, words):
    """How the script's own `parse` refuses the words, or None; its main isn't reached."""
    source = script.read_text(encoding="utf-8")
    if not re.search(r"\bparse\(", source):  # a script of its own, such as micro_grpo.py
        odd = [w for w in words if w.startswith("-") and f'"{w.partition("=")[0]}"' not in source]
        return f"{script.name} has no {', '.join(odd)}" if odd else None
    real = utils.cli.parse

    def stop_after(*args, **kwargs):
        real(*args, **kwargs)
        raise Parsed

    argv, path, said = sys.argv, list(sys.path), io.StringIO()
    sys.argv, utils.cli.parse = [str(script), *words], stop_after
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(script), run_name="__main__")
    except Parsed:
        return None
    except SystemExit:
        lines = [line.strip("│ ").strip() for line in said.getvalue().splitlines()]
        message = " ".join(line for line in lines if re.search(r"\w", line))
        return f"{script.name} refuses it: {message[:300]}"
    finally:
        sys.argv, utils.cli.parse = argv, real
        sys.path[:] = path
    return f"{script.name} never reads its command line"


@every_page
def test_commands_parse(page):
    wrong = [f"{page.relative_to(ROOT)}:{line}: {command}\n    {why}" for line, command in commands(page)
             if (why := what_is_wrong(command))]
    assert not wrong, "\n".join(wrong)


@every_page
def test_flags_in_the_text_exist(page):
    """A `--flag` of a sentence or table is a field somewhere, or a string of some script."""
    others = {"help", "nproc_per_node", "master_port", "strict", "no_deps", "preset"}
    wrong = [f"{page.relative_to(ROOT)}:{line}: {flag}" for line, span in code_spans(page)
             for flag in re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", span)
             if flag.replace("-", "_") not in names_in_code() | others]
    assert not wrong, "no script has these flags:\n" + "\n".join(wrong)


@functools.cache
def names_in_code():
    folders = [(ROOT / name).rglob("*.py") for name in ("utils", "vision", "lessons", "benchmarks")]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder)]
    text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    fields = re.findall(r"^    (\w+): ", text, re.MULTILINE)
    fields += re.findall(r"\b(\w+)=\"", text)
    return set(fields) | {s.replace("-", "_") for s in re.findall(r"[\"'](?:--)?([\w-]+)[\"':=]", text)}


# ---- figures ----
# a figure that a command writes without naming it
WRITERS = {"results/exact.png": "benchmarks/exact.py", "results/gym.png": "results.sh gym",
           "results/learn.png": "results.sh learn",
           "results/scaling.png": "results.sh scaling"}
for view in ("desk", "phone", "dark", "print", "llm"):
    WRITERS[f"docs/report_{view}.png"] = "benchmarks/screenshots.py"


@every_page
def test_figures_have_a_command_on_their_page(page):
    typed = [command for _, command in commands(page)]
    wrong = []
    for line, target in links(page):
        path = posixpath.normpath(posixpath.join(page.parent.relative_to(ROOT).as_posix(), target))
        made = [c for c in typed if path in c or path in WRITERS and WRITERS[path] in c]
        if path.endswith((".png", ".svg")) and not made:
            wrong.append(f"{page.relative_to(ROOT)}:{line}: {path}: no command on this page makes it")
    assert not wrong, "\n".join(wrong)


# ---- README ----
def test_readme_is_one_page():
    text = PAGES[0].read_bytes()
    lines = text.count(b"\n")
    assert lines <= 130 and len(text) <= 9000, f"{lines} lines, {len(text)} bytes: wanted 130 and 9,000"


def test_the_reading_order_counts_lines_right():
    """The table of README.md with the columns `file` and `lines`."""
    header, rows, wrong = None, 0, []
    for number, line in parts(PAGES[0])[0]:
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            header = None
        elif header is None:
            header = [cell.lower() for cell in cells]
        elif {"file", "lines"} <= set(header) and not set(line) <= set("|-: "):
            row = dict(zip(header, cells))
            file = re.search(r"[\w/]+\.py", row["file"])
            rows += 1
            there = file and (ROOT / file[0]).is_file()
            n = len((ROOT / file[0]).read_text(encoding="utf-8").splitlines()) if there else None
            if str(n) != row["lines"].replace(",", ""):
                wrong.append(f"README.md:{number}: {row['file']} has {n} lines, not {row['lines']}")
    assert not wrong, "\n".join(wrong)
    assert rows >= 6, "README.md has no table of the reading order, with the columns `file` and `lines`"


# ---- language ----
ABBREVIATIONS = re.compile(r"\b(?:e\.g|i\.e|vs|al|cf|Dr|No|Fig|eq|[A-Z])\.$")
NUMBER = re.compile(r"(?<![\w.,:/-])[-−+~]?\d[\d,.]*(?:e-?\d+)?(?![\w/])")


def sentences(page):
    """-> (line, sentence): tables, headings, code and the targets of links apart."""
    for start, text in paragraphs(page):
        if re.match(r"[|#]", text) or re.fullmatch(r"(!\[[^\]]*\]\([^)]*\)\s*)+", text):
            continue
        text = re.sub(r"^\s*([-*+]|\d+\.|>)\s+", "", text)  # a list's marker
        text = CODE.sub(lambda found: "code" + "\n" * found[0].count("\n"), text)
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
        begin = 0
        for found in re.finditer(r"[.!?][\"')*_]*(?=\s|$)|$", text):
            piece = text[begin:found.end()]
            if ABBREVIATIONS.search(text[begin:found.start() + 1]) and found.end() < len(text):
                continue
            if piece.strip():
                yield line_of(start, text, begin + len(piece) - len(piece.lstrip())), " ".join(piece.split())
            begin = found.end()


@every_page
def test_sentences_are_short(page):
    """At most 28 words and 5 numbers. The style asks for 20 words and 2 numbers; this catches the worst."""
    wrong = []
    for line, sentence in sentences(page):
        words = [word for word in sentence.split() if re.search(r"\w", word)]
        numbers = NUMBER.findall(sentence)
        if len(words) > 28 or len(numbers) > 5:
            size = f"{len(words)} words, {len(numbers)} numbers"
            wrong.append(f"{page.relative_to(ROOT)}:{line}: {size}: {sentence}")
    assert not wrong, "\n".join(wrong)


MACHINE = re.compile(r"(?<![\w.])/(?:work|home|root|Users|mnt|opt|srv|tmp)/|\b[A-Z]:\\\w|\bpypi\."
                     r"|pythonhosted|anaconda|download\.pytorch|npmjs|\bindex-url\b|crates\.io|artifactory",
                     re.IGNORECASE)


@every_page
def test_no_machine_and_no_registry_is_named(page):
    wrong = [f"{page.relative_to(ROOT)}:{number}: {found[0]}"
             for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
             if (found := MACHINE.search(line))]
    assert not wrong, "\n".join(wrong)


@every_page
def test_both_renderers_see_the_same_lists_and_tables(page):
    """A site's Markdown wants a blank line before a list or table, and four spaces to nest it."""
    wrong, before = [], ""
    for number, line in parts(page)[0]:
        for kind, mark in (("list", r"\s*([-*+]|\d+\.) "), ("table", r"\|")):
            if re.match(mark, line) and before.strip() and not re.match(r"\s*([-*+]|\d+\.) |\||\s", before):
                wrong.append(f"{page.relative_to(ROOT)}:{number}: no blank line before this {kind}: {line}")
        if re.match(r" {1,3}([-*+]|\d+\.) ", line):
            wrong.append(f"{page.relative_to(ROOT)}:{number}: nested by fewer than four spaces: {line}")
        before = line
    assert not wrong, "\n".join(wrong)


# ---- the site ----
def test_the_site_builds_in_strict_mode(tmp_path):
    for package in ("mkdocs", "material"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} isn't installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # material's notice about its successor
    run = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    assert "WARNING" not in run.stderr, run.stderr[-3000:]
    home = (tmp_path / "site/index.html").read_text(encoding="utf-8")
    assert "Group Relative Policy Optimization" in home
    for link in re.findall(r"(?:src|href)=\"([^\"#:]+)(?:#[^\"]*)?\"", home):
        assert (tmp_path / "site" / link).exists(), f"the first page links to {link}, which isn't there"
