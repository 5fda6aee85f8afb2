"""GRPO, Group Relative Policy Optimization: the objective (DeepSeekMath, arXiv:2402.03300), then its family.

Pure functions on tensors: B prompts, G answers to each prompt, T actions (tokens) in each answer.
Left out: sampling (rollout.py), the optimizer (train_grpo.py), and PPO's value network (ppo.py).
Run: python train_grpo.py --objective grpo
"""
from dataclasses import dataclass

import torch


# ---- plain GRPO: the paper on one screen; grpo_loss with OBJECTIVES["grpo"] equals it ----
def plain_grpo(reward, logp, logp_old, logp_ref, mask, eps=0.2, beta=0.04):
    """-mean over answers of 1/|o| Σ_t [ min(r·A, clip(r, 1-ε, 1+ε)·A) - β·k3 ] (arXiv:2402.03300, eq. 3, 4).

    reward (B, G); logp, logp_old, logp_ref and mask (B, G, T) -> scalar.
    """
    adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)  # (B, G)
    adv = adv[:, :, None]  # (B, G, 1): all tokens of an answer share it
    ratio = torch.exp(logp - logp_old)  # (B, G, T)
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv)
    kl = torch.exp(logp_ref - logp) - (logp_ref - logp) - 1  # k3: its gradient is KL(π₀‖π)'s; π₀: reference
    per_token = -(surrogate - beta * kl) * mask
    return (per_token.sum(2) / mask.sum(2)).mean()


# ---- the family: what each member changes ----
CHOICES = {"baseline": ("mean", "loo", "batch", "none"), "scale": ("group", "batch", "mean", "none"),
           "ratio": ("token", "sequence", "none"), "surrogate": ("clip", "cispo", "sapo"),
           "reduce": ("answer", "token", "length", "sum"), "kl": ("k1", "k2", "k3")}


def expect(good, message, error=AssertionError):  # python -O drops the statement assert
    if not good:
        raise error(message)


def check(**chosen):
    for field, x in chosen.items():
        expect(x in CHOICES[field], f"{field}={x!r}: wanted one of {', '.join(CHOICES[field])}", ValueError)


@dataclass(frozen=True)
class Objective:
    """One row of the table; a variant is dataclasses.replace(OBJECTIVES["grpo"], beta=0.0)."""
    baseline: str = "mean"      # is subtracted: the group's mean, loo (of the others), batch (of all), none
    scale: str = "group"        # divides: the std of the group, of the batch, the mean of the group, none
    ratio: str = "token"        # token, sequence (exp of an answer's mean log-ratio), none (on-policy)
    surrogate: str = "clip"     # clip, cispo, sapo
    reduce: str = "answer"      # answer, token, length, sum: how tokens become one number
    eps_low: float = 0.2
    eps_high: float = 0.2       # for cispo the cap itself
    delta: float | None = None  # caps the unclipped ratio from above (two-sided clip); above 1 + eps_high
    beta: float = 0.0
    kl: str = "k3"              # k1, k2, k3
    kl_ratio: bool = False      # multiply the KL term by the differentiable ratio
    tau_pos: float = 1.0        # sapo's temperatures, where A > 0 and elsewhere
    tau_neg: float = 1.05

    def __post_init__(self):
        check(**{field: getattr(self, field) for field in CHOICES})


OBJECTIVES = {
    "reinforce": Objective(baseline="none", scale="none", ratio="none", reduce="sum"),
    "reinforce_pp": Objective(baseline="batch", scale="batch", reduce="token"),  # arXiv:2501.03262
    "rloo": Objective(baseline="loo", scale="none", ratio="none", reduce="sum"),  # arXiv:2402.14740
    "grpo": Objective(beta=0.04),  # arXiv:2402.03300
    "dr_grpo": Objective(scale="none", reduce="length"),  # arXiv:2503.20783: no std, one divisor, no KL
    "dapo": Objective(reduce="token", eps_high=0.28),  # arXiv:2503.14476
    "lite_ppo": Objective(scale="batch", reduce="token"),  # arXiv:2508.08221
    "gspo": Objective(ratio="sequence", eps_low=3e-4, eps_high=4e-4),  # arXiv:2507.18071
    "luspo": Objective(ratio="sequence", reduce="sum", eps_low=2e-3, eps_high=2.5e-3),  # arXiv:2602.05261
    "cispo": Objective(surrogate="cispo", reduce="token", eps_high=5.0),  # arXiv:2506.13585, 2510.13786
    "sapo": Objective(surrogate="sapo"),  # arXiv:2511.20347
    "maxrl": Objective(scale="mean", reduce="token"),  # arXiv:2602.02710, for rewards of 0 and 1
}


def group_advantage(reward, baseline="mean", scale="group", eps=1e-4):
    """How much better an answer is than its group: A = (R - baseline) / (scale + eps), std unbiased.

    reward (B, G) -> (B, G), without gradient. Equal rewards of a group give exactly 0 under mean and loo.
    arXiv:2402.03300, 4.1.2. ValueError on an unknown name, a group of one, a reward below 0 with scale mean.
    """
    expect(reward.dim() == 2, f"reward has shape {tuple(reward.shape)}, wanted (B, G)")
    check(baseline=baseline, scale=scale)
    G = reward.shape[1]
    expect(G > 1 or baseline == scale == "none", f"group of {G=}: {baseline=}, {scale=} need 2", ValueError)
    expect(scale != "mean" or not (reward < 0).any(), f"{scale=} wants rewards of at least 0", ValueError)
    reward = promote(reward.detach())
    whole_batch = baseline == "batch"
    shifted = reward - (reward[0, 0] if whole_batch else reward[:, :1])  # so equal rewards leave no rounding
    adv = reward
    if baseline != "none":
        adv = shifted - (shifted.mean() if whole_batch else shifted.mean(1, keepdim=True))
    if baseline == "loo":
        adv = adv * (G / (G - 1))  # = R - mean of the other G - 1
    if scale == "group":
        adv = adv / (shifted.std(1, keepdim=True) + eps)
    elif scale == "batch":
        adv = adv / (reward.std() + eps)
    elif scale == "mean":
        adv = adv / (reward.mean(1, keepdim=True) + eps)
    return adv


