"""The objective against numbers worked by hand, exact enumeration and its own invariances.

Left out: agreement with a reference library (test_trl_parity.py).
Run: python -m pytest tests/test_grpo.py
"""
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo import OBJECTIVES, Objective, group_advantage, grpo_loss, kl_penalty, plain_grpo

NAMES = sorted(OBJECTIVES)
PLAIN_SUM = Objective(scale="none", reduce="sum")  # r·A summed over tokens: the clip does nothing at r = 1


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def batch(B, G, T, seed=0, spread=0.3):
    """Random logp (a leaf), logp_old, logp_ref, adv and a mask of left runs, the first answer empty."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(B, G, T, generator=g, dtype=torch.float64)
    old, ref = (logp + spread * torch.randn(B, G, T, generator=g, dtype=torch.float64) for _ in range(2))
    adv = torch.randn(B, G, generator=g, dtype=torch.float64)
    length = torch.randint(1, T + 1, (B, G, 1), generator=g)
    length[0, 0] = 0
    return logp.requires_grad_(), old, ref, adv, torch.arange(T) < length


def loss_and_grad(logp, old, ref, adv, mask, objective, **step):
    logp = logp.detach().requires_grad_()
    loss, stats = grpo_loss(logp, old, ref, adv, mask, objective, **step)
    return loss.detach(), torch.autograd.grad(loss, logp)[0], stats


def close(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-12)


# ---- numbers worked by hand: 2 prompts, 2 answers, up to 3 tokens; 9 in the example are padding ----
REWARD = [[1.0, 0.0], [2.0, 5.0]]
LENGTH = [[3, 1], [2, 3]]  # 9 tokens in all
LOGP = [[[-1.0, -0.5, -2.0], [-0.7, 9, 9]], [[-0.1, -3.0, 9], [-1.5, -0.2, -0.9]]]
RATIO = [[[1.0, 1.5, 0.5], [6.0, 9, 9]], [[0.5, 1.1, 9], [0.9, 1.25, 1 / 1.125]]]  # π / π_old
REF = [[[1.0, 2.0, 0.5], [0.25, 9, 9]], [[4.0, 1.0, 9], [0.8, 1.25, 2.0]]]  # π_ref / π


def by_hand(row):
    """Loss, d loss / d logp and the mean surrogate of a row, from the papers' formulas in plain floats."""
    loss, surrogate, grad = 0.0, 0.0, [[[0.0] * 3, [0.0] * 3], [[0.0] * 3, [0.0] * 3]]
    for b, g in ((0, 0), (0, 1), (1, 0), (1, 1)):
        R, other, n = REWARD[b][g], REWARD[b][1 - g], LENGTH[b][g]
        normed = (R - (R + other) / 2) / (abs(R - other) / math.sqrt(2) + 1e-4)  # unbiased std of two numbers
        mean, all_std = (R + other) / 2, math.sqrt(14 / 3) + 1e-4  # of 1, 0, 2 and 5, whose mean is 2
        A = {"reinforce": R, "rloo": R - other, "dr_grpo": R - mean, "lite_ppo": (R - mean) / all_std,
             "reinforce_pp": (R - 2) / all_std, "maxrl": (R - mean) / (mean + 1e-4)}.get(row, normed)
        by_token = dict.fromkeys(["dapo", "cispo", "lite_ppo", "reinforce_pp", "maxrl"], 9)
        divisor = (by_token | {"reinforce": 4, "rloo": 4, "luspo": 4, "dr_grpo": 4 * 3}).get(row, 4 * n)
        s = math.prod(RATIO[b][g][:n]) ** (1 / n)  # geometric mean of the answer's ratios
        for t in range(n):
            r, q, lp = RATIO[b][g][t], REF[b][g][t], LOGP[b][g][t]
            if row in ("reinforce", "rloo"):
                term, slope = -A * lp, -A
            elif row == "cispo":
                term, slope = -min(r, 5.0) * A * lp, -min(r, 5.0) * A
            elif row == "sapo":
                tau = 1.0 if A > 0 else 1.05
                sigmoid = 1 / (1 + math.exp(-tau * (r - 1)))
                term, slope = -4 / tau * sigmoid * A, -4 * sigmoid * (1 - sigmoid) * r * A
            else:
                # gspo: n equal terms, each with slope -s·A/n in every token, so -s·A once they are added up
                r = s if row in ("gspo", "luspo") else r
                low, high = {"gspo": (1 - 3e-4, 1 + 4e-4), "luspo": (1 - 2e-3, 1 + 2.5e-3),
                             "dapo": (0.8, 1.28)}.get(row, (0.8, 1.2))
                bounded = min(max(r, low), high)
                term, slope = -min(r * A, bounded * A), (-r * A if r * A <= bounded * A else 0.0)
            surrogate += term / 9
            if row == "grpo":
                term, slope = term + 0.04 * (q - math.log(q) - 1), slope + 0.04 * (1 - q)
            loss += term / divisor
            grad[b][g][t] = slope / divisor
    return loss, grad, surrogate


