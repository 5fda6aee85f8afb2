"""What speed and many processes may not change: the numbers. And how a run of several ends when one dies."""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
import torch
from torch._dynamo.utils import counters
from helpers import DEVICES, ROOT, cli, environment, numbers, rl
from test_model import close, prompts, seeded
from test_model import tiny as tiny_model

import rollout
import sft
import train_grpo
import train_ppo
from generate import score
from graph import Graphs
from utils import checkpoint, ranks


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rows(path):
    return [{k: float(v) for k, v in row.items() if v} for row in numbers(path)]


def same(a, b, names, atol):
    assert len(a) == len(b) > 0
    for x, y in zip(a, b):
        for name in names:
            assert x[name] == pytest.approx(y[name], abs=atol, rel=atol), f"step {x['step']:.0f}: {name}"


NAMES = ("loss", "mean_r", "kl", "entropy", "token_adv", "length", "gold", "ref_logp", "grad_norm")


# ---- one prompt for its group ----
@pytest.mark.parametrize("T, pad", [(1, None), (2, None), (9, None), (9, [0, 3, 5])])
def test_a_shared_prompt_is_the_repeated_one_in_value_and_gradient(T, pad):
    model, G = tiny_model(), 4
    answers = torch.randint(11, (12, T), generator=seeded(2))
    tokens = torch.cat([prompts(3, 6).repeat_interleave(G, 0), answers], 1)
    pad = None if pad is None else torch.tensor(pad).repeat_interleave(G)
    weight = torch.randn(12, T, generator=seeded(3))
    found = []
    for group_size in (1, G):
        logp, entropy = score(model, tokens, 6, 0.7, pad, group_size)
        model.zero_grad()
        (logp * weight).sum().backward()
        found.append((logp, entropy, *(p.grad.clone() for p in model.parameters())))
    for repeated, shared in zip(*found, strict=True):
        close(repeated, shared, atol=2e-4 * float(1 + repeated.detach().abs().max()))
    assert found[0][2].abs().max() > 0.1


def test_a_shared_prompt_is_read_once(monkeypatch):
    model, read = tiny_model(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, *rest, **kw:
                        read.append(tokens.shape) or hidden(tokens, *rest, **kw))
    score(model, prompts(8, 10), 6, group_size=4)
    assert read == [(2, 6), (8, 3)]


def test_grad_checkpoint_computes_again_and_the_same(monkeypatch):
    model, calls = tiny_model(), []
    tokens = torch.cat([prompts(2, 6).repeat_interleave(4, 0), prompts(8, 4)], 1)
    forward = model.h[0].forward
    monkeypatch.setattr(model.h[0], "forward", lambda *args: calls.append(1) or forward(*args))
    found = []
    for model.checkpointing in (False, True):
        for group_size in (1, 4):
            model.zero_grad()
            calls.clear()
            score(model, tokens, 6, group_size=group_size)[0].sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
            assert len(calls) == (1 + (group_size > 1)) * (1 + model.checkpointing)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            close(a, b, atol=1e-4 * float(1 + a.abs().max()))


# ---- the flags of a run ----
@pytest.mark.parametrize("module, words", [
    (train_grpo, ["--micro_batch", 1]), (train_grpo, ["--micro_batch", 3, "--grad_checkpoint"]),
    (train_grpo, ["--share_prompt", "no"]), (train_grpo, ["--objective", "dapo", "--micro_batch", 1]),
    (train_ppo, ["--micro_batch", 3]), (train_ppo, ["--micro_batch", 1, "--grad_checkpoint"])])
def test_results_do_not_depend_on_micro_batches_sharing_and_checkpointing(module, words):
    common = ["--steps", 3, "--minibatches", 2, "--epochs_per_rollout", 2]
    objective = words[:2] if words[0] == "--objective" else []
    for name, more in (("plain", objective), ("other", words)):
        cli(module, *rl(*common, *more, reward="share_of_e"), "--log", f"{name}.csv", "--out", name)
    same(rows("plain.csv"), rows("other.csv"), NAMES, 2e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module, words", [
    (train_grpo, ["--micro_batch", 3, "--minibatches", 2]), (train_grpo, ["--objective", "dapo"]),
    (train_ppo, ["--micro_batch", 3])])
def test_recordings_learn_what_the_eager_run_learns(module, words, device, monkeypatch):
    """In float32, over 5 steps, which --resume breaks. A CPU takes the recordings' way without a graph."""
    sampled, generate = [], rollout.generate
    monkeypatch.setattr(rollout, "generate", lambda *args, graphs, **kw: sampled.append(graphs) or
                        generate(*args, graphs=graphs, **kw))
    words = rl(*words, "--dtype", "fp32", "--device", device, "--eval_every", 2, reward="share_of_e")
    for name in ("recorded", "eager"):
        begin = rollout.Environment.__init__

        def with_or_without(env, args, policy, *rest, name=name, begin=begin):
            begin(env, args, policy, *rest)
            env.graphs = Graphs(policy) if name == "recorded" else None
        with monkeypatch.context() as patch:
            patch.setattr(rollout.Environment, "__init__", with_or_without)
            for steps in (3, 5):
                more = ["--resume"] if steps == 5 else []
                cli(module, *words, *more, "--steps", steps, "--log", f"{name}.csv", "--out", name)
    same(rows("recorded.csv"), rows("eager.csv"), NAMES, 1e-3)
    assert sampled[0] and not sampled[-1]


