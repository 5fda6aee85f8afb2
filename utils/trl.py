"""TRL's GRPOTrainer (1.16) as a trainer of grpo.py's objectives: its settings, and what it calls.

TRL's defaults are not GRPO's, so every field that changes what is learnt is set here. With several
minibatches it divides by the average minibatch's tokens, and it shuffles answers, not groups.
Left out: TRL's own techniques; --trl.NAME VALUE sets any field that no flag sets.
"""
import json
import os
import sys
import warnings
from pathlib import Path

from utils import ranks
from utils.cli import die, need, refusing
from utils.device import pick_autocast

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
    equal = {"baseline": o.baseline == "mean", "scale": o.scale != "mean", "ratio": o.ratio != "none",
             "reduce": (o.surrogate, o.reduce) in LOSSES, "kl": not o.beta or o.kl == "k3"}
    lacking = [f"{name}={getattr(o, name)!r}" for name, has in equal.items() if not has]
    if lacking:
        raise ValueError(f"TRL has no equal of an --objective with {', '.join(lacking)}: wanted grpo, "
                         "dr_grpo, dapo, lite_ppo, gspo, luspo, cispo or sapo, or run train_grpo.py")
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
        "num_generations": args.group_size, "temperature": args.temperature,
        "max_completion_length": args.max_new, "learning_rate": args.lr, "seed": args.seed % 2**32,
        "output_dir": args.out, "shuffle_dataset": False, "remove_unused_columns": False,
        "logging_nan_inf_filter": False} | fixed
    free = {"use_cpu": device.type == "cpu", "bf16": False, "gradient_checkpointing": False, "top_p": 1.0,
            "top_k": 0, "repetition_penalty": 1.0, "warmup_steps": 0, "weight_decay": 0.0,
            "report_to": "none", "disable_tqdm": True, "disable_dropout": True, "save_total_limit": 1} | free
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


def rollout_config(objective, args, device, updates):
    """GRPOConfig of train_trl.py's flags. TRL counts answers, and its step is an optimizer's, not a rollout.

    updates: optimizer steps in a rollout. Each process passes `size` prompts at a time.
    """
    for name in ("kl_in_reward", "dynamic_sampling", "tis_cap"):
        if getattr(args, name):
            die(f"--{name}: TRL has no equal. Leave it out, or run train_grpo.py")
    if args.overlong == "penalty" or args.sync_ref_every and args.resume:
        die("--overlong penalty and --sync_ref_every with --resume: TRL has no equal. Run train_grpo.py")
    if args.lr_end > 1:
        die(f"--lr_end {args.lr_end}: TRL has no equal of a learning rate that rises: wanted at most 1")
    schedule = {"lr_scheduler_type": "constant"}
    if args.lr_end < 1:
        how = {"lr_end": args.lr * args.lr_end, "power": 1.0}
        schedule = {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": how}
    parts = args.minibatches * ranks.world()
    ranks.whole_parts(args.prompts_per_step, parts, "--minibatches times the number of processes, ")
    share = args.prompts_per_step // parts
    size = args.micro_batch or share
    ranks.whole_parts(share, size, "--micro_batch")
    return grpo_config(objective, args, device, schedule | {
        "max_steps": args.steps * updates, "save_steps": args.save_every * updates, "logging_steps": updates,
        "per_device_train_batch_size": size * args.group_size, "gradient_accumulation_steps": share // size,
        "steps_per_generation": args.minibatches * share // size, "num_iterations": args.epochs_per_rollout,
        "max_grad_norm": args.grad_clip, "entropy_coef": args.entropy_coef,
        "top_entropy_quantile": args.top_entropy, "mask_truncated_completions": args.overlong == "mask",
        "sync_ref_model": bool(args.sync_ref_every and objective.beta), "ref_model_mixup_alpha": 1.0,
        "ref_model_sync_steps": max(1, args.sync_ref_every * updates),
        "bf16": pick_autocast(device, args.dtype)[1] == "bf16",
        "gradient_checkpointing": args.grad_checkpoint,
    }, optim="adamw_torch_fused", adam_beta2=0.99, save_total_limit=2, ddp_find_unused_parameters=False)


def trl_refusing():
    """Turns what TRL raises about its configuration into a clear message."""
    return refusing((ValueError, TypeError, ImportError, RuntimeError), "TRL refuses this configuration: ")


def export(policy, tokenizer, folder):
    """Writes a policy of ours for TRL -> transformers' tokenizer, which adds no token to a prompt."""
    if any(len(stop) > 1 for stop in tokenizer.stops):
        die(f"TRL ends an answer at one token, and this policy at several, {tokenizer.stops[0]}: take one "
            "whose tokenizer is bpe, or a chat model")
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
                numbers = {ours: logs[theirs] for ours, theirs in NUMBERS.items() if theirs in logs}
                adv = torch.tensor(trainer._logs["advantages"])
                run.write(state.global_step // updates - 1, **numbers, token_adv=adv.abs().mean())

        def on_save(self, _, state, control, **kwargs):
            run.save(state.global_step // updates)  # TRL's checkpoint-N holds the model and the optimizer

    trainer.add_callback(Bridge())
    trainer.remove_callback(PrinterCallback)
