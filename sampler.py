"""From logits to a token: temperature, top-k, top-p, and the inverse of the cumulative distribution.

Left out: beam search and other samplers whose probabilities have no closed form.
Run: python sample.py
"""
import torch
import torch.nn.functional as F


def kept_set(logits, top_k=0, top_p=1.0):
    """Which tokens top_k (0: all; ties with the k-th stay) and then top_p leave: (..., V) -> bool (..., V).

    top_p (arXiv:1904.09751) keeps the likeliest tokens until their mass is past it, and the one that takes it
    there. The boundary cases are those of LlamaGen (arXiv:2406.06525).
    """
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    kept = logits > -torch.inf
    if top_p < 1:
        ordered, index = logits.sort(descending=True, stable=True)
        drop = (ordered.softmax(-1).cumsum(-1) > top_p).roll(1, -1)  # is the mass before it past top_p?
        drop[..., 0] = False
        kept = kept & ~torch.zeros_like(drop).scatter(-1, index, drop)
    return kept


def sampling_logp(logits, top_k=0, top_p=1.0):
    """Log-probabilities that sampling follows, (..., V) -> (..., V); -inf outside the kept set."""
    if top_k or top_p < 1:
        logits = logits.masked_fill(~kept_set(logits, top_k, top_p), -torch.inf)
    return logits.log_softmax(-1)


def first_past(cdf, target):
    """The first place of each row whose sum exceeds the target, (N, K), (N, 1) -> (N, 1); of NaN the last."""
    return torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[1] - 1)


def inverse_cdf(logp, u):
    """First token whose cumulative probability exceeds u: logp (N, V), u (N,) in [0, 1) -> (N,).

    Sums are in float64, since a float32 sum over V tokens would lose the unlikely ones. u is scaled by the
    last sum, which is 1 but for rounding, so that it is always exceeded. In a long row the block of 256
    tokens is found first, then the token in it: many short sums are quicker than a long one.
    """
    if logp.device.type == "mps":  # it has no float64
        return inverse_cdf(logp.cpu(), u.cpu()).to(logp.device)
    V, u = logp.shape[1], u.double()[:, None]
    if V <= 4096:
        cdf = logp.double().exp().cumsum(-1)
        return first_past(cdf, u * cdf[:, -1:])[:, 0]
    p = F.pad(logp.exp(), (0, -V % 256)).unflatten(1, (-1, 256))  # (N, blocks, 256)
    ends = p.sum(-1, dtype=torch.double).cumsum(-1)
    target = u * ends[:, -1:]
    block = first_past(ends, target)  # (N, 1)
    cdf = p.gather(1, block[:, :, None].expand(-1, 1, 256))[:, 0].cumsum(-1, dtype=torch.double)
    target = (target - (ends.gather(1, block) - cdf[:, -1:])).clamp(min=0)  # less the sum before the block
    within = first_past(cdf, target.minimum(cdf[:, -1:] * (1 - 2**-52)))
    return (block * 256 + within)[:, 0].clamp(max=V - 1)


def draw(model, hidden, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Last hidden states (N, C) and uniforms (N,) -> the next tokens (N,) and their log-probabilities."""
    logits = model.logits(hidden).float()  # (N, V)
    dist = sampling_logp(logits if temperature == 1 else logits / temperature, top_k, top_p)
    action = inverse_cdf(dist, uniform)
    return action, dist.gather(1, action[:, None])[:, 0]