def test_sharing_chooses_itself_for_long_prompts(monkeypatch):
    asked = []
    monkeypatch.setattr(rollout, "score", lambda model, tokens, P, t, pad, G, entropy_grad:
                        asked.append(G) or score(model, tokens, P, t, pad, G, entropy_grad))
    for words, G in (([], 4), (["--share_prompt", "no"], 1), (["--prompt_len", 4], 1),
                     (["--prompt_len", 4, "--share_prompt", "yes"], 4)):
        asked.clear()
        cli(train_grpo, *rl("--steps", 1, *words, reward="share_of_e"))
        assert set(asked) == {G}, words


@pytest.mark.slow
def test_compiled_learns_the_same_and_other_shapes_compile_nothing_anew():
    torch._dynamo.reset()
    counters.clear()
    for name, more in (("eager", []), ("compiled", ["--compile"])):
        words = rl("--steps", 4, "--prompts_per_step", 5, "--micro_batch", 3, "--samples", 3,
                   reward="share_of_e", *more)
        cli(train_grpo, *words, "--log", f"{name}.csv", "--out", name)
    same(rows("eager.csv"), rows("compiled.csv"), NAMES, 1e-4)
    # A line by which the compiler is tried, the reference, the policy with and without gradient.
    assert counters["stats"]["unique_graphs"] == 4


# ---- several processes ----
def two_ranks(*words):
    """Python with these words as two ranks without torchrun, as a cluster's own launcher would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), PYTHONPATH=str(ROOT))
    return [subprocess.Popen([sys.executable, *map(str, words)], text=True,
                             env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in range(2)]


ONE_AFTER_ANOTHER = """
import json, runpy, sys
from utils import ranks
stop, ranks.stop = ranks.stop, lambda: None  # the processes stay joined from run to run
for words in json.loads(sys.argv[1]):
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
    print("next", flush=True)
stop()
"""
CASES = {"grpo": (train_grpo, ["--minibatches", 2]),
         "dapo": (train_grpo, ["--objective", "dapo", "--micro_batch", 1]), "ppo": (train_ppo, [])}


@pytest.fixture(scope="module")
def two_and_one(tmp_path_factory):
    """A folder with the runs of all cases: whole on one process, and 6 steps of one that go on as two.

    Also 6 steps of two. The two processes serve all cases: importing torch takes longer than these steps.
    """
    jobs, folder = [], tmp_path_factory.mktemp("two")
    with contextlib.chdir(folder):
        for name, (module, more) in CASES.items():
            words = rl("--save_every", 3, *more, reward="share_of_e")
            cli(module, *words, "--steps", 6, "--log", f"{name}/one.csv", "--out", f"{name}/one")
            cli(module, *words, "--steps", 10, "--log", f"{name}/whole.csv", "--out", f"{name}/whole")
            words = [ROOT / f"{module.__name__}.py", *words]
            jobs.append([*words, "--steps", 6, "--log", f"{name}/two.csv", "--out", f"{name}/two"])
            jobs.append([*words, "--steps", 10, "--log", f"{name}/one.csv", "--out", f"{name}/one",
                         "--resume"])
        both = two_ranks("-c", ONE_AFTER_ANOTHER, json.dumps([list(map(str, words)) for words in jobs]))
        (said, errors), (silent, _) = [process.communicate(timeout=280) for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    assert silent.split() == ["next"] * len(jobs), "rank 0 alone speaks"
    assert [part.count("held out: ") for part in said.split("next\n")] == [1] * len(jobs) + [0]
    return folder


def seen(path):
    """A policy's weights as one vector, but for the keys' biases, which softmax cancels.

    Their gradient is rounding alone, and AdamW makes steps of its own size from it.
    """
    weights = torch.load(path, weights_only=True)["model"]
    biases = {name: w.chunk(3) for name, w in weights.items() if name.endswith("c_attn.bias")}
    weights |= {name: torch.cat([query, value]) for name, (query, _, value) in biases.items()}
    return torch.cat([w.flatten() for w in weights.values()])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_and_go_on_as_one_and_back(name, two_and_one):
    """6 steps of two processes go on as one to step 10; 6 steps of one went on as two."""
    module, more = CASES[name]
    shutil.copytree(two_and_one / name, name)
    words = rl("--save_every", 3, *more, reward="share_of_e")
    cli(module, *words, "--steps", 10, "--log", f"{name}/two.csv", "--out", f"{name}/two", "--resume")
    for part in ("two", "one"):
        same(rows(f"{name}/whole.csv"), rows(f"{name}/{part}.csv"), NAMES, 1e-4)
        close(seen(f"{name}/whole/policy.pth"), seen(f"{name}/{part}/policy.pth"), atol=1e-4)


def torchrun(name, *words):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    return subprocess.run([*command, str(ROOT / name), *map(str, words)], env=environment(),
                          capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_sft_of_two_processes_is_that_of_one():
    words = ["--data", "play", "--vocab_size", 300, "--block_size", 32, "--batch_size", 8, "--steps", 10,
             "--eval_every", 5, "--dtype", "fp32", "--device", "cpu"]
    cli(sft, *words, "--log", "one.csv", "--out", "one")
    run = torchrun("sft.py", *words, "--log", "two.csv", "--out", "two")
    assert run.returncode == 0, run.stderr
    assert len(rows("one.csv")) == 11
    for a, b in zip(rows("one.csv"), rows("two.csv"), strict=True):
        for name in {"loss", "grad_norm", "held_out"} & a.keys():
            assert a[name] == pytest.approx(b[name], abs=1e-4, rel=1e-4), name


LONE = """
import os
calls = 0


