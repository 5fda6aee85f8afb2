"""benchmarks/vs_trl.py: how it times, summarises and refuses; the slow tests run both comparisons."""
import csv
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import helpers
import pytest
import torch

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("vs_trl", ROOT / "benchmarks" / "vs_trl.py")
vs_trl = importlib.util.module_from_spec(spec)
sys.modules["vs_trl"] = vs_trl
spec.loader.exec_module(vs_trl)  # it puts engines.py on the path
import engines  # noqa: E402
import gpu  # noqa: E402
import rollout  # noqa: E402

from generate import score  # noqa: E402
from grpo import OBJECTIVES, grpo_loss  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from utils import checkpoint  # noqa: E402
from utils.text import PLAY  # noqa: E402
from utils.tokenizer import train_tokenizer  # noqa: E402


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
    assert engines.letter_share(["e" * 16 + "x" * 48], ["?"]) == [0.25]
    with pytest.raises(ValueError, match="63 tokens"):
        engines.letter_share(["x" * 63, "x" * 64], ["?", "?"])
    two = {"completions": ["ex", "ex"], "prompts": ["?", "?"], "max_new": [2, 2]}
    assert engines.letter_share(**two, completion_ids=[[1, 2], [1, 2]]) == [0.5, 0.5]
    with pytest.raises(ValueError, match="3 tokens.* wants 2"):  # one of them has no text
        engines.letter_share(**two, completion_ids=[[1, 2], [1, 2, 65]])


def test_phase_timers_name_each_span_and_leave_nothing_behind():
    """The model slowed by hand in each phase: its span is at least as long; afterwards all is as it was."""
    before = rollout.generate, rollout.score
    model = GPT(GPTConfig(5, 8, n_layer=1, n_head=1, n_embd=8))
    model.ln_f.register_forward_hook(lambda *_: time.sleep(0.03))
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(2, 6, dtype=torch.long)
    with engines.phase_timers() as spans:
        rollout.generate(model, tokens[:, :4], 2)
        with torch.no_grad():
            rollout.score(model, tokens, 4)
        logp, _ = rollout.score(model, tokens, 4)
        time.sleep(0.05)
        logp.sum().backward()
        optimizer.step()
    assert [name for name, _ in spans] == ["rollout", "reference", "update"]
    assert spans[0][1] >= 0.06 and spans[1][1] >= 0.03 and spans[2][1] >= 0.08
    optimizer.step()
    assert len(spans) == 3 and (rollout.generate, rollout.score) == before


@pytest.mark.slow
def test_a_turn_is_a_process_whose_failure_is_ours(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # the child finds the module there
    assert engines.alone(os.getppid) == os.getpid()
    for function, code in ((sys.exit, 7), (os.abort, 1)):  # its own exit code; killed by a signal
        with pytest.raises(SystemExit) as stopped:
            engines.alone(function, *([7] if code == 7 else []))
        assert stopped.value.code == code


@pytest.mark.slow
def test_turns_side_by_side_keep_their_numbers(monkeypatch, tmp_path):
    """Two at a time: the first ends only when the second has begun, and each result has its call's number."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    os.mkfifo(tmp_path / "pipe")
    pipe = tmp_path / "pipe"  # its reader waits for a writer
    calls = [(Path.read_text, pipe), (Path.write_text, pipe, "four")]
    assert dict(engines.side_by_side(calls, 2)) == {0: "four", 1: 4}


def test_compare_is_in_standard_errors_and_of_the_rise():
    """From 0 to 1.0, 1.2 and to 0.9, 1.1: difference 0.1, each s² 0.02, so the error √0.02."""
    def run(first, end, seconds):
        rows = [{"mean_r": first, "kl": 0.0, "seconds": 1.0}]
        return rows + [{"mean_r": end, "kl": end / 10, "seconds": seconds}] * vs_trl.LAST
    runs = {("ours", "grpo", 0): run("0.0", 1.0, 10.0), ("trl", "grpo", 0): run(0.0, 0.9, 30.0),
            ("trl", "grpo", 1): run(0.0, 1.1, 30.0), ("ours", "grpo", 1): run(0.0, 1.2, "10.0")}
    reward, kl = vs_trl.compare(runs)
    assert (reward["objective"], reward["metric"], kl["metric"]) == ("grpo", "mean_r", "kl")
    assert reward["seeds_ours"] == pytest.approx([1.0, 1.2])
    assert reward["seeds_trl"] == pytest.approx([0.9, 1.1])
    assert reward["difference"] == pytest.approx(0.1)
    assert reward["standard_error"] == pytest.approx(0.02 ** 0.5)
    for row in (reward, kl):
        assert row["standard_errors"] == pytest.approx(0.1 / 0.02 ** 0.5)
        assert row["of_rise"] == pytest.approx(0.1 / 1.05)
    assert reward["seconds_trl_over_ours"] == 3.0 and reward["agree"] is True
    runs["ours", "grpo", 1] = run(0.0, 1.4, 10.0)  # 0.2 apart: 0.89 errors, but 18 % of the rise
    assert vs_trl.compare(runs)[0]["agree"] is False
    one_seed = vs_trl.compare({key: rows for key, rows in runs.items() if key[2] == 0})[0]
    assert one_seed["standard_error"] is None and one_seed["agree"] is None


@pytest.mark.parametrize("words, code, said", [
    (["--help"], 0, "--rounds"), (["--steps", "1"], 2, "--steps 1"),
    (["--out", "x.json"], 2, "--out x.json")])
def test_command_line(words, code, said, tmp_path, monkeypatch, capsys):
    """Help and bad input: one clear line, exit code 2 and no file."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        helpers.cli(vs_trl, *words)
    out, err = capsys.readouterr()
    assert stopped.value.code == code and said in out + err and err.count("\n") == bool(code)
    assert not list(tmp_path.iterdir())


def test_a_missing_trl(tmp_path):
    """One clear line, exit code 2 and no file."""
    hide = "import sys, runpy; sys.modules['trl'] = None; "
    hide += f"runpy.run_path({str(ROOT / 'benchmarks' / 'vs_trl.py')!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "'.[dev]'" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given, said", [
    ({"out": "x.csv"}, "--out x.csv"), ({"steps": 10}, "--steps 10"), ({"jobs": 0}, "--jobs 0"),
    ({"group_size": 1}, "--group_size 1")])
