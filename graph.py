"""The decode step as a captured CUDA graph: one launch a token instead of hundreds.

A graph replays the same kernels on the same memory. So all buffers are fixed: keys and values, the tokens
drawn, their log-probabilities, and the position, which a replay moves on by itself. Attention reads the
buffer up to a multiple of 64 tokens. Each such length is a graph of its own. On a CPU the same step runs
without a graph, for the tests.
Left out: several steps a replay, prompts of another length (they get graphs of their own).
Run: python train_grpo.py --device cuda
"""
import copy

import torch
import torch.nn.functional as F

from generate import draw, ended

LENGTH = 64  # tokens between one graph and the next


class FixedCache:
    """Keys and values of N answers, prompt included: a pair of fixed buffers (N, kv heads, S, d) a layer.

    start (1,): the position of the token that is read. limit: how many tokens of the buffers attention reads.
    """

    def __init__(self, prompt, group_size, max_new):
        self.group_size, self.P = group_size, prompt.length
        S = -(-(prompt.length + max_new) // LENGTH) * LENGTH
        self.pairs = {layer: [self.buffer(x, S) for x in pair] for layer, pair in prompt.pairs.items()}
        self.pad = None if prompt.pad is None else prompt.pad.repeat_interleave(group_size)[:, None]  # (N, 1)
        (self.some, _), *_ = self.pairs.values()
        self.start = torch.tensor([prompt.length], device=self.some.device)
        self.limit = S

    def buffer(self, x, S):
        return F.pad(x.repeat_interleave(self.group_size, 0), (0, 0, 0, S - x.shape[2]))

    def refill(self, prompt):
        """Takes new prompts of the same shape."""
        for layer, pair in prompt.pairs.items():
            for kept, new in zip(self.pairs[layer], pair):
                kept[:, :, :self.P].unflatten(0, (-1, self.group_size)).copy_(new[:, None])
        if self.pad is not None:
            self.pad.copy_(prompt.pad.repeat_interleave(self.group_size)[:, None])
        self.start.fill_(self.P)

    def places(self, T, device):
        key = torch.arange(self.limit, device=device)
        seen, position = key <= self.start, self.start
        if self.pad is not None:
            seen, position = seen & (key >= self.pad), self.start - self.pad  # (N, limit), (N, 1)
        hide = torch.zeros_like(seen, dtype=self.some.dtype).masked_fill(~seen, -torch.inf)
        return position, hide.view(-1, 1, 1, self.limit)

    def attend(self, layer, q, k, v, mask):
        keys, values = self.pairs[layer]
        keys.index_copy_(2, self.start, k)
        values.index_copy_(2, self.start, v)
        (N, heads, _, d), kv_heads = q.shape, k.shape[1]
        q = q.reshape(N, kv_heads, -1, d)  # the queries that a kv head serves stand where tokens would
        mask = mask.expand(N, kv_heads, q.shape[2], -1)
        y = F.scaled_dot_product_attention(q, keys[:, :, :self.limit], values[:, :, :self.limit], mask)
        return y.reshape(N, heads, 1, d)


class Steps:
    """The decode steps of one shape: N answers of up to T tokens behind prompts of P."""

    def __init__(self, model, prompt, group_size, max_new, how, pool):
        self.model, self.how, self.pool, self.graphs = model, how, pool, {}
        self.cache = FixedCache(prompt, group_size, max_new)
        device, N = self.cache.start.device, len(self.cache.some)
        self.token = torch.zeros(N, 1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(N, max_new, dtype=torch.long, device=device)
        self.logp, self.uniforms = (torch.zeros(N, max_new, device=device) for _ in range(2))

    def step(self):
        """Reads `token` at the position `start`, draws the next one, and moves on."""
        hidden = self.model.hidden(self.token, cache=self.cache)[:, -1]
        t = self.cache.start - self.cache.P + 1  # (1,): which of the answer's tokens is drawn
        action, logp = draw(self.model, hidden, self.uniforms.index_select(1, t)[:, 0], *self.how)
        self.tokens.index_copy_(1, t, action[:, None])
        self.logp.index_copy_(1, t, logp[:, None])
        self.token.copy_(action[:, None])
        self.cache.start.add_(1)

    def capture(self):
        """This length's step as a graph. What the warm-up writes is written again by the replays."""
        start, token = self.cache.start.clone(), self.token.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.cache.start.copy_(start)
                self.step()
        torch.cuda.current_stream().wait_stream(stream)
        self.cache.start.copy_(start)
        self.token.copy_(token)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step()
        return graph.replay

    def run(self, prompt, answer, logp, uniforms, stop):
        self.cache.refill(prompt)
        self.tokens.copy_(answer)
        self.logp.copy_(logp)
        self.uniforms.copy_(uniforms)
        self.token.copy_(answer[:, :1])
        cuda = self.token.is_cuda
        for t in range(1, self.tokens.shape[1]):
            self.cache.limit = -(-(self.cache.P + t) // LENGTH) * LENGTH
            if cuda and self.cache.limit not in self.graphs:
                self.graphs[self.cache.limit] = self.capture()
            self.graphs.get(self.cache.limit, self.step)()
            if stop and t % 8 == 7 and ended(self.tokens[:, :t + 1], stop).any(1).all():  # waits for the GPU
                break
        answer.copy_(self.tokens)
        logp.copy_(self.logp)


class DecodeGraph:
    """Decodes for one model: in float32 (fp32), or from a copy of its weights in half precision (bf16)."""

    def __init__(self, model, dtype="fp32"):
        self.model, self.sampler, self.steps = model, model, {}
        if dtype == "bf16":
            self.sampler = copy.deepcopy(model).bfloat16().requires_grad_(False)
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    @torch.no_grad()
    def refreshed(self):
        """The model to sample from, with the weights of now."""
        if self.sampler is not self.model:
            torch._foreach_copy_(list(self.sampler.parameters()), list(self.model.parameters()))
        return self.sampler

    def decode(self, prompt, group_size, answer, logp, uniforms, how, stop):
        """Fills answer and logp (N, T), whose first token is drawn. prompt: their PromptCache."""
        shape = tuple(uniforms.shape), prompt.length, group_size, how
        if shape not in self.steps:
            self.steps[shape] = Steps(self.sampler, prompt, group_size, uniforms.shape[1], how, self.pool)
        self.steps[shape].run(prompt, answer, logp, uniforms, stop)
