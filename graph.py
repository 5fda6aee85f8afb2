"""CUDA graphs: what Python would launch kernel by kernel is recorded once, and then launched in one go.

A recording replays the same kernels on the same memory. So each shape has its own, what changes is copied in
before, and what comes out is copied out. The recorded functions are those of the other files: sampling in
parts of 16 tokens, and a model's passes, forward and backward. On a CPU they run as they are, for tests.
Left out: the loss, the optimizer.
Run: python train_grpo.py --device cuda
"""
import copy
import functools
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

from attention import causal_mask


class AnswerCache:
    """Keys and values of N answers, prompt included: a pair of buffers (N, kv heads, P + T, d) a layer.

    A group's prompt is held G times. So one kernel reads all keys of a row in one go.
    start: how many tokens stand before the one that is read.
    """

    def __init__(self, prompt, group_size, size):
        self.pad = None if prompt.pad is None else prompt.pad.repeat_interleave(group_size)  # (N,)
        size += -(prompt.length + size) % 8  # the kernel reads masks of 8, 16, 24, … keys
        self.pairs = {layer: [F.pad(x.repeat_interleave(group_size, 0), (0, 0, 0, size)) for x in pair]
                      for layer, pair in prompt.pairs.items()}
        self.dtype = next(iter(self.pairs.values()))[0].dtype

    def places(self, T, device):
        position, self.stop = torch.full((1,), self.start, device=device), self.start + 1
        if self.pad is None:
            return position, None
        self.stop += -self.stop % 8
        seen = causal_mask(position, self.stop, self.pad)  # (N, 1, 1, stop)
        hide = torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, -torch.inf)
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


# ---- recording ----
FAILURES = []  # after one none is tried: it might hold buffers that an eager part of a decoding replaces


def made_or_eager(make, function):
    """make(). Where that fails, a line, and `function`: it is called next, and raises faults of its own."""
    if FAILURES:
        return function
    try:
        return make()
    except RuntimeError as error:
        FAILURES.append(str(error))
        torch.clear_autocast_cache()  # what was to be recorded is not computed
        print(f"no more CUDA graphs, so slower: {str(error).splitlines()[0][:150]}", file=sys.stderr)
        return function


def record(function, device, pool=None):
    """-> a function that repeats the kernels of function(), without its Python."""
    if device.type != "cuda" or FAILURES:
        return function
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()  # libraries take their memory at the first call
    torch.cuda.current_stream().wait_stream(stream)

    def make():
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # weights cast before the recording would stay those of now
        with torch.cuda.graph(graph, pool=pool):
            function()
        torch.clear_autocast_cache()
        return graph.replay
    return made_or_eager(make, function)


def record_call(function, inputs, pool=None):
    """-> a function that repeats function(*inputs), without a backward pass, on inputs of these shapes."""
    kept, outputs = [x.clone() for x in inputs], []

    def call():
        outputs[:] = function(*kept)
    replay = record(call, kept[0].device, pool)

    def replayed(*inputs):
        for old, new in zip(kept, inputs):
            old.copy_(new)
        replay()
        return [x.clone() for x in outputs]
    return replayed


class Recording:
    """A Decoding of generate.py that draws its tokens by recordings, a part of them each."""

    def __init__(self, decoding, pool):
        decoding.kind = AnswerCache
        self.inputs = [decoding.prompt.clone(), decoding.uniforms.clone(),
                       None if decoding.pad is None else decoding.pad.clone()]
        decoding.prompt, decoding.uniforms, decoding.pad = self.inputs
        self.decoding, self.tokens, self.logp = decoding, decoding.tokens, decoding.logp
        self.parts, self.pool = {}, pool

    def refill(self, other):
        for old, new in zip(self.inputs, (other.prompt, other.uniforms, other.pad)):
            if old is not None:
                old.copy_(new)
        self.tokens.zero_()
        self.logp.zero_()

    def extend(self, first, last):
        device = self.tokens.device
        with torch.autocast(device.type, enabled=False):  # the weights have the precision already
            if first not in self.parts:
                self.parts[first] = record(lambda: self.decoding.extend(first, last), device, self.pool)
            self.parts[first]()


