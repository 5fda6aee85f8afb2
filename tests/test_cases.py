"""What strangers' cases broke: nothing finished is lost, nothing is silently wrong, one line a mistake."""
import contextlib
import hashlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pandas as pd
import pytest
import torch
from helpers import ROOT, cli, environment, files, numbers, rl, tiny

import reward_model
import rlhf_demo
import sft
import train_grpo
import train_ppo
import utils
from model import GPT, GPTConfig
from policy import load_policy
from ppo import explained_variance, gae
from utils import checkpoint, cli as flags, device, dist, figure, guard, rewards, text
from utils.log import Log
from utils.tokenizer import train_bpe
from vision import c2i_grpo

SFT = ["--data", "play", "--vocab_size", 300, "--block_size", 48, "--batch_size", 4, "--steps", 3,
       "--warmup", 1, "--eval_every", 2, "--device", "cpu", "--dtype", "fp32",
       "--log", "log.csv", "--out", "out"]


def grpo(*words, steps=2, reward="share_of_e", out="out", log="log.csv"):
    return rl("--steps", steps, "--out", out, "--log", log, *words, reward=reward)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules["model"].SIZES, "nano", helpers.TINY)
    yield tmp_path
    guard.release()


def refused(capsys, run, *says):
    """run() ends with exit code 2 and one line on stderr that says all of this."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        run()
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and all(word in error for word in says), error


def digests(where="."):
    return {name: hashlib.sha256(Path(where, name).read_bytes()).hexdigest() for name in files(where)
            if not name.endswith("lock")}  # they go with the process


# ---- a new start, and what is there already ----
@pytest.mark.parametrize("module", [sft, train_grpo, train_ppo, reward_model], ids=lambda m: m.__name__)
def test_the_same_command_again_is_refused_and_changes_nothing(module, capsys):
    words = SFT if module is sft else grpo()
    if module is reward_model:
        words = ["--policy", tiny() / "policy.pth", "--data", "play", "--n_pairs", 8, "--held_out_pairs", 8,
                 "--batch_size", 8, "--prompt_len", 8, "--max_new", 4, "--out", "out", "--log", "log.csv"]
    cli(module, *words)
    before = digests()
    refused(capsys, lambda: cli(module, *words), "--resume", "--overwrite", "log.csv")
    assert digests() == before and not [name for name in before if "lock" in name or "bak" in name]
    cli(module, *words, "--overwrite")
    assert sorted(digests()) == sorted(before)


def test_class_to_image_goes_on_from_its_own_checkpoint(capsys):
    """A new start leaves no older checkpoint of more steps for --resume to take."""
    words = ["--device", "cpu", "--vq-steps", 2, "--gpt-steps", 2, "--classifier-steps", 2,
             "--eval-images", 2, "--sample-batch-size", 8, "--train-batch-size", 8, "--group-size", 2,
             "--eval-every", 0, "--log-image-every", 0, "--log", "log.csv", "--out", "out"]
    cli(c2i_grpo, *words, "--steps", 3)
    before = digests("out")
    refused(capsys, lambda: cli(c2i_grpo, *words, "--steps", 3), "--resume", "--overwrite")
    assert digests("out") == before
    cli(c2i_grpo, *words, "--steps", 1, "--lr", 0.1)
    assert Path("out/0000003.bak").is_dir() and dist.newest("out", "").name == "0000001"
    cli(c2i_grpo, *words, "--steps", 2, "--lr", 0.1, "--resume")
    assert pd.read_csv("log.csv").step.tolist() == [0, 1, 2]


def test_a_run_with_other_arguments_sets_the_former_aside(capsys):
    cli(train_grpo, *grpo())
    before = digests()
    cli(train_grpo, *grpo("--seed", 1))
    after = digests()
    assert {f"{name}.bak": digest for name, digest in before.items()}.items() <= after.items()
    cli(train_grpo, *grpo("--seed", 2))
    assert digests()["out/policy.pth.bak2"] == after["out/policy.pth"]
    refused(capsys, lambda: cli(train_ppo, *grpo()), "train_grpo.py", "--overwrite")


@pytest.mark.parametrize("words, says", [(["--track", "wandb"], ["wandb"]),
                                         (["--policy", "gone.pth"], ["gone.pth"])])
def test_nothing_is_touched_before_set_up_has_succeeded(words, says, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    cli(train_grpo, *grpo())
    before = digests()
    refused(capsys, lambda: cli(train_grpo, *grpo("--overwrite", *words)), *says)
    assert digests() == before


def test_links_as_outputs_are_written_through():
    for name in ("big", "out"):
        Path(name).mkdir()
    Path("out/policy.pth").symlink_to(Path("big/policy.pth").resolve())  # the target isn't there yet
    Path("log.csv").symlink_to(Path("big/g.csv").resolve())
    cli(train_grpo, *grpo())
    assert Path("out/policy.pth").is_symlink() and Path("log.csv").is_symlink()
    assert load_policy("big/policy.pth") and len(pd.read_csv("big/g.csv")) == 2


def test_two_runs_at_once_and_a_lock_that_a_kill_left(capsys):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from utils import guard; "
            "guard.lock('out', 'log.csv'); print('held', flush=True); time.sleep(60)")
    other = subprocess.Popen([sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    refused(capsys, lambda: cli(train_grpo, *grpo()), f"process {other.pid}", "--out")
    refused(capsys, lambda: cli(train_grpo, *grpo(out="b")), f"process {other.pid}", "log.csv")
    other.kill()
    other.wait()
    assert Path("out/.lock").exists()
    cli(train_grpo, *grpo())
    assert not Path("out/.lock").exists() and len(numbers("log.csv")) == 2


def test_names_of_outputs(capsys):
    for flag in ("--out", "--log"):
        refused(capsys, lambda: cli(train_grpo, *grpo(flag, "")), f"{flag} is empty")
    assert [str(flags.beside(name, ".json")) for name in ("a/lr0.1", "a/lr0.1.csv")] == ["a/lr0.1.json"] * 2
    for n in (1, 2):
        Path(f"lr0.{n}").write_text(f"step,kl\n0,{n}\n1,{n}\n")
    assert set(figure.read_runs(["lr0.1", "lr0.2"])) == {"lr0.1", "lr0.2"}


# ---- --resume ----
def change_policy():
    content = torch.load("p.pth")
    content["model"]["ln_f.bias"] += 0.1
    torch.save(content, "p.pth")


def change_reward():
    Path("r.py").write_text(Path("r.py").read_text() + "#\n")


CHANGES = {"policy": change_policy, "reward": change_reward,
           "prompts": lambda: Path("p.jsonl").write_text('{"prompt": "WENNA:\\n"}\n{"prompt": "b:\\n"}\n')}


@pytest.mark.parametrize("what", CHANGES)
def test_an_input_that_changed_is_refused_by_name(what, capsys):
    Path("p.pth").write_bytes((tiny() / "policy.pth").read_bytes())
    Path("r.py").write_text("def f(completions, prompts, **c): return [float(len(x)) for x in completions]\n")
    Path("p.jsonl").write_text('{"prompt": "WENNA:\\n"}\n{"prompt": "a:\\n"}\n')
    words = [*grpo(), "--policy", "p.pth", "--prompts", "p.jsonl", "--reward", "r.py:f"]
    cli(train_grpo, *words)
    CHANGES[what]()
    refused(capsys, lambda: cli(train_grpo, *words, "--resume"), "--resume", what, "has changed")


def test_a_reward_model_that_changed_and_a_corpus(capsys):
    Path("r.pth").write_bytes((tiny() / "reward.pth").read_bytes())
    words = [*grpo(reward="model"), "--reward_model", "r.pth"]
    cli(train_grpo, *words)
    content = torch.load("r.pth")
    content["model"]["mean"] += 1
    torch.save(content, "r.pth")
    refused(capsys, lambda: cli(train_grpo, *words, "--resume"), "reward r.pth has changed")
    Path("c.txt").write_text(text.PLAY.read_text())
    words = [*SFT, "--data", "c.txt", "--out", "s", "--log", "s.csv"]
    cli(sft, *words)
    Path("c.txt").write_text(text.PLAY.read_text().replace("bell", "ball"))
    refused(capsys, lambda: cli(sft, *words, "--resume"), "--data has changed")


def test_a_resume_of_fewer_steps_and_of_none(capsys):
    cli(train_grpo, *grpo(steps=3))
    before = digests()
    refused(capsys, lambda: cli(train_grpo, *grpo("--resume", steps=2)), "has done 3 steps", "wants 2")
    assert digests() == before
    cli(train_grpo, *grpo("--resume", steps=3))
    assert "nothing to do" in capsys.readouterr().out and digests()["log.csv"] == before["log.csv"]


def test_a_resume_says_that_the_learning_rate_falls_otherwise(capsys):
    """Only where it falls: with --lr_end 1 more steps change nothing that came before."""
    cli(train_grpo, *grpo("--lr_end", 0.5))
    capsys.readouterr()
    state = torch.load("out/state.pth")
    for rate, steps, said in ((0.5, 2, False), (0.5, 3, True), (1.0, 3, False)):
        torch.save(state | {"args": state["args"] | {"lr_end": rate}}, "out/state.pth")
        args = train_grpo.Args(**state["args"] | {"lr_end": rate, "steps": steps})
        assert checkpoint.load_state("out/state.pth", args, "python train_grpo.py")["step"] == 2
        note = "began with --steps 2: from here on the learning rate falls to its --lr_end 0.5 at step 3"
        printed = capsys.readouterr().out
        assert note in printed if said else not printed


def test_a_state_of_an_older_version_and_of_another_script(capsys):
    cli(train_grpo, *grpo())
    state = torch.load("out/state.pth")
    for part in ("inputs", "script", "threads"):
        state.pop(part)
    state["args"].pop("share_prompt")
    torch.save(state, "out/state.pth")
    cli(train_grpo, *grpo("--resume", steps=3))
    assert len(numbers("log.csv")) == 3
    refused(capsys, lambda: cli(train_ppo, *grpo("--resume", steps=4)), "train_grpo.py", "train_ppo.py")
    state.pop("samples")
    torch.save(state, "out/state.pth")
    refused(capsys, lambda: cli(train_grpo, *grpo("--resume", steps=4)), "out/state.pth", "samples")


def test_a_csv_keeps_its_rows_by_name(capsys):
    cli(train_grpo, *grpo(steps=3))
    table = pd.read_csv("log.csv")
    mine = table.drop(columns="peak_mem_mb").assign(step=table.step.astype(float), note="x")
    mine[sorted(mine)].to_csv("log.csv", index=False)
    cli(train_grpo, *grpo("--resume", steps=4))
    after = pd.read_csv("log.csv")
    assert after.step.tolist() == [0, 1, 2, 3] and after.note.tolist()[:3] == ["x"] * 3
    assert after.loss[:3].tolist() == pytest.approx(table.loss.tolist())
    assert after.peak_mem_mb.isna().sum() == 3
    Path("log.csv").write_text("a,b\n1,2\n")
    refused(capsys, lambda: cli(train_grpo, *grpo("--resume", steps=5)), "log.csv is no CSV of a run")


# ---- inputs ----
def test_a_padded_vocabulary_is_refused_at_load(capsys):
    model, tokenizer = load_policy(tiny() / "policy.pth")
    big = GPT(GPTConfig(**{**vars(model.config), "vocab_size": tokenizer.vocab_size + 64}))
    checkpoint.save("big.pth", "policy", big, tokenizer)
    refused(capsys, lambda: load_policy("big.pth"), "big.pth", str(tokenizer.vocab_size + 64))


@pytest.mark.parametrize("position", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_a_checkpoint(position, capsys):
    content = bytearray((tiny() / "policy.pth").read_bytes())
    content[int(len(content) * position)] ^= 1
    Path("p.pth").write_bytes(content)
    refused(capsys, lambda: load_policy("p.pth"), "p.pth")


RETURNS = {"a string": ("0101", "str"), "a dict": ({1: 2}, "dict"), "a set": ({1, 2, 3, 4}, "set"),
           "None": (None, "NoneType"), "a None": ([1.0, None, 1, 1], "entry 1"),
           "too large": ([1e39] * 4, "1e+39"),
           "strings": (["0.5"] * 4, "'0.5'"), "nested": ([[1.0]] * 4, "[1.0]"),
           "an int": ([10**400] * 4, "entry 0"),
           "a tensor of lists": (torch.ones(4, 1), "entry 0"), "too few": ([1.0], "1 numbers for 4")}


@pytest.mark.parametrize("case", RETURNS)
def test_what_a_reward_returns(case, capsys):
    value, says = RETURNS[case]
    asked = {"completions": list("abcd"), "prompts": ["p"] * 4}
    refused(capsys, lambda: rewards.checked(lambda completions, prompts: value, "--reward r", **asked), says)


def test_a_reward_that_is_awaited_and_one_that_float32_cannot_tell_apart(capsys):
    async def later(completions, prompts):
        return [1.0]
    asked = {"completions": ["a", "b"], "prompts": ["p"] * 2}
    refused(capsys, lambda: rewards.checked(later, "--reward later", **asked), "async")
    near = rewards.checked(lambda completions, prompts: [1e9, 1e9 + 1], "--reward near", **asked)
    assert near == [1e9, 1e9 + 1] and "float32" in capsys.readouterr().err
    same = rewards.checked(lambda completions, prompts: [0.3, 0.1 + 0.2], "--reward same", **asked)
    assert same[0] == 0.3 and not capsys.readouterr().err
    assert rewards.checked(lambda completions, prompts: torch.tensor([1, 2]), "r", **asked) == [1.0, 2.0]


def test_a_reward_gets_the_tokens_if_it_wants_them():
    Path("r.py").write_text("def f(completion_ids, **c):\n"
                            "    return [float(len(ids)) for ids in completion_ids]\n"
                            "def g(completions, prompts):\n    return [0.0 for _ in completions]\n")
    cli(train_grpo, *grpo(), "--reward", "r.py:f")
    row = pd.read_csv("log.csv").iloc[0]
    assert row.mean_r == pytest.approx(row.length)
    cli(train_grpo, *grpo(out="b", log="b.csv"), "--reward", "r.py:g")


def test_a_reward_file_finds_its_neighbours(capsys):
    Path("sub").mkdir()
    Path("sub/utils.py").write_text("def clean(x):\n    return 7.0\n")
    Path("sub/helper.py").write_text("value = 1\n")
    Path("sub/r.py").write_text("import helper\nfrom utils import clean\n\n\n"
                                "def f(completions, prompts, **c):\n"
                                "    return [clean(x) + helper.value for x in completions]\n")
    ours = sys.modules["utils"]
    function = rewards.load_reward("sub/r.py:f")
    assert function(completions=["a"], prompts=["p"]) == [8.0] and sys.modules["utils"] is ours
    Path("sub/a.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['x'])\n")
    with pytest.raises(SystemExit):
        rewards.load_reward("sub/a.py:f")
    assert re.search(r"error: --reward sub/a.py:f: sub/a.py raised SystemExit", capsys.readouterr().err)


def jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_equal_pairs_are_left_out(capsys):
    _, tokenizer = load_policy(tiny() / "policy.pth")
    rows = [{"prompt": "WENNA:\n", "chosen": f"good {i}", "rejected": f"good {i}"} for i in range(3)]
    jsonl("p.jsonl", rows)
    refused(capsys, lambda: reward_model.read_pairs("p.jsonl", tokenizer, 48), "equal")
    jsonl("p.jsonl", [*rows, {**rows[0], "rejected": "bad"}])
    assert len(reward_model.read_pairs("p.jsonl", tokenizer, 48).tokens) == 1
    assert "3 of 4 pairs" in capsys.readouterr().out


def test_a_prompt_is_trained_on_or_held_out():
    prompts = [f"p{i % 8}" for i in range(40)]
    parts = text.split_by_prompt(prompts, torch.Generator().manual_seed(0), "--pairs")
    sides = [{prompts[i] for i in part.tolist()} for part in parts]
    assert not sides[0] & sides[1] and sorted(torch.cat(parts).tolist()) == list(range(40))
    assert 4 <= len(parts[1]) <= 8
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))  # prompts of their own: as before
    train, held_out = text.split_by_prompt(list(range(30)), torch.Generator().manual_seed(0), "--pairs")
    assert torch.equal(held_out, order[:3]) and torch.equal(train, order[3:])


def test_a_byte_order_mark_and_lines_that_json_lets_through(capsys):
    Path("a.txt").write_text("\ufeff" + text.PLAY.read_text(), encoding="utf-8")
    assert text.load_corpus("a.txt")[0] == text.PLAY.read_text()
    Path("a.jsonl").write_text('\ufeff{"prompt": "a\u2028b"}\n', encoding="utf-8")
    assert text.read_jsonl("a.jsonl", ("prompt",), "--prompts") == [{"prompt": "a\u2028b"}]
    for line in ('{"prompt": "\\ud83d"}', '{"prompt": "a", "n": ' + "9" * 5000 + "}", "[" * 100_000):
        Path("a.jsonl").write_text(line + "\n")
        refused(capsys, lambda: text.read_jsonl("a.jsonl", ("prompt",), "--prompts"), "a.jsonl, line 1")


def test_headings_in_the_first_nine_tenths_only(capsys):
    play = text.PLAY.read_text()
    cut = int(len(play) * 0.9)
    Path("c.txt").write_text(play[:cut] + play[cut:].replace(":", ""))
    refused(capsys, lambda: cli(sft, *SFT, "--data", "c.txt"), "held-out last tenth of c.txt")


def test_bpe_learns_from_letters_without_a_space():
    draw = random.Random(0)
    letters = "".join(draw.choice("abcdefghij") for _ in range(40_000))
    began = time.process_time()
    assert len(train_bpe(letters, 400)) == 400 and time.process_time() - began < 10  # once it took minutes
    # by hand: "aaaaa" is aa aa a, then aaaa a, then aaaaa
    assert train_bpe("aaaaa\naaaaa", 300)[256:] == [b"aa", b"aaaa", b"aaaaa"]


# ---- the reward model with dropout, the critic ----
def test_the_reward_model_trains_without_the_dropout_of_its_policy():
    model, tokenizer = load_policy(tiny() / "policy.pth")
    config = GPTConfig(**{**vars(model.config), "dropout": 0.5})
    dropped = GPT(config)
    dropped.load_state_dict(model.state_dict())
    checkpoint.save("p.pth", "policy", dropped, tokenizer)
    words = ["--data", "play", "--n_pairs", 32, "--held_out_pairs", 16,
             "--batch_size", 8, "--prompt_len", 8, "--max_new", 6, "--epochs", 2, "--eval_every", 2,
             "--dtype", "fp32"]
    cli(reward_model, *words, "--policy", tiny() / "policy.pth", "--out", "plain", "--log", "plain.csv")
    cli(reward_model, *words, "--policy", "p.pth", "--out", "dropped", "--log", "dropped.csv")
    assert numbers("plain.csv") == numbers("dropped.csv")
    assert torch.equal(helpers.weights("plain/reward.pth"), helpers.weights("dropped/reward.pth"))


def test_a_critic_of_noise_explains_nothing():
    generator = torch.Generator().manual_seed(0)
    reward = torch.zeros(64, 48)
    reward[:, -1] = torch.randn(64, generator=generator)
    value = torch.randn(64, 1, generator=generator).expand(64, 48)  # it knows nothing of the reward
    mask = torch.ones(64, 48)
    former = gae(reward, value, mask, 1.0, 0.95)[1]  # the target of the value loss
    assert explained_variance(value, former, mask) > 0.1
    to_come = gae(reward, value, mask, 1.0, 1.0)[1]
    torch.testing.assert_close(to_come, reward.flip(1).cumsum(1).flip(1), atol=1e-5, rtol=1e-5)
    assert explained_variance(value, to_come, mask) < 0


# ---- signals, streams, surroundings ----
def test_sigterm_where_sigint_is_ignored(monkeypatch, capsys):
    with helpers.quiet_signals():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        interrupt = flags.Interrupt()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # passed on by a launcher at the same time: no second one
        assert interrupt.asked == signal.SIGTERM
        with pytest.raises(SystemExit) as left:
            interrupt.leave("x")
    assert left.value.code == 143 and "stopped and saved" in capsys.readouterr().out


def run(*words, **env):
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment(**env), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGHUP, 143)])
def test_a_signal_while_torch_is_imported(number, code):
    process = run(ROOT / "train_grpo.py", "--policy", "gone.pth")
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None and not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & 1:
        time.sleep(0.005)  # until SIGHUP has a handler
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == code and error == f"stopped by {signal.Signals(number).name}\n", error


LOST = {"a destructor": """
class Gone:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)


