"""The whole pipeline on the offline play, with a model that trains in seconds.

Reproducibility (the same run twice, kill and resume), every objective, PPO's critic, the reward model's
padding and normalisation, a smoke run in which the reward rises, and the README's quick commands.
"""
import json
import math
import os
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time

import helpers
import pytest
import torch
from helpers import ROOT, cli, files, numbers, read_csv, rl, tiny, weights

import model
import reward_model
import sft
import train_grpo
import train_ppo
from grpo import OBJECTIVES
from policy import load_policy
from reward import RewardModel, load_reward_model, load_scorer
from utils import checkpoint
from utils.log import SHARED
from utils.rewards import JUDGES
from utils.text import completions, load_corpus, load_prompts
from utils.text import words as words_of

RL_SCRIPTS = {"grpo": train_grpo, "ppo": train_ppo}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.SIZES, "nano", helpers.TINY)
    monkeypatch.delenv("KILL_AT_CALL", raising=False)
    return tmp_path


def column(path, name):
    return [float(row[name]) if row[name] else None for row in read_csv(path)[1]]


# ---- the words of a short run of each script ----
SFT = ["--data", "play", "--vocab_size", "260", "--block_size", "16", "--batch_size", "4",
       "--eval_every", "5", "--warmup", "3", "--device", "cpu"]
PAIRS = ["--data", "play", "--n_pairs", "64", "--held_out_pairs", "16", "--prompt_len", "8", "--max_new", "8",
         "--batch_size", "4", "--eval_every", "4", "--device", "cpu"]


def run_of(name):
    """(module, words) of a short run; the RL ones have several updates a rollout."""
    if name == "sft":
        return sft, [*SFT, "--muon_lr", "0.02", "--steps", "14"]
    if name == "reward_model":
        return reward_model, ["--policy", str(tiny() / "policy.pth"), *PAIRS, "--epochs", "1"]
    words = rl("--steps", 6, "--save_every", 2, "--eval_every", 3, "--epochs_per_rollout", 2,
               "--minibatches", 2, "--lr", 3e-3, reward="share_of_e")
    return (train_grpo if name == "train_grpo" else train_ppo), list(map(str, words))


STAGES = ["sft", "reward_model", "train_grpo", "train_ppo"]
FINAL = {"sft": "state.pth", "reward_model": "reward.pth",
    "train_grpo": "policy.pth", "train_ppo": "policy.pth"}


# ---- reproducible, bit for bit ----
@pytest.mark.parametrize("stage", STAGES)
def test_the_same_run_twice(stage):
    module, words = run_of(stage)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cli(module, *words, "--log", f"{name}.csv", "--out", name, "--seed", seed)
    assert numbers("a.csv") == numbers("b.csv")
    assert numbers("a.csv") != numbers("c.csv")
    assert torch.equal(weights(f"a/{FINAL[stage]}"), weights(f"b/{FINAL[stage]}"))
    header, rows = read_csv("a.csv")
    assert header[:6] == SHARED == ["step", "loss", "mean_r", "kl", "entropy", "token_adv"]
    assert [int(row["step"]) for row in rows] == list(range(len(rows)))


def resumed_equals_whole(module, words, stage, start):
    """Goes on with the run under "out" and "log.csv" and compares it with an uninterrupted one."""
    cli(module, *start)
    cli(module, *words, "--log", "whole.csv", "--out", "whole")
    assert numbers("log.csv") == numbers("whole.csv")
    assert torch.equal(weights(f"out/{FINAL[stage]}"), weights(f"whole/{FINAL[stage]}"))
    assert not [f for f in files("whole") if f.endswith(".tmp")]


