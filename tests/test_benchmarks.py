"""benchmarks/vs_trl.py: how it times, summarises and refuses; one slow test runs the comparison."""
import csv
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("vs_trl", ROOT / "benchmarks" / "vs_trl.py")
vs_trl = importlib.util.module_from_spec(spec)
sys.modules["vs_trl"] = vs_trl
spec.loader.exec_module(vs_trl)


def test_summary_is_trls_best_over_ours():
    """Two turns of each, the first step a warm-up: medians of what is left, worked by hand."""
    def turn(engine, dtype, *seconds):
        return engine, dtype, {"seconds": [99.0, *seconds], "wall": [99.0, *(2 * s for s in seconds)]}
    turns = [turn("ours", "bf16", 1.0, 3.0), turn("trl", "bf16", 6.0, 6.0), turn("ours", "fp32", 5.0, 5.0),
             turn("trl", "fp32", 4.0, 5.0), turn("ours", "bf16", 2.0), turn("trl", "fp32", 9.0)]
    found = vs_trl.summary(turns, 1)
    want = {"ours bf16": 2.0, "trl bf16": 6.0, "ours fp32": 5.0, "trl fp32": 5.0}
    assert found["medians"]["seconds"] == want
    assert found["medians"]["wall"]["ours bf16"] == 4.0
    assert found["trl_best_over_ours"]["seconds"] == {"ours bf16": 2.5, "ours fp32": 1.0}


def test_an_answer_that_ended_early_is_refused():
    assert vs_trl.letter_share(["e" * 16 + "x" * 48], ["?"]) == [0.25]
    with pytest.raises(ValueError, match="63 tokens"):
        vs_trl.letter_share(["x" * 63, "x" * 64], ["?", "?"])


def test_phase_timers_name_each_span_and_leave_nothing_behind():
    """The model slowed by hand in each phase: its span is at least as long; afterwards GPT is what it was."""
    before = vs_trl.GPT.generate, vs_trl.GPT.score
    model = vs_trl.GPT(vs_trl.GPTConfig(5, 8, n_layer=1, n_head=1, n_embd=8))
    model.ln_f.register_forward_hook(lambda *_: time.sleep(0.03))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(2, 6, dtype=torch.long)
    with vs_trl.phase_timers() as spans:
        model.generate(tokens[:, :4], 2)
        with torch.no_grad():
            model.score(tokens, 4)
        logp, _ = model.score(tokens, 4)
        time.sleep(0.05)
        logp.sum().backward()
        optimizer.step()
    assert [name for name, _ in spans] == ["rollout", "reference", "update"]
    assert spans[0][1] >= 0.06 and spans[1][1] >= 0.03 and spans[2][1] >= 0.08
    optimizer.step()
    assert len(spans) == 3 and (vs_trl.GPT.generate, vs_trl.GPT.score) == before


def test_a_turn_is_a_process_whose_failure_is_ours(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # the child finds the module there
    assert vs_trl.alone(os.getppid) == os.getpid()
    for function, code in ((sys.exit, 7), (os.abort, 1)):  # its own exit code; killed by a signal
        with pytest.raises(SystemExit) as stopped:
            vs_trl.alone(function, *([7] if code == 7 else []))
        assert stopped.value.code == code


@pytest.mark.parametrize("words, code, said", [
    (["--help"], 0, "--rounds"), (["--steps", "1"], 2, "--steps 1"), (["--out", "x.json"], 2, "--out x.json"),
    ([], 2, "'.[dev]'")])
def test_command_line(words, code, said, tmp_path):
    """Help, bad input and a missing trl: one clear line, exit code 2 and no file."""
    hide = f"import sys, runpy; sys.modules['trl'] = None; sys.argv[1:] = {words!r}; "
    hide += f"runpy.run_path({str(ROOT / 'benchmarks' / 'vs_trl.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == code and said in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_both_engines_run_and_leave_only_the_results(tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "benchmarks/vs_trl.py", "--steps", "2", "--warmup", "1", "--rounds", "1",
               "--threads", "1", "--out", str(tmp_path / "vs.csv")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"TMPDIR": str(tmp_path / "tmp")})
    assert done.returncode == 0, done.stderr[-2000:]
    rows = list(csv.DictReader(open(tmp_path / "vs.csv", newline="")))
    record = json.loads((tmp_path / "vs.json").read_text())
    assert {r["engine"] for r in rows} == {"ours", "trl"}
    assert all(float(r["seconds_per_step"]) > 0 for r in rows)
    for row in (r for r in rows if r["run"] == "phases"):
        assert sum(float(row[k]) for k in (*vs_trl.PHASES, "other")) == pytest.approx(1, abs=1e-3)
        assert 0 <= float(row["other"]) < 0.2
    assert all(len(turn["seconds"]) == 3 and len(turn["wall"]) == 2 for turn in record["turns"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tmp", "vs.csv", "vs.json"]
    assert not [p.name for p in (tmp_path / "tmp").iterdir()]
