"""benchmarks/faults.py: what it calls lost, torn or left over; a forked process ends as a new one does."""
import os
import signal
import sys

import pytest
import torch
from helpers import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import faults  # noqa: E402


@pytest.fixture
def folders(tmp_path):
    """Two folders with the same results."""
    for name in ("whole", "again"):
        folder = tmp_path / name
        folder.mkdir()
        torch.save({"model": {"w": torch.tensor([1.0])}, "args": {"resume": name},
                    "config": {"resume": name}}, folder / "state.pth")
        (folder / "log.csv").write_text(f"step,loss,seconds\n0,1.5,{len(name)}\n")
    return tmp_path / "whole", tmp_path / "again"


def test_equal_but_for_times_and_arguments(folders):
    assert faults.fault(folders[1], folders[0]) is None and faults.fault(folders[1]) is None


@pytest.mark.parametrize("name,content,said", [
    ("log.csv", b"step,loss,seconds\n0,1.25,3\n", "log.csv differs"),
    ("log.csv", b"step,loss,seconds\n0,1.5\n", "log.csv can't be read (ValueError)"),
    ("state.pth", b"PK", "state.pth can't be read"),
    (".lock", b"1", ".lock is left"),
    (".state.pth.1.tmp", b"", ".state.pth.1.tmp is left")])
def test_what_is_wrong_is_said(folders, name, content, said):
    (folders[1] / name).write_bytes(content)
    assert faults.fault(folders[1], folders[0]).startswith(said)


def test_other_weights_or_a_missing_file(folders):
    torch.save({"model": {"w": torch.tensor([1.0 + 2**-23])}, "args": {}}, folders[1] / "state.pth")
    assert faults.fault(folders[1], folders[0]) == "state.pth differs"
    (folders[1] / "state.pth").unlink()
    assert faults.fault(folders[1], folders[0]) == "state.pth can't be read (FileNotFoundError)"


SCRIPT = """import sys
if sys.argv[1] == "work": exec("while True: pass")
if sys.argv[1] == "fail": raise ValueError("no")
sys.exit({"well": None, "refused": 2, "said": "a line"}[sys.argv[1]])
"""


@pytest.mark.parametrize("cold", [True, False])
@pytest.mark.parametrize("word,code,said", [("well", 0, ""), ("refused", 2, ""), ("said", 1, "a line"),
                                            ("fail", 1, "ValueError: no"), ("work", -15, "")])
def test_a_forked_process_ends_as_a_new_one(tmp_path, monkeypatch, word, code, said, cold):
    (tmp_path / "s.py").write_text(SCRIPT)
    monkeypatch.setitem(faults.SCRIPTS, "sft", f"{os.path.relpath(tmp_path / 's.py', ROOT)} {word}")
    moment = 0.7 if word == "work" else None
    error, found, used = faults.run("sft", tmp_path / "r", number=signal.SIGTERM, moment=moment, cold=cold)
    assert found == code and said in error and (word == "fail") == ("Traceback" in error)
    assert word != "work" or 0.7 <= used < 1.4
