"""Gold judges and reward functions: completions: list[str], prompts: list[str], **columns -> list[float].

A gold judge stands for the human labeller: it labels pairs of answers and measures policies; by default no
policy is trained on it directly. The signature is TRL's, so that a function works here and there.
"""
import functools
import importlib.util
import math
import re
import sys
import traceback
from pathlib import Path

from utils.cli import die


@functools.cache
def vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    return SentimentIntensityAnalyzer()


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


JUDGES = {"sentiment": sentiment, "meter": meter}


def load_reward(spec, known=("model", *JUDGES)):
    """The function that "sentiment", "meter" or "path/to/file.py:function" names; known: for the message."""
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
    try:
        spec_of_file.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises is the user's to see, with its place
        die(f"{source}: {path} raised {describe(error)}")
    if not hasattr(module, name):
        die(f"{source}: {path} has no {kind} {name!r}")
    return getattr(module, name)


def checked(function, source, /, completions, prompts, **columns):
    """The scores as floats, one a completion, or a message that says what the function did instead."""
    try:
        scores = function(completions=completions, prompts=prompts, **columns)
    except Exception as error:
        die(f"{source} raised {describe(error)}")
    try:
        values = [float(x) for x in scores]
    except (TypeError, ValueError):
        die(f"{source} returned {type(scores).__name__} {str(scores)[:40]}: wanted a list of "
            f"{len(completions)} numbers")
    if len(values) != len(completions):
        die(f"{source} returned {len(values)} numbers for {len(completions)} completions: wanted one each")
    for value, text in zip(values, completions):
        if not math.isfinite(value):
            die(f"{source} returned {value} for {text[:40]!r}: wanted a finite number")
    return values


def describe(error):
    """The error, with the file and line that raised it."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"


def distinct(completions):
    """Share of distinct words among an answer's words, mean over the answers that have any."""
    words = [re.findall(r"[a-z']+", text.lower()) for text in completions]
    shares = [len(set(w)) / len(w) for w in words if w]
    return sum(shares) / len(shares) if shares else float("nan")