def test_bad_input_of_learn(given, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        vs_trl.main(vs_trl.Args(learn=True, **given))
    assert stopped.value.code == 2 and said in capsys.readouterr().err


def test_learn_wants_a_bpe_policy_that_has_room(tmp_path, capsys):
    """No file, a char policy, a context that is too short: one line each, exit code 2."""
    args = vs_trl.Args(learn=True, policy=str(tmp_path / "p.pth"), max_new=48)
    cases = [(None, "run `python sft.py`"), (train_tokenizer("char", "abc"), "wanted bpe"),
             (train_tokenizer("bpe", "abcabc"), "--prompt_len 32 + --max_new 48")]
    for tokenizer, said in cases:
        if tokenizer:
            model = GPT(GPTConfig(tokenizer.vocab_size, 64, n_layer=1, n_head=1, n_embd=8))
            checkpoint.save(args.policy, "policy", model, tokenizer)
        with pytest.raises(SystemExit) as stopped:
            vs_trl.learn(args, tmp_path)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.slow
def test_both_engines_run_and_leave_only_the_results(tmp_path, monkeypatch):
    """Every turn is taken here and not in a process of its own: the tests below and above have those."""
    pytest.importorskip("trl")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path.parent / "inductor"))  # torch's own, kept
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(vs_trl, "alone", lambda function, *args: function(*args))
    monkeypatch.setattr(os, "environ", os.environ.copy())  # main() changes it for its turns
    with helpers.quiet_signals():
        vs_trl.main(vs_trl.Args(steps=2, warmup=1, rounds=1, threads=1, prompts_per_step=4, max_new=32,
                                out=str(tmp_path / "vs.csv")))
    rows = list(csv.DictReader(open(tmp_path / "vs.csv", newline="")))
    record = json.loads((tmp_path / "vs.json").read_text())
    assert {r["engine"] for r in rows} == {"ours", "trl"}
    sizes = {"prompts_per_step": "4", "group_size": "8", "prompt_len": "32", "max_new": "32", "compiled": "0"}
    assert all(sizes.items() <= row.items() for row in rows)
    assert all(float(r["seconds_per_step"]) > 0 for r in rows)
    for row in (r for r in rows if r["run"] == "phases"):
        assert sum(float(row[k]) for k in (*engines.PHASES, "other")) == pytest.approx(1, abs=1e-3)
        assert 0 <= float(row["other"]) < 0.2
    assert all(len(turn["seconds"]) == 3 and len(turn["wall"]) == 2 for turn in record["turns"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tmp", "vs.csv", "vs.json"]
    assert not [p.name for p in (tmp_path / "tmp").iterdir()]


def loving():
    """A π₀ of random weights that says little else than love, hate and the stop: rewards differ."""
    tokenizer = train_tokenizer("bpe", PLAY.read_text(encoding="utf-8") + " love hate" * 5000, 400)
    words = tokenizer.encode(" love hate\n\n")
    assert len(words) == 3
    torch.manual_seed(0)
    model = GPT(GPTConfig(tokenizer.vocab_size, 32, n_layer=1, n_head=2, n_embd=32, dropout=0.1))
    with torch.no_grad():  # ln_f's output then has the mean 1 over 32 dimensions: these logits gain 32 · 0.25
        model.ln_f.bias += 1.0
        model.wte.weight[words] += 0.25
    return model, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["grpo", "dapo"])
def test_trls_own_steps_have_our_loss_and_gradient(objective, tmp_path, monkeypatch):
    """Three steps of TRL's training: each one's batch and weights give our loss and its gradient's norm."""
    trl = pytest.importorskip("trl")
    model, tokenizer = loving()
    prompts = [text for text in (tokenizer.decode([i] * 4) for i in range(60, 90))
               if len(tokenizer.encode(text)) == 4][:12]
    engines.prepare(tmp_path, model, tokenizer, prompts, 8)
    seen, norms, compute = [], [], trl.GRPOTrainer._compute_loss
    clip = torch.nn.utils.clip_grad_norm_

    def computed(trainer, policy, inputs):
        loss = compute(trainer, policy, inputs)
        trainer.model.save_pretrained(tmp_path / f"step{len(seen)}")
        seen.append((dict(inputs), loss.item()))
        return loss

    def clipped(*args, **kwargs):
        norms.append(clip(*args, **kwargs).item())
        return torch.tensor(norms[-1])
    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", computed)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    work = engines.Work(prompts_per_step=4, group_size=4, prompt_len=4, max_new=8, steps=3, seed=0, threads=1,
                        objective=objective, beta=0.05, lr=0.01, reward="sentiment")
    engines.run_trl(tmp_path, work, "fp32")
    assert len(seen) == len(norms) == 3
    ref, wanted = GPT.from_pretrained(tmp_path / "hf").eval(), replace(OBJECTIVES[objective], beta=0.05)
    for step, ((inputs, loss), norm) in enumerate(zip(seen, norms)):
        policy = GPT.from_pretrained(tmp_path / f"step{step}").eval()
        tokens = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
        logp, logp_ref = (score(m, tokens, 4)[0].view(4, 4, -1) for m in (policy, ref))
        ours, _ = grpo_loss(logp, logp.detach(), logp_ref.detach(), inputs["advantages"].view(4, 4),
                            inputs["completion_mask"].view(4, 4, -1), wanted, max_len=8)
        ours.backward()
        assert ours.item() == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert clip(policy.parameters(), 1.0).item() == pytest.approx(norm, rel=1e-4) and norm > 1e-3