def one_pass(function, model, tokens, pad, autocast, graphs, group_size=1):
    """function(tokens (N, L), pad (N,) or None) of a model, in a precision; with graphs by a recording.

    A recording fills the rows up on the right, and adds whole groups below. So the function must not look
    ahead. A recording is found by model, shape and group_size: always pass the same function for these.
    """
    if graphs and not getattr(getattr(model, "trunk", model), "checkpointing", False):
        return graphs.call(function, model, autocast, tokens, pad, group_size)
    with autocast():
        return function(tokens, pad)


class Pass(nn.Module):
    """function(tokens, pad) of a model's, in one precision, as make_graphed_callables wants it."""

    def __init__(self, function, model, autocast):
        super().__init__()
        self.function, self.model, self.autocast = function, model, autocast

    def forward(self, tokens, pad=None):
        with self.autocast():
            return self.function(tokens, pad)


class Graphs:
    """A run's recordings. They sample in float32 (fp32), or from a copy of the weights in bfloat16 (bf16)."""

    def __init__(self, model, dtype="fp32"):
        self.model, self.sampler, self.decodings, self.passes, self.cloned = model, model, {}, {}, set()
        self.full = False
        if dtype == "bf16":
            self.sampler = copy.deepcopy(model).bfloat16().requires_grad_(False)
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    @torch.no_grad()
    def refreshed(self):
        """The model to sample from, with the weights of now."""
        if self.sampler is not self.model:
            torch._foreach_copy_(list(self.sampler.parameters()), list(self.model.parameters()))
        return self.sampler

    def recorded(self, decoding):
        """The recording for a Decoding of this shape, with its prompts and uniforms; of many shapes none."""
        shape = decoding.prompt.shape, decoding.uniforms.shape, decoding.pad is None, decoding.how
        if shape not in self.decodings:
            if len(self.decodings) == 8:  # each keeps a KV cache
                return decoding
            self.decodings[shape] = Recording(decoding, self.pool)
        self.decodings[shape].refill(decoding)
        return self.decodings[shape]

    def call(self, function, model, autocast, tokens, pad, group_size):
        """As one_pass. Rows are filled up to 16, 32, … tokens, and groups to a power of two."""
        (N, length), most = tokens.shape, model.config.block_size
        more = min(-length % 16, most - length)
        rows = group_size << (N // group_size - 1).bit_length()
        inputs = [F.pad(tokens, (0, more, 0, rows - N))]
        inputs += [] if pad is None else [F.pad(pad, (0, rows - N))]
        key = id(model), group_size, inputs[0].shape, pad is None, torch.is_grad_enabled()
        if key not in self.passes:
            without = functools.partial(record_call, pool=self.pool)
            make = self.with_backward if torch.is_grad_enabled() else without
            self.passes[key] = make(Pass(function, model, autocast), inputs)
        return [x[:N, :x.shape[1] - more] for x in self.passes[key](*inputs)]

    def with_backward(self, module, inputs):
        """-> a function that repeats module(*inputs) and its backward pass."""
        if not inputs[0].is_cuda:
            return module
        warn = "set_warn_on_accumulate_grad_stream_mismatch"  # the recording's stream is another, rightly
        getattr(torch.autograd.graph, warn, lambda warn: None)(False)
        torch.cuda.empty_cache()  # what torch keeps for later tensors is free; what recordings keep is not
        free, total = torch.cuda.mem_get_info()
        if free < total / 2 and not self.full:  # a recording keeps its activations
            self.full = True
            print("half of the GPU is full: other shapes of an update are not recorded", file=sys.stderr)
        if self.full:
            return module
        # memory of its own, not `pool`: two models' forward passes may come before both backward passes
        graphed = made_or_eager(lambda: torch.cuda.make_graphed_callables(
            module, tuple(inputs), allow_unused_input=True), module)
        for weight in set(module.parameters()) - self.cloned:
            self.cloned.add(weight)
            if weight.requires_grad:  # the next backward pass overwrites what this one gave
                weight.register_hook(torch.clone)
        return graphed
