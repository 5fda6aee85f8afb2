"""PPO, Proximal Policy Optimization (arXiv:1707.06347): a value network where GRPO has a group mean.

Pure functions on (N, T) tensors, N answers of up to T tokens, and the critic. More axes in front, as in
(B, G, T), work too. An answer cut by max_new counts as ended: no value is added for what might follow.
Left out: a trunk shared with the policy, adaptive KL. On text as InstructGPT has it, arXiv:2203.02155.
Run: python train_ppo.py
"""
import torch
import torch.nn as nn

from grpo import expect, masked_mean, promote

VALUE_COLUMNS = ["explained_variance", "value_loss", "value_clip_frac"]


def expect_alike(**tensors):
    """Raises unless all are (N, T) of one shape and none but the first carries a gradient."""
    (first, x0), *rest = tensors.items()
    want = tuple(x0.shape)
    expect(x0.dim() >= 2, f"{first} has shape {want}, wanted (N, T)")
    for name, x in rest:
        expect(x.shape == x0.shape, f"{name} has shape {tuple(x.shape)}, wanted {want} like {first}")
        expect(not x.requires_grad, f"{name} {want} carries a gradient: detach it")


def whiten(x, mask, eps=1e-8):
    """(x - mean) / std over the real tokens of the batch, (N, T) -> (N, T), 0 at masked ones."""
    x = x - masked_mean(x, mask)
    return torch.where(mask.bool(), x * torch.rsqrt(masked_mean(x.square(), mask) + eps), torch.zeros_like(x))


def token_reward(reward, logp, logp_ref, mask, beta):
    """What each token earns: -β·(logp - logp_ref), and on its last real token the answer's reward.

    reward (N,), the others (N, T) -> (N, T). InstructGPT, arXiv:2203.02155, eq. 2.
    """
    last = mask.sum(-1, keepdim=True) - 1
    return (-beta * (logp - logp_ref)).scatter_add(-1, last, reward[..., None])


def gae(reward, value, mask, gamma=1.0, lam=0.95):
    """Generalised advantage estimation: Â_t = Σ_k (γλ)ᵏ δ_{t+k} (arXiv:1506.02438, eq. 16).

    δ_t = reward_t + γ·V_{t+1} - V_t, to the answer's last token; V is 0 after it.
    reward, value, mask (N, T) -> adv, returns = adv + value, both (N, T) and 0 at masked positions.
    value[:, t] is read where action t is predicted. A row of mask is ones from the left, then zeros.
    """
    expect_alike(reward=reward, value=value, mask=mask)
    mask = mask.bool()
    zero = torch.zeros_like(value)
    reward, value = torch.where(mask, reward, zero), torch.where(mask, value, zero)
    adv, running, value_next = zero.clone(), zero[..., 0], zero[..., 0]
    for t in reversed(range(reward.shape[-1])):
        delta = reward[..., t] + gamma * value_next - value[..., t]  # (N,)
        running = delta + gamma * lam * running
        adv[..., t] = running
        value_next = value[..., t]
    return torch.where(mask, adv, zero), torch.where(mask, adv + value, zero)


def ppo_policy_loss(logp, logp_old, adv, mask, eps=0.2):
    """-mean over real tokens of min(r·Â, clip(r, 1-ε, 1+ε)·Â), r = exp(logp - logp_old) (eq. 7).

    logp, logp_old, adv, mask (N, T) -> scalar, dict; clip_frac: tokens that the clip leaves no gradient.
    """
    expect_alike(logp=logp, logp_old=logp_old, adv=adv, mask=mask)
    log_ratio = torch.where(mask.bool(), promote(logp) - promote(logp_old), torch.zeros_like(adv))
    ratio = torch.exp(log_ratio)
    loss = masked_mean(-torch.minimum(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv), mask)
    clipped = ((ratio < 1 - eps) & (adv < 0)) | ((ratio > 1 + eps) & (adv > 0))
    return loss, {"clip_frac": masked_mean(clipped.float(), mask), "pg_loss": loss.detach(),
                  "ratio_max": ratio.detach().masked_fill(~mask.bool(), 0.0).max()}


def value_loss(value, value_old, returns, mask, clip=0.2):
    """½ mean over real tokens of max((V - returns)², (V_old + clip(V - V_old, ±clip) - returns)²).

    V_old is the value at the rollout. The clip is from OpenAI's baselines; the paper has the plain square.
    value, value_old, returns, mask (N, T) -> scalar, dict.
    """
    expect_alike(value=value, value_old=value_old, returns=returns, mask=mask)
    value, value_old, returns = (promote(x).masked_fill(~mask.bool(), 0.0)
                                 for x in (value, value_old, returns))
    bounded = (value_old + (value - value_old).clamp(-clip, clip) - returns).square()
    plain = (value - returns).square()
    loss = 0.5 * masked_mean(torch.maximum(plain, bounded), mask)
    clipped = (bounded > plain).float()
    return loss, {"value_loss": loss.detach(), "value_clip_frac": masked_mean(clipped, mask),
                  "explained_variance": explained_variance(value_old, returns, mask)}


def explained_variance(value, returns, mask):
    """1 - Var[returns - value] / Var[returns] over real tokens: 1 for an oracle, NaN for equal returns."""
    error, returns = (returns - value)[mask.bool()], returns[mask.bool()]
    spread = returns.var(correction=0)
    return torch.where(spread > 0, 1 - error.var(correction=0) / spread, torch.nan)


class ValueModel(nn.Module):
    """The critic: a trunk like the policy's and a scalar head. tokens (N, T) -> V (N, T), float32.

    V[:, t] has read tokens[:, :t + 1], so answer token t is predicted at V[:, P - 1 + t].
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.trunk = config.build()
        self.head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.head.weight)  # V = 0 at the start: the first advantages are the returns
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens, pad=None):
        return self.head(self.trunk.hidden(tokens, pad)).squeeze(-1).float()