LN3 = math.log(3)
CLIPPED = {"grpo": 3, "dr_grpo": 3, "dapo": 2, "gspo": 2, "cispo": 1, "sapo": 0, "reinforce": 0, "rloo": 0,
           "reinforce_pp": 2, "lite_ppo": 3, "luspo": 2, "maxrl": 3}


@pytest.mark.parametrize("row", NAMES)
def test_every_row_by_hand(row):
    """Loss, gradient and stats of a row equal what its paper's formula gives on nine tokens."""
    o, logp = OBJECTIVES[row], tensor(LOGP)
    mask = torch.arange(3) < torch.tensor(LENGTH)[:, :, None]
    adv = group_advantage(tensor(REWARD), o.baseline, o.scale)
    ref = logp + tensor(REF).log()
    loss, grad, stats = loss_and_grad(logp, logp - tensor(RATIO).log(), ref, adv, mask, o)
    want_loss, want_grad, surrogate = by_hand(row)
    close([loss, grad], [tensor(want_loss), tensor(want_grad)])
    k3 = [q - math.log(q) - 1 for b in (0, 1) for g in (0, 1) for q in REF[b][g][:LENGTH[b][g]]]
    assert not any(x.requires_grad for x in stats.values())
    want = {"kl": sum(k3) / 9, "clip_frac": CLIPPED[row] / 9, "ratio_max": 6.0, "pg_loss": surrogate}
    assert {k: v.item() for k, v in stats.items()} == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("change, r, A, loss, slope", [
    ({}, 1.5, 1, -1.2, 0.0),  # gained enough: clipped
    ({}, 1.5, -1, 1.5, 1.5),  # a bad answer that became likelier is pushed back, however far it went
    ({}, 0.5, 1, -0.5, -0.5),
    ({}, 0.5, -1, 0.8, 0.0),
    ({"delta": 3.0}, 6.0, -1, 3.0, 0.0),  # two-sided clip: a bad answer's ratio counts as 3 at most
    ({"delta": 3.0}, 6.0, 1, -1.2, 0.0),
    ({"eps_low": 0.6}, 0.5, -1, 0.5, 0.5),
    ({"surrogate": "cispo", "eps_high": 5.0}, 6.0, 1, 10.0, -5.0),  # the cap is 5, not 1 + 5; logp = -2
    ({"surrogate": "cispo", "eps_high": 5.0}, 0.01, -1, -0.02, 0.01),  # no lower clip
    ({"surrogate": "sapo"}, 1.0, 1, -2.0, -1.0),  # at r = 1 the slope is -A whatever the temperature
    ({"surrogate": "sapo", "tau_neg": 2.0}, 1.0, -1, 1.0, 1.0),
    ({"surrogate": "sapo", "tau_pos": 2.0}, 1.0, 1, -1.0, -1.0),
    ({"surrogate": "sapo", "tau_neg": 2.0}, 1 + LN3 / 2, -1, 1.5, 0.75 * (1 + LN3 / 2)),  # σ(ln 3) = ¾
])
def test_one_token_on_paper(change, r, A, loss, slope):
    """-min(min(r, δ)·A, clip(r)·A), CISPO and SAPO on one token with logp = -2."""
    logp, one = tensor([[[-2.0]]]), torch.ones(1, 1, 1)
    o = replace(Objective(), **change)
    got = loss_and_grad(logp, logp - math.log(r), logp, tensor([[float(A)]]), one, o)
    assert (got[0].item(), got[1].item()) == pytest.approx((loss, slope), abs=1e-12)


