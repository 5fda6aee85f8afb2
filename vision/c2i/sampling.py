"""From an image GPT's logits to codes and their log-probabilities: the one path of sampling and scoring.

The order is LlamaGen's (arXiv:2406.06525): classifier-free guidance (CFG, arXiv:2207.12598), temperature,
top-k, top-p. All of them belong to the policy, so scoring applies what sampling applied. Every policy is
scored on the codes that top-k and top-p kept, else a ratio could be infinite. Left out: beam search.
"""
import math

import torch

from sampler import inverse_cdf, kept_set


def check_sampling(cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """ValueError on settings that define no distribution."""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: wanted a share in (0, 1]")
    for name, value in (("cfg_scale", cfg_scale), ("temperature", temperature), ("top_k", top_k)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value}: wanted a number of at least 0")


def guided_steps(T, cfg_scale, cfg_interval):
    """How many of T codes are guided: the first and those of decode steps 0 … cfg_interval (-1: all)."""
    if cfg_scale <= 1:
        return 0
    return T if cfg_interval < 0 else min(T, cfg_interval + 2)


def guide(cond, uncond, cfg_scale):
    """ℓ = ℓ_null + s·(ℓ_class - ℓ_null), (..., V): arXiv:2207.12598, eq. 6, with its 1 + w written s."""
    return uncond + cfg_scale * (cond - uncond)


def guided_logits(model, codes, labels, cfg_scale=1.0, cfg_interval=-1):
    """codes (B, T), labels (B,) -> logits (B, T + 1, V) that sampling follows, before the temperature.

    model: an ImageGPT, or DDP around one, which wants one forward pass: the null class's rows are in it too.
    """
    n_guided = guided_steps(codes.shape[1] + 1, cfg_scale, cfg_interval)
    if not n_guided:
        return model(codes, labels)
    null = torch.full_like(labels, getattr(model, "module", model).config.num_classes)
    cond, uncond = model(torch.cat([codes, codes]), torch.cat([labels, null])).chunk(2)
    guided = guide(cond[:, :n_guided], uncond[:, :n_guided], cfg_scale)
    return torch.cat([guided, cond[:, n_guided:]], dim=1)


def log_probs(logits, temperature=1.0, kept=None):
    """Log-softmax over the kept codes, (..., V) -> (..., V); temperature at least 1e-5, as in LlamaGen."""
    logits = logits / max(temperature, 1e-5)
    if kept is not None:
        logits = logits.masked_fill(~kept, -torch.inf)
    return logits.log_softmax(-1)


def draw(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """Inverse-CDF draws: logits (..., V), uniforms (...) -> codes and logp (...), kept (..., V) or None."""
    kept = kept_set(logits / max(temperature, 1e-5), top_k, top_p) if top_k or top_p < 1 else None
    dist = log_probs(logits, temperature, kept)
    action = inverse_cdf(dist.flatten(0, -2), uniforms.flatten()).view(uniforms.shape)
    return action, dist.gather(-1, action[..., None])[..., 0], kept


@torch.no_grad()
def sample_forced(model, truth, labels, uniforms, cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """G codes at every place of an image, each given the true codes before it (teacher forcing).

    truth (B, T), labels (B,), uniforms (B, G, T) -> codes, logp (B·G, T), kept (B·G, T, V) or None.
    """
    logits = guided_logits(model, truth[:, :-1], labels, cfg_scale)  # (B, T, V)
    logits = logits.repeat_interleave(uniforms.shape[1], 0)  # (B·G, T, V)
    return draw(logits, uniforms.flatten(0, 1), temperature, top_k, top_p)


def score(model, codes, labels, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, kept=None, context=None):
    """Log-probability of each code and the entropy at it: codes (B, T), labels (B,) -> two float32 (B, T).

    kept (B, T, V): what `sample` or `draw` returned. context (B, T): the codes that the model reads, where
    these are not the scored ones (teacher forcing). The entropy has no gradient. model: see guided_logits.
    """
    context = codes if context is None else context
    logits = guided_logits(model, context[:, :-1], labels, cfg_scale, cfg_interval)
    dist = log_probs(logits, temperature, kept)  # (B, T, V)
    with torch.no_grad():
        entropy = torch.special.entr(dist.exp()).sum(-1)
    return dist.gather(-1, codes.long()[..., None])[..., 0], entropy