CHILD = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import torch
torch.set_num_threads(1)
import importlib, model
from utils.cli import parse
model.SIZES["nano"] = (1, 2, 32)
module = importlib.import_module(sys.argv[0] if sys.argv[0] != "-c" else sys.argv.pop(1))
module.main(parse(module.Args, getattr(module, "PRESETS", None)))
"""


def child(module, words, **env):
    return subprocess.Popen([sys.executable, "-c", CHILD, str(ROOT), module.__name__, *map(str, words)],
                            env=helpers.environment(**env), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def kill_at_row(process, path, row):
    """SIGKILL as soon as the CSV has so many rows, wherever the process is then."""
    began = time.time()
    while process.poll() is None and time.time() - began < 280:
        if os.path.exists(path) and open(path).read().count("\n") > row:
            process.kill()
            break
        time.sleep(0.002)
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL, f"it wasn't killed: {process.returncode} {output}"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_killed_at_a_random_row_and_resumed(stage):
    module, words = run_of(stage)
    if stage == "sft":
        words = words[:-1] + ["100"]  # long enough to be caught in the middle
    else:
        words = words[:-1] + ["4"]
    row = random.SystemRandom().randrange(7, 40)
    print(f"killed at row {row}")
    kill_at_row(child(module, [*words, "--log", "log.csv", "--out", "out"]), "log.csv", row)
    resumed_equals_whole(module, words, stage, [*words, "--log", "log.csv", "--out", "out", "--resume"])


@pytest.mark.parametrize("stage", ["train_grpo", pytest.param("train_ppo", marks=pytest.mark.slow)])
def test_killed_within_a_random_step_and_resumed(stage):
    """The reward function kills the process: calls 1 and 5 are evaluations, the others steps."""
    module, words = run_of(stage)
    call = random.SystemRandom().randrange(2, 9)
    print(f"killed at call {call}")
    process = child(module, [*words, "--log", "log.csv", "--out", "out"],
                    KILL_AT_CALL=str(call), KILL_WITH="SIGKILL")
    output = process.communicate(timeout=280)[0]
    assert process.returncode == -signal.SIGKILL, output
    resumed_equals_whole(module, words, stage, [*words, "--log", "log.csv", "--out", "out", "--resume"])


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_saves_and_names_the_command_that_goes_on(stage, monkeypatch, capsys):
    module, words = run_of(stage)
    full = [*words, "--log", "log.csv", "--out", "out"]
    finite = checkpoint.finite
    if stage in ("sft", "reward_model"):
        steps = []

        def press(step, *args, **kw):
            steps.append(step)
            if len(steps) == 8:
                os.kill(os.getpid(), signal.SIGINT)
            return finite(step, *args, **kw)
        monkeypatch.setattr(checkpoint, "finite", press)
    else:
        monkeypatch.setenv("KILL_AT_CALL", "4")
        monkeypatch.setenv("KILL_WITH", "SIGINT")
    with pytest.raises(SystemExit) as left:
        cli(module, *full)
    monkeypatch.delenv("KILL_AT_CALL", raising=False)
    monkeypatch.setattr(checkpoint, "finite", finite)
    assert left.value.code == 130
    goes_on = re.search(r"stopped and saved; go on with: (.+)", capsys.readouterr().out)[1]
    python, script, *rest = shlex.split(goes_on)
    assert (python, script) == ("python", f"{module.__name__}.py") and rest == [*full, "--resume"]
    rows = len(read_csv("log.csv")[1])
    assert checkpoint.load("out/state.pth", "state", "")["step"] == rows  # no step is lost
    resumed_equals_whole(module, words, stage, rest)


# ---- checkpoints ----
def test_a_checkpoint_goes_there_and_back(folder):
    policy, tokenizer = load_policy(tiny() / "policy.pth")
    checkpoint.save("p.pth", "policy", policy, tokenizer, more=[1, 2])
    content = torch.load("p.pth", weights_only=True)  # runs no code
    assert {"format", "kind", "config", "tokenizer", "model"} <= content.keys() and content["more"] == [1, 2]
    again, tokens = load_policy("p.pth")
    assert again.config == policy.config and not again.training
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), policy.state_dict().values()))
    text = "ROMEO:\nO, speak again, bright angel! – 世界\n\nNURSE:\n"
    assert tokens.state() == tokenizer.state()
    assert tokens.encode(text) == tokenizer.encode(text) and tokens.decode(tokens.encode(text)) == text
    assert files(folder) == ["p.pth"]


def failing(*args):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("cut", ["os.fsync fails", "os.replace fails",
                         "SIGKILL in os.fsync", "SIGKILL in os.replace"])
def test_cut_off_while_a_checkpoint_is_written(cut, monkeypatch, folder):
    policy, tokenizer = load_policy(tiny() / "policy.pth")
    checkpoint.save("p.pth", "policy", policy, tokenizer)
    before = weights("p.pth")
    with torch.no_grad():
        policy.wte.weight += 1

    def die(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    def write():
        act = die if cut.startswith("SIGKILL") else failing
        monkeypatch.setattr(os, "fsync" if "fsync" in cut else "replace", act)
        checkpoint.save("p.pth", "policy", policy, tokenizer)

    if cut.startswith("SIGKILL"):
        pid = os.fork()
        if not pid:
            write()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    else:
        with pytest.raises(SystemExit) as left:
            write()
        assert left.value.code == 2
        assert files(folder) == ["p.pth"]
    assert torch.equal(weights("p.pth"), before)
    load_policy("p.pth")


def test_not_finite_stops_before_the_weights_and_the_checkpoint(monkeypatch, capsys):
    def broken(logp, *args, **kw):
        loss, stats = whole(logp, *args, **kw)
        return loss * (float("nan") if len(read_csv("logs/grpo.csv")[1]) == 3 else 1.0), stats
    whole = train_grpo.grpo_loss
    monkeypatch.setattr(train_grpo, "grpo_loss", broken)
    with pytest.raises(SystemExit) as left:
        cli(train_grpo, *rl("--steps", 9, "--save_every", 2, reward="share_of_e"))
    err = capsys.readouterr().err
    assert left.value.code == 2 and "Traceback" not in err
    assert "step 3" in err and "loss nan" in err and "--lr" in err
    assert checkpoint.load("out/grpo/state.pth", "state", "")["step"] == 2
    assert torch.isfinite(weights("out/grpo/policy.pth")).all()


# ---- SFT and the CSV ----
def test_sft_learns_and_keeps_the_best():
    header, rows = read_csv(tiny() / "sft.csv")
    held_out = [float(row["held_out"]) for row in rows if row["held_out"]]
    assert len(held_out) == 3 and held_out[-1] < held_out[0] - 1  # nats a token
    assert held_out[0] == pytest.approx(math.log(300), abs=0.3)  # it starts about uniform over the vocabulary
    for row in rows:
        assert row["mean_r"] == row["kl"] == row["entropy"] == row["token_adv"] == ""  # not measured: not 0
        assert row["loss"] or row is rows[-1]


def test_each_weight_has_one_optimizer(monkeypatch):
    """Muon: the blocks' four matrices each. AdamW: the two tables with decay, biases and norms without."""
    args = sft.Args(muon_lr=0.02)
    gpt = model.GPT(model.GPTConfig(50, 16, n_layer=2, n_head=2, n_embd=8))
    names = {id(p): name for name, p in gpt.named_parameters()}

    def names_of(group):
        return [names[id(p)] for p in group["params"]]
    made = sft.make_optimizers(gpt, args)
    every = [name for each in made.values() for group in each.param_groups for name in names_of(group)]
    assert sorted(every) == sorted(names.values()) and len(every) == len(set(every)) == 28
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    blocks = [f"h.{layer}.{name}.weight" for layer in (0, 1) for name in matrices]
    assert [names_of(group) for group in made["muon"].param_groups] == [blocks]
    decayed, others = made["optimizer"].param_groups
    assert names_of(decayed) == ["wte.weight", "wpe.weight"] and decayed["weight_decay"] == args.weight_decay
    assert others["weight_decay"] == 0 and all(p.dim() == 1 for p in others["params"])
    peaks = {name: {group["peak_lr"] for group in each.param_groups} for name, each in made.items()}
    assert peaks == {"optimizer": {args.lr}, "muon": {args.muon_lr}}
    adamw = sft.make_optimizers(gpt, sft.Args(muon_lr=0.0))
    monkeypatch.delattr(torch.optim, "Muon")  # as before torch 2.9
    for made in (adamw, sft.make_optimizers(gpt, args)):
        assert list(made) == ["optimizer"]
        assert set(names_of(made["optimizer"].param_groups[0])) == {"wte.weight", "wpe.weight", *blocks}
        assert sum(len(group["params"]) for group in made["optimizer"].param_groups) == 28