gone = Gone()
del gone""", "code in C": """
class Buffer(io.BytesIO):
    def write(self, content):
        if self.tell() > 100:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().write(content)


torch.save({"w": torch.ones(99)}, Buffer())"""}


@pytest.mark.parametrize("where", LOST)
def test_a_signal_whose_exception_gets_lost(where):
    code = "import io, os, signal, utils, torch\nutils.take_signals(utils.stop)" + LOST[where]
    done = subprocess.run([sys.executable, "-c", f"{code}\nprint('went on')"], cwd=ROOT / "vision", text=True,
                          env=environment(PYTHONPATH=str(ROOT)), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", "stopped by SIGTERM\n")


def test_a_run_that_was_killed_before_it_saved(capsys):
    """What is half-written goes, another run's stays; the refusal names the way that is open."""
    Path("out").mkdir()
    torn = ["out/.state.pth.12.tmp", ".log.csv.12.tmp", ".log.json.12.tmp", "out/.0000003.tmp/run.pth",
            ".log.png.12.tmp", ".log_images.png.12.tmp", ".log.samples.jsonl.12.tmp"]
    for name in (*torn, ".other.csv.12.tmp", "out/.mine.tmp"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("")
    Path("log.csv").write_text("step\n")
    capsys.readouterr()
    refused(capsys, lambda: cli(train_grpo, *grpo("--resume")), "no state at out/state.pth", "run `")
    with pytest.raises(SystemExit):
        cli(train_grpo, *grpo())
    error = capsys.readouterr().err
    assert "--overwrite" in error and "--resume" not in error
    cli(train_grpo, *grpo("--overwrite"))
    assert [name for name in files(".") if name.endswith("tmp")] == [".other.csv.12.tmp", "out/.mine.tmp"]
    assert not Path("out/.0000003.tmp").exists()


@pytest.mark.slow
def test_streams_that_are_closed_narrow_or_broken():
    code = (f"exec {sys.executable} {ROOT}/sample.py --policy {tiny()}/policy.pth --max_new 4 "
            "--temperature 9 --num_samples 50")
    for how in (f"{code} >&-", f"PYTHONIOENCODING=ascii {code}", f"({code}) | head -c 1"):
        done = subprocess.run(["bash", "-c", how], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, (how, done.stderr)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_a_variable_that_another_tool_left(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "1")
    refused(capsys, device.world, f"unset {name}", "torchrun")


@pytest.mark.slow
def test_shapes_are_checked_under_python_O():
    code = """if True:
        import torch
        from grpo import OBJECTIVES, grpo_loss
        x = torch.zeros(2, 4, 3)
        grpo_loss(x, x, x, torch.zeros(2, 1), torch.ones(2, 4, 3), OBJECTIVES["grpo"])"""
    done = subprocess.run([sys.executable, "-O", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "adv has shape (2, 1)" in done.stderr


def test_a_compiler_that_cannot_compile(monkeypatch, capsys):
    def fails(function):
        raise RuntimeError("CXX")
    monkeypatch.setattr(torch, "compile", lambda function, **kw: fails)
    refused(capsys, lambda: device.check_compiler(torch.device("cpu")), "--compile", "C++ compiler", "CXX")


# ---- plot.py ----
ROWS = "".join(f"{i},{i}.5\n" for i in range(5))
TABLES = {"utf-16": ("step,kl\n" + ROWS).encode("utf-16"), "a mark": ("\ufeffstep,kl\n" + ROWS).encode(),
          "semicolons": ("step;kl\n" + ROWS.replace(",", ";")).encode(),
          "decimal commas": ("step;kl\n" + ROWS.replace(",", ";").replace(".", ",")).encode(),
          "notes": ('#{"env": 1}\nstep,kl\n' + ROWS).encode(), "torn": ("step,kl\n" + ROWS + "5,1").encode()}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_other_tools(name):
    Path("a.csv").write_bytes(TABLES[name])
    x, y = figure.curve(figure.read_csv("a.csv"), "kl")
    assert x.tolist() == [0, 1, 2, 3, 4] and y.tolist() == [0.5, 1.5, 2.5, 3.5, 4.5]


def test_two_runs_in_one_file_dollars_and_commas(capsys):
    Path("a.csv").write_text("step,kl\n" + ROWS + ROWS)
    refused(capsys, lambda: figure.plot_panels(["a.csv"], "kl", "f.png"), "a.csv", "goes back from 4 to 0")
    Path("b$c_d$.csv").write_text('step,$x_y$,"lr=1, b"\n0,1,2\n1,2,3\n')
    path = figure.plot_panels(["b$c_d$.csv"], "$x_y$,lr=1, b,$x_y$", "f.png", dpi=30)
    assert path.is_file()
    runs = figure.read_runs(["b$c_d$.csv"])
    assert figure.metric_names("$x_y$,lr=1, b", runs) == ["$x_y$", "lr=1, b"]


# ---- the demo ----
def stage(monkeypatch, args=None):
    """What the demo would start for its first stage: the words, or None where it takes what is there."""
    started = []

    class Popen:
        def __init__(self, command, env):
            started.append(command[1:])

        def wait(self):
            return 0
    monkeypatch.setattr(subprocess, "Popen", Popen)
    monkeypatch.setattr(rlhf_demo.utils, "take_signals", lambda handler: None)
    rlhf_demo.run("sft.py", "out/sft/policy.pth", [], 2, args or rlhf_demo.Args(), "--steps", 2)
    return started[0] if started else None


def test_the_demo_leaves_what_it_has_not_made(monkeypatch, capsys):
    for name in ("out/sft", "logs"):
        Path(name).mkdir(parents=True)
    command = " ".join(stage(monkeypatch))
    assert "--overwrite" not in command
    Path("out/sft/policy.pth").write_bytes(b"mine")
    csv, record = Path("logs/sft.csv"), Path("logs/sft.json")
    csv.write_text("step,seconds,peak_mem_mb\n2,1,1\n")
    refused(capsys, lambda: stage(monkeypatch), "out/sft/policy.pth", "--fresh")
    record.write_text(json.dumps({"command": "python sft.py --size mini"}))
    refused(capsys, lambda: stage(monkeypatch), "python sft.py --size mini", "--fresh")
    record.write_text(json.dumps({"command": f"python {command}"}))
    assert stage(monkeypatch) is None
    csv.write_text("step,loss\n2,1\n")
    assert stage(monkeypatch)[-1] == "--overwrite"
    for damaged in ("{", "{}", "[]", '{"command": 3}'):
        record.write_text(damaged)
        assert stage(monkeypatch)[-1] == "--overwrite"
    record.write_text(json.dumps({"command": "python sft.py --steps 9", "started_by": "rlhf_demo.py"}))
    assert stage(monkeypatch)[-1] == "--overwrite"
    with contextlib.redirect_stdout(io.StringIO()):
        assert stage(monkeypatch, rlhf_demo.Args(fresh=True))[-1] == "--overwrite"


def test_a_log_whose_folder_is_a_file_is_one_line(capsys):
    Path("file").write_text("")
    refused(capsys, lambda: Log("file/a.csv", ["step"], 1), "can't write file/a.csv")
