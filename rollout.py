"""What GRPO and PPO share on text: prompts, answers sampled from a policy, their reward, what is measured.

The answers' tensors, (B, G, T), are in answers.py. Left out: several turns.
Run: python train_grpo.py
"""
import torch

from answers import Answers
from generate import generate, score
from graph import Graphs, one_pass
from grpo import kl_penalty, masked_mean
from policy import sampling
from reward import gold_score, load_questions, load_scorer, quality
from samples import Samples
from techniques import cut_off
from utils import ranks
from utils.log import SHARED
from utils.rewards import distinct
from utils.run import step_generator
from utils.text import completions

COLUMNS = [*SHARED, "samples", "tokens", "seconds", "gold", "length", "frac_cut", "distinct", "ref_logp",
           "clip_frac", "ratio_max", "grad_norm", "frac_zero_std", "eval_r", "eval_gold", "eval_acc",
           "eval_pass8", "tokens_per_s", "peak_mem_mb"]


def token_stats(logp, logp_ref, entropy, mask):
    """Masked means for the CSV: KL(π‖π₀) (k3), entropy, log π₀; all (n, G, T), without gradient."""
    return {"kl": masked_mean(kl_penalty(logp.detach(), logp_ref), mask),
            "entropy": masked_mean(entropy, mask), "ref_logp": masked_mean(logp_ref, mask)}