def test_the_learning_rates_schedule():
    """Warm-up by tenths, the peak, half of the way at half of the time, the share lr_end at the end."""
    args = sft.Args(steps=110, warmup=10, lr_end=0.2)
    for step, share in ((0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (60, 0.6), (110, 0.2)):
        assert sft.schedule(step, args) == pytest.approx(share)


def test_the_rl_columns():
    for name, module in RL_SCRIPTS.items():
        cli(module, *rl("--steps", 3, "--eval_every", 2, reward="share_of_e"))
        header, rows = read_csv(f"logs/{name}.csv")
        assert header[:6] == SHARED
        assert {"samples", "tokens", "seconds", "gold", "length", "distinct", "ref_logp", "clip_frac",
                "grad_norm", "frac_zero_std", "eval_r", "tokens_per_s", "peak_mem_mb"} <= set(header)
        assert [row["eval_r"] != "" for row in rows] == [True, False, True]
        assert all(row[k] != "" for row in rows for k in header if not k.startswith("eval_"))
        assert column(f"logs/{name}.csv", "samples") == [16, 32, 48]
        lengths = column(f"logs/{name}.csv", "length")
        tokens = column(f"logs/{name}.csv", "tokens")
        assert tokens == pytest.approx([16 * sum(lengths[:i + 1]) for i in range(3)])
        assert all(1 <= n <= 12 for n in lengths)


# ---- GRPO ----
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains(objective):
    cli(train_grpo, *rl("--objective", objective, "--steps", 2, reward="share_of_e"))
    for row in read_csv("logs/grpo.csv")[1]:
        assert all(math.isfinite(float(v)) for v in row.values() if v)
        assert float(row["grad_norm"]) > 0
    moved = (weights("out/grpo/policy.pth") - weights(tiny() / "policy.pth")).abs()
    assert 1e-6 < moved.max() < 0.01  # two steps of AdamW with lr 1e-4


def test_the_first_step():
    """Ratio 1 and centred advantages: the loss is β·KL = 0, its gradient is not (trl#2703)."""
    cli(train_grpo, *rl("--steps", 1, "--beta", 0.5, reward="share_of_e"))
    row = {k: float(v) for k, v in read_csv("logs/grpo.csv")[1][0].items() if v}
    assert abs(row["kl"]) < 1e-9 and row["ratio_max"] == 1 and row["clip_frac"] == 0
    assert abs(row["loss"]) < 1e-6 and row["grad_norm"] > 1e-3 and 0 < row["token_adv"] < 2


def test_several_epochs_clip():
    words = ["--steps", 2, "--lr", 1e-2, "--beta", 0]
    cli(train_grpo, *rl(*words, "--epochs_per_rollout", 4, "--minibatches", 2, reward="share_of_e"))
    cli(train_grpo, *rl(*words, "--log", "one.csv", "--out", "one", reward="share_of_e"))
    assert column("logs/grpo.csv", "clip_frac")[0] > 0.05 and column("logs/grpo.csv", "ratio_max")[0] > 1.2
    assert column("one.csv", "clip_frac") == [0, 0] and column("one.csv", "ratio_max") == [1, 1]


def test_equal_rewards_teach_nothing():
    """All answers earn 0.1 and there is no KL: the weights stay, bit for bit; the column says why."""
    for objective in ("grpo", "dr_grpo", "rloo", "dapo"):
        cli(train_grpo, *rl("--steps", 1, "--beta", 0, "--objective",
            objective, "--group_size", 7, reward="constant"))
        assert torch.equal(weights("out/grpo/policy.pth"), weights(tiny() / "policy.pth"))
        assert column("logs/grpo.csv", "grad_norm") == [0] and column("logs/grpo.csv", "token_adv") == [0]
        assert column("logs/grpo.csv", "frac_zero_std") == [1]


# `spec` is also the name of an argument within utils/rewards.py: it must reach the user all the same
PROMPTS = [{"prompt": p, "worth": i, "spec": [i, "x"]} for i, p in enumerate(
    ["WENNA:\n", "The bell rang.\n\nFENWICK:\n", "a\n", "Come home.\n\nMARGERY:\n",
     "no", "To sea!\n\nWENNA:\n"])]


@pytest.mark.parametrize("name", RL_SCRIPTS)
def test_prompts_of_a_user(name, folder):
    """Prompts of several lengths; their other keys reach the reward function, beside their own prompt."""
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    cli(RL_SCRIPTS[name], *rl("--prompts", "p.jsonl", "--steps", 2, "--epochs_per_rollout", 2,
                              "--minibatches", 1, "--lr", 1e-12, "--eval_every", 9, reward="of_prompt"))
    asked = [json.loads(line) for line in open("asked.jsonl")]
    known = {row["prompt"]: row for row in PROMPTS}
    sizes = []
    for prompts, worth, columns in asked:
        sizes.append(len(prompts))
        assert columns.keys() == {"spec", "completion_ids"} and len(columns["completion_ids"]) == len(prompts)
        for prompt, w, note in zip(prompts, worth, columns["spec"]):
            assert known[prompt] == {"prompt": prompt, "worth": w, "spec": note}
    # evaluation on the one held out, its four samples, two steps of 4 × 4, evaluation and samples at the end
    assert sizes == [1, 4, 16, 16, 1, 4]
    held_out = asked[0][0][0]
    assert asked[1][0] == [held_out] * 4
    for prompts, _, _ in asked[2:4]:
        assert held_out not in prompts
        groups = [prompts[i:i + 4] for i in range(0, 16, 4)]
        assert all(len(set(group)) == 1 for group in groups) and len({group[0] for group in groups}) == 4
    # every answer to a prompt earns the same: groups of 4 whole answers, none mixed
    assert column(f"logs/{name}.csv", "frac_zero_std") == [1, 1]
    # the second epoch scores with padding what was sampled with padding: nothing moved, so the ratio is 1
    assert all(abs(r - 1) < 1e-4 for r in column(f"logs/{name}.csv", "ratio_max"))
    assert all(abs(kl) < 1e-8 for kl in column(f"logs/{name}.csv", "kl"))


# ---- PPO ----
def test_ppo_first_step():
    cli(train_ppo, *rl("--steps", 1, "--epochs_per_rollout", 1, "--minibatches", 1, reward="share_of_e"))
    row = {k: float(v) for k, v in read_csv("logs/ppo.csv")[1][0].items() if v}
    assert abs(row["ratio_max"] - 1) < 1e-4 and row["clip_frac"] == 0 and abs(row["kl"]) < 1e-8
    assert row["grad_norm"] > 1e-3 and row["value_loss"] > 0
    assert abs(row["explained_variance"]) < 1e-6  # the critic says 0 everywhere


def test_the_critic_learns(folder):
    """The reward hangs on the prompt alone: a critic that reads prompts explains it, a constant one can't."""
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    cli(train_ppo, *rl("--prompts", "p.jsonl", "--steps", 15, "--beta", 0, "--lr", 1e-5, "--value_lr", 1e-2,
                       "--value_clip", 10, reward="of_prompt"))
    explained, loss = column("logs/ppo.csv", "explained_variance"), column("logs/ppo.csv", "value_loss")
    assert explained[0] < 0.01 and statistics.mean(explained[-3:]) > 0.7
    assert statistics.mean(loss[-3:]) < loss[0] / 3
    critic = checkpoint.load("out/ppo/state.pth", "state", "")["critic"]
    begun = checkpoint.load(tiny() / "policy.pth", "policy", "")["model"]
    assert critic["head.weight"].abs().max() > 1e-3
    assert all((critic[f"trunk.{k}"] - v).abs().max() > 1e-4 for k,
               v in begun.items() if k.endswith("c_fc.weight"))


# ---- the reward model ----
def scored(model, tokens, mask, pad=None):
    with torch.no_grad():
        return model(tokens, mask, pad)


@pytest.mark.parametrize("pool", ["sum", "last"])
def test_pools_and_padding(pool):
    """Against the sum, or the last one, of per-token scalars, read answer by answer without any padding."""
    torch.manual_seed(0)
    rm = RewardModel(model.GPTConfig(50, 32, 2, 2, 16), pool).eval()
    torch.nn.init.normal_(rm.head.weight)
    rm.mean.fill_(0.3)
    rm.std.fill_(2.0)
    prompts, answers = [5, 8, 1, 8], [6, 1, 4, 3]
    P, T = max(prompts), max(answers)
    rows = [(torch.randint(50, (p,)), torch.randint(50, (a,))) for p, a in zip(prompts, answers)]
    expected = []
    for prompt, answer in rows:
        each = rm.head(rm.trunk.hidden(torch.cat([prompt, answer])[None]))[0, len(prompt):, 0]
        expected.append(((each.sum() if pool == "sum" else each[-1]) - 0.3) / 2)
    for fill in (0, 49):
        tokens = torch.full((4, P + T), fill)
        mask = torch.zeros(4, T, dtype=torch.bool)
        for i, (prompt, answer) in enumerate(rows):
            tokens[i, P - len(prompt):P + len(answer)] = torch.cat([prompt, answer])
            mask[i, :len(answer)] = True
        pad = torch.tensor([P - p for p in prompts])
        torch.testing.assert_close(scored(rm, tokens, mask, pad), torch.stack(expected), atol=1e-5, rtol=1e-5)
    keep = [i for i, p in enumerate(prompts) if p == P]  # without any pad the same rows score the same
    torch.testing.assert_close(
    scored(
        rm,
        tokens[keep],
        mask[keep]),
        torch.stack(expected)[keep],
        atol=1e-5,
         rtol=1e-5)


@pytest.mark.parametrize("pool", ["sum", "last"])
def test_a_separable_set_is_ordered_at_100_percent(pool, folder, capsys):
    """Who praises is chosen: fifty pairs of several lengths, all of them in order, held-out ones too."""
    draw = random.Random(0)
    rows = []
    for i in range(50):
        rest = [" ".join(draw.choice(["the", "sea", "bell", "night"])
                         for _ in range(draw.randrange(1, 4))) for _ in "ab"]
        rows.append({"prompt": "WENNA:\n" if i % 2 else "What say you to the sea?\n\nFENWICK:\n",
                     "chosen": f"good {rest[0]}", "rejected": f"bad {rest[1]}"})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = cli(reward_model, "--policy", tiny() / "policy.pth", "--pairs", "pairs.jsonl", "--pool", pool,
                 "--epochs", 12, "--batch_size", 15, "--lr", 3e-3, "--device", "cpu", "--dtype", "fp32")
    assert result["held_out_accuracy"] == 1.0
    assert "held-out accuracy 1.000" in capsys.readouterr().out
    rm, content = load_reward_model("out/reward/reward.pth")
    assert content["pool"] == pool and rm.pool == pool
    _, tokenizer = load_policy(tiny() / "policy.pth")
    pairs = reward_model.read_pairs("pairs.jsonl", tokenizer, rm.config.block_size)
    for i in range(50):  # one by one, so that no neighbour can lend its score
        tokens, mask, pad = pairs.pick(torch.tensor([i])).batch("cpu")
        chosen, rejected = scored(rm, tokens, mask, pad).tolist()
        assert chosen > rejected
    assert column("logs/reward.csv", "judge_accuracy")[0] is None  # no judge: not measured


def test_scores_are_normalised_on_held_out_answers():
    args = reward_model.Args(data="play", held_out_pairs=64, prompt_len=16, max_new=12)
    policy, tokenizer = load_policy(tiny() / "policy.pth")
    prompts = load_prompts("", "play", tokenizer, 16)[1]
    pairs, texts = reward_model.sample_pairs(policy, tokenizer, prompts, 64, args, 1)
    rm, content = load_reward_model(tiny() / "reward.pth")
    tokens, mask, pad = pairs.batch("cpu")
    score = scored(rm, tokens, mask, pad)
    assert abs(score.mean()) < 1e-4 and abs(score.std() - 1) < 1e-3
    kept = content["model"]  # the two numbers are in the checkpoint, beside the weights
    assert kept["mean"] == rm.mean and kept["std"] == rm.std
    raw = score * kept["std"] + kept["mean"]
    rm.mean.zero_()
    rm.std.fill_(1.0)
    torch.testing.assert_close(scored(rm, tokens, mask, pad), raw, atol=1e-5, rtol=1e-4)
    # the scorer of the RL scripts says the same; the gold column belongs to the texts
    score_of = load_scorer("model", tiny() / "reward.pth", "π₀", tokenizer, torch.device("cpu"))
    one = prompts.pick(torch.zeros(128, dtype=torch.long))
    torch.testing.assert_close(score_of(tokens, mask, one, [""] * 128), score, atol=1e-5, rtol=1e-4)
    flat = [row[key] for row in texts for key in ("chosen", "rejected")]
    known = frozenset(words_of(load_corpus("play")[0]))
    assert flat == completions(pairs.tokens.flatten(0, 1)[:, 16:], pairs.mask.flatten(0, 1), tokenizer)
    assert pairs.gold.flatten().tolist() == pytest.approx(JUDGES["taste"](flat, flat, corpus_words=known))
    assert pairs.gold.flatten().tolist() != pytest.approx(JUDGES["taste"](flat, flat))  # it knew the corpus


def test_labels_follow_bradley_terry():
    """Without noise the judge's favourite is always chosen; with much noise it is a coin's throw."""
    policy, tokenizer = load_policy(tiny() / "policy.pth")
    prompts = load_prompts("", "play", tokenizer, 16)[0]

    def favourite(temperature):
        args = reward_model.Args(judge="meter", label_temperature=temperature, prompt_len=16, max_new=12)
        gap = reward_model.sample_pairs(policy, tokenizer, prompts, 400, args, 0)[0].gold
        gap = gap[:, 0] - gap[:, 1]
        return (gap > 0).float()[gap != 0], gap[gap != 0].abs()
    assert favourite(0.0)[0].min() == 1
    for temperature in (0.1, 0.3, 100.0):
        won, gap = favourite(temperature)
        p = torch.sigmoid(gap / temperature)
        z = (won - p).sum() / (p * (1 - p)).sum().sqrt()
        assert abs(z) < 5, temperature  # chance of a false alarm: 6e-7 each; the seed is fixed besides


# ---- reward rises ----
@pytest.mark.slow
@pytest.mark.parametrize("name", RL_SCRIPTS)
def test_reward_rises_beyond_chance(name):
    """The share of the letter e in an answer, 40 steps of 8 × 8 answers.

    The mean reward of the last 10 steps is compared with 20 rollouts of π₀ of the same size. Were the policy
    untrained, the difference divided by its standard error, s·√(1/10 + 1/20), would follow Student's t with
    19 degrees of freedom, and exceed 8 with probability 1e-7: so rarely is an untrained policy let through.
    A trained one fails with no probability: with fixed seeds the run is the same every time, t = 40 or more.
    """
    size = ["--prompts_per_step", 8, "--group_size", 8]
    cli(train_grpo, *rl(*size, "--steps", 20, "--lr", 0, "--log", "chance.csv", "--out", "chance",
                        "--eval_every", 99, "--seed", 5, reward="share_of_e"))
    assert torch.equal(weights("chance/policy.pth"), weights(tiny() / "policy.pth"))
    chance = column("chance.csv", "mean_r")
    cli(RL_SCRIPTS[name], *rl(*size, "--steps", 40, "--lr", 3e-3, reward="share_of_e"))
    trained = column(f"logs/{name}.csv", "mean_r")
    error = statistics.stdev(chance) * math.sqrt(1 / 10 + 1 / 20)
    t = (statistics.mean(trained[-10:]) - statistics.mean(chance)) / error
    print(f"π₀ {statistics.mean(chance):.4f}, trained {statistics.mean(trained[-10:]):.4f}, t = {t:.1f}")
    assert t > 8
    assert (weights(f"out/{name}/policy.pth") - weights(tiny() / "policy.pth")).abs().max() > 1e-3
    assert column(f"logs/{name}.csv", "kl")[-1] > 1e-3  # it went somewhere, away from π₀
    held_out = [x for x in column(f"logs/{name}.csv", "eval_r") if x is not None]
    assert held_out[-1] > held_out[0]


# ---- the README ----
def quick_blocks():
    path = ROOT / "README.md"
    return re.findall(r"^```bash quick\n(.*?)^```", path.read_text(encoding="utf-8"),
                      re.M | re.S) if path.exists() else []


@pytest.mark.slow
def test_quick_blocks_of_the_readme(folder):
    """As written, one after another, in a folder that holds links to the repository's files."""
    if not (ROOT / "README.md").exists():
        pytest.skip("no README.md yet")
    blocks = quick_blocks()
    assert blocks, "README.md has no block that opens with ```bash quick"
    for path in ROOT.iterdir():
        if path.suffix in (".py", ".txt", ".toml") or path.name in (
            "utils", "data", "vision", "results", "Makefile"):
            (folder / path.name).symlink_to(path)
    (folder / "bin").mkdir()
    for name in ("python", "python3"):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    env = helpers.environment(PATH=f"{folder}/bin:{os.environ['PATH']}")
    for block in blocks:
        run = subprocess.run(["bash", "-euo", "pipefail", "-c", block], env=env, capture_output=True,
                             text=True, timeout=600)
        assert run.returncode == 0, f"{block}\n{run.stdout[-1500:]}\n{run.stderr[-1500:]}"
