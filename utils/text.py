"""Corpora and prompts: where the text comes from, its parts for training and for evaluation, and the prompts.

A prompt is the last P tokens up to and including a speaker's heading ("ROMEO:\\n"); an answer is the speech
that follows, and the blank line behind a speech is the stop.
"""
import hashlib
import http.client
import json
import os
import re
import urllib.request
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from utils.cli import atomic_write, die
from utils.guard import note

DATA = Path(__file__).parent.parent / "data"
PLAY = DATA / "bell_of_merrow.txt"
SHAKESPEARE = "tinyshakespeare/input.txt"
SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 8  # seconds, for the one download that this repository does
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")  # letters, with apostrophes between them
HEADING = re.compile(r"(?:\A|\n\n)([^\n:]{1,40}:\n)")


def load_corpus(name="auto"):
    """-> (text, its source). name: auto (Shakespeare, else the play), shakespeare, play, or a text file."""
    if name in ("auto", "shakespeare"):
        try:
            return tiny_shakespeare(), "tinyshakespeare"
        except (OSError, http.client.HTTPException) as error:  # urllib's own errors are OSErrors
            if name == "shakespeare":
                why = " ".join(str(error).split())
                die(f"can't download Tiny Shakespeare ({why}): put it at {DATA}/{SHAKESPEARE}, name the "
                    "folder that holds tinyshakespeare/ in NANOGRPO_DATA, or use --data play")
        print(f"Tiny Shakespeare can't be found or downloaded: using the offline play, data/{PLAY.name}")
    if name in ("auto", "play"):
        note("text of --data", PLAY)
        return PLAY.read_text(encoding="utf-8"), PLAY.name
    text = read_text("--data", name, "auto, shakespeare, play or the path of a UTF-8 text file")
    if len(text) < 1000:
        die(f"--data {name} has {len(text)} characters: wanted at least 1,000 to learn from")
    return text, name


def tiny_shakespeare():
    """The checked text, found in $NANOGRPO_DATA or data/, else downloaded; raises what the download does."""
    places = [Path(folder, SHAKESPEARE) for folder in (os.environ.get("NANOGRPO_DATA") or DATA, DATA)]
    source = next((path for path in places if path.is_file()), SHAKESPEARE_URL)
    if source == SHAKESPEARE_URL:
        with urllib.request.urlopen(source, timeout=TIMEOUT) as response:
            content = response.read()
    else:
        content = source.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        die(f"{source} is not Tiny Shakespeare: {len(content)} bytes, SHA-256 {digest[:12]}…, wanted "
            f"{SHAKESPEARE_SHA256[:12]}…. Delete it and try again, or use --data play.")
    if source == SHAKESPEARE_URL and os.access(DATA if DATA.exists() else DATA.parent, os.W_OK):
        atomic_write(places[-1], content)
    note("text of --data", content)
    return content.decode()


def read_text(flag, path, wanted):
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a byte order mark
    except (OSError, ValueError) as error:
        die(f"{flag} {path} can't be read ({error}): wanted {wanted}")
    note(f"file of {flag}", text)
    return text


def split(text):
    """-> (train, held out): the last tenth is held out, as nanoGPT does."""
    cut = int(len(text) * 0.9)
    return text[:cut], text[cut:]


def words(text):
    """The words of a text in small letters and in order: "'Tis thy bell's" -> ["tis", "thy", "bell's"]."""
    return WORD.findall(text.lower())


def heading_prompts(text, tokenizer, prompt_len, source):
    """Every heading of the text with the tokens before it: int64 (number of prompts, prompt_len)."""
    prompts = []
    for end in (heading.end() for heading in HEADING.finditer(text)):
        # 12 characters a token are plenty; a cut within a word changes only the first tokens, which go unused
        ids = tokenizer.encode(text[max(0, end - prompt_len * 12):end])[-prompt_len:]
        if len(ids) == prompt_len:
            prompts.append(ids)
    if not prompts:
        die(f"{source} has no speaker headings at {prompt_len} tokens or more: wanted lines such as 'ROMEO:' "
            "after a blank line, with the speech below")
    return torch.tensor(prompts)


def read_jsonl(path, keys, flag):
    """Rows of a JSON-lines file, each with at least these string keys; errors name the line."""
    wanted = f"one JSON object a line, UTF-8, with text under the keys {', '.join(keys)}"
    rows = []
    for number, line in enumerate(read_text(flag, path, wanted).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            die(f"{path}, line {number}: not JSON ({error.msg}, column {error.colno})")
        except (ValueError, RecursionError) as error:  # half a character, a number too long, too deep a nest
            die(f"{path}, line {number}: not usable ({str(error)[:80]})")
        for key in keys:
            if not isinstance(row, dict) or not isinstance(row.get(key), str):
                die(f"{path}, line {number}: no text under {key!r}; wanted {wanted}")
        rows.append(row)
    if not rows:
        die(f"{flag} {path} is empty: wanted {wanted}")
    return rows


def left_pad(rows):
    """Lists of ids -> tokens (N, P), P that of the longest row; pad (N,), or None if no row needs any."""
    tokens = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_side="left")
    pad = tokens.shape[1] - torch.tensor([len(row) for row in rows])
    return tokens, pad if pad.any() else None


