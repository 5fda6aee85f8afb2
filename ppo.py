"""PPO, Proximal Policy Optimization (arXiv:1707.06347): a value network where GRPO has a group mean.

Pure functions on (N, T) tensors, N answers of up to T tokens, and the critic. An answer ends at its last real
token, whether it stopped or was cut by max_new: no value behind it is counted (no bootstrap). The per-token
KL in the reward, the shuffled minibatches and both optimizers are in train_ppo.py.
Left out: a trunk shared by policy and critic, adaptive KL, early stopping on KL.
Run: python train_ppo.py
"""
import torch
import torch.nn as nn

from grpo import promote
from model import GPT


def check(**tensors):
    """Asserts that all are (N, T) of one shape and that none but the first carries a gradient."""
    (first, x0), *rest = tensors.items()
    assert x0.dim() == 2, f"{first} has shape {tuple(x0.shape)}, wanted (N, T)"
    for name, x in rest:
        assert x.shape == x0.shape, (f"{name} has shape {tuple(x.shape)}, "
                                     f"wanted {tuple(x0.shape)} like {first}")
        assert not x.requires_grad, f"{name} {tuple(x.shape)} carries a gradient: detach it"


def masked_mean(x, mask):
    """Mean over real tokens, a scalar; 0 where there is none. `where`, since what is masked may be NaN."""
    mask = mask.bool()
    return torch.where(mask, x, torch.zeros_like(x)).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, eps=1e-8):
    """(x - mean) / std over the real tokens of the batch, (N, T) -> (N, T), 0 at masked ones."""
    mean = masked_mean(x, mask)
    var = masked_mean((x - mean).square(), mask)
    return torch.where(mask.bool(), (x - mean) * torch.rsqrt(var + eps), torch.zeros_like(x))


def gae(reward, value, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation (arXiv:1506.02438, eq. 16).

    Â_t = Σ_k (γλ)ᵏ δ_{t+k}, summed over the rest of the answer, with δ_t = r_t + γ V_{t+1} - V_t.
    reward, value, mask (N, T) -> adv, returns = adv + value, both (N, T) and 0 at masked positions.
    value[:, t] is read where action t is predicted; behind the last real token V is 0. A row of mask is a run
    of ones from the left, then zeros.
    """
    check(reward=reward, value=value, mask=mask)
    mask = mask.bool()
    zero = torch.zeros_like(value)
    reward, value = torch.where(mask, reward, zero), torch.where(mask, value, zero)
    adv, running, value_next = zero.clone(), zero[:, 0], zero[:, 0]
    for t in reversed(range(reward.shape[1])):
        delta = reward[:, t] + gamma * value_next - value[:, t]  # (N,)
        running = delta + gamma * lam * running
        adv[:, t] = running
        value_next = value[:, t]
    return torch.where(mask, adv, zero), torch.where(mask, adv + value, zero)


def ppo_policy_loss(logp, logp_old, adv, mask, eps=0.2):
    """-mean over real tokens of min(r·Â, clip(r, 1-ε, 1+ε)·Â), r = exp(logp - logp_old).

    That is arXiv:1707.06347, eq. 7. logp, logp_old, adv, mask (N, T) -> scalar loss and a dict: clip_frac,
    the share of tokens that the clip leaves without gradient; ratio_max; pg_loss, the loss itself.
    """
    check(logp=logp, logp_old=logp_old, adv=adv, mask=mask)
    log_ratio = torch.where(mask.bool(), promote(logp) - promote(logp_old), torch.zeros_like(adv))
    ratio = torch.exp(log_ratio)
    loss = masked_mean(-torch.minimum(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv), mask)
    clipped = ((ratio < 1 - eps) & (adv < 0)) | ((ratio > 1 + eps) & (adv > 0))
    real = ratio.detach().masked_fill(~mask.bool(), 0.0)
    return loss, {"clip_frac": masked_mean(clipped.float(), mask), "ratio_max": real.max(),
                  "pg_loss": loss.detach()}


def value_loss(value, value_old, returns, mask, clip=0.2):
    """½ mean over real tokens of max((V - R)², (V_old + clip(V - V_old, ±clip) - R)²).

    So it doesn't pay to move V further than `clip` from V_old, the value at the rollout. The clip is that of
    OpenAI's baselines; the paper has the plain square, which is clip=inf (times ½).
    value, value_old, returns, mask (N, T) -> scalar loss and a dict: value_loss, value_clip_frac, and the
    explained_variance of value_old.
    """
    check(value=value, value_old=value_old, returns=returns, mask=mask)
    value, value_old, returns = (promote(x).masked_fill(~mask.bool(), 0.0)
                                 for x in (value, value_old, returns))
    clipped = value_old + (value - value_old).clamp(-clip, clip)
    plain, bounded = (value - returns).square(), (clipped - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, bounded), mask)
    return loss, {"value_loss": loss.detach(),
                  "explained_variance": explained_variance(value_old, returns, mask),
                  "value_clip_frac": masked_mean((bounded > plain).float(), mask)}


def explained_variance(value, returns, mask):
    """1 - Var[returns - value] / Var[returns] over real tokens: 0 for a constant value, 1 for an oracle.

    NaN where the returns don't vary.
    """
    error, returns = (returns - value)[mask.bool()], returns[mask.bool()]
    spread = returns.var(correction=0)
    return torch.where(spread > 0, 1 - error.var(correction=0) / spread, torch.nan)


class ValueModel(nn.Module):
    """The critic: a GPT trunk of its own and a scalar head; tokens (N, T) -> V (N, T).

    V[:, t] is the value after reading tokens[:, :t + 1].
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = GPT(config)
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.head.weight)  # V = 0 at the start: the first advantages are the returns
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens, pad=None):
        return self.head(self.trunk.hidden(tokens, pad)).squeeze(-1).float()  # (N, T)
