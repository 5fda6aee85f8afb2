"""Fuzz: whatever a user's file holds, our readers read it, or refuse it in one line with exit code 2."""
import contextlib
import io
import json
import math
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reward_model
from utils import checkpoint, figure, text
from utils.tokenizer import Tokenizer

FUZZ = settings(max_examples=500, deadline=timedelta(seconds=2), derandomize=True,
                suppress_health_check=[HealthCheck.too_slow])
FOLDER = tempfile.TemporaryDirectory(prefix="nanogrpo-fuzz-")
FILE = Path(FOLDER.name, "file")


def answer(read, content):
    """read() of a file that holds this content: what it returns, or None after one line on stderr."""
    FILE.write_bytes(content)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return read()
    except SystemExit as left:
        message = said.getvalue().rpartition("error: ")[2]
        assert left.code == 2 and message.endswith("\n") and len(message.splitlines()) == 1, message


# ---- JSON lines, and pairs in them ----
PIECES = st.sampled_from([*'{}[]",:\\ \n', "\r\n", "\u2028", "\x00", "\ufeff", '"prompt"', '"prompt": "a"',
                          '"\\ud800"', "1e999", "NaN", "null", "9" * 5000, "[" * 2000])
ANY = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just([])
TEXTS = st.text(max_size=12) | st.sampled_from(["", " ", "a", "a\u2028b", "\n\n", "\ud800"])
OURS = st.text("ab \n", max_size=3) | st.just("a" * 300)  # what the tokenizer below knows


def rows(*keys):
    """JSON lines of objects, in which a key may be missing and a value may be anything."""
    good = st.fixed_dictionaries(dict.fromkeys(keys, TEXTS), optional={"other": ANY})
    row = st.fixed_dictionaries({}, optional={key: TEXTS | ANY for key in keys})
    lines = st.lists(good, min_size=1, max_size=4) | st.lists(good | row | ANY, max_size=4)
    return lines.map(lambda rows: "\n".join(map(json.dumps, rows)))


def encoded(texts):
    return texts.map(lambda text: text.encode(errors="surrogatepass"))


NOISE = st.binary(max_size=60) | encoded(st.lists(PIECES, max_size=30).map("".join))


@FUZZ
@given(NOISE | encoded(rows("prompt")))
def test_any_jsonl_is_read_or_refused(content):
    read = answer(lambda: text.read_jsonl(FILE, ("prompt",), "--prompts"), content)
    for row in read or []:
        assert isinstance(row["prompt"], str)
        json.dumps(row, ensure_ascii=False).encode()


@FUZZ
@given(st.lists(st.fixed_dictionaries({"prompt": st.text()}), min_size=1, max_size=4))
def test_what_json_writes_is_what_is_read(wanted):
    content = "".join(json.dumps(row) + "\n" for row in wanted).encode()
    if "\\ud" not in content.decode():  # half a character is refused
        assert answer(lambda: text.read_jsonl(FILE, ("prompt",), "--prompts"), content) == wanted


CHARACTERS = Tokenizer("char", list("ab \n"))
PAIR = st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), OURS))
PAIRS = st.lists(PAIR, max_size=3).map(lambda pairs: "\n".join(map(json.dumps, pairs)))


@FUZZ
@given(NOISE | encoded(rows("prompt", "chosen", "rejected")) | encoded(PAIRS))
def test_any_pairs_are_read_or_refused(content):
    pairs = answer(lambda: reward_model.read_pairs(FILE, CHARACTERS, 64), content)
    if pairs:
        M, two, length = pairs.tokens.shape
        assert two == 2 and length <= 64 and pairs.mask.shape[:2] == (M, 2) and pairs.mask.any(2).all()
        answers = pairs.tokens[:, :, -pairs.mask.shape[2]:].where(pairs.mask, -1)
        assert not (answers[:, 0] == answers[:, 1]).all(1).any()


# ---- CSVs ----
CELLS = st.sampled_from(["", "0", "1", "-2.5", "1e400", "nan", "inf", "x", '"', '"a,b"', "1,5", "0x10",
                         "9" * 400, "\x00", "true", "2026-01-01", "$x$", " 3 "]) | st.floats().map(str)
TABLES = st.tuples(st.sampled_from([",", ";", "\t"]), st.sampled_from(["\n", "\r\n", "\r", "\x0b"]),
                   st.lists(st.lists(CELLS | st.sampled_from(["step", "kl"]), max_size=4), max_size=6),
                   st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"])).map(
    lambda t: ("step,kl" * (len(t[2]) % 2) + t[1] + t[1].join(map(t[0].join, t[2]))).encode(t[3], "replace"))


@FUZZ
@given(st.binary(max_size=80) | TABLES)
def test_any_csv_is_drawn_or_refused(content):
    frame = answer(lambda: figure.read_csv(FILE), content)
    for name in frame if frame is not None else ():
        curve = answer(lambda: figure.curve(frame, name, frame.columns[0]), content)
        assert curve is None or all(map(math.isfinite, [*curve[0], *curve[1]]))


@settings(FUZZ, max_examples=100)
@given(st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=8))
def test_a_table_of_numbers_is_read_as_it_is(values):
    content = "step,kl\n" + "".join(f"{i},{value!r}\n" for i, value in enumerate(values))
    assert answer(lambda: figure.read_csv(FILE), content.encode()).kl.tolist() == values


# ---- checkpoints ----
def checkpoint_bytes():
    parts = {"config": {"n": 1}, "tokenizer": {"name": "char"}, "model": {"w": torch.arange(40.0)}}
    checkpoint.write(FILE, "policy", **parts)
    return FILE.read_bytes()


WHOLE = checkpoint_bytes()


@FUZZ
@given(st.lists(st.integers(0, 8 * len(WHOLE) - 1), max_size=3), st.integers(-2 * len(WHOLE), len(WHOLE)))
def test_a_damaged_checkpoint_is_refused_or_as_it_was(flips, end):
    """Bits are flipped; end: where the file is cut, below 0 nowhere."""
    damaged = bytearray(WHOLE)
    for place in flips:
        damaged[place // 8] ^= 1 << place % 8
    content = answer(lambda: checkpoint.load(FILE, "policy", "x"), damaged[:end] if end >= 0 else damaged)
    if content:
        assert content["config"] == {"n": 1} and content["tokenizer"] == {"name": "char"}
        assert content["model"]["w"].tolist() == list(range(40))
