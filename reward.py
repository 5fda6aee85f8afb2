"""What a run asks, and what an answer earns: a reward model's score, what a function says, a task's check.

The reward model is a policy's trunk with one scalar a token (InstructGPT, arXiv:2203.02155). reward_model.py
trains it.
Left out: ensembles of reward models.
Run: python reward_model.py
"""
import torch
import torch.nn as nn

from policy import make_config
from tasks import load_task
from utils import checkpoint
from utils.cli import die
from utils.rewards import JUDGES, load_reward
from utils.text import load_prompts


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


def load_scorer(reward, reward_model, policy_path, tokenizer, device, task=None):
    """-> function (tokens (N, P+T), mask (N, T), prompts of N rows, texts) -> reward (N,) on the CPU.

    A task brings a reward of its own in place of the reward model.
    """
    if reward != "model" or task:
        function = task.scores if reward == "model" else load_reward(reward)

        def by_function(tokens, mask, prompts, texts):
            ids = [row[m].tolist() for row, m in zip(tokens[:, -mask.shape[1]:].cpu(), mask.cpu())]
            columns = prompts.columns | ({"corpus_words": prompts.corpus_words} if reward in JUDGES else {})
            return torch.tensor(function(completions=texts, prompts=prompts.texts, completion_ids=ids,
                                         **columns))
        return by_function
    model, content = load_reward_model(reward_model, device)
    if content["tokenizer"] != tokenizer.state():  # π₀'s holds for all: other ids would be other words
        die(f"{reward_model} was made with another tokenizer than {policy_path} ({tokenizer.name}): make it "
            "again")

    @torch.no_grad()
    def by_model(tokens, mask, prompts, texts):
        if tokens.shape[1] > model.config.block_size:
            die(f"answers of {tokens.shape[1]} tokens, prompt included, don't fit the reward model's context "
                f"of {model.config.block_size}")
        return model(tokens, mask, prompts.pad if prompts.pad is None else prompts.pad.to(device)).cpu()
    return by_model


# ---- a run's questions, and how good held-out answers are ----
def load_questions(args, tokenizer, block_size):
    """-> (training Prompts, --eval_prompts held-out Prompts, the task or None) of a run's flags."""
    if args.task and args.prompts:
        die(f"--task {args.task} and --prompts {args.prompts} both say what is asked: give one of them")
    task = load_task(args.task) if args.task else None
    train, held_out = (task.prompts(tokenizer, args.seed) if task else
                       load_prompts(args.prompts, args.data, tokenizer, args.prompt_len))
    P = train.tokens.shape[1]
    if P + args.max_new > block_size:
        die(f"prompts of {P} tokens + --max_new {args.max_new} don't fit the policy's context of "
            f"{block_size} tokens: shorten one, or train π₀ with a larger --block_size")
    return train, held_out.pick(torch.arange(len(held_out.texts))[:args.eval_prompts]), task


def gold_score(args, texts, prompts, corpus_words):
    """The gold judge's mean score; None for a task, which has right answers instead."""
    if args.task:
        return None
    return sum(JUDGES[args.gold](texts, prompts, corpus_words=corpus_words)) / len(texts)


def quality(args, task, policy, tokenizer, prompts, texts):
    """A task's accuracy (greedy) and pass@8 (is one of 8 samples right?). Else the gold score of `texts`."""
    if not task:
        return {"eval_gold": gold_score(args, texts, prompts.texts, prompts.corpus_words)}
    samples = {"eval_acc": 1, "eval_pass8": 8} if args.eval_pass8 else {"eval_acc": 1}
    right = {name: task.ask(policy, tokenizer, prompts, args.max_new, n, args.temperature, args.seed)[1] >= 1
             for name, n in samples.items()}
    return {name: each.any(1).float().mean() for name, each in right.items()}
