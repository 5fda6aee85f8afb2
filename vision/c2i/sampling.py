"""From an image GPT's logits to codes and their log-probabilities: the one path of sampling and scoring.

Classifier-free guidance (CFG, arXiv:2207.12598), then temperature, top-k, top-p, in the order and with the
boundary cases of LlamaGen (arXiv:2406.06525). All of it is the policy: what is sampled is what is scored.
With top-k or top-p on, the sampler hands out the kept set, and all policies are scored on this one support.
Left out: samplers whose probabilities have no closed form, such as beam search.
"""
import math

import torch

from model import inverse_cdf


def check_sampling(cfg_scale=1.0, temperature=1.0, top_k=0, top_p=1.0):
    """ValueError on what no distribution belongs to."""
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p}: wanted a share in (0, 1]")
    for name, value in (("cfg_scale", cfg_scale), ("temperature", temperature), ("top_k", top_k)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} {value}: wanted a number of at least 0")


def guided_steps(T, cfg_scale, cfg_interval):
    """How many of T codes guidance bears on, from the first: the prefill's, decode steps 0 … cfg_interval.

    cfg_interval < 0: all. cfg_scale <= 1: none, as in LlamaGen.
    """
    if cfg_scale <= 1:
        return 0
    return T if cfg_interval < 0 else min(T, cfg_interval + 2)


def guide(cond, uncond, cfg_scale):
    """ℓ = ℓ_null + s·(ℓ_class - ℓ_null), (..., V): arXiv:2207.12598, eq. 6, with its 1 + w written s."""
    return uncond + cfg_scale * (cond - uncond)


def guided_logits(model, codes, labels, cfg_scale=1.0, cfg_interval=-1):
    """codes (B, T), labels (B,) -> logits (B, T + 1, V) that sampling follows, before the temperature.

    model: an ImageGPT, or DDP around one. One call of it, with class and null rows side by side.
    """
    n = guided_steps(codes.shape[1] + 1, cfg_scale, cfg_interval)
    if not n:
        return model(codes, labels)
    null = torch.full_like(labels, getattr(model, "module", model).config.num_classes)
    cond, uncond = model(torch.cat([codes, codes]), torch.cat([labels, null])).chunk(2)
    return torch.cat([guide(cond[:, :n], uncond[:, :n], cfg_scale), cond[:, n:]], dim=1)


def kept_set(logits, top_k=0, top_p=1.0):
    """Which codes top_k (0: all; ties with the k-th stay) and then top_p leave: (..., V) -> bool (..., V).

    top_p keeps the likeliest until their mass is past it, the code that takes it there included.
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    kept = logits > -torch.inf
    if top_p < 1:
        ordered, index = logits.sort(descending=True, stable=True)
        after = (ordered.softmax(-1).cumsum(-1) > top_p).roll(1, -1)  # is the mass before it past top_p?
        after[..., 0] = False
        kept = kept & ~torch.zeros_like(after).scatter(-1, index, after)
    return kept


def log_probs(logits, temperature=1.0, kept=None):
    """Log-softmax over the kept codes, (..., V) -> (..., V); temperature at least 1e-5, as in LlamaGen."""
    logits = logits / max(temperature, 1e-5)
    return (logits if kept is None else logits.masked_fill(~kept, -torch.inf)).log_softmax(-1)


def draw(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """logits (..., V), uniforms (...) -> codes and their logp (...), kept (..., V) or None."""
    kept = kept_set(logits / max(temperature, 1e-5), top_k, top_p) if top_k or top_p < 1 else None
    dist = log_probs(logits, temperature, kept)
    action = inverse_cdf(dist.flatten(0, -2), uniforms.flatten()).view(uniforms.shape)
    return action, dist.gather(-1, action[..., None])[..., 0], kept


def score(model, codes, labels, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, kept=None, context=None):
    """Log-probability of each code and the entropy at it: codes (B, T), labels (B,) -> two float32 (B, T).

    kept (B, T, V): what `sample` or `draw` returned; every policy is scored on this one support.
    context: the codes (B, T) that the model reads, where they aren't those scored (teacher forcing).
    The entropy is that of the distribution scored and carries no gradient. model: as for guided_logits.
    """
    context = codes if context is None else context
    logits = guided_logits(model, context[:, :-1], labels, cfg_scale, cfg_interval)
    dist = log_probs(logits, temperature, kept)  # (B, T, V)
    with torch.no_grad():
        entropy = torch.special.entr(dist.exp()).sum(-1)
    return dist.gather(-1, codes.long()[..., None])[..., 0], entropy
