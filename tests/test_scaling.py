"""benchmarks/roofline.py, scaling.py and what they share: counts against oracles, fits, one real point."""
import contextlib
import csv
import importlib
import io
import json
import math
import sys
from pathlib import Path

import helpers
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))
floor, fresh, memory, roofline, scaling = (
    importlib.import_module(name) for name in ("floor", "fresh", "memory", "roofline", "scaling"))
from generate import score  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

CPU = torch.device("cpu")
TINY = GPTConfig(11, 32, n_layer=2, n_head=2, n_embd=16)


# ---- counts ----
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("B, G, P, T", [(2, 3, 5, 7), (1, 2, 1, 4), (3, 1, 6, 1)])
def test_flops_are_those_of_the_calls(B, G, P, T, shared):
    """torch's own counter on the timed functions; with one answer a group there's nothing to share."""
    shared = shared and G > 1
    phases = roofline.work(TINY, B, G, P, T, shared, CPU, "fp32")
    counted = {}
    for name, run in phases.items():
        with FlopCounterMode(display=False) as counter:
            run()
        counted[name] = counter.get_total_flops()
    counted["decode"] = counted.pop("rollout") - counted["prefill"]
    assert counted == floor.flops(TINY, B, G, P, T, shared, done=True)


def test_flops_that_are_needed_by_hand():
    """One layer, 2 wide, 3 tokens known, 1 prompt of 2 with 2 answers of 2: every product written out."""
    c = GPTConfig(3, 4, n_layer=1, n_head=1, n_embd=2)
    token, pair, head = 24 * 4, 4 * 2, 2 * 2 * 3
    prefill = 2 * token + (1 + 2) * pair + 2 * head
    decode = 2 * (token + 3 * pair) + 2 * head  # each answer's first token looks at the prompt and at itself
    both = prefill + decode
    found = floor.flops(c, 1, 2, 2, 2)
    assert found == {"prefill": prefill, "decode": decode, "reference": both, "update": 3 * both}
    alone = 2 * (3 * token + (1 + 2 + 3) * pair) + 4 * head
    assert floor.flops(c, 1, 2, 2, 2, shared=False)["reference"] == alone


def test_bytes_by_hand():
    """The same tiny case: 54 weights of four bytes; a position's key and value are 16 bytes."""
    c = GPTConfig(3, 5, n_layer=1, n_head=1, n_embd=2)
    W, K = 4 * (12 * 4 + 3 * 2), 16
    found = floor.bytes_moved(c, 1, 2, 2, 3)
    assert found["prefill"] == (W + 2 * K, W + 2 * K)
    # two passes: 2 + 2·1, then 2 + 2·2 positions read, and two written in each
    assert found["decode"] == (2 * W + 4 * K + 6 * K + 2 * 2 * K, W + K * (2 + 2 * 3))
    n = 2 + 2 * 2  # tokens of a scoring pass: the prompt's, and two of each answer
    assert found["reference"] == (W + 2 * n * 2 * 4, W + n * 2 * 4)
    saved = 16 * n * 2 * 4 + 4 * 2 * 3 * 3
    assert found["update"] == (13 * W + 2 * saved, 4 * W + saved)
    half = floor.bytes_moved(c, 1, 2, 2, 3, size=2)
    assert half["update"][0] == 13 * W + 2 * (16 * n * 2 * 2 + 4 * 2 * 3 * 3)
    assert half["decode"] == found["decode"]


def test_the_floor_takes_the_tighter_bound_and_the_nearer_copy():
    copies = [{"bytes": 1e6, "rate": 100.0}, {"bytes": 1e8, "rate": 10.0}]
    machine = {"fp32": 1e30, "bf16": 1e-30, "copies": copies}
    assert floor.bandwidth(machine, 3e6) == 100.0 and floor.bandwidth(machine, 9e7) == 10.0
    found = floor.floors(TINY, 2, 3, 5, 7, True, "bf16", machine)
    moved, operations = floor.bytes_moved(TINY, 2, 3, 5, 7, True, 2), floor.flops(TINY, 2, 3, 5, 7)
    assert found["decode"] == (moved["decode"][0] / 100.0, "memory")  # sampling is float32
    assert found["update"] == (pytest.approx(operations["update"] / 1e-30), "matmul")


