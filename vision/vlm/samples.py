"""Answers to a few held-out examples at every evaluation, token by token: samples.py for the loop on images.

Left out: the images, and TRL's engine, which holds the reference itself.
"""
import torch

from answers import Answers
from grpo import group_advantage
from samples import append
from utils.cli import beside
from utils.run import step_generator
from utils.text import Prompts
from vision.vlm.data import Scorer
from vision.vlm.models import generate, inputs_of, score


class Samples:
    """draw() before a step seeds its random numbers, write() after its update."""

    def __init__(self, args, progress, ref, objective):
        self.args, self.progress, self.ref, self.objective, self.step = args, progress, ref, objective, None

    @torch.no_grad()
    def draw(self, step, policy):
        args, p, G = self.args, self.progress, self.args.group_size
        K = min(args.samples, len(p.held_out))
        if not K or step % args.eval_every and step < args.steps:
            return
        rows = torch.arange(K).repeat_interleave(G).tolist()
        self.inputs = inputs_of(p.processor, [p.held_out[i] for i in rows], p.device)
        torch.manual_seed(step_generator(args.seed, 0, "evaluation").initial_seed())
        tokens, mask, texts = generate(policy, self.inputs, p.processor, args.max_new, args.temperature)
        scorer = Scorer(p.held_out, p.scorer.weights, p.scorer.custom)
        reward = torch.tensor(scorer(texts, rows)).view(K, G)
        prompts = Prompts(None, None, [p.held_out[i]["prompt"] for i in rows], {})
        self.answers = Answers(tokens.view(K, G, -1), None, mask.view(K, G, -1), None, prompts, texts,
                               slice(0, K), K)
        adv = group_advantage(reward, self.objective.baseline, self.objective.scale)
        logp_old, logp_ref = (self.scored(model)[0] for model in (policy, self.ref))
        self.values = {"reward": reward, "advantage": adv, "logp_old": logp_old, "logp_ref": logp_ref}
        self.step = step

    def scored(self, model):
        tokens, mask = (x.flatten(0, 1) for x in (self.answers.tokens, self.answers.mask))
        both = score(model, self.inputs, tokens, mask, self.args.temperature)
        return [x.view(self.answers.mask.shape) for x in both]

    @torch.no_grad()
    def write(self, step, policy):
        """The line of what was drawn, if anything was. Behind the last step, one of the trained policy."""
        if self.step is not None:
            logp, entropy = self.scored(policy)
            append(beside(self.args.log, ".samples.jsonl"), self.step, step < self.args.steps, self.answers,
                   self.progress.processor.tokenizer.decode, self.values | {"logp": logp, "entropy": entropy})
            self.step = None
        if step == self.args.steps - 1:
            self.draw(self.args.steps, policy)
            self.write(self.args.steps, policy)
