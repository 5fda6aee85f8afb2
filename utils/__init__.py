"""Import this before torch: OpenMP and the allocator take their settings before the first tensor.

It also steadies the streams, and turns a signal into one line: importing torch takes seconds.

A thread that waits spins for some microseconds and then sleeps. The default spins for milliseconds, which
costs most of the speed on a machine whose cores have other work too. Sleeping at once costs speed on a quiet
machine. docs/log.md has what was seen.

Memory that a step frees stays with the process for the next step. glibc would give it back, and each 4 KB
that is touched anew costs a page fault.
"""
import contextlib
import ctypes
import io
import os
import signal
import sys
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
with contextlib.suppress(OSError, AttributeError):  # no glibc, no setting
    # M_ARENA_MAX, M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_TOP_PAD of malloc.h
    for setting, value in ((-8, 1), (-1, 2**31 - 1), (-3, 2**25), (-2, 2**26)):
        ctypes.CDLL("libc.so.6").mallopt(setting, value)


# ---- signals: Ctrl-C, the end of a job, the end of the terminal ----
STOPS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 143}  # and their exit codes


class Stopped(KeyboardInterrupt):
    """A signal came where there is nothing to save; .args[0] is its number."""


def stop(number, frame):
    ASKED.append(number)  # C code turns the exception into an error of its own
    raise Stopped(number)


def end(number, frame=None):
    """At once: an exception within the import of a library can be lost, or crash it."""
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(STOPS[number])


ASKED = []  # signals that a loop has noted: it saves and ends, or a process that it needs has ended before
OURS = [signal.SIG_DFL, signal.default_int_handler, stop, end]  # handlers that may be replaced


def take_signals(handler):
    """Not those of a program that has its own handlers, nor a signal that nohup or & has switched off."""
    for number in STOPS:
        if signal.getsignal(number) in OURS:
            signal.signal(number, handler)
    OURS.append(handler)


def in_one_line(kind, error, trace):
    """Python's own report of an error that nothing caught; one line for a signal or what it broke."""
    if not (issubclass(kind, KeyboardInterrupt) or ASKED):
        return sys.__excepthook__(kind, error, trace)
    number = signal.Signals(error.args[0] if isinstance(error, Stopped) else (*ASKED, signal.SIGINT)[0])
    print(f"stopped by {number.name}", file=sys.stderr)
    raise SystemExit(STOPS[number])


def lost(report):
    """Python prints an exception of a destructor or at exit, and goes on: a signal ends the run."""
    if issubclass(report.exc_type, Stopped):
        end(ASKED[-1])
    sys.__unraisablehook__(report)


# ---- streams: closed, not UTF-8, or a pipe whose reader has gone ----
class Pipe(io.FileIO):
    def write(self, data):
        try:
            return super().write(data)
        except BrokenPipeError:  # the run goes on without a reader
            return len(data)


def steady(stream, number):
    """The same stream, which no closed pipe and no character can break."""
    raw, at_once = Pipe(number, "w", closefd=False), getattr(stream, "write_through", False)  # python -u
    encoding, by_line = getattr(stream, "encoding", "utf-8"), getattr(stream, "line_buffering", False)
    return io.TextIOWrapper(raw if at_once else io.BufferedWriter(raw), encoding, "replace",
                            line_buffering=by_line, write_through=at_once)


script = Path(getattr(sys.modules["__main__"], "__file__", None) or ".").resolve()
root = Path(__file__).resolve().parent.parent
if script.parent in [root / name for name in ("", "vision", "lessons", "benchmarks")]:  # no mere importer
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # a closed stream's number must not become a data file's
    os.close(number)
    sys.stdout, sys.stderr = steady(sys.stdout, 1), steady(sys.stderr, 2)
    sys.excepthook = in_one_line
    sys.unraisablehook = lost
    if os.environ.get("MPLBACKEND", "").startswith("module://"):  # a notebook's: a script draws into files
        del os.environ["MPLBACKEND"]
    take_signals(end)