def kl_penalty(logp, logp_ref, estimator="k3"):
    """Schulman's estimators of KL(π‖π₀) at actions drawn from π (joschu.net/blog/kl-approx.html).

    d = logp_ref - logp: k1 = -d, k2 = d²/2, k3 = eᵈ - d - 1; (..., T) -> (..., T). As a *loss* on on-policy
    samples they differ in their mean gradient. k1 has none: it ignores π₀. k2 and ratio·k3 have that of
    KL(π‖π₀), and k3 has that of KL(π₀‖π). Under the reduction "answer" this holds only for equal lengths.
    """
    check(kl=estimator)
    d = logp_ref - logp
    return -d if estimator == "k1" else d.square() / 2 if estimator == "k2" else torch.expm1(d) - d


def grpo_loss(logp, logp_old, logp_ref, adv, mask, objective, max_len=None, n_tokens=None, n_answers=None):
    """The loss to minimise and its stats: β·KL - surrogate(r, A) a token, reduced; r = exp(logp - logp_old).

    logp, logp_old, logp_ref, mask (B, G, T), adv (B, G) or, one a token, (B, G, T) -> scalar, dict of masked
    means (ratio_max: maximum). With β = 0 logp_ref may be NaN, and so is the stat kl.
    Pass n_tokens and n_answers of the whole optimizer step. Then the losses of its parts add up.
    AssertionError on other shapes, and on a gradient where none belongs.
    """
    for name, x in (("logp_old", logp_old), ("logp_ref", logp_ref), ("mask", mask), ("adv", adv)):
        want = logp.shape[:max(2, adv.dim())] if name == "adv" else logp.shape
        expect(x.shape == want and not x.requires_grad, f"{name} has shape {tuple(x.shape)}, requires_grad "
               f"{x.requires_grad}, wanted {tuple(want)}, False")
    expect(logp.dim() == 3, f"logp has shape {tuple(logp.shape)}, wanted (B, G, T)")
    o, mask = objective, mask.bool()  # what is masked is filled: multiplied by 0, an inf would become NaN
    logp, logp_old, logp_ref = (promote(x).masked_fill(~mask, 0.0) for x in (logp, logp_old, logp_ref))
    adv = promote(adv).view(*mask.shape[:2], -1)  # (B, G, 1), or (B, G, T)
    length = mask.sum(2, keepdim=True).clamp(min=1)  # an empty answer divides nothing by zero
    ratio = torch.exp(logp - logp_old)  # (B, G, T)
    if o.ratio == "sequence":
        ratio = torch.exp((logp - logp_old).sum(2, keepdim=True) / length).expand_as(logp)
    clipped = torch.zeros_like(mask)  # where the clip takes the gradient away, or cispo's cap acts
    if o.ratio == "none":
        pg = -adv * logp
    elif o.surrogate == "clip":
        low, high = 1 - o.eps_low, 1 + o.eps_high
        delta = float("inf") if o.delta is None else o.delta
        pg = -torch.minimum(ratio.clamp(max=delta) * adv, ratio.clamp(low, high) * adv)
        clipped = (((ratio < low) | (ratio > delta)) & (adv < 0)) | ((ratio > high) & (adv > 0))
    elif o.surrogate == "cispo":
        pg = -ratio.clamp(max=o.eps_high).detach() * adv * logp
        clipped = ratio > o.eps_high
    else:  # sapo
        tau = torch.full_like(adv, o.tau_neg).masked_fill(adv > 0, o.tau_pos)
        pg = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * adv
    kl = o.beta * kl_penalty(logp, logp_ref, o.kl) if o.beta else 0.0  # at each token
    loss = (pg + (ratio * kl if o.kl_ratio else kl)).masked_fill(~mask, 0.0)
    tokens = mask.sum().clamp(min=1)
    n_tokens = tokens if n_tokens is None else n_tokens
    n_answers = mask.shape[0] * mask.shape[1] if n_answers is None else n_answers
    max_len = mask.shape[2] if max_len is None else max_len
    # "answer" has divided by each length, "length" divides by the constant max_len
    denominator = {"answer": n_answers, "token": n_tokens, "length": n_answers * max_len, "sum": n_answers}
    loss = (loss / length if o.reduce == "answer" else loss).sum() / denominator[o.reduce]

    kl_raw, clip_frac = kl_penalty(logp, logp_ref, "k3").detach(), clipped.to(logp.dtype)
    return loss, {"kl": masked_mean(kl_raw, mask), "clip_frac": masked_mean(clip_frac, mask),
                  "pg_loss": masked_mean(pg.detach(), mask),
                  "ratio_max": ratio.detach().masked_fill(~mask, 0.0).max()}


def masked_mean(x, mask):
    """Mean over real tokens, a scalar; 0 where there is none. What is masked may be NaN."""
    mask = mask.bool()
    return x.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def promote(x):  # float64 stays, all else becomes float32: bfloat16 can't hold a ratio of 1.001
    return x if x.dtype == torch.float64 else x.float()
