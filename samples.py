"""NAME.samples.jsonl: the answers to a few held-out prompts at every evaluation, token by token.

The policy answers before a step's update, from random numbers of these answers alone. After the update it
scores them again, so the ratio has left 1; --micro_batch bounds the memory. A last line has the answers after
the last step. report.py draws all that.
Left out: what --tis_cap, --top_entropy and --overlong mask do to a token of training.
Run: python train_grpo.py --samples 4
"""
import json
import math

import torch

import techniques
from answers import Answers
from grpo import group_advantage
from ppo import gae, token_reward, whiten
from utils.cli import beside, writing
from utils.device import rank
from utils.run import step_generator


class Samples:
    """draw() before a step's update, write() after it. Rank 0 does both, from its own weights."""

    def __init__(self, args):
        self.args, self.step, self.held = args, None, None
        self.path = beside(args.log, ".samples.jsonl")

    @torch.no_grad()
    def draw(self, step, env, trained, ref, due=True):
        """G answers to each of K prompts, always from the same random numbers; what each is worth now."""
        args, G, K = self.args, self.args.group_size, min(self.args.samples, len(env.held_out.texts))
        self.held = env, trained, ref
        if rank() or not K or not due:
            return
        prompts, repeated = (env.held_out.pick(torch.arange(K), n) for n in (1, G))
        uniforms = torch.rand(K * G, env.T, generator=step_generator(args.seed, 10**6 + 1))
        tokens, logp, mask, texts = env.sample(trained["model"], prompts, G, uniforms)
        reward = env.reward_of(tokens, mask, repeated, texts).view(K, G)
        longest = int(mask.any(0).sum())
        tokens, logp, mask = (x[:, :x.shape[1] - env.T + longest].unflatten(0, (K, G))
                              for x in (tokens, logp, mask))
        pad = None if repeated.pad is None else repeated.pad.view(K, G).to(env.device)
        answers = Answers(tokens, logp, mask, pad, repeated, texts, slice(0, K), K)
        logp_old, logp_ref = (env.score(model, answers)[0] for model in (trained["model"], ref))
        adv = advantage(args, answers, env, trained, reward, logp_old, logp_ref)
        self.step, self.answers = step, answers
        self.values = {"reward": reward, "advantage": adv, "logp_old": logp_old, "logp_ref": logp_ref}

    @torch.no_grad()
    def write(self, updated=True):
        """Adds the line of what was drawn, if anything was, with the log-probabilities of now."""
        if self.step is None:
            return
        env, trained, _ = self.held
        logp, entropy = env.score(trained["model"], self.answers)
        values = self.values | {"logp": logp, "entropy": entropy}
        append(self.path, self.step, updated, self.answers, env.tokenizer.decode, values)
        self.step = None

    def last(self, step):
        """A line of the policy after the last step: there is no update behind it, so its ratios are 1."""
        if self.held:
            self.draw(step, *self.held)
            self.write(updated=False)


def advantage(args, answers, env, trained, reward, logp_old, logp_ref):
    """As in training, of these answers alone: (K, G); PPO's is one a token, GAE whitened: (K, G, T)."""
    earned = techniques.less_penalty(reward, answers.mask.sum(2).cpu(), args)
    if "critic" in trained:
        paid = token_reward(earned.to(env.device), logp_old, logp_ref, answers.mask, args.beta)
        value = env.value(trained["critic"], answers)
        return whiten(gae(paid, value, answers.mask, args.gamma, args.lam)[0], answers.mask)
    objective, weight = techniques.pick_objective(args)
    kl = torch.where(answers.mask, logp_old - logp_ref, 0.0).sum(2).cpu()
    return group_advantage(earned - weight * kl, objective.baseline, objective.scale)


# ---- the file: a JSON object a line ----
def append(path, step, updated, answers, decode, values):
    """Adds a line. values: {name: (K, G), one an answer, or (K, G, T), one a token}; decode: ids -> text."""
    K, G, T = answers.mask.shape
    prompts = [{"prompt": answers.prompts.texts[k * G], "answers": []} for k in range(K)]
    for k, g in ((k, g) for k in range(K) for g in range(G)):
        mask = answers.mask[k, g]
        ids = answers.tokens[k, g, -T:][mask].tolist()
        own = {name: plain(x[k, g] if x.dim() == 2 else x[k, g][mask]) for name, x in values.items()}
        prompts[k]["answers"].append({"text": answers.texts[k * G + g], "tokens": ids,
                                      "decoded": [decode([token]) for token in ids]} | own)
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "updated": updated, "prompts": prompts}) + "\n")


def plain(x):
    """A tensor as JSON has it, in seven digits; null for what is not finite."""
    values = [float(f"{v:.7g}") if math.isfinite(v) else None for v in x.flatten().tolist()]
    return values if x.dim() else values[0]
