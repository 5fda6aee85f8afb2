"""What an answer earns: the score of a reward model, or what a function says.

The reward model is a policy's trunk with one scalar a token (InstructGPT, arXiv:2203.02155). reward_model.py trains it.
Left out: ensembles of reward models.
Run: python reward_model.py
"""
import torch
import torch.nn as nn

from policy import make_config
from utils import checkpoint
from utils.cli import die
from utils.rewards import load_reward


class RewardModel(nn.Module):
    """A trunk and one scalar a token, pooled over the answer's real tokens: the sum, or the last one's.

    The scalar is head(hidden) + word[token]. π₀'s hidden states say what comes next, and hardly how a reader
    judges it. So each token also has a number of its own.
    """

    def __init__(self, config, pool="sum"):
        super().__init__()
        self.config, self.pool = config, pool
        self.trunk = config.build()  # of the policy's own architecture
        self.head = nn.Linear(config.n_embd, 1)
        self.word = nn.Embedding(config.vocab_size, 1)
        for p in (self.head.weight, self.head.bias, self.word.weight):
            nn.init.zeros_(p)
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))

    def forward(self, tokens, mask, pad=None):
        """tokens (N, P + T), mask (N, T) of the answer's real tokens -> normalised score (N,), float32."""
        T = mask.shape[1]
        hidden = self.trunk.hidden(tokens, pad)[:, -T:]
        score = (self.head(hidden).float() + self.word(tokens[:, -T:])).squeeze(-1)  # (N, T)
        score = torch.where(mask, score, 0.0)
        if self.pool == "last":
            score = score.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))
        return (score.sum(1) - self.mean) / self.std


def load_reward_model(path, device="cpu", made_by="python reward_model.py"):
    """-> (RewardModel in eval mode, the checkpoint's content)."""
    content = checkpoint.load(path, "reward", made_by)
    model = checkpoint.build(
        path, content, lambda: RewardModel(make_config(content["config"]), content["pool"]), made_by)
    return model.to(device).eval(), content


def load_scorer(reward, reward_model, policy_path, tokenizer, device):
    """-> function (tokens (N, P+T), mask (N, T), prompts of N rows, texts) -> reward (N,) on the CPU."""
    if reward != "model":
        function = load_reward(reward)

        def by_function(tokens, mask, prompts, texts):
            return torch.tensor(function(completions=texts, prompts=prompts.texts, **prompts.columns))
        return by_function
    model, content = load_reward_model(reward_model, device)
    checkpoint.same_tokenizer(reward_model, content, tokenizer, policy_path)

    @torch.no_grad()
    def by_model(tokens, mask, prompts, texts):
        if tokens.shape[1] > model.config.block_size:
            die(f"answers of {tokens.shape[1]} tokens, prompt included, don't fit the reward model's context "
                f"of {model.config.block_size}")
        return model(tokens, mask, prompts.pad if prompts.pad is None else prompts.pad.to(device)).cpu()
    return by_model
