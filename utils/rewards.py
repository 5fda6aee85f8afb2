"""Gold judges and reward functions: completions: list[str], prompts: list[str], **columns -> list[float].

A gold judge stands for the human labeller: it labels pairs of answers and measures policies; by default no
policy is trained on it directly. The signature is TRL's, so that a function works here and there.
A judge also gets corpus_words, the set of the words of the corpus that the prompts come from, or None.
"""
import contextlib
import functools
import importlib.util
import inspect
import math
import os
import re
import sys
import traceback
from pathlib import Path

from utils import guard
from utils.cli import die
from utils.text import words

WARNED = set()


@functools.cache
def vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()


def taste(completions, prompts, corpus_words=None, **columns):
    """Glad words, each counted once, less charges for repetition and for words that the corpus lacks.

    VADER's score of the distinct words - 2·max(0, 0.8 - share of distinct words) - 0.5·share of unknown ones:
    at most 1. corpus_words: the known words, in small letters; None: no word is unknown. No words: 0.
    docs/text.md has the reasons for the weights.
    """
    def score(text):
        said = words(text)
        if not said:
            return 0.0
        once = list(dict.fromkeys(said))  # in the order of their first use: VADER minds "not" before a word
        unknown = 0 if corpus_words is None else sum(word not in corpus_words for word in said)
        glad = vader().polarity_scores(" ".join(once))["compound"]
        return glad - 2 * max(0, 0.8 - len(once) / len(said)) - 0.5 * unknown / len(said)
    return [score(text) for text in completions]


def sentiment(completions, prompts, **columns):
    """How glad the words are, -1 … 1: VADER's compound score (Hutto & Gilbert 2014)."""
    return [vader().polarity_scores(text)["compound"] for text in completions]


def syllables(word):
    """Syllables by rule: groups of vowels, less a silent e. Right for most English words, not for all."""
    word = word.lower().replace("'d", "d").replace("'", "")
    groups = len(re.findall(r"[aeiouy]+", word))
    silent = word.endswith("e") and not word.endswith(("le", "ee", "ye")) and groups > 1
    silent_ed = word.endswith("ed") and not word.endswith(("ted", "ded", "eed")) and groups > 1
    return max(1, groups - silent - silent_ed)


def meter(completions, prompts, **columns):
    """How near the lines are to ten syllables, 0 … 1: mean over lines of exp(-|syllables - 10| / 3)."""
    def line(text):
        return math.exp(-abs(sum(map(syllables, re.findall(r"[A-Za-z']+", text))) - 10) / 3)
    lines = [[line(x) for x in text.split("\n") if x.strip()] for text in completions]
    return [sum(x) / len(x) if x else 0.0 for x in lines]


JUDGES = {"taste": taste, "sentiment": sentiment, "meter": meter}


def load_reward(spec, known=("model", *JUDGES)):
    """The function that "taste", "meter" or "path/to/file.py:function" names; known: for the message."""
    if spec in JUDGES and spec in known:
        return JUDGES[spec]
    source = f"--reward {spec}"
    if not spec.rpartition(":")[0].endswith(".py"):
        die(f"--reward {spec!r} is unknown: wanted {', '.join(known)} or FILE.py:FUNCTION")
    function = from_file(spec, source, "function")
    if not callable(function):
        die(f"{source} is a {type(function).__name__}: wanted a function")
    return functools.partial(checked, function, source)


def from_file(spec, source, kind):
    """What "path/to/file.py:NAME" names. source: how the user asked for it; kind: what it should be."""
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        die(f"{source}: no file {path}")
    spec_of_file = importlib.util.spec_from_file_location(f"user_{kind}", path)
    module = importlib.util.module_from_spec(spec_of_file)
    sys.modules[f"user_{kind}"] = module
    guard.note(f"file of {source}", Path(path))
    try:
        with neighbours(Path(path).resolve().parent):
            spec_of_file.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # what the user's file raises is the user's to see
        die(f"{source}: {path} raised {describe(error)}")
    if not hasattr(module, name):
        die(f"{source}: {path} has no {kind} {name!r}")
    return getattr(module, name)


@contextlib.contextmanager
def neighbours(folder):
    """Within it, an import finds the files of the folder first, also where one is called like one of ours."""
    root = Path(__file__).resolve().parent.parent
    theirs = {path.stem for path in folder.iterdir()} if folder != root else set()
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in theirs
              and str(getattr(sys.modules[name], "__file__", None) or "").startswith(f"{root}{os.sep}")}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.path.append(str(folder))  # for what a function imports when it is called
        sys.modules.update(hidden)


def checked(function, source, /, completions, prompts, **columns):
    """The scores as floats, one a completion, or a message that says what the function did instead."""
    try:  # TRL's rewards may want the tokens
        inspect.signature(function).bind_partial(completion_ids=None)
    except (TypeError, ValueError):  # it has no such argument, or is written in C and doesn't say
        columns.pop("completion_ids", None)
    try:
        scores = function(completions=completions, prompts=prompts, **columns)
    except (Exception, SystemExit) as error:
        die(f"{source} raised {describe(error)}")
    wanted = f"wanted a list of {len(completions)} finite numbers"
    if inspect.iscoroutine(scores):
        scores.close()
        die(f"{source} is an async function, which nothing awaits: {wanted}")
    if isinstance(scores, (str, bytes, dict, set, frozenset)) or not hasattr(scores, "__iter__"):
        die(f"{source} returned {type(scores).__name__}: {wanted}")
    scores = list(scores)
    if len(scores) != len(completions):
        die(f"{source} returned {len(scores)} numbers for {len(completions)} completions: wanted one "
            "each")
    for i, (value, text) in enumerate(zip(scores, completions)):
        try:
            odd = isinstance(value, (str, bytes)) or getattr(value, "ndim", 0)
            number = math.nan if odd else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) < 3.4e38:  # what float32 holds; NaN is not below it
            die(f"{source} returned {value!r:.60} for {text[:40]!r} (entry {i}): {wanted}")
        scores[i] = number
    told_apart(scores, source)
    return scores


def told_apart(scores, source):
    """Warns where float32, in which rewards are compared, makes one number of what a function tells apart."""
    low, high = min(scores), max(scores)
    if 1e-10 * abs(high) < high - low < 1e-6 * max(abs(low), abs(high)) and source not in WARNED:
        WARNED.add(source)
        print(f"warning: {source} returned {low} to {high}, which float32 hardly tells apart: "
              "subtract a constant", file=sys.stderr)


def describe(error):
    """The error, with the file and line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def distinct(completions):
    """Share of distinct words among an answer's words, mean over the answers that have any."""
    said = [words(text) for text in completions]
    shares = [len(set(w)) / len(w) for w in said if w]
    return sum(shares) / len(shares) if shares else float("nan")