def test_kl_term_on_paper():
    """With π_ref/π = ½ at ratio 6: k1, k2, k3, k3·r, and δ caps the policy term but not the KL's ratio."""
    logp, d, k3 = tensor([[[-2.0]]]), math.log(0.5), 0.5 - math.log(0.5) - 1
    for change, value, slope in (({"kl": "k1"}, -d, 1.0), ({"kl": "k2"}, d * d / 2, -d), ({}, k3, 0.5),
                                 ({"kl_ratio": True}, 6 * k3, 6 * -d),  # slope r·log(π/π_ref)
                                 ({"kl_ratio": True, "delta": 3.0}, 6 * k3, 6 * -d)):
        o = replace(Objective(beta=10.0), **change)
        tensors = logp, logp - math.log(6), logp + d, torch.zeros(1, 1), torch.ones(1, 1, 1)
        loss, grad, stats = loss_and_grad(*tensors, o)
        assert (loss.item(), grad.item()) == pytest.approx((10 * value, 10 * slope))
        assert stats["kl"].item() == pytest.approx(k3)  # the log's estimator is k3 and carries no β
    # near 0, k3 is d²/2: float32 keeps it, where e^d - d - 1 as written loses all its digits
    assert kl_penalty(torch.zeros(()), torch.tensor(1e-4)).item() == pytest.approx(5e-9, rel=0.01)


def test_plain_grpo_is_the_grpo_row():
    """The one-screen version and the table agree in loss and gradient, off-policy and clipped."""
    logp, old, ref, _, mask = batch(3, 4, 5, spread=0.5)
    mask[0, 0, :2] = True  # the one-screen version divides by every answer's length
    reward = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plain = plain_grpo(reward, logp, old, ref, mask)
    loss, grad, stats = loss_and_grad(logp, old, ref, group_advantage(reward), mask, OBJECTIVES["grpo"])
    assert stats["clip_frac"] > 0.1
    close([plain.detach(), torch.autograd.grad(plain, logp)[0]], [loss, grad])


# ---- enumeration: a vocabulary of 5, answers of one or two tokens, every expectation exact ----
def logits(seed):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in (5, (5, 5))]


POLICY = logits(0)  # first token, second given the first
PI, REFERENCE = ([x.log_softmax(-1) for x in pair] for pair in (POLICY, [x.detach() for x in logits(1)]))


def gradient(scalar):
    grads = torch.autograd.grad(scalar, POLICY, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(grads, POLICY)]


def expected_gradient(objective, steps, stop=None):
    """Exact mean over all answers of π of the gradient of β·KL in grpo_loss; `stop` ends an answer."""
    total = 0.0
    for first in range(5):
        for second in range(5 if steps == 2 else 1):
            logp, ref = (torch.stack([p[0][first], p[1][first, second]][:steps]).view(1, 1, steps)
                         for p in (PI, REFERENCE))
            mask = torch.ones(1, 1, steps, dtype=torch.bool)
            mask[:, :, 1:] = first != stop
            loss, _ = grpo_loss(logp, logp.detach(), ref, torch.zeros(1, 1), mask, objective)
            total = total + logp.sum().exp().detach() * loss
    return gradient(total)


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


def state_wise(p, q, stop=None):
    """KL at the first token, plus at the second over prefixes drawn from π, which aren't differentiated."""
    prefix = PI[0].exp().detach().clone()
    if stop is not None:
        prefix[stop] = 0.0  # nothing follows a stop token
    return kl(p[0], q[0]) + (prefix * kl(p[1], q[1])).sum()


@pytest.mark.parametrize("estimator, kl_ratio, direction", [
    ("k1", False, "nothing"), ("k2", False, "forward"), ("k3", False, "reverse"), ("k3", True, "forward"),
    ("k1", True, "forward"),
])
def test_what_each_kl_estimator_descends(estimator, kl_ratio, direction):
    """E[∇k1] = 0, E[∇k2] = E[∇(r·k3)] = ∇KL(π‖π_ref), E[∇k3] = ∇KL(π_ref‖π): one step, two steps."""
    o = replace(PLAIN_SUM, beta=1.0, kl=estimator, kl_ratio=kl_ratio)
    p, q = (REFERENCE, PI) if direction == "reverse" else (PI, REFERENCE)
    factor = 0.0 if direction == "nothing" else 1.0
    close(expected_gradient(o, steps=1), gradient(factor * kl(p[0], q[0])))
    close(expected_gradient(o, steps=2), gradient(factor * state_wise(p, q)))
    forward, reverse = gradient(kl(PI[0], REFERENCE[0]))[0], gradient(kl(REFERENCE[0], PI[0]))[0]
    assert torch.cosine_similarity(forward, reverse, dim=0) < 0.95  # the two targets point elsewhere


