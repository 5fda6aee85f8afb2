"""What all lessons share: the way to the repository's modules, and a tiny task.

note() and show() are in display.py.
Run: by a lesson, as in python lessons/01_loss_is_zero.py
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a lesson runs from any folder

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)
import torch  # noqa: E402
from generate import generate, score  # noqa: E402
from model import GPTConfig  # noqa: E402
from display import note, show  # noqa: E402, F401

torch.set_num_threads(1)  # The tensors are tiny: a second thread costs more than it saves.
B, G, P, T, VOCAB = 8, 8, 4, 6, 12  # prompts, answers to each, tokens of a prompt and of an answer


# ---- a task that a tiny policy learns in seconds ----
def tiny_policy(seed, vocab_size=VOCAB, block_size=16, dropout=0.0):
    """An untrained GPT of one block, in eval mode; the global generator starts from the seed."""
    torch.manual_seed(seed)
    return GPTConfig(vocab_size, block_size, n_layer=1, n_head=2, n_embd=32, dropout=dropout).build().eval()


def rollout(policy, generator, temperature=1.0):
    """Answers to random prompts -> tokens (B·G, P + T), reward (B, G), logp_old and mask (B, G, T)."""
    prompts = torch.randint(VOCAB, (B, P), generator=generator)
    tokens, logp_old, mask = generate(policy, prompts, T, G, temperature, generator=generator)
    reward = (tokens[:, P:] < 6).float().mean(1)  # an untrained policy earns about 0.5
    return tokens, reward.view(B, G), logp_old.view(B, G, T), mask.view(B, G, T)


def log_prob(policy, tokens, temperature=1.0):
    """Of the answers: tokens (B·G, P + T) -> (B, G, T)."""
    return score(policy, tokens, P, temperature)[0].view(B, G, T)


def adam(policy, lr):
    return torch.optim.AdamW(policy.parameters(), lr, weight_decay=0.0)


def start(seed, lr, **config):
    """What a run begins with -> tiny policy, its optimizer, the generator of its draws."""
    policy = tiny_policy(seed, **config)
    return policy, adam(policy, lr), torch.Generator().manual_seed(seed)


def update(optimizer, loss):
    """One step of the optimizer -> the gradient's norm before it was clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    return grad_norm
