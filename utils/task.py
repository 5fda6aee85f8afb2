"""What an RL run on text is about: its prompts, and the reward that its answers earn."""
from dataclasses import dataclass

import torch

from utils import checkpoint
from utils.cli import die
from utils.rewards import load_reward
from utils.run import step_generator
from utils.text import completions, heading_prompts, left_pad, load_corpus, read_jsonl, split


@dataclass
class Prompts:
    tokens: torch.Tensor                # (M, P), padded on the left
    pad: torch.Tensor | None            # (M,) padding tokens a row, None if there are none
    texts: list[str]
    columns: dict[str, list]            # further keys of a user's JSONL: they reach the reward function

    def pick(self, index, repeat=1):
        """The rows `index`, each `repeat` times, its copies side by side."""
        index = index.repeat_interleave(repeat)
        rows = index.tolist()
        return Prompts(self.tokens[index], None if self.pad is None else self.pad[index],
                       [self.texts[i] for i in rows],
                       {k: [v[i] for i in rows] for k, v in self.columns.items()})


def load_prompts(source, data, tokenizer, prompt_len):
    """-> (train, held out) Prompts: the corpus's headings, or a user's JSONL (a tenth of it is held out)."""
    if not source:
        text, name = load_corpus(data)
        parts = [heading_prompts(part, tokenizer, prompt_len, name) for part in split(text)]
        return [Prompts(p, None, [tokenizer.decode(row) for row in p.tolist()], {}) for p in parts]
    rows = read_jsonl(source, ("prompt",), "--prompts")
    tokens, pad = left_pad([tokenizer.encode(row["prompt"]) or [0] for row in rows])
    keys = [k for k in rows[0] if k != "prompt"]
    for key in {"prompts", "completions"} & set(keys):
        die(f"--prompts {source}: the key {key!r} is an argument of every reward function: rename it")
    for number, row in enumerate(rows, 1):
        if set(row) - {"prompt"} != set(keys):
            die(f"--prompts {source}, row {number}: keys {sorted(row)} differ from the first row's")
    every = Prompts(tokens, pad, [row["prompt"] for row in rows], {k: [row[k] for row in rows] for k in keys})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    held_out = max(1, len(rows) // 10)
    return every.pick(order[held_out:] if len(rows) > 1 else order), every.pick(order[:held_out])


def load_scorer(reward, reward_model, policy_path, tokenizer, device):
    """-> function (tokens (N, P+T), mask (N, T), prompts of N rows, texts) -> reward (N,) on the CPU."""
    if reward != "model":
        function = load_reward(reward)

        def by_function(tokens, mask, prompts, texts):
            return torch.tensor(function(completions=texts, prompts=prompts.texts, **prompts.columns))
        return by_function
    from reward_model import load_reward_model  # here, since that script imports this module
    model, content = load_reward_model(reward_model, device)
    checkpoint.same_tokenizer(reward_model, content, tokenizer, policy_path)

    @torch.no_grad()
    def by_model(tokens, mask, prompts, texts):
        if tokens.shape[1] > model.config.block_size:
            die(f"answers of {tokens.shape[1]} tokens, prompt included, don't fit the reward model's context "
                f"of {model.config.block_size}")
        return model(tokens, mask, prompts.pad if prompts.pad is None else prompts.pad.to(device)).cpu()
    return by_model


@torch.no_grad()
def sample_texts(model, tokenizer, prompts, max_new, temperature=1.0, seed=0, top_k=0):
    """One answer to each prompt, in float32 -> (tokens, logp, mask, texts)."""
    device = model.wte.weight.device
    pad = None if prompts.pad is None else prompts.pad.to(device)
    generator = step_generator(seed, -1 % 1_000_003)  # just before the next seed's: no step of a run
    tokens, logp, mask = model.generate(prompts.tokens.to(device), max_new, temperature=temperature,
                                        top_k=top_k, stop=tokenizer.stops, generator=generator, pad=pad)
    return tokens, logp, mask, completions(tokens[:, prompts.tokens.shape[1]:], mask, tokenizer)