def test_state_wise_is_not_whole_sequence_kl():
    """A per-token penalty misses how the first token changes the KL of the second, and only that."""
    joint, joint_ref = (p[0][:, None] + p[1] for p in (PI, REFERENCE))
    whole = gradient(kl(joint.flatten(), joint_ref.flatten()))
    ours = expected_gradient(replace(PLAIN_SUM, beta=1.0, kl="k2"), steps=2)
    missing = gradient((PI[0].exp() * kl(PI[1], REFERENCE[1]).detach()).sum())
    close(whole, [x + m for x, m in zip(ours, missing)])
    assert missing[0].norm() / whole[0].norm() > 0.1


@pytest.mark.parametrize("stop, pi_stop, d, off_by", [
    (0, 0.612, 0.765, 0.666), (1, 0.098, -0.675, 0.225), (2, 0.015, -2.355, 0.127),
])
def test_answer_reduction_bends_the_kl_gradient_when_lengths_vary(stop, pi_stop, d, off_by):
    """1/n depends on the action: E[∇loss] is ½∇KL plus ½π(stop)·d·∇log π(stop); sum, length stay exact.

    d = log π(stop) - log π_ref(stop); off_by: how far that moves the first token's gradient, over its norm.
    """
    exact = gradient(state_wise(PI, REFERENCE, stop))
    o = replace(PLAIN_SUM, beta=1.0, kl="k2")
    close(expected_gradient(o, 2, stop), exact)
    close(expected_gradient(replace(o, reduce="length"), 2, stop), [x / 2 for x in exact])
    log_pi, log_ratio = PI[0][stop], (PI[0] - REFERENCE[0])[stop].detach()
    extra = gradient(0.5 * log_pi.exp().detach() * log_ratio * log_pi)
    for kl_ratio, estimator in ((False, "k2"), (True, "k3")):
        bent = expected_gradient(replace(o, reduce="answer", kl=estimator, kl_ratio=kl_ratio), 2, stop)
        close(bent, [x / 2 + e for x, e in zip(exact, extra)])
    k1 = expected_gradient(replace(o, reduce="answer", kl="k1"), 2, stop)
    close(k1, gradient(0.5 * log_pi.exp()))  # k1's mean is zero no longer: minimising it makes stopping rarer
    measured = (log_pi.exp().item(), log_ratio.item(), (extra[0].norm() / (exact[0] / 2).norm()).item())
    assert measured == pytest.approx((pi_stop, d, off_by), abs=0.001)


@pytest.mark.parametrize("ratio", ["token", "none"])
@pytest.mark.parametrize("G", [2, 3])
@pytest.mark.parametrize("baseline", ["none", "loo", "mean"])
def test_expected_gradient_is_the_policy_gradient(baseline, G, ratio):
    """Over all groups: -∇E[R] with no or leave-one-out baseline, (G - 1)/G of it with the group mean."""
    pi = [POLICY[0][:3].log_softmax(0), POLICY[1][:3, :3].log_softmax(1)]
    answers = torch.stack([pi[0][:, None].expand(3, 3), pi[1]], dim=-1).view(9, 2)  # 9 answers of two tokens
    reward = tensor([0.0, 3.0, 1.0, -2.0, 5.0, 0.5, 1.0, 1.0, 4.0])
    probability = answers.sum(1).exp()
    groups = torch.cartesian_prod(*[torch.arange(9)] * G)  # every group of G answers
    weight = probability.detach()[groups].prod(1, keepdim=True)
    adv = group_advantage(reward[groups], baseline, "none") * weight  # the loss is linear in adv at r = 1
    logp = answers[groups]
    o = replace(PLAIN_SUM, baseline=baseline, ratio=ratio)
    loss, _ = grpo_loss(logp, logp.detach(), logp.detach(), adv, torch.ones_like(logp).detach(), o)
    factor = (G - 1) / G if baseline == "mean" else 1.0
    close(gradient(loss * len(groups)), [-factor * g for g in gradient(probability @ reward)])


