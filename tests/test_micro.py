"""micro_grpo.py: its loss against grpo.py's, a short run that learns, and the whole run of one seed."""
import copy
import re
import runpy
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, environment

import micro_grpo
from grpo import OBJECTIVES, group_advantage
from grpo import grpo_loss as family_loss


def test_its_loss_is_the_familys_in_value_and_gradient():
    torch.manual_seed(0)
    logp_old, logp_ref, reward = torch.randn(3, 4, 5), torch.randn(3, 4, 5), torch.rand(3, 4)
    adv, mask = group_advantage(reward), torch.ones(3, 4, 5, dtype=torch.bool)
    ours = (logp_old + 0.3 * torch.randn(3, 4, 5)).requires_grad_(True)
    theirs = ours.detach().clone().requires_grad_(True)
    loss, kl, clipped = micro_grpo.grpo_loss(ours, logp_old, logp_ref, adv)
    row = OBJECTIVES["grpo"]
    assert (micro_grpo.EPS, micro_grpo.EPS, micro_grpo.BETA) == (row.eps_low, row.eps_high, row.beta)
    want, stats = family_loss(theirs, logp_old, logp_ref, adv, mask, row)
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), abs=1e-6)
    assert kl.item() == pytest.approx(stats["kl"].item(), abs=1e-5)
    assert clipped.item() == pytest.approx(stats["clip_frac"].item(), abs=1e-6) and clipped > 0
    assert torch.allclose(ours.grad, theirs.grad, atol=1e-7) and ours.grad.abs().max() > 1e-3


def test_its_advantage_is_the_groups():
    """The loop's line, read from the source, gives what grpo.py gives."""
    source = (ROOT / "micro_grpo.py").read_text(encoding="utf-8")
    line = re.search(r"^ +adv = (\(reward .*)$", source, re.MULTILINE)[1]
    reward = torch.rand(6, 8)
    assert torch.allclose(eval(line, {"reward": reward}), group_advantage(reward), atol=1e-6)


def test_the_reward_is_the_share_of_right_places():
    prompt = [3, 1, 4, 1, 10]
    tokens = torch.tensor([[*prompt, 1, 1, 3, 4], [*prompt, 1, 3, 1, 4], [*prompt, 0, 0, 0, 0]])
    assert micro_grpo.reward_of(tokens).tolist() == [1.0, 0.5, 0.0]


def test_fresh_prompts_are_no_training_prompts():
    torch.manual_seed(1)
    examples, fresh = micro_grpo.make_examples()
    both = {tuple(row) for row in examples.tolist()} & {tuple(row) for row in fresh.tolist()}
    assert not both and len(examples) == 9000 and len(fresh) == 1000


def test_a_few_steps_raise_the_reward(capsys):
    """From seed 0 on one thread, so a machine gives one outcome: no false failure unless torch changes."""
    torch.manual_seed(0)
    policy = micro_grpo.Policy()
    examples, fresh = micro_grpo.make_examples()
    micro_grpo.pretrain(policy, examples)
    start, before = copy.deepcopy(policy), micro_grpo.evaluate(policy, fresh)[0]
    micro_grpo.grpo(policy, examples, fresh, steps=40)
    with torch.no_grad():
        rewards = [micro_grpo.reward_of(micro_grpo.sample(p, fresh[:, :micro_grpo.P])).mean()
                   for p in (start, policy)]
    assert rewards[1] > rewards[0] + 0.1 and micro_grpo.evaluate(policy, fresh)[0] > before + 0.1
    assert all(not torch.equal(a, b) for a, b in zip(start.parameters(), policy.parameters()))
    shown = capsys.readouterr().out
    pattern = r"step  25  reward (0\.\d+)  exact answers +(\d+\.\d)%  KL (\d\.\d+)  clipped (\d+\.\d+)%"
    row = re.match(pattern, shown)
    assert all(float(number) > 0 for number in row.groups())  # the clip acted, and the policy left π₀


def run(*words):
    return subprocess.run([sys.executable, str(ROOT / "micro_grpo.py"), *words], env=environment(),
                          capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("words", [["x"], ["1", "2"], ["9" * 30]])
def test_a_bad_seed_is_one_line(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["micro_grpo.py", *words])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "micro_grpo.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert left.value.code == 2 and not out
    assert re.fullmatch(rf"error: seed '{re.escape(' '.join(words))}': wanted .*\n", err)


@pytest.mark.slow
def test_the_whole_run_takes_exact_answers_from_below_40_to_over_95_percent():
    done = run("0")
    assert done.returncode == 0, done.stderr
    first = float(re.search(r"supervised start: ([\d.]+)%", done.stdout)[1])
    steps = re.findall(r"exact answers +([\d.]+)%", done.stdout)
    assert first <= 40 and float(steps[-1]) >= 95
    after = re.findall(r"before: .* after: \S+ (right|wrong)", done.stdout)
    assert len(after) == 5 and after.count("right") >= 4