@pytest.mark.parametrize("group", [1, 3])
def test_fake_tensors_keep_what_real_ones_keep(group):
    """Without the fake mode the same hooks count the same bytes: what the formula says, or a little more."""
    def make():
        return [GPT(TINY).eval()]

    def run(policy):
        return score(policy, torch.zeros(6, 12, dtype=torch.long), 5, 1.0, None, group)
    fake = memory.kept_for_backward(make, run, contextlib.nullcontext)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "FakeTensorMode", contextlib.nullcontext)
        assert memory.kept_for_backward(make, run, contextlib.nullcontext) == fake
    n = 6 * 11 if group == 1 else 2 * 5 + 6 * 6
    copies = 0 if group == 1 else 2 * 2 * 16 * 6 * 5 * 4  # each answer has its prompt's keys and values
    formula = 16 * 2 * 16 * n * 4 + 4 * 6 * 7 * 11 + copies
    assert 1 <= fake / formula < 1.25  # norms' statistics, the last stream


def test_what_is_held_by_hand():
    found = memory.held(TINY, 2, 4, 5, 7, False, 1, contextlib.nullcontext)
    n = sum(p.numel() for p in GPT(TINY).parameters())
    assert (found["policy"], found["gradients"], found["AdamW's moments"]) == (4 * n, 4 * n, 8 * n)
    assert found["value network"] == 0 and found["KV cache (rollout)"] == 2 * 2 * 16 * 4 * (2 * 5 + 8 * 7)
    ppo = [memory.held(TINY, 2, 4, 5, 7, True, m, contextlib.nullcontext) for m in (1, 4)]
    assert ppo[0]["value network"] == 4 * (n + 17) and ppo[0]["gradients"] == 4 * (2 * n + 17)
    assert 3.8 < ppo[0]["activations (update)"] / ppo[1]["activations (update)"] <= 4