# ---- advantages ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["mean", "loo"])
def test_equal_rewards_give_exactly_zero(baseline, scale, dtype):
    """A group that agrees teaches nothing, not even rounding residue over a tiny std."""
    for G in range(2, 10):
        for value in (0.1, 1 / 3, -0.7, 1e-30, 123456.789, 3e8, 1e30):
            reward = torch.full((2, G), value, dtype=dtype)
            assert (group_advantage(reward, baseline, scale) == 0).all(), (G, value)
            reward[1, 0] = 0.0
            adv = group_advantage(reward, baseline, scale)
            assert (adv[0] == 0).all() and adv[1].isfinite().all(), (G, value)
    small = torch.tensor([[0.0, 1.0, 3.0]])  # nor does float32 lose an ordinary signal on top of a million
    torch.testing.assert_close(group_advantage(small + 1e6, baseline), group_advantage(small, baseline))


def test_advantage_scales_by_hand():
    """Unbiased std, eps outside the root; `batch` takes the std of all raw rewards, over all groups."""
    reward = tensor([[1.0, 2.0, 6.0], [10.0, 10.0, 13.0]])
    deviation = tensor([[-2.0, -1.0, 3.0], [-1.0, -1.0, 2.0]])
    torch.testing.assert_close(group_advantage(reward, "mean", "none"), deviation)
    torch.testing.assert_close(group_advantage(reward, "loo", "none"), deviation * 1.5)
    group_std = tensor([[math.sqrt(14 / 2)], [math.sqrt(6 / 2)]])
    torch.testing.assert_close(group_advantage(reward), deviation / (group_std + 1e-4))
    batch_std = math.sqrt((36 + 25 + 1 + 9 + 9 + 36) / 5)  # around the mean of all six, 7
    torch.testing.assert_close(group_advantage(reward, "mean", "batch", 0.5), deviation / (batch_std + 0.5))
    torch.testing.assert_close(group_advantage(reward, "none", "batch"), reward / (batch_std + 1e-4))
    assert not group_advantage(reward.requires_grad_()).requires_grad


# ---- the first epoch ----
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "gspo", "sapo"])
def test_first_epoch_loss_is_beta_kl_but_its_gradient_is_not(name):
    """At ratio 1 centred advantages cancel: the loss is β·KL, 0 where π = π_ref; it learns anyway."""
    o = replace(OBJECTIVES[name], beta=0.04, tau_neg=1.0)  # sapo's unequal temperatures don't cancel
    logp, _, ref, _, _ = batch(3, 4, 5)
    mask, adv = torch.ones(3, 4, 5), group_advantage(torch.arange(12.0, dtype=torch.float64).view(3, 4) ** 2)
    loss, grad, stats = loss_and_grad(logp, logp.detach(), ref, adv, mask, o)
    assert loss.item() == pytest.approx(0.04 * stats["kl"].item(), rel=1e-9) and stats["kl"] > 0.01
    loss, grad, stats = loss_and_grad(logp, logp.detach(), logp.detach(), adv, mask, o)
    assert abs(loss.item()) < 1e-12 and stats["kl"] == 0 and stats["ratio_max"] == 1
    assert stats["clip_frac"] == 0
    assert grad.abs().min() > 1e-3


# ---- masks and denominators ----
@pytest.mark.parametrize("name", NAMES)
def test_an_empty_answer_counts_and_adds_nothing(name):
    """Masking all of one answer in four: as if left out, over a denominator that still counts it."""
    o = replace(OBJECTIVES[name], beta=0.1)
    logp, old, ref, adv, mask = batch(1, 4, 5)
    assert not mask[0, 0].any()
    loss, grad, _ = loss_and_grad(logp, old, ref, adv, mask, o)
    three, grad3, _ = loss_and_grad(logp[:, 1:], old[:, 1:], ref[:, 1:], adv[:, 1:], mask[:, 1:], o)
    share = 1.0 if o.reduce == "token" else 3 / 4
    close([loss, grad[:, 1:]], [share * three, share * grad3])
    loss, grad, stats = loss_and_grad(logp, old, ref, adv, torch.zeros_like(mask), o)  # nothing is left
    assert loss == 0 and (grad == 0).all() and all(x == 0 for x in stats.values())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(cuts=st.sets(st.integers(1, 14), max_size=14), seed=st.integers(0, 99))
