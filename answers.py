"""The answers of a training step, and the minibatches that its updates take.

A step has B prompts and G answers to each. A process holds b of the prompts; one process holds all.
Left out: answers of several turns.
Run: python train_grpo.py
"""
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from utils import ranks
from utils.text import Prompts, completions


@dataclass
class Answers:
    """G answers to each of b prompts, of up to T tokens. A stop, such as a blank line, ends an answer."""
    tokens: torch.Tensor        # (b, G, P + T)
    logp: torch.Tensor          # (b, G, T) under the policy that sampled
    mask: torch.Tensor          # (b, G, T): True to the stop's last token, which is scored like any other
    pad: torch.Tensor | None    # (b, G): how many tokens on the left of each prompt are padding
    prompts: Prompts            # b·G rows, an answer's prompt each
    texts: list[str]            # b·G
    share: slice                # the rows of B that this process holds
    total: int                  # B
    useful: torch.Tensor | None = None  # (B,): the groups that need an update pass; None: all

    @classmethod
    def of_ids(cls, ids, prompts, env):
        """Lists of token ids, G for each of b prompts, as TRL sampled them; no logp."""
        mask = torch.arange(env.T) < torch.tensor([[len(answer)] for answer in ids])  # (b·G, T)
        tokens = torch.zeros(mask.shape, dtype=torch.long)
        tokens[mask] = torch.tensor([token for answer in ids for token in answer])
        texts = completions(tokens, mask, env.tokenizer)
        tokens = torch.cat([prompts.tokens, tokens], 1)  # (b·G, P + T)
        tokens, mask = (x.unflatten(0, (-1, env.args.group_size)).to(env.device) for x in (tokens, mask))
        pad = None if prompts.pad is None else prompts.pad.view(mask.shape[:2])
        return cls(tokens, None, mask, pad, prompts, texts, env.share, env.args.prompts_per_step)

    def parts(self, args):
        """All rows, in parts of --micro_batch."""
        return torch.arange(len(self.tokens)).split(args.micro_batch or len(self.tokens))

    def padding(self, rows):
        return None if self.pad is None else self.pad[rows].flatten()

    def ungrouped(self):
        """The same with every answer a group of its own: B·G groups of one answer."""
        G = self.mask.shape[1]
        single = {name: x.flatten(0, 1)[:, None] for name, x in vars(self).items() if torch.is_tensor(x)}
        share = slice(self.share.start * G, self.share.stop * G)
        return replace(self, **single, share=share, total=self.total * G)

    def with_rows(self, rows, fresh):
        """These with the groups `rows` replaced by those of `fresh`, in its order."""
        b, G = self.mask.shape[:2]
        order = torch.arange(b).index_put((rows,), b + torch.arange(len(rows)))
        each = (order[:, None] * G + torch.arange(G)).flatten()  # the same for single answers

        def joined(old, new):
            width = max(old.shape[-1], new.shape[-1])  # that of the longest answer
            old, new = (F.pad(x, (0, width - x.shape[-1])) for x in (old, new))
            return old.index_put((rows.to(old.device),), new)

        new = vars(fresh)
        tensors = {name: joined(x, new[name]) for name, x in vars(self).items() if torch.is_tensor(x)}
        texts = self.texts + fresh.texts
        prompts = self.prompts.joined(fresh.prompts).pick(each)
        return replace(self, **tensors, prompts=prompts, texts=[texts[i] for i in each.tolist()])


@dataclass
class Minibatch:
    """What one optimizer step takes; n_tokens and n_answers of all processes are the loss's denominators."""
    parts: list[torch.Tensor]  # rows of this process's answers, a backward pass each
    n_tokens: int
    n_answers: int
    n_scored: int              # tokens in the parts of all processes: `useful` may leave some out


def minibatches(answers, mask, args, generator):
    """The step's groups in a random order, in args.minibatches parts, as Minibatches.

    mask (b, G, T): the tokens that count. The denominators count groups that aren't useful too, unless
    dynamic sampling tried to replace them.
    """
    useful = torch.ones(answers.total, dtype=torch.bool) if answers.useful is None else answers.useful
    for batch in torch.randperm(answers.total, generator=generator).chunk(args.minibatches):
        passed = batch[useful[batch]]
        counted = passed if getattr(args, "dynamic_sampling", 0) else batch
        n_tokens, n_scored = (ranks.count(mask, groups, answers.share) for groups in (counted, passed))
        parts = ranks.local(passed, answers.share, args.micro_batch)
        yield Minibatch(parts, n_tokens, len(counted) * mask.shape[1], n_scored)
