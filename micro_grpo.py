"""GRPO in one file: after a short supervised start, a reward teaches a tiny transformer to sort four digits.

GRPO is Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300, equations 3 and 4).
Left out: answers of different lengths, a KV cache, checkpoints. train_grpo.py has them.
Run: python micro_grpo.py    (python micro_grpo.py 3 runs seed 3)
"""
import copy
import sys

import torch
from torch import nn

V, P, T = 11, 5, 4  # vocabulary: ten digits and "="; a prompt "3141=" has P tokens, its answer "1134" has T
B, G = 32, 8  # prompts of a rollout, answers to each prompt
START_STEPS, STEPS, UPDATES = 42, 250, 2  # supervised steps, then rollouts, and updates with each rollout
LR, EPS, BETA = 1.5e-3, 0.2, 0.04  # learning rate, ε of the clip, weight β of the KL penalty


# ---- the task: prompts, and a reward for any answer ----
def make_examples():
    """All 10,000 prompts with right answers, shuffled: 9,000 to train on, 1,000 fresh ones to test on."""
    digits = torch.cartesian_prod(*[torch.arange(10)] * T)  # (10000, T)
    examples = torch.cat([digits, torch.full((10000, 1), 10), digits.sort(dim=1).values], dim=1)
    return examples[torch.randperm(10000)].split([9000, 1000])  # (9000, P + T), (1000, P + T)


def reward_of(tokens):
    """The share of right places, (..., P + T) -> (...). At the start most whole answers are wrong."""
    return (tokens[..., P:] == tokens[..., :T].sort(dim=-1).values).float().mean(dim=-1)


# ---- the policy π: a causal transformer that predicts the next token ----
class Policy(nn.Module):
    def __init__(self, width=48, heads=2, layers=2):
        super().__init__()
        self.token = nn.Embedding(V, width)
        self.position = nn.Embedding(P + T, width)
        block = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, V)

    def forward(self, tokens):  # (..., length) -> logits (..., length, V) of the token after each
        x = self.token(tokens) + self.position.weight[:tokens.shape[-1]]  # (..., length, width)
        causal = nn.Transformer.generate_square_subsequent_mask(tokens.shape[-1])
        return self.head(self.blocks(x.flatten(0, -3), causal, is_causal=True)).view(*tokens.shape, V)


@torch.no_grad()
def sample(policy, tokens, greedy=False):
    for _ in range(T):
        logits = policy(tokens)[..., -1, :]  # (..., V)
        token = logits.argmax(-1) if greedy else torch.distributions.Categorical(logits=logits).sample()
        tokens = torch.cat([tokens, token[..., None]], dim=-1)
    return tokens  # (..., P + T)


def log_prob(policy, tokens):
    logp = policy(tokens[..., :-1]).log_softmax(dim=-1)[..., P - 1:, :]  # (..., T, V): t predicts t + 1
    return logp.gather(-1, tokens[..., P:, None])[..., 0]  # (..., T), of the answer's own tokens


def evaluate(policy, examples):
    """Greedy answers: the share that is right in all places, and the first five as text."""
    tokens = sample(policy, examples[:, :P], greedy=True)
    right = (tokens == examples).all(dim=1)
    texts = ["".join("0123456789="[token] for token in row) for row in tokens[:5].tolist()]
    return right.float().mean(), [f"{text} {'right' if ok else 'wrong'}" for text, ok in zip(texts, right)]


def pretrain(policy, examples):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    for _ in range(START_STEPS):
        loss = -log_prob(policy, examples[torch.randint(len(examples), (64,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


# ---- GRPO: the loss, then the loop ----
def grpo_loss(logp, logp_old, logp_ref, adv):
    """-mean(min(r·A, clip(r, 1-ε, 1+ε)·A) - β·KL), (B, G, T) and adv (B, G) -> loss, KL, clipped share."""
    adv = adv[:, :, None]  # (B, G, 1)
    ratio = torch.exp(logp - logp_old)
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - EPS, 1 + EPS) * adv)
    kl = torch.exp(logp_ref - logp) - (logp_ref - logp) - 1
    clipped = surrogate < ratio * adv
    return -(surrogate - BETA * kl).mean(), kl.mean(), clipped.float().mean()


def grpo(policy, examples, fresh, steps=STEPS):
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), LR, betas=(0.9, 0.95))
    for step in range(1, steps + 1):
        # 1. Prompts, and G samples for each.
        prompts = examples[torch.randint(len(examples), (B, 1)), :P].expand(B, G, P)
        tokens = sample(policy, prompts)  # (B, G, P + T)
        # 2. Reward: one number for each answer.
        reward = reward_of(tokens)  # (B, G)
        # 3. Group advantage: how much better is an answer than the mean of its group?
        adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        # 4. Log-probabilities before any update: under the policy that sampled, and under the reference.
        logp_old = log_prob(policy, tokens).detach()  # (B, G, T)
        logp_ref = log_prob(reference, tokens)
        # 5. Ratio, clip, KL, update. The ratio is 1 at the first update; the clip can act from the second on.
        optimizer.param_groups[0]["lr"] = LR * (1 - 0.85 * step / steps)  # falls to 15 %
        for _ in range(UPDATES):
            loss, kl, clipped = grpo_loss(log_prob(policy, tokens), logp_old, logp_ref, adv)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % 25 == 0:
            print(f"step {step:3}  reward {reward.mean():.3f}  exact answers "
                  f"{evaluate(policy, fresh)[0]:6.1%}  KL {kl:.3f}  clipped {clipped:.2%}", flush=True)


if __name__ == "__main__":
    seed = " ".join(sys.argv[1:]) or "0"
    if not (seed.isdecimal() and len(seed) < 10):
        print(f"error: seed {seed!r}: wanted one whole number of at most 9 digits", file=sys.stderr)
        sys.exit(2)
    torch.manual_seed(int(seed))
    torch.set_num_threads(1)  # The tensors are tiny: a second thread costs more than it saves.
    policy = Policy()
    examples, fresh = make_examples()
    pretrain(policy, examples)
    exact, before = evaluate(policy, fresh)
    print(f"supervised start: {exact:.1%} of 1,000 fresh prompts answered exactly (greedy)")
    grpo(policy, examples, fresh)
    for pair in zip(before, evaluate(policy, fresh)[1]):
        print("before: %s   after: %s" % pair)
