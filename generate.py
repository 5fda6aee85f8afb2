"""Sampling and scoring with a text policy, through one path: what is sampled is what is scored.

A policy is a module with `config.block_size`, `hidden(tokens, pad, cache)` and `logits(hidden)`. Nothing here
knows its architecture. A group's prompt is read once: in sampling, in scoring and in the update.
Left out: beam search and other samplers whose probabilities have no closed form.
Run: python sample.py
"""
import torch
import torch.nn.functional as F

from attention import GroupCache, PromptCache
from utils.run import step_generator
from utils.text import completions


# ---- the sampler ----
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


def inverse_cdf(logp, u):
    """First token whose cumulative probability exceeds u: logp (N, V), u (N,) in [0, 1) -> (N,).

    In float64, since a float32 sum over V tokens would lose the unlikely ones. u is scaled by the last sum,
    which is 1 but for rounding, so that it is always exceeded. A GPU sums a long row slowly, but many short
    ones quickly: there the block of 256 tokens is found first, then the token in it.
    """
    if logp.device.type == "mps":  # it has no float64
        return inverse_cdf(logp.cpu(), u.cpu()).to(logp.device)
    p, u = logp.double().exp(), u.double()[:, None]
    if p.is_cuda and p.shape[1] > 4096:
        blocks = F.pad(p, (0, -p.shape[1] % 256)).unflatten(1, (-1, 256))  # (N, blocks, 256)
        ends = blocks.sum(-1).cumsum(-1)
        u = u * ends[:, -1:]
        block = torch.searchsorted(ends, u, right=True).clamp(max=ends.shape[1] - 1)  # (N, 1)
        within = blocks.gather(1, block[:, :, None].expand(-1, 1, 256))[:, 0].cumsum(-1)  # (N, 256)
        before = ends.gather(1, block) - within[:, -1:]
        action = block * 256 + torch.searchsorted(within, u - before, right=True).clamp(max=255)
        return action[:, 0].clamp(max=p.shape[1] - 1)
    cdf = p.cumsum(-1)
    action = torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]
    return action.clamp(max=p.shape[1] - 1)


def draw(model, hidden, uniform, temperature=1.0, top_k=0, top_p=1.0):
    """Last hidden states (N, C) and uniforms (N,) -> the next tokens (N,) and their log-probabilities."""
    dist = sampling_logp(model.logits(hidden).float() / temperature, top_k, top_p)  # (N, V)
    action = inverse_cdf(dist, uniform)
    return action, dist.gather(1, action[:, None])[:, 0]


def next_token(model, token, cache, *how):
    """Reads tokens (N, 1) behind what the cache holds and draws those that follow: as `draw`."""
    return draw(model, model.hidden(token, cache=cache)[:, -1], *how)


def ended(tokens, stop):
    """Where one of the stop sequences ends in answers (N, T): bool (N, T)."""
    result = torch.zeros_like(tokens, dtype=torch.bool)
    for sequence in stop:
        places = tokens.shape[1] - len(sequence) + 1  # at which it can begin
        if places > 0:
            same = [tokens[:, i:i + places] == token for i, token in enumerate(sequence)]
            result[:, len(sequence) - 1:] |= torch.stack(same).all(0)
    return result


