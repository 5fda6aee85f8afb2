"""What surrounds the loss against numbers worked by hand, and the loop with and without it.

Run: python -m pytest tests/test_techniques.py
"""
import csv
from types import SimpleNamespace

import pytest
import torch
from helpers import cli, numbers, rl

import techniques
import train_grpo
import train_ppo
from answers import Answers, minibatches
from generate import score
from grpo import OBJECTIVES, group_advantage
from model import GPT, GPTConfig
from utils import checkpoint
from utils.text import Prompts
from utils.tokenizer import Tokenizer

ARGS = SimpleNamespace(overlong="keep", overlong_tokens=5, max_new=20, tis_cap=0.0, top_entropy=1.0,
                       entropy_coef=0.0, minibatches=1, micro_batch=0, dynamic_sampling=0, objective="grpo")


def args(**changed):
    return SimpleNamespace(**vars(ARGS) | changed)


def answers(length, T=20, start=0):
    """b prompts with G answers of these lengths, (b, G); tokens count up from `start`."""
    length = torch.tensor(length)
    b, G = length.shape
    mask = torch.arange(T) < length[:, :, None]
    tokens = start + torch.arange(b * G * (2 + T)).view(b, G, 2 + T)
    numbers = list(range(b * G))
    prompts = Prompts(tokens.flatten(0, 1)[:, :2], None, [f"{start}p{i}" for i in numbers], {"n": numbers})
    texts = [f"{start}t{i}" for i in numbers]
    return Answers(tokens, -torch.ones(b, G, T), mask, None, prompts, texts, slice(0, b), b)


def test_the_penalty_of_long_answers():
    """DAPO, eq. 13, with L_max 20 and a cache of 5: 0 up to 15 tokens, then a fifth more with each token."""
    some = answers([[3, 15], [17, 20]])
    reward = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    got = techniques.shaped(reward, some, args(overlong="penalty"))
    torch.testing.assert_close(got, torch.tensor([[1.0, 1.0], [-0.4, 0.0]]))
    assert techniques.shaped(reward, some, args()) is reward


def test_maxrl_refuses_a_negative_reward(capsys):
    with pytest.raises(SystemExit):
        techniques.shaped(torch.tensor([[1.0, -0.5]]), answers([[3, 3]]), args(objective="maxrl"))
    assert "-0.5" in capsys.readouterr().err


def test_kl_in_the_reward():
    """Two answers of 2 and 1 tokens: β times the sum of the log-ratios of their real tokens."""
    some = answers([[2, 1]], T=3)
    logp = torch.tensor([[[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0]]])
    ref = torch.tensor([[[-3.0, -2.5, 0.0], [-0.5, 0.0, 0.0]]])
    got = techniques.less_kl(torch.tensor([[1.0, 1.0]]), some, logp, ref, 0.1)
    torch.testing.assert_close(got, torch.tensor([[1 - 0.1 * 2.5, 1 + 0.1 * 0.5]]))


def test_which_answers_were_cut():
    """Full length without a stop at the end is cut. A stop in the last place is an end."""
    some = answers([[20, 20, 5]])
    some.tokens[0, 1, -1] = 7
    assert techniques.cut_off(some, [(7,)], 20).tolist() == [[True, False, False]]
    assert techniques.cut_off(some, [(7,)], 21).tolist() == [[False, False, False]]


def environment(logp, entropy):
    tokenizer = SimpleNamespace(stops=[])
    return SimpleNamespace(score=lambda policy, some: (logp, entropy), tokenizer=tokenizer, T=20)


def test_weights_of_tokens():
    """TIS caps exp(0.5) = 1.65 and keeps exp(-0.5); top entropy keeps the two highest of four real tokens."""
    some, adv = answers([[2, 2]], T=2), torch.tensor([[2.0, -1.0]])
    logp = torch.tensor([[[-0.5, -1.0], [-1.5, -1.0]]])
    entropy = torch.tensor([[[0.1, 0.9], [0.5, 0.2]]])
    env = environment(logp, entropy)
    got, mask = techniques.weighted(adv, some, args(tis_cap=1.2), env, None)
    torch.testing.assert_close(got, torch.tensor([[[2.4, 2.0], [-0.6065307, -1.0]]]))
    got, mask = techniques.weighted(adv, some, args(top_entropy=0.5), env, None)
    assert got.tolist() == [[[0.0, 2.0], [-1.0, 0.0]]] and mask.all()
    env = environment(None, None)
    got, mask = techniques.weighted(adv, answers([[20, 3]]), args(overlong="mask"), env, None)
    assert mask.sum(2).tolist() == [[0, 3]] and got.shape == (1, 2, 20)


