"""The floor under a GRPO step: its operations and bytes counted by formula, the machine's rates measured.

Used by roofline.py and scaling.py. Everywhere c is a GPTConfig (L layers, C wide, V tokens), B prompts of P
tokens have G answers of T tokens each, N = B·G, and the phases are those of roofline.py.
Left out: operations that are no matmul, biases, norms' weights and positions.
"""
import math
import time

import torch


# ---- what has to be done ----
def shared_by_itself(P, T):
    return 2 * P >= T  # train_grpo.py's rule for --share_prompt auto


def flops(c, B, G, P, T, shared=True, done=False):
    """Floating-point operations of each phase's matmuls -> {phase: number}; c: GPTConfig, B·G answers.

    A pass over n tokens behind `first` others, a row: L·(24·C²·n + 4·C·pairs), where pairs are (token, token
    it looks at): first·n + n·(n + 1)/2. The output head: 2·C·V a position. Decode reads T - 1 tokens, one a
    pass. A backward pass costs twice the forward one. done=True counts the float32 calls on a CPU instead, as
    FlopCounterMode does: whole squares, first·n + n², and the scores a second time in the backward pass.
    """
    C, L, N, head = c.n_embd, c.n_layer, B * G, 2 * c.n_embd * c.vocab_size

    def rows(number, first, n):
        pairs = first * n + (n * n if done else n * (n + 1) // 2)
        return number * L * (24 * C * C * n + 4 * C * pairs)
    found = {"prefill": rows(B, 0, P) + N * head}
    found["decode"] = sum(rows(N, P + t, 1) for t in range(T - 1)) + N * (T - 1) * head
    together = rows(B, 0, P) + rows(N, P, T - 1) if shared else rows(N, 0, P + T - 1)
    squares = B * P ** 2 + N * (T - 1) * (P + T - 1) if shared else N * (P + T - 1) ** 2
    found["reference"] = together + N * T * head
    found["update"] = 3 * found["reference"] + (2 * C * L * squares if done else 0)
    return found


def bytes_moved(c, B, G, P, T, shared=True, size=4):
    """Bytes that each phase must move at least, and bytes that it holds -> {phase: (moved, held)}.

    W = 4·(12·L·C² + V·C) of weights; K = 8·L·C a position of the cache (key and value, float32).
    prefill: W + K·B·P. decode, every pass: W, K·(B·P + N·t) read with t answer tokens, K·N written.
    reference: W, and the stream of n tokens in and out of each layer, 2·L·C·n numbers of `size` bytes
    (2 in bfloat16). update: W 13 times (forward, backward, gradient, clip 3, AdamW 7), and what the backward
    pass needs, written and read: 16·L·C·n numbers of `size` bytes (stream 2, norms 2, q k v 3, attention 1,
    MLP 8) and the log-softmax, 4·N·T·V bytes.
    """
    C, L, N = c.n_embd, c.n_layer, B * G
    W, K = 4 * (12 * L * C * C + c.vocab_size * C), 8 * L * C
    n = B * P + N * (T - 1) if shared else N * (P + T - 1)
    saved = 16 * L * C * n * size + 4 * N * T * c.vocab_size
    decode = sum(W + K * (B * P + N * t) + K * N for t in range(1, T))
    return {"prefill": (W + K * B * P, W + K * B * P), "decode": (decode, W + K * (B * P + N * T)),
            "reference": (W + 2 * L * C * n * size, W + C * n * size),
            "update": (13 * W + 2 * saved, 4 * W + saved)}


def floors(c, B, G, P, T, shared, dtype, machine):
    """-> {phase: (seconds, "matmul" or "memory")}; rollouts in float32, the rest in `dtype`."""
    found, moved = {}, bytes_moved(c, B, G, P, T, shared, 2 if dtype == "bf16" else 4)
    for phase, operations in flops(c, B, G, P, T, shared).items():
        rate = machine["fp32" if phase in ("prefill", "decode") else dtype]
        compute = operations / rate
        memory = moved[phase][0] / bandwidth(machine, moved[phase][1])
        found[phase] = max((compute, "matmul"), (memory, "memory"))
    return found


def bandwidth(machine, held):
    """Of the two copies, whose footprint is twice their size, the one nearer by ratio to the bytes held."""
    return min(machine["copies"], key=lambda copy: abs(math.log(2 * copy["bytes"] / held)))["rate"]


# ---- what the machine can do ----
def timed(function, device):
    clock = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - clock


def fastest(function, device, least=0.2):
    """Seconds of the fastest call: of five or more, until they took `least` seconds, behind a first one."""
    timed(function, device)
    times = [timed(function, device) for _ in range(5)]
    while sum(times) < least:
        times.append(timed(function, device))
    return min(times)


def measure_machine(device, dtypes, products, copy_mb):
    """-> {dtype: rate of the last product, in operations a second, products: all, copies: bytes a second}."""
    found = {"products": [], "copies": []}
    for dtype in dtypes:
        kind = torch.bfloat16 if dtype == "bf16" else torch.float32
        for m, k, n in products:
            a, b = (torch.randn(rows, k, device=device, dtype=kind) for rows in (m, n))
            found[dtype] = 2 * m * k * n / fastest(lambda: torch.nn.functional.linear(a, b), device)
            found["products"].append({"dtype": dtype, "m": m, "k": k, "n": n, "rate": found[dtype]})
    for mb in copy_mb:
        a = torch.randn(mb * 250_000, device=device)
        b = torch.empty_like(a)
        rate = 2 * mb * 1e6 / fastest(lambda: b.copy_(a), device)  # read and written
        found["copies"].append({"bytes": mb * 1e6, "rate": rate})
    return found
