"""Corpora and prompts: where the text comes from, its train and held-out parts, and what a policy is asked.

A prompt is the last P tokens up to and including a speaker's heading ("ROMEO:\\n"); an answer is the speech
that follows, and the blank line behind a speech is the stop.
"""
import hashlib
import http.client
import json
import os
import re
import urllib.error
import urllib.request
from pathlib import Path

import torch

from utils.cli import atomic_write, die

DATA = Path(__file__).parent.parent / "data"
PLAY = DATA / "bell_of_merrow.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 8  # seconds, for the one download that this repository does
HEADING = re.compile(r"(?:\A|\n\n)([^\n:]{1,40}:\n)")


def load_corpus(name="auto"):
    """-> (text, where it came from). name: auto, shakespeare, play, or the path of a plain text file.

    auto is Shakespeare, or the offline play where it can't be had, and says so in one line.
    """
    if name == "play":
        return PLAY.read_text(encoding="utf-8"), PLAY.name
    if name in ("auto", "shakespeare"):
        path = find_shakespeare(required=name == "shakespeare")
        if path is None:
            print("Tiny Shakespeare is not here and can't be downloaded: using the offline play, "
                  f"data/{PLAY.name}")
            return PLAY.read_text(encoding="utf-8"), PLAY.name
        return path.read_text(encoding="utf-8"), "tinyshakespeare"
    if not Path(name).is_file():
        die(f"--data {name!r}: no such file; wanted auto, shakespeare, play or the path of a text file")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        die(f"--data {name} is no UTF-8 text (byte {error.start}): wanted a plain text file")
    if len(text) < 1000:
        die(f"--data {name} has {len(text)} characters: wanted at least 1,000 to learn from")
    return text, str(name)


def find_shakespeare(required):
    """Path of the checked file: in $NANOGRPO_DATA, in data/, else downloaded; None if it can't be had.

    Where it is required, that ends the program.
    """
    folders = [Path(os.environ["NANOGRPO_DATA"])] if os.environ.get("NANOGRPO_DATA") else []
    for folder in [*folders, DATA]:
        path = folder / "tinyshakespeare" / "input.txt"
        if path.is_file():
            check_sha256(path.read_bytes(), path)
            return path
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=TIMEOUT) as response:
            content = response.read()
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        if required:
            reason = " ".join(str(error).split())
            die(f"can't download Tiny Shakespeare ({reason}): put it at {DATA}/tinyshakespeare/input.txt, "
                "name the folder that holds tinyshakespeare/ in NANOGRPO_DATA, or use --data play")
        return None
    check_sha256(content, SHAKESPEARE_URL)
    atomic_write(DATA / "tinyshakespeare" / "input.txt", content)
    return DATA / "tinyshakespeare" / "input.txt"


def check_sha256(content, source):
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        die(f"{source} is not Tiny Shakespeare: {len(content)} bytes, SHA-256 {found[:12]}…, wanted "
            f"{SHAKESPEARE_SHA256[:12]}…. Delete it and try again, or use --data play.")


def split(text, held_out=0.1):
    """-> (train, held out): the last tenth is held out, as nanoGPT does."""
    cut = int(len(text) * (1 - held_out))
    return text[:cut], text[cut:]


def heading_prompts(text, tokenizer, prompt_len, source):
    """Every heading of the text with the tokens before it: int64 (number of prompts, prompt_len)."""
    ends = [m.end() for m in HEADING.finditer(text)]
    if not ends:
        die(f"{source} has no speaker headings: wanted lines such as 'ROMEO:' after a blank line, with the "
            "speech below")
    # 12 characters a token are plenty; a cut within a word changes only the first tokens, which are not used
    window = prompt_len * 12
    prompts = [tokenizer.encode(text[max(0, end - window):end])[-prompt_len:] for end in ends]
    prompts = [p for p in prompts if len(p) == prompt_len]
    if not prompts:
        die(f"{source} has no heading with {prompt_len} tokens up to its end: wanted a longer text or a "
            "smaller --prompt_len")
    return torch.tensor(prompts)


def read_jsonl(path, keys, flag):
    """Rows of a JSON-lines file, each with at least these string keys; errors name the line."""
    if not Path(path).is_file():
        die(f"{flag} {path}: no such file")
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        die(f"{flag} {path} is no UTF-8 text (byte {error.start}): wanted JSON lines")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            die(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})")
        missing = [k for k in keys if not (isinstance(row, dict) and isinstance(row.get(k), str))]
        if missing:
            die(f"{path}, line {number}: no text under {missing[0]!r}; wanted the keys {', '.join(keys)}")
        rows.append(row)
    if not rows:
        die(f"{flag} {path} is empty: wanted one JSON object a line with the keys {', '.join(keys)}")
    return rows


def left_pad(rows, length=None):
    """Lists of ids -> tokens (N, P), pad (N,) or None if no row needs any.

    P is `length`, or that of the longest row; rows that are longer keep their last P ids.
    """
    length = length or max(map(len, rows))
    rows = [row[-length:] for row in rows]
    pad = torch.tensor([length - len(row) for row in rows])
    tokens = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    return tokens, pad if pad.any() else None


def completions(tokens, mask, tokenizer):
    """The answers as text, without the blank line that ended them: tokens, mask (N, T) -> N strings."""
    answers = [row[m].tolist() for row, m in zip(tokens.cpu(), mask.cpu())]
    return [tokenizer.decode(answer).removesuffix("\n\n") for answer in answers]
