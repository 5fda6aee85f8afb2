"""What every command line of this repository shares: clear errors, presets, atomic files, Ctrl-C."""
import argparse
import contextlib
import importlib
import os
import shlex
import signal
import sys
from pathlib import Path


def die(message):
    """Says what was wrong, what was wanted and what to do, on stderr in one line; exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def need(module, extra):
    """Imports an optional package, or names the extra that brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        die(f"this needs the package {error.name!r}, which isn't installed: pip install '.[{extra}]'")


def parse(args_class, presets=None):
    """Fills args_class from the command line; --preset NAME, at any place, picks one of `presets`."""
    import tyro
    words, rest, default = command(), sys.argv[1:], args_class()
    prog = shlex.join(words[:len(words) - len(rest)])  # python sft.py, python -m vision.exact
    if presets:
        first = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
        first.add_argument("--preset", choices=presets)
        first.error = lambda message: die(f"{message}: wanted one of {', '.join(presets)}")
        known, rest = first.parse_known_args()
        default = presets.get(known.preset, default)
    args = tyro.cli(args_class, prog=prog, args=rest, default=default,
                    description=sys.modules[args_class.__module__].__doc__)
    if not 0 <= getattr(args, "seed", 0) <= 10**12:  # a million steps' generators must fit 64 bits
        die(f"--seed {args.seed}: wanted 0 to {10**12:,}")
    return args


def at_least(args, **least):
    """Refuses fields of the arguments that are below their least useful value (None is let through)."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            die(f"--{name} {value} is too small: wanted at least {low}")


@contextlib.contextmanager
def writing(path):
    """Turns the ways in which a write can fail (a full disk, no permission) into a clear message."""
    try:
        yield
    except OSError as error:
        die(f"can't write {path}: {error.strerror or error}. Free some space or name another place.")


def atomic_write(path, content):
    """Writes bytes, or lets content(file) write; after a kill there is the old file or the new, whole."""
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would replace /dev/null itself
        die(f"can't write {path}: it is no regular file. Name another place.")
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
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
    """Turns Ctrl-C and SIGTERM into a flag that the loop reads after a step; a second one kills at once."""

    def __init__(self):
        self.asked = False
        # a program that runs a script's main() within itself may have its own handler: it stays
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self.ask)
            signal.signal(signal.SIGTERM, self.ask)

    def ask(self, signum, frame):
        self.asked = True
        signal.signal(signum, signal.SIG_DFL)

    def leave(self, command):
        print(f"\nstopped and saved; go on with: {command}")
        raise SystemExit(130)


def command():
    """The words that started this run: python FILE …, or python -m MODULE …"""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    by_name = spec is not None and spec.origin == sys.argv[0]
    return ["python", *(["-m", spec.name] if by_name else sys.argv[:1]), *sys.argv[1:]]


def resume_command():
    """The command line that goes on with this run."""
    return shlex.join([*(w for w in command() if w not in ("--resume", "--fresh")), "--resume"])
