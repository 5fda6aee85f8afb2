"""PPO's pieces against definitions: GAE as a sum and in its limits, losses by hand, a critic that learns.

Run: python -m pytest tests/test_ppo.py
"""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GPTConfig
from ppo import ValueModel, explained_variance, gae, masked_mean, ppo_policy_loss, value_loss, whiten

UNIT = st.floats(0, 1)


def rollout(N, T, seed=0):
    """Random rewards and values, masks of every length from 0 to T, float64."""
    g = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(2, N, T, generator=g, dtype=torch.float64)
    length = torch.randint(0, T + 1, (N, 1), generator=g)
    return reward, value, torch.arange(T) < length


def by_definition(reward, value, mask, gamma, lam):
    """Σ_k (γλ)^k δ_{t+k}, δ_t = r_t + γ·V_{t+1} - V_t, V = 0 behind the last token: a double sum."""
    adv = torch.zeros_like(reward)
    for i in range(len(reward)):
        n = int(mask[i].sum())
        r, v = reward[i, :n].tolist(), value[i, :n].tolist() + [0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            adv[i, t] = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
    return adv


# ---- GAE ----
def test_gae_by_hand():
    """γ = ½, λ = ½, two tokens then padding: δ = (1 + ½·4 - 2, 3 - 4) = (1, -1), so Â = (1 - ¼, -1)."""
    reward, value = torch.tensor([[1.0, 3.0, 50.0]]), torch.tensor([[2.0, 4.0, 70.0]])
    mask = torch.tensor([[1, 1, 0]])
    adv, returns = gae(reward, value, mask, gamma=0.5, lam=0.5)
    assert adv.tolist() == [[0.75, -1.0, 0.0]]
    assert returns.tolist() == [[2.75, 3.0, 0.0]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(N=st.integers(1, 4), T=st.integers(1, 7), seed=st.integers(0, 999), gamma=UNIT, lam=UNIT)
def test_gae_is_its_definition(N, T, seed, gamma, lam):
    """The backward recursion equals the double sum; λ = 1 is Monte Carlo minus V, λ = 0 the TD error."""
    reward, value, mask = rollout(N, T, seed)
    adv, returns = gae(reward, value, mask, gamma, lam)
    torch.testing.assert_close(adv, by_definition(reward, value, mask, gamma, lam), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(returns, (adv + value) * mask)
    _, monte_carlo = gae(reward, value, mask, gamma, lam=1.0)
    td, _ = gae(reward, value, mask, gamma, lam=0.0)
    for i, t in mask.nonzero().tolist():
        n = int(mask[i].sum())
        discounted = sum(gamma ** (k - t) * reward[i, k].item() for k in range(t, n))
        assert monte_carlo[i, t].item() == pytest.approx(discounted, abs=1e-9)  # whatever the critic says
        after = value[i, t + 1].item() if t + 1 < n else 0.0
        delta = reward[i, t].item() + gamma * after - value[i, t].item()
        assert td[i, t].item() == pytest.approx(delta, abs=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(N=st.integers(1, 4), T=st.integers(1, 6), seed=st.integers(0, 999))
def test_padding_does_not_leak(N, T, seed):
    """Junk behind the mask, even NaN, changes no advantage, loss, statistic or gradient."""
    reward, value, mask = rollout(N, T, seed)
    mask[0, 0] = True
    runs = []
    for junk in (0.0, 7e7, math.inf, -math.inf, math.nan):
        r, v = reward.masked_fill(~mask, junk), value.masked_fill(~mask, junk)
        results = [*gae(r, v, mask), whiten(r, mask)]
        assert all((x[~mask] == 0).all() for x in results)
        for f in (ppo_policy_loss, value_loss):
            new = v.clone().requires_grad_()
            loss, stats = f(new, v + 0.5, r, mask)
            results += [loss.detach(), *torch.autograd.grad(loss, new), *stats.values()]
            if f is ppo_policy_loss:  # padding's exp(0) = 1 is no ratio
                assert stats["ratio_max"].item() == pytest.approx(math.exp(-0.5))
        runs.append(results)
    for junked in runs[1:]:
        for got, want in zip(junked, runs[0]):  # NaN: the explained variance of a single return
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


# ---- the losses ----
def test_policy_loss_by_hand():
    """Six real tokens, two of them clipped: loss, gradient -r·Â/6 where the clip is silent, and the stats."""
    ratio = torch.tensor([[1.0, 1.5, 0.9, 9.0], [1.5, 0.5, 1.1, 9.0]], dtype=torch.float64)
    adv = torch.tensor([[2.0, 1.0, 1.0, 5.0], [-1.0, -1.0, -3.0, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]])
    old = torch.full_like(ratio, -2.0)
    logp = (old + ratio.log()).requires_grad_()
    loss, stats = ppo_policy_loss(logp, old, adv, mask, eps=0.2)
    assert loss.item() == pytest.approx(-(2.0 + 1.2 + 0.9 - 1.5 - 0.8 - 3.3) / 6)
    grad = torch.autograd.grad(loss, logp)[0] * -6
    assert grad.flatten().tolist() == pytest.approx([2.0, 0, 0.9, 0, -1.5, 0, -3.3, 0])
    want = {"clip_frac": 2 / 6, "ratio_max": 1.5, "pg_loss": loss.item()}
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(want)


def test_first_epoch_of_ppo():
    """At ratio 1 the loss is -mean Â, 0 once Â is whitened, and its gradient -Â/n is not."""
    adv, logp, mask = rollout(4, 5, seed=3)
    adv, logp = whiten(adv, mask), logp.requires_grad_()
    loss, stats = ppo_policy_loss(logp, logp.detach(), adv, mask)
    assert abs(loss.item()) < 1e-12 and stats["ratio_max"] == 1 and stats["clip_frac"] == 0
    grad = torch.autograd.grad(loss, logp)[0]
    torch.testing.assert_close(grad, -adv / mask.sum())
    assert grad.abs().max() > 0.01
    half, old = logp.detach().bfloat16(), adv.bfloat16()  # widened before the arithmetic
    wide = ppo_policy_loss(half.float(), old.float(), adv, mask)[0]
    assert ppo_policy_loss(half, old, adv, mask)[0] == wide


def test_value_loss_by_hand():
    """R = 1, V_old = 0, clip 0.2: the worse of the plain and the clipped square, ½ of the mean, per token."""
    value = torch.tensor([[0.1, 0.5, -0.5, 1.9, 8.0]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.zeros_like(value).detach(), torch.ones_like(value).detach()
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    loss, stats = value_loss(value, old, returns, mask, clip=0.2)
    # 0.1: inside, 0.9²; 0.5: clipped to 0.2, 0.8² is worse than 0.5²; -0.5: the plain 1.5² is worse;
    # 1.9: 0.9² is worse than the clipped 0.8², so an overshoot is pulled back
    assert loss.item() == pytest.approx(0.5 * (0.81 + 0.64 + 2.25 + 0.81) / 4)
    grad = torch.autograd.grad(loss, value)[0]  # (V - R) / 4, none where the clip holds
    torch.testing.assert_close(grad, torch.tensor([[-0.9, 0.0, -1.5, 0.9, 0.0]], dtype=torch.float64) / 4)
    assert stats["value_loss"] == loss and stats["value_clip_frac"].item() == 1 / 4
    plain, _ = value_loss(value, old, returns, mask, clip=math.inf)
    assert plain.item() == pytest.approx(0.5 * (0.81 + 0.25 + 2.25 + 0.81) / 4)


def test_explained_variance_by_hand():
    """1 for an oracle, give or take a constant, 0 for a constant, negative for worse; NaN if R is flat."""
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 99.0]]), torch.tensor([[1, 1, 1, 0]])
    for value, want in ((returns, 1.0), (returns + 7, 1.0), (returns * 0 + 5, 0.0), (returns * 2, 0.0),
                        (returns / 2, 0.75), (-returns, -3.0)):
        stats = value_loss(0 * value, value, returns, mask)[1]  # of V_old, what the rollout saw
        assert stats["explained_variance"].item() == pytest.approx(want, abs=1e-6)
    assert explained_variance(returns, torch.ones_like(returns), mask).isnan()


@pytest.mark.filterwarnings("ignore:var")
def test_whitening_by_hand():
    """Mean 0 and std 1 over real tokens only; a constant becomes 0, not a division by 0; no token gives 0."""
    x, mask = torch.tensor([[1.0, 3.0, 100.0], [5.0, 100.0, 100.0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    std = math.sqrt(8 / 3)
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-2 / std, 0, 0], [2 / std, 0, 0]]))
    assert (whiten(torch.full((2, 3), 0.5), mask) == 0).all()
    assert masked_mean(x, mask) == 3 and masked_mean(x, mask * 0) == 0
    assert ppo_policy_loss(x, x, x, mask * 0)[0] == 0 and value_loss(x, x, x, mask * 0)[0] == 0


@pytest.mark.parametrize("f, names", [(gae, ["reward", "value", "mask"]),
                                      (ppo_policy_loss, ["logp", "logp_old", "adv", "mask"]),
                                      (value_loss, ["value", "value_old", "returns", "mask"])])
def test_errors_name_the_tensor(f, names):
    """A wrong shape, or a gradient through any but the first, is an AssertionError that says which tensor."""
    good = [torch.zeros(2, 3) for _ in names]
    with pytest.raises(AssertionError, match=f"^{names[0]} has shape .*wanted \\(N, T\\)"):
        f(*(x[0] for x in good))
    for at, name in enumerate(names[1:], 1):
        with pytest.raises(AssertionError, match=f"^{name} has shape \\(2, 2\\), wanted \\(2, 3\\)"):
            f(*good[:at], torch.zeros(2, 2), *good[at + 1:])
        with pytest.raises(AssertionError, match=f"^{name} .*carries a gradient"):
            f(*good[:at], torch.zeros(2, 3, requires_grad=True), *good[at + 1:])


# ---- the critic ----
def test_the_critic_learns():
    """V = 0 and explained variance 0 at first; on returns that tokens decide all parts move, EV > 0.9."""
    torch.manual_seed(0)
    critic = ValueModel(GPTConfig(vocab_size=8, block_size=6, n_layer=1, n_head=2, n_embd=16))
    tokens, mask = torch.randint(8, (16, 6)), torch.arange(6) < torch.randint(1, 7, (16, 1))
    returns = (tokens.float() - 3.5) / 2
    value = critic(tokens)
    assert value.shape == (16, 6) and (value == 0).all()
    before = {name: p.detach().clone() for name, p in critic.named_parameters()}
    optimizer, curve = torch.optim.Adam(critic.parameters(), lr=1e-2), []
    for _ in range(60):
        value = critic(tokens)
        loss, stats = value_loss(value, value.detach(), returns, mask)  # a fresh rollout each: V_old = V
        curve.append(stats["explained_variance"].item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert curve[0] == pytest.approx(0.0, abs=1e-6) and curve[-1] > 0.9
    still = [name for name, p in critic.named_parameters() if torch.equal(p, before[name])]
    assert still == []  # trunk and head: a detached value would leave them where they were