def test_groups_that_are_drawn_anew():
    """Only groups of equal rewards are replaced, each by its own fresh one, until rewards differ."""
    old, asked = answers([[3, 4], [5, 6], [7, 8]]), []

    def rollout(policy, generator, rows):
        asked.append(rows.tolist())
        return answers([[9, 9]] * len(rows), T=12, start=1000 * len(asked))
    rewards = iter([torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]),
                    torch.tensor([[2.0, 3.0], [5.0, 5.0]]), torch.tensor([[7.0, 8.0]])])
    env = SimpleNamespace(args=args(dynamic_sampling=5), rollout=rollout, reward=lambda some: next(rewards))
    new, reward = techniques.rewarded(old, env, None, None)
    assert asked == [[0, 2], [2]] and reward.tolist() == [[2, 3], [0, 1], [7, 8]]
    assert new.texts == ["1000t0", "1000t1", "0t2", "0t3", "2000t0", "2000t1"]
    assert new.prompts.texts == ["1000p0", "1000p1", "0p2", "0p3", "2000p0", "2000p1"]
    assert new.prompts.columns["n"] == [0, 1, 2, 3, 0, 1]
    assert new.mask.sum(2).tolist() == [[9, 9], [5, 6], [9, 9]]
    assert new.tokens.shape == (3, 2, 22) and new.tokens[2, 1, 0] == 2014  # the rest is padded


def test_the_denominators_of_a_minibatch():
    """Equal groups need no pass and still count, unless dynamic sampling tried to replace them."""
    some, generator = answers([[3, 4], [5, 6]]), torch.Generator().manual_seed(0)
    some.useful = torch.tensor([False, True])
    [batch] = minibatches(some, some.mask, args(), generator)
    assert (batch.n_tokens, batch.n_answers, batch.n_scored) == (18, 4, 11) and batch.parts[0].tolist() == [1]
    [batch] = minibatches(some, some.mask, args(dynamic_sampling=1), generator)
    assert (batch.n_tokens, batch.n_answers, batch.n_scored) == (11, 2, 11)


def test_baselines_over_the_batch():
    """A batch of equal rewards has advantage exactly 0, whatever float32 makes of its mean."""
    assert not group_advantage(torch.full((3, 7), 0.1), "batch", "batch").any()
    got = group_advantage(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), "mean", "mean")
    torch.testing.assert_close(got, torch.tensor([[0.9998, -0.9998], [0.0, 0.0]]))
    with pytest.raises(ValueError, match="at least 0"):
        group_advantage(torch.tensor([[-1.0, 0.0]]), "mean", "mean")


