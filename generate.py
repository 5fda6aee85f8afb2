"""Sampling and scoring with a text policy, through one path: what is sampled is what is scored.

A policy is a module with `config.block_size`, `hidden(tokens, pad, cache)` and `logits(hidden)`. Nothing here
knows its architecture. A group's prompt is read once: in sampling, in scoring and in the update.
Left out: several turns.
Run: python sample.py
"""
import torch
import torch.nn.functional as F

from attention import GroupCache, PromptCache
from sampler import draw
from utils.run import step_generator
from utils.text import completions

PART = 16  # tokens between two looks at whether all answers have ended: on a GPU a look has to be waited for


def ended(tokens, stop):
    """Where one of the stop sequences ends in answers (N, T): bool (N, T)."""
    result = torch.zeros_like(tokens, dtype=torch.bool)
    for sequence in stop:
        n_starts = tokens.shape[1] - len(sequence) + 1  # places at which it can begin
        if n_starts > 0:
            same = [tokens[:, i:i + n_starts] == token for i, token in enumerate(sequence)]
            result[:, len(sequence) - 1:] |= torch.stack(same).all(0)
    return result


class Decoding:
    """N = B·G answers of up to T tokens to prompts (B, P) while they grow: tokens and logp (N, T)."""
    kind = GroupCache  # of its cache; graph.py has another

    def __init__(self, model, prompt, pad, group_size, uniforms, how):
        self.model, self.prompt, self.pad, self.group_size = model, prompt, pad, group_size
        self.uniforms, self.how = uniforms, how
        self.tokens, self.logp = torch.zeros_like(uniforms, dtype=torch.long), torch.zeros_like(uniforms)

    def begin(self):
        """Reads each prompt once, and draws the first token of its answers."""
        cache = PromptCache(self.pad)
        hidden = self.model.hidden(self.prompt, cache=cache)[:, -1].repeat_interleave(self.group_size, 0)
        self.cache = self.kind(cache, self.group_size, self.tokens.shape[1])
        return draw(self.model, hidden, self.uniforms[:, 0], *self.how)

    def follow(self, t):
        """Reads token t - 1, and draws the next one."""
        self.cache.start = self.prompt.shape[1] + t - 1
        hidden = self.model.hidden(self.tokens[:, t - 1:t], cache=self.cache)[:, -1]
        return draw(self.model, hidden, self.uniforms[:, t], *self.how)

    def extend(self, first, last):
        """Draws tokens `first` to `last` - 1 of every answer."""
        for t in range(first, last):
            self.tokens[:, t], self.logp[:, t] = self.follow(t) if t else self.begin()


@torch.no_grad()
def generate(model, prompt, max_new, group_size=1, temperature=1.0, top_k=0, top_p=1.0, stop=(),
             generator=None, uniforms=None, pad=None, graphs=None):
    """G answers to each of B prompts: (B, P) -> tokens (B·G, P + T), logp and mask (B·G, T); T = max_new.

    stop: token sequences that end an answer. They are part of it (mask is True), what follows is not.
    A token is drawn by inverse CDF: the first one whose cumulative probability exceeds a number of uniforms
    (B·G, T), which come from `generator` unless given. pad (B,): padding on the left of each prompt.
    logp is that of the distribution sampled from: temperature, then top_k, then top_p.
    graphs: graph.py's, which replay the loop on a GPU.
    ValueError where prompt and answer don't fit the context.
    """
    P, device, N = prompt.shape[1], prompt.device, prompt.shape[0] * group_size
    if P + max_new > model.config.block_size:
        raise ValueError(f"prompt {P} + max_new {max_new} don't fit the context of "
                         f"{model.config.block_size} (block_size)")
    if uniforms is None:
        uniforms = torch.rand(N, max_new, generator=generator).to(device)
    how = temperature, top_k, top_p
    decoding = Decoding(model, prompt, pad, group_size, uniforms, how)
    decoding = graphs.recorded(decoding) if graphs and N else decoding
    # inference mode is the quickest, but autocast would cast each weight again at each token in it
    mode = torch.no_grad if graphs or torch.is_autocast_enabled(device.type) else torch.inference_mode
    part = 1 if device.type == "cpu" and not graphs else PART
    with mode():
        for t in range(0, max_new, part):
            if t and stop and ended(decoding.tokens[:, :t], stop).any(1).all():
                break
            decoding.extend(t, min(t + part, max_new))
    stops = ended(decoding.tokens, stop).long()
    mask = stops.cumsum(1) - stops == 0  # no stop before it
    prompts = prompt.repeat_interleave(group_size, 0)
    return torch.cat([prompts, decoding.tokens], 1), decoding.logp * mask, mask


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
        # -Σ p·log p = log Σ exp(logit) - Σ p·logit; the first term is chosen - logp
        entropy = chosen - logp.view_as(chosen) - logits.softmax(-1).mul_(logits).sum(-1)
    return logp.view_as(entropy), entropy


@torch.no_grad()
def sample_texts(model, tokenizer, prompts, max_new, temperature=1.0, seed=0, top_k=0, group_size=1):
    """G answers to each prompt, in float32 -> (tokens, logp, mask, texts)."""
    device = next(model.parameters()).device
    pad = None if prompts.pad is None else prompts.pad.to(device)
    generator = step_generator(seed, 1_000_002)  # a step that no run reaches
    tokens, logp, mask = generate(model, prompts.tokens.to(device), max_new, group_size, temperature, top_k,
                                  stop=tokenizer.stops, generator=generator, pad=pad)
    return tokens, logp, mask, completions(tokens[:, prompts.tokens.shape[1]:], mask, tokenizer)
