"""What keeps runs apart: digests of what a run has read, locks on what it writes, earlier files set aside."""
import atexit
import fcntl
import hashlib
import os
import shutil
from pathlib import Path

from utils.cli import INPUTS, beside, die, writing
from utils.device import rank

LOCKS = {}  # {path: open file} of this process


# ---- what a run has read ----
def note(what, content):
    """Notes the digest of an input that decides the numbers; content: bytes, text, or the path of a file."""
    if isinstance(content, Path):
        with open(content, "rb") as file:
            INPUTS[what] = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        INPUTS[what] = hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def same_inputs(before, path):
    """Refuses a resume whose inputs are not those of the state at `path`; before: its {what: SHA-256}."""
    for what, digest in before.items():
        if INPUTS.get(what, digest) != digest:
            die(f"--resume: the {what} has changed since {path} began (SHA-256 {digest[:12]}, now "
                f"{INPUTS[what][:12]}): bring the former back, or begin anew with --overwrite")


# ---- what a run writes ----
def lock(out, log):
    """Takes a run's folder and CSV for this process until it ends, or until release().

    What a kill has left half-written there is removed.
    """
    for path, place in ((out, Path(out, ".lock")), (log, Path(log).with_name(f".{Path(log).name}.lock"))):
        if rank() or place in LOCKS:  # rank 0 does it for all
            continue
        with writing(path):
            place.parent.mkdir(parents=True, exist_ok=True)
            file = open(place, "a+")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel releases it with the process
        except OSError:
            file.seek(0)
            die(f"process {file.read()} is writing {path} now: wait for it, or name another --out and --log")
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        LOCKS[place] = file
    torn = [] if rank() else list(Path(out).glob(".*[0-9].tmp"))
    beside_log = [beside(log, ending) for ending in (".json", ".samples.jsonl", ".png", "_images.png")]
    for path in () if rank() else (Path(log), *beside_log):
        torn += path.parent.glob(f".{path.name}.*[0-9].tmp")
    for path in torn:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@atexit.register
def release():
    """Gives back what this process holds, and removes the marks."""
    while LOCKS:
        place, file = LOCKS.popitem()
        place.unlink(missing_ok=True)
        file.close()


def set_aside(paths):
    """Renames an earlier run's files to NAME.bak, NAME.bak2 and so on; of a link the target."""
    for path in paths if rank() == 0 else ():
        path, n = os.path.realpath(path), 1
        while os.path.exists(new := f"{path}.bak{n if n > 1 else ''}"):
            n += 1
        with writing(path):
            os.rename(path, new)
        print(f"an earlier run's {path} is {new} now")
