"""What every command line of this repository shares: clear errors, presets, atomic files, Ctrl-C."""
import argparse
import contextlib
import dataclasses
import importlib
import inspect
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import typing
from pathlib import Path

import utils

INPUTS = {}  # {what was read: its SHA-256} since parse(), by guard.py


def die(message):
    """Says what was wrong, what was wanted and what to do, on stderr in one line; exit code 2."""
    long = len(message) > 1500  # it quotes a file whose first line is a megabyte
    print(f"error: {message[:1000]} … {message[-300:]}" if long else f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def need(module, extra):
    """Imports an optional package, or names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        die(f"this needs the package {error.name!r}, which isn't installed: pip install '.[{extra}]'")


@contextlib.contextmanager
def impatient(seconds=15):
    """A download within it fails after so many seconds without an answer, instead of never."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The least value of a flag, beside its field: `group_size: Annotated[int, AtLeast(2)] = 8`."""
    low: float


@dataclasses.dataclass
class RunFlags:
    """What most training runs take."""
    # ---- the task ----
    track: typing.Literal["none", "tensorboard", "wandb"] = "none"  # the same numbers there
    resume: bool = False  # go on from --out
    overwrite: bool = False  # begin anew in a finished run's place
    # ---- speed and memory: the algorithm stays the same ----
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: typing.Literal["auto", "fp32", "bf16"] = "auto"  # of the matrix products


def parse(args_class, presets=None, default=None):
    """Fills args_class from the command line; --preset NAME, at any place, picks one of `presets`.

    args_class is a dataclass. Its banners (`# ---- the task ----`) are the groups of --help, its ALIASES the
    historical names of flags, its AtLeast marks the least values. A bad value ends with exit code 2.
    """
    import tyro
    utils.take_signals(utils.stop)  # all is imported
    INPUTS.clear()
    rest, default, prog = sys.argv[1:], default or args_class(), program()
    rest = canonical_names(rest, getattr(args_class, "ALIASES", {}))
    if presets:
        first = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
        first.add_argument("--preset", choices=presets)
        first.error = lambda message: die(f"{message}: wanted one of {', '.join(presets)}")
        known, rest = first.parse_known_args(rest)
        default = presets.get(known.preset, default)
    about = sys.modules[args_class.__module__].__doc__ or ""
    about += "".join(f"\n--preset {name}" for name in presets or ())
    given, values = tyro.cli(flag_groups(args_class, default), prog=prog, args=rest, use_underscores=True,
                             description=about), {}
    for name, value in vars(given).items():
        values |= vars(value) if dataclasses.is_dataclass(value) else {name: value}
    args = args_class(**values)
    for name, hint in typing.get_type_hints(args_class, include_extras=True).items():
        at_least(args, **{name: mark.low for mark in getattr(hint, "__metadata__", ())
                          if isinstance(mark, AtLeast)})
    for name in ("out", "log"):
        if getattr(args, name, name) == "":
            die(f"--{name} is empty: wanted the name of a {'folder' if name == 'out' else 'file'}")
    if not 0 <= getattr(args, "seed", 0) <= 10**12:  # a million steps' generators must fit 64 bits
        die(f"--seed {args.seed}: wanted 0 to {10**12:,}")
    return args


def canonical_names(words, aliases):
    """The words of a command line with each historical flag under its canonical name.

    aliases: {"grpo_steps": "steps"}, or {"use_amp": "dtype=bf16"} for a flag that is a value of another.
    Two names of one flag with different values are refused.
    """
    result, given = [], {}  # given: {canonical name: {its name as typed: the values behind it}}
    values = []
    for word in words:
        if not word.startswith("--"):
            result.append(word)
            values.append(word)
            continue
        typed, _, value = word.partition("=")
        old = typed[2:].replace("-", "_")  # both spellings are one name
        name, _, meant = aliases.get(old, old).partition("=")
        values = [word for word in (value, meant) if word]
        result += [f"--{name}" if old in aliases else typed, *values]
        given.setdefault(name, {})[f"--{old}"] = values
    for name, spellings in given.items():
        if len({tuple(values) for values in spellings.values()}) > 1:
            both = " and ".join(" ".join([typed, *values]) for typed, values in spellings.items())
            die(f"{both}: these are names of one flag, --{name}. Give one of them")
    return result


def flag_groups(args_class, default):
    """A class with a dataclass for each banner in args_class's source, for --help; others stay alone."""
    import tyro
    hints = typing.get_type_hints(args_class, include_extras=True)
    fields = {field.name for field in dataclasses.fields(args_class)}
    banner, members, helps = None, {}, {}
    parts_of_class = [part for part in args_class.__mro__ if dataclasses.is_dataclass(part)]
    for line in "".join(map(inspect.getsource, parts_of_class)).splitlines():
        title, flag = re.match(r"\s+# ---- (.+?) ----", line), re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if title:
            banner = title[1]
        elif flag and flag[1] in fields - set(helps):  # a class may have another default than its base
            members.setdefault(banner, []).append(flag[1])
            helps[flag[1]] = flag[2] or ""
    old_names = {new.partition("=")[0]: old for old, new in getattr(args_class, "ALIASES", {}).items()}

    def member(name):
        marks = getattr(hints[name], "__metadata__", ())
        low = "".join(f"; at least {mark.low}" for mark in marks if isinstance(mark, AtLeast))
        old = f"; formerly --{old_names[name]}" if name in old_names else ""
        about = tyro.conf.arg(help=(helps[name] + low + old).removeprefix("; ") or None)
        value = dataclasses.field(default_factory=lambda: getattr(default, name))
        return name, typing.Annotated[hints[name], about], value

    parts = []
    for banner, names in members.items():
        alone = [name for name in names if isinstance(getattr(default, name), dict)]  # --trl.NAME has a dot
        if banner:
            group = dataclasses.make_dataclass("Group", [member(name) for name in names if name not in alone])
            about = tyro.conf.arg(help=banner[0].upper() + banner[1:] + ".")  # else tyro reads sources for it
            title = re.sub(r"\W+", "_", banner.partition(":")[0].removeprefix("the "))
            hint = typing.Annotated[tyro.conf.OmitArgPrefixes[group], about]
            parts += [(title, hint, dataclasses.field(default_factory=group))]
        parts += [member(name) for name in (alone if banner else names)]
    return dataclasses.make_dataclass("Flags", parts)


def at_least(args, **least):
    """Refuses fields of the arguments that are below their least useful value (None is let through)."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            die(f"--{name} {value} is too small: wanted at least {low}")


@contextlib.contextmanager
def refusing(kinds=ValueError, what=""):
    """Turns errors of these kinds about the user's arguments into a clear message, which `what` opens."""
    try:
        yield
    except kinds as error:
        die(what + " ".join(str(error).split()))


@contextlib.contextmanager
def writing(path):
    """Turns the ways in which a write can fail (a full disk, no permission) into a clear message."""
    try:
        yield
    except OSError as error:
        die(f"can't write {path}: {error.strerror or error}. Free some space or name another place.")


def atomic_write(path, content):
    """Writes bytes, or lets content(file) write; after a kill there is the old file or the new, whole."""
    named, path = path, Path(os.path.realpath(path))  # a link stays, its target is written
    if path.exists() and not path.is_file():  # a rename would replace /dev/null itself
        die(f"can't write {named}: it is no regular file. Name another place.")
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(named):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(tmp, "wb") as file:
                content(file) if callable(content) else file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)