def completions(tokens, mask, tokenizer):
    """The answers as text, without the stop that ended them: tokens, mask (N, T) -> N strings."""
    answers = [row[m].tolist() for row, m in zip(tokens.cpu(), mask.cpu())]
    return [tokenizer.decode(answer).removesuffix(tokenizer.stop_text) for answer in answers]


# ---- prompts ----
@dataclass
class Prompts:
    tokens: torch.Tensor                # (M, P), padded on the left
    pad: torch.Tensor | None            # (M,) padding tokens a row, None if there are none
    texts: list[str]
    columns: dict[str, list]            # further keys of a user's JSONL: they reach the reward function
    corpus_words: frozenset | None = None  # of the corpus that they come from; a judge gets them

    def draw(self, n, generator):
        """The indices of n prompts, all different where there are enough."""
        index = torch.randperm(len(self.texts), generator=generator)[:n]
        return index if len(index) == n else torch.randint(len(self.texts), (n,), generator=generator)

    def pick(self, index, repeat=1):
        """The rows `index`, each `repeat` times, its copies side by side."""
        index = index.repeat_interleave(repeat)
        rows = index.tolist()
        return Prompts(self.tokens[index], None if self.pad is None else self.pad[index],
                       [self.texts[i] for i in rows],
                       {k: [v[i] for i in rows] for k, v in self.columns.items()}, self.corpus_words)

    def joined(self, other):
        """These rows, then the other's."""
        pad = None if self.pad is None else torch.cat([self.pad, other.pad])
        columns = {name: values + other.columns[name] for name, values in self.columns.items()}
        return Prompts(torch.cat([self.tokens, other.tokens]), pad, self.texts + other.texts, columns,
                       self.corpus_words)


def load_prompts(source, data, tokenizer, prompt_len):
    """-> (train, held out) Prompts: the corpus's headings, or a user's JSONL (a tenth of it is held out)."""
    if not source:
        text, name = load_corpus(data)
        names = f"the first nine tenths of {name}", f"the held-out last tenth of {name}"
        parts = [heading_prompts(part, tokenizer, prompt_len, of) for part, of in zip(split(text), names)]
        known = frozenset(words(text))
        return [Prompts(p, None, [tokenizer.decode(row) for row in p.tolist()], {}, known) for p in parts]
    rows = read_jsonl(source, ("prompt",), "--prompts")
    every = as_prompts(rows, tokenizer, f"--prompts {source}")
    return list(map(every.pick, split_by_prompt(every.texts, torch.Generator().manual_seed(0), "--prompts")))


def as_prompts(rows, tokenizer, source, short=None):
    """Dicts with a `prompt` and the same other keys -> Prompts. source: where they come from, for messages.

    short: the key of a shorter form, which a policy without a chat template reads instead.
    """
    tokens, pad = left_pad([tokenizer.encode_prompt(row["prompt"], row.get(short)) or [0] for row in rows])
    keys = [k for k in rows[0] if k != "prompt"]
    for key in {"prompts", "completions", "completion_ids"} & set(keys):
        die(f"{source}: the key {key!r} is an argument of every reward function: rename it")
    for number, row in enumerate(rows, 1):
        if set(row) - {"prompt"} != set(keys):
            die(f"{source}, row {number}: keys {sorted(row)} differ from the first row's")
    return Prompts(tokens, pad, [row["prompt"] for row in rows], {k: [row[k] for row in rows] for k in keys})


def split_by_prompt(prompts, generator, flag):
    """-> row numbers (train, held out), shuffled: about a tenth is held out, no prompt is in both."""
    order = torch.randperm(len(prompts), generator=generator).tolist()
    count, wanted, held, rows = Counter(prompts), max(1, len(prompts) // 10), set(), 0
    for prompt in dict.fromkeys(prompts[i] for i in order):
        if rows < wanted and rows + count[prompt] <= max(2 * wanted, len(prompts) // 3):
            held.add(prompt)
            rows += count[prompt]
    if len(count) > 1 and held:
        return [torch.tensor([i for i in order if (prompts[i] in held) == side]) for side in (False, True)]
    print(f"{flag}: a prompt has more than a third of the rows, so training and held-out rows share prompts")
    return torch.tensor(order[wanted:] or order), torch.tensor(order[:wanted])