def test_micro_batches_add_up(name, cuts, seed):
    """Answers split at random, given the step's n_tokens and n_answers: losses and gradients add up."""
    o = replace(OBJECTIVES[name], beta=0.1)
    tensors = batch(3, 5, 4, seed)
    flat = [x.detach().flatten(0, 1)[:, None] for x in tensors]  # 15 answers as (15, 1, T), adv (15, 1)
    step = {"n_tokens": tensors[4].sum(), "n_answers": 15, "max_len": 7}
    whole, grad, _ = loss_and_grad(*tensors, o, max_len=7)
    edges = [0, *sorted(cuts), 15]
    parts = [loss_and_grad(*(x[a:b] for x in flat), o, **step)[:2] for a, b in zip(edges, edges[1:])]
    close([sum(loss for loss, _ in parts), torch.cat([g for _, g in parts]).view_as(grad)], [whole, grad])


# ---- dtypes and bad input ----
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_half_precision_is_promoted(dtype):
    """bf16 and fp16 are computed in float32 to the last bit, float64 stays; the gradient has logp's dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logp, old, ref, adv, mask = batch(2, 3, 4)
    half = [x.detach().to(dtype) for x in (logp, old, ref, adv)]
    for o in OBJECTIVES.values():
        loss, grad, stats = loss_and_grad(*half, mask, o)
        want, want_grad, _ = loss_and_grad(*(x.to(wide) for x in half), mask, o)
        assert loss.dtype == wide and loss == want and all(x.dtype == wide for x in stats.values())
        assert grad.dtype == dtype and torch.equal(grad, want_grad.to(dtype))
    assert group_advantage(half[3]).dtype == wide
    assert torch.equal(group_advantage(half[3]), group_advantage(half[3].to(wide)))


def test_unknown_names_and_groups_of_one_are_refused():
    """A misspelt choice is a ValueError that lists the choices; so is G = 1 where something is compared."""
    for field, first in (("baseline", "mean"), ("scale", "group"), ("ratio", "token"), ("surrogate", "clip"),
                         ("reduce", "answer"), ("kl", "k1")):
        with pytest.raises(ValueError, match=f"^{field}='typo': wanted one of {first}, "):
            replace(OBJECTIVES["grpo"], **{field: "typo"})
        if field in ("baseline", "scale"):
            with pytest.raises(ValueError, match=f"^{field}='typo'"):
                group_advantage(torch.ones(1, 2), **{field: "typo"})
    with pytest.raises(ValueError, match="^kl='typo'"):
        kl_penalty(torch.zeros(1), torch.zeros(1), "typo")
    one = torch.ones(3, 1)
    for baseline, scale in (("mean", "group"), ("loo", "none"), ("none", "group"), ("none", "batch")):
        with pytest.raises(ValueError, match="group of G=1"):
            group_advantage(one, baseline, scale)
    assert torch.equal(group_advantage(one, "none", "none"), one)
    assert grpo_loss(*batch(3, 1, 4), OBJECTIVES["reinforce"])[0].isfinite()  # the loss itself doesn't mind


@pytest.mark.parametrize("at, name", enumerate(["logp", "logp_old", "logp_ref", "adv", "mask"]))
def test_shape_errors_name_the_tensor(at, name):
    """A wrong shape, or a gradient where none belongs, is an AssertionError with the tensor's name in it."""
    good = [x.detach() for x in batch(2, 3, 4)]
    bandit = [x[:, :, 0] if x.dim() == 3 else x for x in good]  # forgot the axis T
    calls = [(bandit, r"^logp has shape \(2, 3\), wanted \(B, G, T\)"),
             ([*good[:at], good[at][:, :2], *good[at + 1:]], f"^{name} has shape" if at else "has shape")]
    if name in ("logp_old", "logp_ref", "adv"):
        leaf = good[at].clone().requires_grad_()
        calls.append(([*good[:at], leaf, *good[at + 1:]], f"^{name} .*requires_grad True"))
    for tensors, message in calls:
        with pytest.raises(AssertionError, match=message):
            grpo_loss(*tensors, OBJECTIVES["grpo"])
    with pytest.raises(AssertionError, match=r"^reward has shape \(6,\), wanted \(B, G\)"):
        group_advantage(torch.zeros(6))