@pytest.mark.slow
def test_both_engines_learn_from_one_policy(tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "tmp").mkdir()
    model, tokenizer = loving()
    checkpoint.save(tmp_path / "p.pth", "policy", model, tokenizer)
    command = [sys.executable, "benchmarks/vs_trl.py", "--learn", "--policy", str(tmp_path / "p.pth"),
               "--data", "play", "--objectives", "dapo", "--seeds", "1", "--steps", "11",
               "--prompts_per_step", "4", "--prompt_len", "8", "--max_new", "8", "--jobs", "2",
               "--out", str(tmp_path / "learn")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"TMPDIR": str(tmp_path / "tmp")})
    assert done.returncode == 0, done.stderr[-2000:]
    for engine in ("ours", "trl"):
        rows = list(csv.DictReader(open(tmp_path / f"learn/{engine}-dapo-s0.csv", newline="")))
        assert list(rows[0]) == engines.CURVE and [int(r["step"]) for r in rows] == list(range(11))
        assert [int(r["samples"]) for r in rows] == list(range(32, 32 * 12, 32))
        kl = [float(r["kl"]) for r in rows]
        assert abs(kl[0]) < 1e-6 < kl[-1]  # the policy begins at π₀, without dropout, and leaves it
    record = json.loads((tmp_path / "learn/summary.json").read_text())
    assert [row["metric"] for row in record["comparison"]] == ["mean_r", "kl"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["learn", "learn.png", "p.pth", "tmp"]
    assert not [p.name for p in (tmp_path / "tmp").iterdir()]


# ---- a GPU's numbers, on next to no work ----
def test_the_gpu_benchmark_runs_on_a_cpu_with_tiny_sizes(tmp_path):
    """Each row is written as it comes, and the note is the value over its floor."""
    gpu.run_part(gpu.floor, gpu.Args(tiny=True, device="cpu", out=str(tmp_path)))
    with open(tmp_path / "floor.csv", newline="") as file:
        rows = {row["what"]: row for row in csv.DictReader(file)}
    assert {"matmul, bf16", "copy", "decode step, bf16", "update, bf16, eager"} <= set(rows)
    step, note = float(rows["decode step, fp32"]["value"]), rows["decode step, fp32"]["note"]
    times, least = float(note.split()[0]), float(note.split()[-1])
    assert step == pytest.approx(times * least, rel=0.05, abs=0.05) and (tmp_path / "floor.json").is_file()


def test_the_gpu_benchmark_names_its_parts(capsys):
    with pytest.raises(SystemExit):
        gpu.main(gpu.Args(parts=("speed",)))
    assert "speed_nano" in capsys.readouterr().err
