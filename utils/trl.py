"""TRL's GRPOTrainer (1.16) as a trainer of grpo.py's objectives: its settings, and what it calls.

TRL's defaults are not GRPO's, so every field that changes what is learnt is set here. With several minibatches
its token means divide by their average number of tokens, and it deals out answers, not groups.
Left out: TRL's own techniques; --trl.NAME VALUE sets any field that no flag sets.
"""
import contextlib
import json
import os
import sys
import warnings
from pathlib import Path

from utils.cli import die, need

LOSSES = {  # (surrogate, reduce) of an Objective: TRL's loss_type
    ("clip", "answer"): "grpo", ("clip", "token"): "dapo", ("clip", "length"): "dr_grpo",
    ("clip", "sum"): "luspo", ("cispo", "token"): "cispo", ("sapo", "answer"): "sapo"}
NUMBERS = {  # a column of our CSV: the name in TRL's log
    "loss": "loss", "mean_r": "reward", "kl": "kl", "entropy": "entropy", "grad_norm": "grad_norm",
    "length": "completions/mean_length", "frac_zero_std": "frac_reward_zero_std",
    "clip_frac": "clip_ratio/region_mean"}


def load_trl():
    """The package trl, with transformers' bars and advice silenced."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    trl, logging = need("trl", "trl"), need("transformers", "trl").utils.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return trl


def given_fields():
    """The fields that the command line sets by --trl.NAME, for a flag `trl: dict[str, str]`."""
    return {word.split("=")[0][6:].replace("-", "_"): "" for word in sys.argv if word.startswith("--trl.")}


def objective_fields(o):
    """An Objective of grpo.py as fields of GRPOConfig. ValueError where TRL has no equal."""
    lacking = [f"baseline={o.baseline!r}"] if o.baseline != "mean" else []
    lacking += [f"scale={o.scale!r}"] if o.scale == "mean" else []
    lacking += [f"ratio={o.ratio!r}"] if o.ratio == "none" else []
    lacking += [f"surrogate={o.surrogate!r} with reduce={o.reduce!r}"] if (o.surrogate, o.reduce) not in LOSSES else []
    lacking += [f"kl={o.kl!r}"] if o.beta and o.kl != "k3" else []
    if lacking:
        raise ValueError(f"TRL has no equal of an objective with {', '.join(lacking)}: wanted grpo, dr_grpo, dapo, "
                         "lite_ppo, gspo, luspo, cispo or sapo")
    return {"loss_type": LOSSES[o.surrogate, o.reduce], "importance_sampling_level": o.ratio,
            "scale_rewards": o.scale, "epsilon": o.eps_low, "epsilon_high": o.eps_high, "delta": o.delta,
            "beta": o.beta, "use_bias_correction_kl": o.kl_ratio, "sapo_temperature_pos": o.tau_pos,
            "sapo_temperature_neg": o.tau_neg}


def grpo_config(objective, args, device, fixed, **free):
    """TRL's GRPOConfig: the objective, the flags of args, and what --trl.NAME adds.

    fixed: more fields that the script's flags set. free: its defaults, which --trl.NAME may replace.
    """
    from transformers import HfArgumentParser
    from trl import GRPOConfig
    ours = objective_fields(objective) | {
        "num_generations": args.group_size, "temperature": args.temperature, "max_completion_length": args.max_new,
        "learning_rate": args.lr, "seed": args.seed % 2**32, "output_dir": args.out, "shuffle_dataset": False,
        "remove_unused_columns": False, "logging_nan_inf_filter": False} | fixed
    free = {"use_cpu": device.type == "cpu", "bf16": False, "gradient_checkpointing": False, "top_p": 1.0,
            "top_k": 0, "repetition_penalty": 1.0, "warmup_steps": 0, "weight_decay": 0.0, "report_to": "none",
            "disable_tqdm": True, "disable_dropout": True, "save_total_limit": 1} | free
    free = {name: value for name, value in free.items() if name not in ours}
    parser = HfArgumentParser(GRPOConfig, allow_abbrev=False, add_help=False)
    parser.error = lambda message: die(f"--trl: {message}")
    takes_several = {action.dest: action.nargs in ("+", "*") for action in parser._actions}
    for name, value in args.trl.items():
        if name in ours or name not in takes_several:
            why = "the script sets it" if name in ours else "trl.GRPOConfig has no such field"
            die(f"--trl.{name}: {why}. Wanted a field of GRPOConfig that --help shows no flag for")
        words = value.split() if takes_several[name] else [value]
        free[name] = getattr(parser.parse_args([f"--{name}", *words]), name)
    with trl_refusing():
        return GRPOConfig(**ours, **free)


@contextlib.contextmanager
def trl_refusing():
    """Turns what TRL raises about its configuration into a clear message."""
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        die(f"TRL refuses this configuration: {' '.join(str(error).split())}")


def export(policy, tokenizer, folder):
    """Writes a policy of ours for TRL -> transformers' tokenizer, which adds no token of its own to a prompt."""
    if any(len(stop) > 1 for stop in tokenizer.stops):
        die(f"TRL ends an answer at one token, and this policy at several, {tokenizer.stops[0]}: take one whose "
            "tokenizer is bpe or a chat model's")
    policy.export_hf(folder, tokenizer)
    source = Path(folder) / "tokenizer.json"
    source.write_text(json.dumps(json.loads(source.read_text(encoding="utf-8")) | {"post_processor": None}))
    made = need("transformers", "trl").AutoTokenizer.from_pretrained(folder)
    if made.eos_token is None:  # TRL wants one; a policy without a stop never says "<eos>"
        eos = made.convert_ids_to_tokens(tokenizer.stops[0][0]) if tokenizer.stops else "<eos>"
        made.add_special_tokens({"eos_token": eos, "pad_token": eos})
    return made


def attach(trainer, run, updates=1):
    """TRL's loop calls run's begin(step, model), end() -> stop?, write(step, **numbers) and save(steps).

    updates: optimizer steps in a step of ours, one rollout. Their numbers are averaged, as TRL logs them.
    """
    import torch
    from transformers import PrinterCallback, TrainerCallback

    class Bridge(TrainerCallback):
        def on_step_begin(self, _, state, control, model=None, **kwargs):
            if state.global_step % updates == 0:
                run.begin(state.global_step // updates, model)

        def on_step_end(self, _, state, control, **kwargs):
            if state.global_step % updates == 0 and run.end():
                control.should_save = control.should_training_stop = True

        def on_log(self, _, state, control, logs=None, **kwargs):
            if "reward" in logs:  # TRL's summary at the end has none
                numbers = {ours: logs.get(theirs) for ours, theirs in NUMBERS.items()}
                adv = torch.tensor(trainer._logs["advantages"])
                run.write(state.global_step // updates - 1, **numbers, token_adv=adv.abs().mean())

        def on_save(self, _, state, control, **kwargs):
            run.save(state.global_step // updates)  # TRL's checkpoint-N holds the model and the optimizer

    trainer.add_callback(Bridge())
    trainer.remove_callback(PrinterCallback)