class Interrupt:
    """Turns Ctrl-C, SIGTERM and SIGHUP into a flag that the loop reads after a step.

    A second one ends at once. One second must lie between: a launcher passes on what the group has got too.
    """

    def __init__(self):
        self.asked = 0  # the signal's number
        utils.take_signals(self.ask)

    def ask(self, number, frame):
        if not self.asked:
            self.asked, self.when = number, time.monotonic()
            utils.ASKED.append(number)
        elif time.monotonic() - self.when > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def over(self):
        """After the loop there is nothing to wait for: a signal ends the run at once, with a line."""
        utils.take_signals(utils.stop)

    def leave(self, command):
        print(f"\nstopped and saved; go on with: {command}", flush=True)
        raise SystemExit(utils.STOPS.get(self.asked, 130))


def beside(path, ending):
    """logs/lr0.1.csv or logs/lr0.1, ".json" -> logs/lr0.1.json: only .csv is an ending, .1 is none."""
    return Path(str(path).removesuffix(".csv") + ending)


def command():
    """The words that started this run: python FILE …, or python -m MODULE …"""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    by_name = spec is not None and spec.origin == sys.argv[0]
    return ["python", *(["-m", spec.name] if by_name else sys.argv[:1]), *sys.argv[1:]]


def program():
    """The same without its flags: python sft.py, python -m vision.cnn_grpo."""
    words = command()
    return shlex.join(words[:len(words) - len(sys.argv[1:])])


def resume_command():
    """The command line that goes on with this run."""
    once = ("--resume", "--fresh", "--overwrite")
    return shlex.join([*(word for word in command() if word not in once), "--resume"])


def run_stage(command, environment=None):
    """Prints and runs ["python", script, …], a process of its own, which gets a signal and saves.

    If it fails, this script ends with the same exit code.
    """
    print(f"\n$ {shlex.join(command)}", flush=True)
    stage = subprocess.Popen([sys.executable, *command[1:]], env=environment)
    utils.take_signals(lambda *_: stage.terminate())
    code = stage.wait()
    utils.take_signals(utils.stop)
    code = code if code >= 0 else 128 - code
    if code in utils.STOPS.values():
        print("the demo goes on with:", resume_command().removesuffix(" --resume"))
    if code:
        raise SystemExit(code)
