"""Attention, and the KV cache of a group: a prompt's keys and values are read once for its G answers.

A model's attention calls `attention` on (N, heads, T, d), or the `attend` of the cache that it was given.
Left out: paged caches and batches that change while they run; they belong in a server.
Run: python sample.py
"""
import torch
import torch.nn.functional as F


def attention(q, k, v, mask=None, dropout=0.0):
    """softmax(q·kᵀ/√d)·v of q (N, heads, T, d), k and v (N, kv heads, S, d) -> (N, heads, T, d).

    mask (N or 1, 1, T, S) is True where a key is seen. None: causal. Each kv head serves heads / kv heads
    query heads that stand side by side (grouped-query attention, arXiv:2305.13245).
    """
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return plain_attention(q, k, v, mask, dropout)
    repeats = q.shape[1] // k.shape[1]
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, None, dropout, is_causal=True, enable_gqa=repeats > 1)
    queries = q.reshape(*k.shape[:2], -1, q.shape[3])  # no fused kernel has both, masks and fewer kv heads
    y = F.scaled_dot_product_attention(queries, k, v, mask.repeat(1, 1, repeats, 1), dropout)
    return y.reshape(q.shape)


@torch.autocast("cpu", enabled=False)  # it would copy what softmax reads into float32 and back
def plain_attention(q, k, v, mask, dropout):
    """The same, written out: PyTorch's fused one has a slow backward pass on a CPU in bfloat16."""
    if mask is None:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    hide = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
    (N, heads, T, d), kv_heads = q.shape, k.shape[1]
    weights = (q * d ** -0.5).reshape(N, kv_heads, -1, d) @ k.transpose(2, 3)
    weights = weights.view(N, heads, T, -1).add_(hide).softmax(-1)  # (N, heads, T, S)
    return (F.dropout(weights, dropout).view(N, kv_heads, -1, k.shape[2]) @ v).view(N, heads, T, d)


def causal_mask(position, n_keys, pad=None):
    """Which keys a token sees: those up to its own position, without padding -> (B or 1, 1, T, S)."""
    left = position.new_zeros(1) if pad is None else pad
    key = torch.arange(n_keys, device=position.device)
    seen = (key >= left[:, None, None]) & (key <= position[:, None])
    return (seen | (key == position[:, None]))[:, None]  # padding sees itself: an empty softmax is NaN


def places(T, pad, device):
    """Positions (T,) or (N, T) and mask of whole rows; pad (N,) counts the padding on their left."""
    position = torch.arange(T, device=device)
    if pad is None:
        return position, None
    return (position - pad[:, None]).clamp(min=0), causal_mask(position, T, pad)


# ---- the KV cache ----
class PromptCache:
    """Keys and values of B prompts, a pair (B, kv heads, P, d) a layer. One pass over them fills it."""
    start = 0

    def __init__(self, pad=None):
        self.pad, self.pairs, self.length = pad, {}, 0

    def places(self, T, device):
        self.length = T
        return places(T, self.pad, device)

    def attend(self, layer, q, k, v, mask):
        self.pairs[layer] = k.contiguous(), v.contiguous()  # every later token reads them
        return attention(q, k, v, mask)


class GroupCache:
    """What G answers to each of B prompts look back on: their prompt, held once, and their own tokens.

    size 0: the answers come whole, in one pass. Otherwise they come token by token, at most `size` of them.
    Then they leave keys and values in `own`, a buffer (2, B, kv heads, G, size, d) a layer.
    start: how many tokens stand before the next pass.
    """

    def __init__(self, prompt, group_size, size=0):
        self.prompt, self.group_size, self.size, self.start = prompt, group_size, size, prompt.length
        self.own = {}
        if size:
            for layer, (k, _) in prompt.pairs.items():
                B, heads, _, d = k.shape
                self.own[layer] = k.new_zeros(2, B, heads, group_size, size, d)

    def places(self, T, device):
        pad, first = self.prompt.pad, self.start - self.prompt.length
        position = self.start + torch.arange(T, device=device)
        self.slots = slice(first, first + T)  # of this pass, in `own`
        alone = pad is None and self.size and T == 1  # one new token sees all that is there
        mask = None if alone else causal_mask(position, self.start + T, pad)
        if pad is not None:
            position = (position - pad[:, None]).clamp(min=0).repeat_interleave(self.group_size, 0)
        return position, mask

    def attend(self, layer, q, k, v, mask):
        if self.size:
            return self.decode(layer, q, k, v, mask)
        prompt_k, prompt_v = (x.repeat_interleave(self.group_size, 0) for x in self.prompt.pairs[layer])
        mask = mask if len(mask) == 1 else mask.repeat_interleave(self.group_size, 0)
        return attention(q, torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2), mask)

    def decode(self, layer, q, k, v, mask):
        """Attention of new tokens (B·G, heads, T, d) to a prompt that their group holds once."""
        (prompt_k, prompt_v), own = self.prompt.pairs[layer], self.own[layer]
        (N, heads, T, d), (B, kv_heads, P, _), G = q.shape, prompt_k.shape, self.group_size
        q = (q * d ** -0.5).reshape(B, G, kv_heads, -1, d).transpose(1, 2)  # (B, kv heads, G, queries, d)
        own[0][..., self.slots, :] = k.view(B, G, kv_heads, T, d).transpose(1, 2)
        own[1][..., self.slots, :] = v.view(B, G, kv_heads, T, d).transpose(1, 2)
        k, v = own[..., :self.slots.stop, :]
        q_all = q.reshape(B, kv_heads, -1, d)
        to_prompt = (q_all @ prompt_k.transpose(2, 3)).view(B, kv_heads, G, -1, P)
        weights = torch.cat([to_prompt, q_all.view(q.shape) @ k.transpose(3, 4)], -1)
        if mask is not None:  # a kv head's queries are those of T tokens for each head that it serves
            by_head = weights.view(B, kv_heads, G, -1, T, weights.shape[-1])
            weights = by_head.masked_fill(~mask[:, :, None, None], -torch.inf).flatten(3, 4)
        weights = weights.softmax(-1)  # (B, kv heads, G, queries, P + S)
        y = weights[..., P:] @ v + (weights[..., :P].flatten(2, 3) @ prompt_v).view(q.shape)
        return y.transpose(1, 2).reshape(N, heads, T, d)