def test_the_gradient_of_the_entropy():
    """The bonus has the entropy's own gradient: against a finite difference."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(9, 8, 1, 1, 8)).double().eval()
    tokens = torch.randint(9, (2, 6))
    logp, entropy = score(model, tokens, 3, entropy_grad=True)
    plain = score(model, tokens, 3)
    torch.testing.assert_close((logp, entropy), plain)
    weight = model.wte.weight
    grad = torch.autograd.grad(entropy.sum(), weight)[0][4, 2]
    with torch.no_grad():
        values = []
        for step in (0.01, -0.01):
            weight[4, 2] += step
            values.append(score(model, tokens, 3)[1].sum())
            weight[4, 2] -= step
    assert grad.item() == pytest.approx(((values[0] - values[1]) / 0.02).item(), rel=1e-2)


# ---- the loop ----
@pytest.fixture
def tiny(tmp_path):
    """A policy of 2 layers, and a reward that is the same for all answers of every second prompt."""
    torch.manual_seed(0)
    tokenizer = Tokenizer("char", list("abcdefgh\n"))
    checkpoint.save(tmp_path / "p.pth", "policy", GPT(GPTConfig(9, 24, 2, 2, 16)), tokenizer)
    rows = [f'{{"prompt": "{a}{b}"}}\n' for a in "abcd" for b in "efgh"]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    (tmp_path / "reward.py").write_text(
        "def r(completions, prompts, **columns):\n"
        "    return [t.count('a') if p[0] in 'ab' else 0 for t, p in zip(completions, prompts)]\n")
    return tmp_path


def train(script, folder, name, *flags):
    words = ["--policy", folder / "p.pth", "--prompts", folder / "prompts.jsonl", "--reward",
             f"{folder}/reward.py:r", "--steps", 4, "--prompts_per_step", 4, "--group_size", 4,
             "--max_new", 10, "--eval_every", 2,
             "--dtype", "fp32", "--lr", 1e-2, "--log", folder / f"{name}.csv", "--out", folder / name, *flags]
    cli(script, *map(str, words))
    with open(folder / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, torch.load(folder / name / "policy.pth", weights_only=True)["model"]


def same(a, b):
    return all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


def test_no_pass_for_groups_without_gradient(tiny, monkeypatch):
    """Leaving them out changes no gradient: theirs is 0, and the denominators count them."""
    rows = train(train_grpo, tiny, "skipped", "--beta", 0)[0]
    assert 0 < float(rows[0]["frac_zero_std"]) < 1 and rows[1]["kl"] == "" and rows[2]["kl"] != ""
    everything = lambda adv, *rest: torch.ones(len(adv), dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(techniques, "groups_with_gradient", everything)
    every = train(train_grpo, tiny, "all", "--beta", 0)[0]
    for name in ("loss", "grad_norm"):  # of the first step: AdamW makes much of the last digits
        assert float(rows[0][name]) == pytest.approx(float(every[0][name]), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("script", [train_grpo, train_ppo])
@pytest.mark.parametrize("flags", [
    ("--overlong", "mask"), ("--overlong", "penalty", "--overlong_tokens", 8), ("--entropy_coef", 0.5),
    ("--top_entropy", 0.3), ("--sync_ref_every", 2), ("--lr_end", 0.1)])
def test_each_flag_changes_what_is_learnt(tiny, script, flags):
    assert not same(train(script, tiny, "plain")[1], train(script, tiny, "other", *flags)[1])


@pytest.mark.parametrize("flags", [
    ("--kl_in_reward",), ("--dynamic_sampling", 3), ("--tis_cap", 1.0, "--dtype", "bf16")])
def test_flags_of_grpo(tiny, flags):
    """tis_cap weighs by the gap of two precisions; that there is one is the point of bf16 here."""
    plain = ("--dtype", "bf16") if "--tis_cap" in flags else ()
    rows, weights = train(train_grpo, tiny, "other", *flags)
    others = train(train_grpo, tiny, "plain", *plain)[1]
    assert not all(torch.equal(weights[name], others[name]) for name in weights)
    if "--dynamic_sampling" in flags:  # every answer that was drawn counts
        assert int(rows[-1]["samples"]) > 4 * 16


def test_a_part_whose_answers_are_all_cut_leaves_the_numbers_of_the_others(tmp_path, monkeypatch):
    """With seed 3 one answer of 16 is whole, so three of the four parts have no token in the loss."""
    monkeypatch.chdir(tmp_path)
    rows = []
    for size in (1, 4):
        words = rl("--steps", 1, "--seed", 3, "--overlong", "mask", "--micro_batch", size,
                   reward="share_of_e")
        cli(train_grpo, *words, "--log", f"{size}.csv", "--out", f"out{size}")
        rows += numbers(f"{size}.csv")
    assert float(rows[0]["frac_cut"]) == 15 / 16
    for name in ("entropy", "ref_logp", "kl"):
        assert float(rows[0][name]) == pytest.approx(float(rows[1][name]), rel=1e-4)


def test_the_bonus_keeps_entropy(tiny):
    plain, bonus = (train(train_grpo, tiny, name, "--steps", 12, *flags)[0][-1] for name, flags in
                    (("plain", ()), ("bonus", ("--entropy_coef", 1.0))))
    assert float(bonus["entropy"]) > float(plain["entropy"]) + 0.1


def test_a_moving_reference_resumes(tiny):
    """The reference is in the checkpoint: a resumed run ends at the same weights."""
    flags = ("--sync_ref_every", 2, "--save_every", 1)
    whole = train(train_grpo, tiny, "whole", *flags)[1]
    train(train_grpo, tiny, "half", *flags, "--steps", 3)
    assert same(whole, train(train_grpo, tiny, "half", *flags, "--resume")[1])


def test_the_rate_falls():
    group = {"lr": 2.0, "params": []}
    env = SimpleNamespace(args=args(eval_every=10**9, lr_end=0.5, steps=10, sync_ref_every=0), first={},
                          evaluate=lambda policy: {}, run=SimpleNamespace(start=1, start_clock=lambda: None),
                          samples=SimpleNamespace(draw=lambda *_: None))
    rates = []
    for step in (0, 5, 10):
        techniques.before_step(step, env, {"model": None}, None, SimpleNamespace(param_groups=[group]))
        rates.append(group["lr"])
    assert rates == pytest.approx([2.0, 1.5, 1.0])


def test_rows_that_need_their_flags(tiny, capsys):
    refused = {("--kl_in_reward", "--beta", 0): "--beta above 0", ("--top_entropy", 0): "at least"}
    for words, wanted in refused.items():
        with pytest.raises(SystemExit) as stop:
            train(train_grpo, tiny, "bad", *words)
        assert stop.value.code == 2 and wanted in capsys.readouterr().err
    assert OBJECTIVES["maxrl"].scale == "mean"