# ---- measurements ----
def test_decode_is_the_rollout_less_its_prefill():
    """A clock that is set by hand: the medians of two rounds behind one that doesn't count."""
    times = iter([9.0, 9.0, 1.0, 4.0, 3.0, 8.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "timed", lambda phase, device: next(times))
        found = roofline.measure({"prefill": None, "rollout": None}, 2, 1, CPU)
    assert found == {"prefill": 2.0, "decode": 4.0}


def test_the_machine_has_rates():
    found = floor.measure_machine(CPU, ["fp32"], [(8, 8, 8), (64, 64, 64)], (1, 1))
    assert found["fp32"] == found["products"][-1]["rate"] > 1e6
    assert all(c["rate"] > 1e6 and c["bytes"] == 1e6 for c in found["copies"])


def test_exponents_of_made_up_data():
    x = [32, 64, 128, 512]
    assert scaling.exponent(x, [3 * v ** 1.5 for v in x]) == pytest.approx(1.5)
    assert scaling.exponent(x, [7.0] * 4) == pytest.approx(0)
    noisy = [1.0, 2.0, 4.0]  # slope through (0, 0), (1, 1), (2, 1) in log2: a half
    assert scaling.exponent(noisy, [1.0, 2.0, 2.0]) == pytest.approx(0.5)
    assert scaling.exponent([4], [1.0]) is None and scaling.exponent([4, 4], [1.0, 2.0]) is None
    assert scaling.exponent([1, 2, 4], [0.0, 2.0, 4.0]) == pytest.approx(1)  # nothing measured: left out


def test_the_plan_varies_one_factor_at_a_time():
    rows = scaling.plan(scaling.Args())
    assert [x for factor, x, _ in rows if factor == "group_size"] == [2, 4, 8, 16, 32]
    for factor, x, p in rows:
        base = fresh.point() | ({"prompt_len": 192, "max_new": 32} if factor == "group_size" else {})
        assert {k for k in p if p[k] != base[k]} <= {factor}
        wanted = p[factor] if factor != "model" else sum(
            w.numel() for w in GPT(fresh.config_of(p["model"], 96)).parameters())
        assert x == wanted


# ---- whole runs, measuring replaced: the files, the figure, the messages ----
def test_scaling_writes_table_figure_and_record(tmp_path, monkeypatch):
    """Steps that cost answers^1 · length^2 by construction: the exponents come back."""
    def train(config, p, args, script="train_grpo.py", steps=1, words=()):
        cost = p["group_size"] * p["max_new"] ** 2 / p["processes"]
        return [1e9, *[cost] * (steps - 1)], 100.0 + cost
    monkeypatch.setattr(scaling, "train", train)
    monkeypatch.setattr(scaling, "program", lambda args: 100.0)
    machine = {"fp32": 1e9, "products": [], "copies": [{"bytes": 1e6, "rate": 1e9}]}
    monkeypatch.setattr(scaling, "measure_machine", lambda *_: machine)
    before = torch.get_num_threads()
    with contextlib.redirect_stdout(io.StringIO()):
        scaling.main(scaling.Args(model=("nano",), warmup=1, threads=before, out=str(tmp_path / "s.csv")))
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["exponents"]["max_new"]["seconds_per_step"] == pytest.approx(2)
    assert record["exponents"]["group_size"]["mb"] == pytest.approx(1)
    assert record["exponents"]["processes"]["seconds_per_step"] == pytest.approx(-1)
    rows = list(csv.DictReader(open(tmp_path / "s.csv", newline="")))
    assert list(rows[0]) == scaling.COLUMNS and len(rows) == 18
    assert all(math.isclose(float(r["times_floor"]), float(r["seconds_per_step"]) / float(r["floor_seconds"]),
                            rel_tol=1e-3) for r in rows)
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_roofline_runs(tmp_path):
    args = roofline.Args(layers=2, heads=2, width=16, vocab=11, prompts_per_step=2, group_size=2,
                         prompt_len=4, max_new=4, repeats=1, warmup=0, large=32, copy_mb=(1, 2),
                         device="cpu", threads=1, out=str(tmp_path / "r.csv"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        roofline.main(args)
    rows = list(csv.DictReader(open(tmp_path / "r.csv", newline="")))
    assert [r["phase"] for r in rows[:4]] == ["prefill", "decode", "reference", "update"]
    assert list(rows[0]) == roofline.COLUMNS and "dispatch and Python" in said.getvalue()
    assert json.loads((tmp_path / "r.json").read_text())["shared"] is True


@pytest.mark.parametrize("module, words, said", [
    (roofline, {"heads": 3}, "--heads 3"), (roofline, {"out": "x"}, "--out x"),
    (roofline, {"repeats": 0}, "--repeats 0"), (scaling, {"out": "x"}, "--out x"),
    (scaling, {"group_size": (1,)}, "--group_size"),
    (scaling, {"max_new": (0,)}, "--max_new"), (scaling, {"memory": True, "base": (1, 2, 4, 4)}, "--base")])
def test_bad_input_is_one_line(module, words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        module.main(module.Args(**words))
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_point_is_a_real_run(processes):
    seconds, peak = fresh.train(GPTConfig(65, 12, 1, 1, 8), fresh.point("", 2, 2, 8, 4, processes),
                                scaling.Args(threads=1), steps=3)
    assert len(seconds) == 3 and min(seconds) > 0 and peak > 50


@pytest.mark.slow
def test_a_run_that_fails_says_what_it_said(capsys):
    with pytest.raises(SystemExit):
        fresh.train(TINY, fresh.point("", 2, 2, 8, 4), scaling.Args(), words=["--minibatches", "3"])
    assert "--minibatches 3" in capsys.readouterr().err


@pytest.mark.parametrize("module", [roofline, scaling])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as left:
        helpers.cli(module, "--help")
    assert left.value.code == 0 and "--out" in capsys.readouterr().out
