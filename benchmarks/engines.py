"""The two that vs_trl.py compares: train_grpo.py's own main and TRL's GRPOTrainer (1.16) at the same work.

Both begin at one π₀, saved here in both formats, and read the same prompts as text. Each turn is a process of
its own that loads one engine only.
Left out: vLLM (it needs a GPU or a server), GPUs.
Run: by vs_trl.py
"""
import contextlib
import csv
import io
import json
import multiprocessing
import multiprocessing.connection
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

import rollout  # noqa: E402
import train_grpo  # noqa: E402
from grpo import OBJECTIVES  # noqa: E402
from model import GPT  # noqa: E402
from policy import load_policy  # noqa: E402
from utils import checkpoint  # noqa: E402
from utils.rewards import JUDGES  # noqa: E402
from utils.text import load_prompts  # noqa: E402
from utils.tokenizer import BLANK_LINE, PATTERN  # noqa: E402

NEVER = 10**9
PHASES = ["rollout", "reference", "update"]
CURVE = ["step", "loss", "mean_r", "kl", "entropy", "token_adv", "samples", "seconds"]
TIMES = []  # when letter_share was called


@dataclass(frozen=True)
class Work:
    """What both engines do in a turn; the rest is train_grpo.py's default and the same in TRL's arguments."""
    prompts_per_step: int
    group_size: int
    prompt_len: int
    max_new: int
    steps: int
    seed: int
    threads: int
    objective: str
    beta: float
    lr: float
    reward: str  # letter_share, or one of JUDGES
    device: str = "cpu"


