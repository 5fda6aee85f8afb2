"""CUDA graphs of the three slow loops: sampling, scoring and the backward pass of scoring.

A graph records the kernels that Python launches, and launches them all at once. It replays the same work on
the same memory, so each shape has a recording of its own, and what changes is copied in before a replay.
The recorded functions are those of the other files. On a CPU they run as they are, for the tests.
Left out: the optimizer's step, the loss, shapes that change during a replay.
Run: python train_grpo.py --device cuda
"""
import copy
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import causal_mask


class AnswerCache:
    """Keys and values of N answers, prompt included: a pair of buffers (N, kv heads, P + T, d) a layer.

    A group's prompt is held G times: on a GPU one kernel reads a row's buffer, and memory is no concern.
    start: how many tokens stand before the one that is read.
    """

    def __init__(self, prompt, group_size, size):
        self.pad = None if prompt.pad is None else prompt.pad.repeat_interleave(group_size)  # (N,)
        size = -(-(prompt.length + size) // 8) * 8 - prompt.length  # the kernel wants masks of 8, 16, … keys
        self.pairs = {layer: [F.pad(x.repeat_interleave(group_size, 0), (0, 0, 0, size)) for x in pair]
                      for layer, pair in prompt.pairs.items()}
        (self.some, _), *_ = self.pairs.values()

    def places(self, T, device):
        position, self.stop = torch.full((1,), self.start, device=device), self.start + 1
        if self.pad is None:
            return position, None
        self.stop = -(-self.stop // 8) * 8
        seen = causal_mask(position, self.stop, self.pad)  # (N, 1, 1, stop)
        hide = torch.zeros_like(seen, dtype=self.some.dtype).masked_fill(~seen, -torch.inf)
        return position - self.pad[:, None], hide

    def attend(self, layer, q, k, v, mask):
        keys, values = self.pairs[layer]
        keys[:, :, self.start:self.start + 1] = k
        values[:, :, self.start:self.start + 1] = v
        (N, heads, _, d), kv_heads = q.shape, k.shape[1]
        q = q.reshape(N, kv_heads, -1, d)  # the queries that a kv head serves stand where tokens would
        if mask is not None:
            mask = mask.expand(N, kv_heads, q.shape[2], -1)
        y = F.scaled_dot_product_attention(q, keys[:, :, :self.stop], values[:, :, :self.stop], mask)
        return y.reshape(N, heads, 1, d)


def record(function, pool=None):
    """The kernels of function() as a graph -> what replays them; on a CPU, or where that fails, function."""
    if not torch.cuda.is_available():
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # libraries take their memory at the first call
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch.clear_autocast_cache()  # weights that autocast cast before would be those of now for ever
    try:
        with torch.cuda.graph(graph, pool=pool):
            function()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return without(error, function)
    finally:
        torch.clear_autocast_cache()
    return graph.replay


def without(error, function):
    print(f"no CUDA graph, so slower: {str(error).splitlines()[0][:150]}", file=sys.stderr)
    return function


class Recording:
    """A Decoding whose parts are graphs."""

    def __init__(self, decoding, pool):
        decoding.kind = AnswerCache
        decoding.prompt, decoding.uniforms = decoding.prompt.clone(), decoding.uniforms.clone()
        decoding.pad = None if decoding.pad is None else decoding.pad.clone()
        self.decoding, self.tokens, self.logp = decoding, decoding.tokens, decoding.logp
        self.parts, self.pool = {}, pool

    def refill(self, other):
        for name in ("prompt", "uniforms", "pad"):
            if getattr(other, name) is not None:
                getattr(self.decoding, name).copy_(getattr(other, name))
        self.tokens.zero_()
        self.logp.zero_()

    def draw(self, first, last):
        if first not in self.parts:
            self.parts[first] = record(lambda: self.decoding.draw(first, last), self.pool)
        self.parts[first]()


class Scorer(nn.Module):
    """`score` of one model in one precision, with fixed settings, as make_graphed_callables wants it."""

    def __init__(self, score, model, autocast, P, temperature, *more):
        super().__init__()
        self.score, self.model, self.autocast = score, model, autocast
        self.P, self.temperature, self.more = P, temperature, more

    def forward(self, tokens, pad=None):
        with self.autocast():
            return self.score(tokens, self.P, self.temperature, pad, *self.more)


class Graphs:
    """A run's recordings. They sample in float32 (fp32), or from a copy of the weights in bfloat16 (bf16)."""

    def __init__(self, model, dtype="fp32"):
        self.model, self.sampler, self.recordings, self.scorers = model, model, {}, {}
        if dtype == "bf16":
            self.sampler = copy.deepcopy(model).bfloat16().requires_grad_(False)
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.hooked = set()

    @torch.no_grad()
    def refreshed(self):
        """The model to sample from, with the weights of now."""
        if self.sampler is not self.model:
            torch._foreach_copy_(list(self.sampler.parameters()), list(self.model.parameters()))
        return self.sampler

    def recorded(self, decoding):
        """The recording of a Decoding of this shape, with its prompts and uniforms."""
        shape = decoding.prompt.shape, decoding.uniforms.shape, decoding.how
        if shape not in self.recordings:
            self.recordings[shape] = Recording(decoding, self.pool)
        self.recordings[shape].refill(decoding)
        return self.recordings[shape]

    def scoring(self, score, model, autocast):
        """generate.score of a model by recordings: tokens (N, P + T) -> log-probability, entropy (N, T).

        Rows and T are filled up to those of a recording that is there, or of a new one.
        """
        def recorded(tokens, P, temperature, pad, *more):
            N, T = len(tokens), tokens.shape[1] - P
            tokens = F.pad(tokens, (0, -T % 16))
            key = id(model), tokens.shape[1], P, torch.is_grad_enabled()
            rows = min((n for n in self.scorers.get(key, {}) if n >= N), default=N)
            inputs = [F.pad(tokens, (0, 0, 0, rows - N))]
            inputs += [] if pad is None else [F.pad(pad, (0, rows - N))]
            known = self.scorers.setdefault(key, {})
            if rows not in known:
                known[rows] = self.record(Scorer(score, model, autocast, P, temperature, *more), inputs)
            return [x[:N, :T] for x in known[rows](*inputs)]
        return recorded

    def record(self, scorer, inputs):
        if not torch.is_grad_enabled():
            return forward_graph(scorer, inputs, self.pool)
        if not torch.cuda.is_available():
            return scorer
        try:
            scorer = torch.cuda.make_graphed_callables(scorer, tuple(inputs), pool=self.pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            return without(error, scorer)
        for weight in set(scorer.parameters()) - self.hooked:
            if weight.requires_grad:  # a replay overwrites the gradients of the one before
                weight.register_hook(torch.clone)
        self.hooked |= set(scorer.parameters())
        return scorer


def forward_graph(function, inputs, pool=None):
    """function(*inputs), without a backward pass, as a recording."""
    inputs, outputs = [x.clone() for x in inputs], []

    def forward():
        outputs[:] = function(*inputs)
    replay = record(forward, pool)

    def replayed(*given):
        for kept, new in zip(inputs, given):
            kept.copy_(new)
        replay()
        return [x.clone() for x in outputs]
    return replayed