class Environment:
    """The prompts and the reward of a run. It samples a policy's answers and says what they earn."""

    def __init__(self, args, policy, tokenizer, run):
        self.args, self.tokenizer, self.run, self.device = args, tokenizer, run, run.device
        self.share = ranks.share(args.prompts_per_step, "--prompts_per_step")  # slice: this process's prompts
        self.train, self.held_out, self.task = load_questions(args, tokenizer, policy.config.block_size)
        run.record["eval_n"] = len(self.held_out.texts)
        self.P, self.T = self.train.tokens.shape[1], args.max_new
        self.reward_of = load_scorer(args.reward, args.reward_model, args.policy, tokenizer, self.device,
                                     self.task)
        share_prompt = getattr(args, "share_prompt", "no")  # PPO's answers stand alone
        self.share_prompt = share_prompt == "yes" or (share_prompt == "auto" and 2 * self.P >= self.T)
        self.samples = Samples(args)
        self.drawn = torch.zeros(2, dtype=torch.long)  # answers and tokens since the last measure
        self.cut = 0.0  # share of the last step's answers that --max_new cut
        self.sampling, self.exact, dtype = sampling(policy, args.sample_dtype, run)
        self.graphs = Graphs(policy, dtype) if self.device.type == "cuda" else None
        compiled = getattr(args, "compile", False)
        self.score_of = torch.compile(score, dynamic=True) if compiled else score  # for rows of any length

    # ---- answers, and what they earn ----
    def sample(self, policy, prompts, group_size, uniforms):
        """Answers: tokens (N, P + T), logp and mask (N, T), texts."""
        pad = None if prompts.pad is None else prompts.pad.to(self.device)
        policy = self.graphs.refreshed() if self.graphs else policy  # the same weights
        with self.sampling():
            tokens, logp, mask = generate(
                policy, prompts.tokens.to(self.device), self.T, group_size, self.args.temperature, pad=pad,
                stop=self.tokenizer.stops, uniforms=uniforms.to(self.device), graphs=self.graphs)
        return tokens, logp, mask, completions(tokens[:, self.P:], mask, self.tokenizer)

    def rollout(self, policy, generator, rows=slice(None)):
        """G answers to each of this process's prompts, or to `rows` of them. All draw the same numbers."""
        B, G = self.args.prompts_per_step, self.args.group_size
        index = self.train.draw(B, generator)[self.share][rows]
        uniforms = torch.rand(B, G, self.T, generator=generator)[self.share][rows].flatten(0, 1)
        prompts, repeated = (self.train.pick(index, n) for n in (1, G))
        tokens, logp, mask, texts = self.sample(policy, prompts, G, uniforms)
        longest = max(ranks.gather([int(mask.any(0).sum())]))  # what no process's answer reaches is cut off
        self.drawn += torch.tensor([len(mask), int(mask.sum())])
        tokens, logp, mask = (x.unflatten(0, (-1, G)) for x in (tokens, logp, mask))
        pad = None if repeated.pad is None else repeated.pad.view(-1, G).to(self.device)
        return Answers(tokens[..., :self.P + longest], logp[..., :longest], mask[..., :longest], pad,
                       repeated, texts, self.share, B)

    def reward(self, answers):
        """What each answer earns: (b, G), on the CPU."""
        tokens, mask = answers.tokens.flatten(0, 1), answers.mask.flatten(0, 1)
        return self.reward_of(tokens, mask, answers.prompts, answers.texts).view(answers.mask.shape[:2])

    # ---- log-probabilities ----
    def score(self, model, answers, rows=None):
        """Log-probability and entropy, (n, G, T) each, of answers `rows`. None: all, in micro-batches."""
        if rows is None:
            scored = [self.score(model, answers, part) for part in answers.parts(self.args)]
            return [torch.cat(x) for x in zip(*scored)]
        tokens = answers.tokens[rows]
        read_together = tokens.shape[1] if self.share_prompt else 1  # answers whose prompt is read once

        def scored(tokens, pad):
            return self.score_of(model, tokens, self.P, self.args.temperature, pad, read_together,
                                 self.args.entropy_coef > 0)
        both = one_pass(scored, model, tokens.flatten(0, 1), answers.padding(rows), self.run.autocast,
                        self.graphs, read_together)
        return [x.unflatten(0, tokens.shape[:2]) for x in both]

    def value(self, critic, answers, rows=None):
        """The critic's value where each token of the answers in `rows` is predicted: (n, G, T)."""
        if rows is None:
            return torch.cat([self.value(critic, answers, part) for part in answers.parts(self.args)])
        tokens = answers.tokens[rows]
        [value] = one_pass(lambda tokens, pad: [critic(tokens, pad)], critic, tokens[..., :-1].flatten(0, 1),
                           answers.padding(rows), self.run.autocast, self.graphs)
        return value[:, self.P - 1:].unflatten(0, tokens.shape[:2])

    # ---- what is measured ----
    def measure(self, answers, reward, adv):
        """A step's numbers beside the loss, of all processes; reward (B, G), adv (B, G) or (B, G, T)."""
        texts, asked, mask = map(ranks.gather, (answers.texts, answers.prompts.texts, answers.mask))
        samples, tokens = ranks.gather(self.drawn[None]).sum(0).tolist()
        self.drawn.zero_()
        self.cut = ranks.gather(cut_off(answers, self.tokenizer.stops, self.T)).float().mean()
        token_adv = adv.abs().mean() if adv.dim() == 2 else masked_mean(adv.abs(), mask)
        equal = (reward == reward[:, :1]).all(1).float().mean() if reward.shape[1] > 1 else None
        return {"mean_r": reward.mean(), "token_adv": token_adv, "frac_zero_std": equal, "frac_cut": self.cut,
                "gold": gold_score(self.args, texts, asked, self.train.corpus_words), "samples": samples,
                "length": mask.sum() / len(texts), "distinct": distinct(texts), "tokens": tokens}

    def evaluate(self, policy):
        """What an answer to each held-out prompt earns, always from the same draws, and how good it is."""
        args, prompts = self.args, self.held_out
        uniforms = torch.rand(len(prompts.texts), self.T, generator=step_generator(args.seed, 10**6))
        tokens, _, mask, texts = self.sample(policy, prompts, 1, uniforms)
        reward = self.reward_of(tokens, mask, prompts, texts)
        with self.sampling():
            measured = quality(args, self.task, policy, self.tokenizer, prompts, texts)
        return {"eval_r": reward.mean()} | measured

    def conclude(self, policy):
        """The run's last line: what held-out answers are worth now, and where the files are."""
        shown = ", ".join(f"{name} {value:.3f}" for name, value in self.evaluate(policy).items())
        print(f"{self.args.steps} steps, {self.run.counts['seconds']:.0f} s; held out: {shown}; "
              f"wrote {self.args.log} and {self.args.out}/policy.pth")
        self.samples.last(self.args.steps)
        if self.run.start < self.args.steps and self.cut > 0.9:
            print(f"warning: --max_new {self.T} cut {self.cut:.0%} of the last step's answers")