# ---- what both begin with ----
def prepare(folder, model, tokenizer, prompts, max_new):
    """One π₀ in both formats, and the prompts, as files in `folder`; the two tokenizers must agree."""
    checkpoint.save(folder / "policy.pth", "policy", model, tokenizer)
    model.export_hf(folder / "hf")
    other = hf_tokenizer(tokenizer)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    assert other(prompts)["input_ids"] == ids, "TRL's tokenizer gives other ids"
    assert other.batch_decode(ids) == prompts, "TRL's tokenizer gives another text"
    assert len(set(map(len, ids))) == 1, "the prompts are of several lengths"
    eos = other.eos_token_id if tokenizer.stops else None  # else no answer ends early
    assert eos is None or tokenizer.stops == [(eos,)], "TRL's tokenizer has another stop"
    config = json.loads((folder / "hf/config.json").read_text())
    config |= {"bos_token_id": None, "eos_token_id": eos}
    (folder / "hf/config.json").write_text(json.dumps(config))
    rows = [json.dumps({"prompt": prompt, "max_new": max_new}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(rows))


def hf_tokenizer(ours):
    """transformers' tokenizer of the same ids as `ours` (char or bpe)."""
    import tokenizers
    import transformers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    if ours.name == "char":
        stop = "<eos>"  # TRL wants one; the policy has no such id, so no answer has it
        ids = {token: i for i, token in enumerate([*ours.table, stop])}
        made = tokenizers.Tokenizer(models.WordLevel(ids, unk_token=stop))
        made.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
        made.decoder = decoders.Fuse()
    else:
        stop, letter = BLANK_LINE, bytes_to_unicode()  # a printable letter for each byte, GPT-2's custom
        ranks = {"".join(letter[ord(byte)] for byte in token): i for i, token in enumerate(ours.table)}
        # tiktoken joins any two neighbours whose union has a rank, the lowest rank first
        cuts = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))]
        merges = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        made = tokenizers.Tokenizer(models.BPE(ranks, merges, ignore_merges=True))
        made.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([tokenizers.AddedToken(stop, normalized=False)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=stop, pad_token=stop,
                                                clean_up_tokenization_spaces=False)


def letter_share(completions, prompts, max_new=(64,), **columns):
    """The reward of the comparison of speed, as cheap as one can be: the share of the letter e.

    It refuses answers that haven't max_new tokens: characters, and ids where the engine hands them over.
    """
    TIMES.append(time.perf_counter())
    for answers in (completions, columns.get("completion_ids", completions)):
        other = {len(answer) for answer in answers} - {max_new[0]}
        if other:
            raise ValueError(f"an answer has {min(other)} tokens: this comparison wants {max_new[0]} in each")
    return [text.count("e") / len(text) for text in completions]


# ---- ours ----
@contextlib.contextmanager
def phase_timers():
    """Yields a list that fills with (phase, seconds).

    Rollout: generate; reference: score without a gradient; update: from the call of score with one to the
    end of optimizer.step. Both are taken where rollout.py calls them.
    """
    spans, began = [], []
    generate, score = rollout.generate, rollout.score

    def timed_generate(*args, **kwargs):
        clock = time.perf_counter()
        result = generate(*args, **kwargs)
        spans.append(("rollout", time.perf_counter() - clock))
        return result

    def timed_score(*args, **kwargs):
        clock = time.perf_counter()
        result = score(*args, **kwargs)
        if torch.is_grad_enabled():
            began.append(clock)
        else:
            spans.append(("reference", time.perf_counter() - clock))
        return result

    def after_step(optimizer, args, kwargs):
        spans.append(("update", time.perf_counter() - began.pop()))

    hook = register_optimizer_step_post_hook(after_step)
    rollout.generate, rollout.score = timed_generate, timed_score
    try:
        yield spans
    finally:
        rollout.generate, rollout.score = generate, score
        hook.remove()


def run_ours(folder, work, dtype, compiled=False, phases=False):
    """train_grpo.py's own main -> {"seconds", "wall": of each step, "rows": of CURVE, with `phases` "spans"}.

    seconds is the engine's own, of its CSV; wall the time from one call of letter_share to the next.
    """
    torch.set_num_threads(work.threads)
    out = Path(tempfile.mkdtemp(dir=folder))
    reward = work.reward if work.reward in JUDGES else f"{Path(__file__).resolve()}:{work.reward}"
    run = train_grpo.Args(
        objective=work.objective, policy=str(folder / "policy.pth"), prompts=str(folder / "prompts.jsonl"),
        reward=reward, prompts_per_step=work.prompts_per_step, group_size=work.group_size,
        prompt_len=work.prompt_len, max_new=work.max_new, beta=work.beta, lr=work.lr, grad_clip=1.0,
        steps=work.steps, eval_every=NEVER, eval_prompts=1, save_every=NEVER, compile=compiled, device=work.device,
        dtype=dtype, seed=work.seed, log=str(out / "log.csv"), out=str(out))
    with phase_timers() if phases else contextlib.nullcontext() as spans:
        with contextlib.redirect_stdout(io.StringIO()):
            train_grpo.main(run)
    with open(out / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    result = {"seconds": differences([0.0, *(float(row["seconds"]) for row in rows)]), "wall": [],
              "rows": [{name: row[name] for name in CURVE} for row in rows]}
    if reward != work.reward:  # loaded as user_function; the first and the last call are of evaluations
        result["wall"] = differences(sys.modules["user_function"].TIMES[1:-1])
    if phases:
        result["spans"] = spans[1:-1]  # likewise
    return result


def shares(result, warmup):
    """Each phase's share of a step, from the spans that `phase_timers` took: medians over steps."""
    spans, found = result["spans"], {}
    names = [name for name, _ in spans]
    assert names == PHASES * len(result["seconds"]), f"a step isn't {PHASES}: {names[:6]}"
    for i, name in enumerate(PHASES):
        parts = [spent / step for (_, spent), step in zip(spans[i::3], result["seconds"])]
        found[name] = median(parts[warmup:])
    return found | {"other": 1 - sum(found.values())}


# ---- TRL's ----
def run_trl(folder, work, dtype):
    """The same work by GRPOTrainer -> as run_ours; seconds is from on_step_begin to on_step_end.

    Its log's `kl` is, as ours, the sum of k3 over all answers' tokens by their number, before the update.
    """
    torch.set_num_threads(work.threads)
    import transformers
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)  # a name of an argument that TRL still takes
    _, ours = load_policy(folder / "policy.pth")
    prompts, _ = load_prompts(str(folder / "prompts.jsonl"), "auto", ours, work.prompt_len)
    objective, defaults = OBJECTIVES[work.objective], train_grpo.Args()
    learns = work.reward in JUDGES
    config = GRPOConfig(
        tempfile.mkdtemp(dir=folder), use_cpu=work.device == "cpu", bf16=dtype == "bf16", seed=work.seed,
        max_steps=work.steps, per_device_train_batch_size=work.prompts_per_step * work.group_size,
        gradient_accumulation_steps=1, steps_per_generation=1, num_iterations=1,
        num_generations=work.group_size,
        max_completion_length=work.max_new, temperature=defaults.temperature, top_p=1.0, top_k=0,
        repetition_penalty=1.0, mask_truncated_completions=False, loss_type=work.objective,
        importance_sampling_level="token", scale_rewards="group", beta=work.beta,
        use_bias_correction_kl=False, epsilon=objective.eps_low, epsilon_high=objective.eps_high, delta=None,
        learning_rate=work.lr, lr_scheduler_type="constant", warmup_steps=0, adam_beta1=0.9, adam_beta2=0.99,
        adam_epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused",
        disable_dropout=True, gradient_checkpointing=False, use_vllm=False, dataloader_num_workers=0,
        dataloader_pin_memory=False, logging_strategy="steps" if learns else "no", logging_steps=1,
        save_strategy="no", report_to="none", disable_tqdm=True)
    seconds, rows = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            seconds.append(-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            seconds[-1] += time.perf_counter()

        def on_log(self, *args, logs, **kwargs):
            if "loss" in logs:  # a step's; the last one is of the whole run
                rows.append({"step": len(rows), "loss": logs["loss"], "mean_r": logs["reward"],
                             "kl": logs["kl"], "entropy": logs["entropy"], "token_adv": "",
                             "samples": len(seconds) * work.prompts_per_step * work.group_size,
                             "seconds": sum(seconds)})

    data = Dataset.from_dict({"prompt": prompts.texts, **prompts.columns})
    trainer = GRPOTrainer(str(folder / "hf"), JUDGES[work.reward] if learns else letter_share, config, data,
                          processing_class=hf_tokenizer(ours), callbacks=[Clock])
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters()), "TRL's weights aren't float32"
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return {"seconds": seconds, "wall": differences(TIMES), "rows": rows}


def differences(times):
    return [b - a for a, b in zip(times, times[1:])]


# ---- turns ----
def alone(function, *args):
    """One turn in a fresh process, so that no engine inherits the other's threads, memory or patches."""
    [(_, result)] = side_by_side([(function, *args)], 1)
    return result


def side_by_side(calls, jobs):
    """Turns, calls = [(function, *args), …], `jobs` of them at a time -> yields (which call, its result)."""
    context = multiprocessing.get_context("spawn")
    waiting, running = list(enumerate(calls)), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, call = waiting.pop(0)
                receive, send = context.Pipe(duplex=False)
                process = context.Process(target=deliver, args=(send, *call), daemon=True)
                process.start()
                send.close()  # the child's is then the only one: its death ends the wait below
                running[receive] = number, process
            for receive in multiprocessing.connection.wait(list(running)):
                number, process = running[receive]
                try:
                    result = receive.recv()
                except EOFError:
                    process.join()
                    code = process.exitcode
                    print(f"a turn ended with exit code {code} before it had a result", file=sys.stderr)
                    raise SystemExit(code if code > 0 else 1) from None
                del running[receive]
                process.kill()
                process.join()
                yield number, result
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def deliver(send, function, *args):
    send.send(function(*args))