def dies(completions, prompts, **columns):
    global calls
    calls += 1
    if os.environ.get("RANK") == "1" and calls == 6:
        os.kill(os.getpid(), 9)
    return [text.count("e") / max(1, len(text)) for text in completions]


def refuses(completions, prompts, **columns):
    return None if os.environ.get("RANK") == "1" else [0.0] * len(completions)
"""


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_the_checkpoint_stays():
    with open("lone.py", "w") as file:
        file.write(LONE)
    words = rl("--steps", 50, "--save_every", 2, reward="lone.py:dies")
    first, second = two_ranks(ROOT / "train_grpo.py", *words, "--log", "log.csv", "--out", "out")
    assert second.wait(200) == -9
    began = time.time()
    out, err = first.communicate(timeout=60)
    assert first.returncode == 2 and time.time() - began < 60
    assert err.count("\n") == 1 and "another process is gone" in err and "--resume" in err, err
    assert checkpoint.load("out/state.pth", "state", "")["step"] == 4
    cli(train_grpo, *words, "--steps", 6, "--log", "log.csv", "--out", "out",
        "--resume")
    assert len(rows("log.csv")) == 6


@pytest.mark.slow
def test_trouble_of_one_rank_alone_is_said_by_it():
    with open("lone.py", "w") as file:
        file.write(LONE)
    words = rl("--steps", 2, "--log", "log.csv", "--out", "out", reward="lone.py:refuses")
    first, second = two_ranks(ROOT / "train_grpo.py", *words)
    err = second.communicate(timeout=200)[1]
    assert second.returncode == 2 and err.startswith("rank 1: error: --reward lone.py:refuses returned"), err
    assert first.wait(60) == 2
    first.communicate()


# ---- bad input ----
def refused(capsys, module, *words):
    with pytest.raises(SystemExit) as left:
        cli(module, *words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    return error


def test_compile_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "--compile needs a C++ compiler and 'no-such-compiler'" in refused(
        capsys, train_grpo, *rl("--compile", reward="share_of_e"))


@pytest.mark.parametrize("module, words, said", [
    (train_grpo, ["--prompts_per_step", "4"], "--prompts_per_step 4 doesn't split into 8"),
    (train_ppo, ["--prompts_per_step", "4"], "--prompts_per_step 4 doesn't split into 8"),
    (sft, ["--batch_size", "12"], "--batch_size 12 doesn't split into 8")])
def test_more_processes_than_prompts(module, words, said, monkeypatch, capsys):
    monkeypatch.setattr(ranks, "world", lambda: 8)
    assert said in refused(capsys, module, *(words if module is sft else rl(*words)))
    assert not os.path.exists("logs")


def test_an_address_in_use(monkeypatch, capsys):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_ADDR", "127.0.0.1"),
                            ("MASTER_PORT", s.getsockname()[1])):
            monkeypatch.setenv(name, str(value))
        error = refused(capsys, train_grpo, *rl(reward="share_of_e"))
    assert "address in use" in error and os.environ["MASTER_PORT"] in error
    ranks.stop()


@pytest.mark.parametrize("module", [train_grpo, train_ppo, sft])
def test_a_resume_with_other_model_sizes(module, capsys):
    words = ["--data", "play", "--vocab_size", 300, "--block_size", 32, "--batch_size", 8, "--steps", 1,
             "--eval_every", 1] if module is sft else rl("--steps", 1, reward="share_of_e")
    cli(module, *words, "--out", "out")
    state = torch.load("out/state.pth", weights_only=True)
    state["model"] = {k: w[..., :-1] for k, w in state["model"].items()}
    torch.save(state, "out/state.pth")
    assert "other sizes" in refused(capsys, module, *words, "--out", "out", "--resume")