# ---- properties: any shape with B = 1, T = 1 among them, any mask ----
@st.composite
def cases(draw):
    """A random batch (any mask, not only left runs) and an objective with a KL term."""
    B, G, T = draw(st.integers(1, 3)), draw(st.integers(2, 9)), draw(st.integers(1, 5))
    logp, old, ref, adv, _ = batch(B, G, T, seed=draw(st.integers(0, 999)))
    bits = draw(st.lists(st.booleans(), min_size=B * G * T, max_size=B * G * T))
    o = replace(OBJECTIVES[draw(st.sampled_from(NAMES))], beta=0.1, kl_ratio=draw(st.booleans()))
    return logp, old, ref, adv, torch.tensor(bits).view(B, G, T), o


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases(), junk=st.sampled_from([math.inf, -math.inf, math.nan]))
def test_what_is_behind_the_mask_changes_nothing(case, junk):
    """inf or NaN where masked and in two more columns: same loss, gradient, stats; no gradient there."""
    *scored, adv, mask, o = case
    T = mask.shape[2]
    loss, grad, stats = loss_and_grad(*scored, adv, mask, o)
    assert loss.isfinite() and grad.isfinite().all() and (grad[~mask] == 0).all()
    dirty = [x.detach().masked_fill(~mask, junk) for x in scored]
    adv = adv.masked_fill(~mask.any(2), junk)  # of an empty answer
    got, got_grad, got_stats = loss_and_grad(*dirty, adv, mask, o)
    assert got == loss and torch.equal(got_grad, grad) and got_stats == stats
    got, got_grad, _ = loss_and_grad(dirty[0], *scored[1:], adv, mask.double(), o)  # one side; a float mask
    assert got == loss and torch.equal(got_grad, grad)
    wide = [torch.nn.functional.pad(x, (0, 2), value=junk) for x in dirty]
    got, got_grad, got_stats = loss_and_grad(*wide, adv, torch.nn.functional.pad(mask, (0, 2)), o, max_len=T)
    close([got, got_grad[:, :, :T], *got_stats.values()], [loss, grad, *stats.values()])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(B=st.integers(1, 3), G=st.integers(2, 9), seed=st.integers(0, 999), shift=st.floats(-1e3, 1e3))
def test_advantages_of_any_group(B, G, seed, shift):
    """They sum to 0, don't see a constant, keep the rewards' order; loo is R - mean of the others."""
    reward = torch.randn(B, G, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for baseline in ("mean", "loo"):
        for scale in ("group", "batch", "none"):
            adv = group_advantage(reward, baseline, scale)
            torch.testing.assert_close(adv.sum(1), torch.zeros(B, dtype=torch.float64), rtol=0, atol=1e-9)
            shifted = group_advantage(reward + shift, baseline, scale)
            torch.testing.assert_close(shifted, adv, rtol=1e-6, atol=1e-9)
            assert torch.equal(adv.argsort(1), reward.argsort(1))
    std = group_advantage(reward, eps=0.0).std(1)
    torch.testing.assert_close(std, torch.ones_like(std))
    others = (reward.sum(1, keepdim=True) - reward) / (G - 1)
    torch.testing.assert_close(group_advantage(reward, "loo", "none"), reward - others)


@pytest.mark.parametrize("one, other", [("grpo", "gspo"), ("grpo", "sapo"), ("dapo", "cispo")])
def test_at_ratio_one_these_have_the_same_gradient(one, other):
    """docs/grpo.md says: before the policy moves, the form of the ratio doesn't matter."""
    torch.manual_seed(0)
    logp = torch.randn(2, 4, 5, dtype=torch.float64)
    adv = group_advantage(torch.randn(2, 4, dtype=torch.float64))
    mask = torch.arange(5) < torch.tensor([[5, 3, 1, 4], [2, 5, 5, 1]])[:, :, None]
    grads = []
    for name in (one, other):
        x = logp.clone().requires_grad_()
        grpo_loss(x, logp, logp - 0.1, adv, mask, replace(OBJECTIVES[name], beta=0.05))[0].backward()
        grads.append(x.grad)
    assert grads[0].abs().max() > 0.01
    torch.testing.assert_close(*grads)