@torch.no_grad()
def generate(model, prompt, max_new, group_size=1, temperature=1.0, top_k=0, top_p=1.0, stop=(),
             generator=None, uniforms=None, pad=None, fast_next_token=None, graph=None):
    """G answers to each of B prompts: (B, P) -> tokens (B·G, P + T), logp and mask (B·G, T); T = max_new.

    stop: token sequences that end an answer. They are part of it (mask is True), what follows is not.
    A token is drawn by inverse CDF: the first one whose cumulative probability exceeds a number of uniforms
    (B·G, T), which come from `generator` unless given. pad (B,): padding on the left of each prompt.
    logp is that of the distribution sampled from: temperature, then top_k, then top_p.
    fast_next_token: `next_token`, compiled. graph: graph.py's, which decodes on a GPU.
    ValueError where prompt and answer don't fit the context.
    """
    (B, P), device, N = prompt.shape, prompt.device, prompt.shape[0] * group_size
    if P + max_new > model.config.block_size:
        raise ValueError(f"prompt {P} + max_new {max_new} don't fit the context of "
                         f"{model.config.block_size} (block_size)")
    if uniforms is None:
        uniforms = torch.rand(N, max_new, generator=generator).to(device)
    how = temperature, top_k, top_p
    prompt_cache = PromptCache(pad)
    hidden = model.hidden(prompt, cache=prompt_cache)[:, -1].repeat_interleave(group_size, 0)
    answer, logp = torch.zeros(N, max_new, dtype=torch.long, device=device), torch.zeros_like(uniforms)
    answer[:, 0], logp[:, 0] = draw(model, hidden, uniforms[:, 0], *how)
    if graph:
        graph.decode(prompt_cache, group_size, answer, logp, uniforms, how, stop)
    else:
        cache = GroupCache(prompt_cache, group_size, max_new)
        position = torch.arange(P + max_new, device=device) if fast_next_token else range(P + max_new)
        # inference mode is the quickest, but autocast would cast each weight again at each token in it
        mode = torch.no_grad if torch.is_autocast_enabled(device.type) else torch.inference_mode
        step = fast_next_token or mode()(lambda *read: next_token(model, *read))
        for t in range(1, max_new):
            look = device.type == "cpu" or t % 8 == 0  # a GPU's answer has to be waited for
            if stop and look and ended(answer[:, :t], stop).any(1).all():
                break
            cache.start = position[P + t - 1]
            answer[:, t], logp[:, t] = step(answer[:, t - 1:t], cache, uniforms[:, t], *how)
    stops = ended(answer, stop).long()
    mask = stops.cumsum(1) - stops == 0  # no stop before it
    return torch.cat([prompt.repeat_interleave(group_size, 0), answer], 1), logp * mask, mask


def score(model, tokens, prompt_len, temperature=1.0, pad=None, group_size=1, entropy_grad=False):
    """Log-probability and full-softmax entropy of the answer: tokens (N, P + T) -> two float32 (N, T).

    Only the last T positions meet the output head. The entropy has a gradient if asked. group_size > 1: rows
    are G answers to each prompt, side by side, and the prompt is read once for its group.
    """
    if group_size == 1:
        hidden = model.hidden(tokens[:, :-1], pad)[:, prompt_len - 1:]
    else:
        prompt_cache = PromptCache(None if pad is None else pad[::group_size])
        first = model.hidden(tokens[::group_size, :prompt_len], cache=prompt_cache)[:, -1:]
        hidden = first.repeat_interleave(group_size, 0)
        if tokens.shape[1] > prompt_len + 1:  # the last token of an answer is not read
            rest = model.hidden(tokens[:, prompt_len:-1], cache=GroupCache(prompt_cache, group_size))
            hidden = torch.cat([hidden, rest], 1)
    logits = model.logits(hidden).float()  # (N, T, V), the largest tensor of an update
    logits = logits if temperature == 1 else logits / temperature
    logp = -F.cross_entropy(logits.flatten(0, 1), tokens[:, prompt_len:].flatten(), reduction="none")
    if entropy_grad:  # entr's own gradient is infinite at probability 0
        every = logits.log_softmax(-1)
        return logp.view(every.shape[:2]), -(every.exp() * every).sum(-1)
    with torch.no_grad():
        chosen = logits.gather(2, tokens[:, prompt_len:, None])[:, :, 0]
        # -Σ p·log p = log Σ exp(logit) - Σ p·logit, and the chosen token knows the first term
        entropy = chosen - logp.view_as(chosen) - logits.softmax(-1).mul_(logits).sum(-1)
    return logp.view_as(entropy), entropy


@torch.no_grad()
def sample_texts(model, tokenizer, prompts, max_new, temperature=1.0, seed=0, top_k=0, group_size=1):
    """G answers to each prompt, in float32 -> (tokens, logp, mask, texts)."""
    device = next(model.parameters()).device
    pad = None if prompts.pad is None else prompts.pad.to(device)
    generator = step_generator(seed, -1 % 1_000_003)  # just before the next seed's: no step of a run
    tokens, logp, mask = generate(model, prompts.tokens.to(device), max_new, group_size, temperature, top_k,
                                  stop=tokenizer.stops, generator=generator, pad=pad)
    return tokens, logp, mask, completions(tokens[:, prompts.tokens.shape[1]:], mask, tokenizer)
