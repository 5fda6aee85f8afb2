"""Our loss and advantage against those of TRL's GRPOTrainer itself (1.16): values and gradients to 1e-6.

The trainer is real, around a random two-layer GPT-2; only its forward pass gives way to logps of ours.
Its settings are those of utils/trl.py.
Left out: TRL's entropy bonus, vLLM correction, off-policy mask, and vespo, which we don't have.
Run: python -m pytest tests/test_trl_parity.py (needs pip install -e ".[dev]")
"""
from dataclasses import replace

import pytest
import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils.trl import objective_fields

pytest.importorskip("trl")
REWARDS = [1.0, 0.0, 0.5, 3.0, 0.1, 0.1, 0.1, 0.1, -2.0, 4.0, 4.0, 4.5]  # 3 prompts × 4 answers
G, T, MAX_LEN = 4, 6, 9
SAPO = replace(OBJECTIVES["sapo"], tau_pos=1.5, tau_neg=2.0)  # exact in float32, to which TRL rounds 1.05
PAIRS = {  # rows of the table, and variants that TRL has too
    **{name: OBJECTIVES[name] for name in ("grpo", "dr_grpo", "dapo", "lite_ppo")},
    "cispo": replace(OBJECTIVES["cispo"], eps_high=1.3),  # a cap low enough to bite here
    "sapo": SAPO,
    "gspo": replace(OBJECTIVES["gspo"], eps_low=0.1, eps_high=0.05),
    "luspo": replace(OBJECTIVES["luspo"], eps_low=0.1, eps_high=0.05),
    "sum_of_tokens": replace(OBJECTIVES["luspo"], ratio="token", eps_low=0.1),
    "gspo_dapo": replace(OBJECTIVES["dapo"], ratio="sequence"),
    "sapo_sequence": replace(SAPO, ratio="sequence"),
    "cispo_sequence": replace(OBJECTIVES["cispo"], ratio="sequence", eps_high=1.05),
}


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    words = {"<eos>": 0, **{c: i + 1 for i, c in enumerate("abcdefg")}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("trl")
    config = GPT2Config(vocab_size=8, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
                        eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    args = GRPOConfig(f"{folder}/out", use_cpu=True, bf16=False, beta=0.0, report_to=[], num_generations=G,
                      max_completion_length=MAX_LEN, per_device_train_batch_size=len(REWARDS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    data = Dataset.from_dict({"prompt": ["a b"] * 3})
    return GRPOTrainer(str(folder), lambda completions, **_: REWARDS, args, data, processing_class=tokenizer)


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(3, G, T, generator=g, dtype=torch.float64)
    old, ref = (logp + 0.3 * torch.randn(3, G, T, generator=g, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(T) < torch.randint(0, T + 1, (3, G, 1), generator=g)  # 0: an empty answer
    adv = group_advantage(torch.tensor(REWARDS, dtype=torch.float64).view(3, G))
    return logp.requires_grad_(), old, ref, adv, mask


def trl_loss(trainer, monkeypatch, o, tensors, items, micro_batches=1):
    """TRL's loss of these answers and what it logs; `items`: tokens in its whole generation batch."""
    logp, old, ref, adv, mask = (x.flatten(0, 1) for x in tensors)
    fields = objective_fields(o) | {"steps_per_generation": micro_batches}
    fields["epsilon_low"] = fields.pop("epsilon")
    for name, value in fields.items():  # the trainer has read some of them from its arguments already
        monkeypatch.setattr(trainer if hasattr(trainer, name) else trainer.args, name, value)
    monkeypatch.setattr(trainer, "current_gradient_accumulation_steps", micro_batches, raising=False)
    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies",
                        lambda *args, **kwargs: (logp, torch.zeros_like(logp.detach()), None))
    trainer.model.train()
    trainer._metrics["train"].clear()
    ids = torch.zeros(len(logp), T, dtype=torch.long)
    loss = trainer._compute_loss(trainer.model, {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": adv, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": items})
    return loss, {key: values[-1] for key, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize("delta", [None, 1.4])
@pytest.mark.parametrize("beta, kl_ratio", [(0.0, False), (0.2, False), (0.2, True)])
@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradient_are_those_of_trl(trainer, monkeypatch, name, beta, kl_ratio, delta):
    """Same log-probabilities in, same loss and d loss / d logp out, off-policy and clipped; the logs too."""
    o = replace(PAIRS[name], beta=beta, kl_ratio=kl_ratio, delta=delta)
    for seed in range(3):
        tensors = batch(seed)
        logp, mask = tensors[0], tensors[4]
        theirs, log = trl_loss(trainer, monkeypatch, o, tensors, mask.sum())
        ours, stats = grpo_loss(*tensors, o, max_len=MAX_LEN)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        grad, want = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs))
        torch.testing.assert_close(grad, want, rtol=1e-6, atol=1e-9)
        assert want.abs().max() > 1e-3
        if beta and not kl_ratio:  # with the ratio, TRL logs ratio·k3; we log k3 always
            assert stats["kl"].item() == pytest.approx(log["kl"], rel=1e-6)
        if o.ratio == "token" and o.surrogate == "clip" and delta is None:  # TRL counts after δ
            assert stats["clip_frac"].item() == pytest.approx(log["clip_ratio/region_mean"], rel=1e-6)
            assert 0.1 < stats["clip_frac"] < 0.9


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo"])
def test_accumulated_micro_batches_are_those_of_trl(trainer, monkeypatch, name):
    """Three prompts as three accumulation steps: each of TRL's losses is ours with the step's counts."""
    o, tensors = replace(PAIRS[name], beta=0.1), batch(7)
    items, total = tensors[4].sum(), 0.0
    for b in range(3):
        micro = [x[b:b + 1] for x in tensors]
        theirs, _ = trl_loss(trainer, monkeypatch, o, micro, items, micro_batches=3)
        ours, _ = grpo_loss(*micro, o, max_len=MAX_LEN, n_tokens=items, n_answers=3 * G)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
        total = total + ours.detach()
    torch.testing.assert_close(total, grpo_loss(*tensors, o, max_len=MAX_LEN)[0].detach())


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_trl(trainer, monkeypatch, scale):
    """A real rollout of TRL's, its rewards replaced: its advantages are group_advantage of them, to 1e-6."""
    monkeypatch.setattr(trainer, "scale_rewards", scale)
    monkeypatch.setattr(trainer, "beta", 0.0)
    trainer.model.train()
    out = trainer._generate_and_score_completions([{"prompt": "a b"} for _ in REWARDS])
    ours = group_advantage(torch.tensor(REWARDS).view(3, G), "mean", scale)
    torch.testing.assert_close(ours.flatten(), out["advantages"], rtol=1e-6, atol=1e-6)
