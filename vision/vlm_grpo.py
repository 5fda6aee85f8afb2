"""GRPO on a vision-language model that says where things are: Qwen2.5-VL (arXiv:2502.13923), GRPO arXiv:2402.03300.

--engine trl trains with TRL's GRPOTrainer, nothing of it copied or overridden; --engine nano with grpo.py and
the loop of this file: same data in the same order, same seeds, same reward. Answer tokens alone carry loss.
Left out: several images a prompt; in nano also several processes and gradient accumulation.
Run: python -m vision.vlm_grpo, or with --model Qwen/Qwen2.5-VL-3B-Instruct --data FILE.json --images_root DIR
"""
import contextlib
import copy
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint
from utils.cli import Interrupt, at_least, die, need, parse, resume_command
from utils.device import peak_mem_mb, pick_device, write_run_record
from utils.log import SHARED, Log
from utils.rewards import load_reward
from vision.data import step_index
from vision.vlm_data import Scorer, load_examples, picture, scenes
from vision.vlm_models import (
    generate,
    inputs_of,
    load_model,
    load_processor,
    lora,
    save_folder,
    score,
    supervise,
)

COLUMNS = [*SHARED, "samples", "seconds", "length", "clip_frac", "grad_norm", "frac_zero_std", "unparsed",
           "accuracy", "eval_r", "eval_unparsed", "peak_mem_mb"]
WEIGHTS = ("accuracy_reward_coord", "iou", "distance", "format")


@dataclass
class Args:
    model: str = ""  # a folder or the hub's name; else a tiny one, supervised on digit scenes at first
    data: str = ""  # JSON or JSONL of {image, prompt, solution}; else digit scenes
    images_root: str = "."
    eval_data: str = ""  # held out; else the last tenth of --data
    engine: Literal["trl", "nano"] = "trl"
    reward: str = ""  # FILE.py:FUNCTION instead of the sum of these four with their weights:
    accuracy_reward_coord: float = 1.0  # the first (x, y) lies in the box
    iou: float = 0.0
    distance: float = 0.0  # 1 at the centre, 0 a diagonal away from it
    format: float = 0.0  # a point or a box inside the image
    loss_type: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"] = "grpo"  # a row of grpo.py
    beta: float = 0.04
    lr: float = 3e-5  # falls linearly to 0
    per_device_train_batch_size: int = 64  # answers, not prompts
    num_generations: int = 8
    max_completion_length: int = 16
    temperature: float = 1.0
    steps: int = 200
    use_lora: bool = False
    lora_r: int = 16
    sft_steps: int = 400  # of the tiny model
    sft_lr: float = 3e-3
    eval_every: int = 50
    eval_examples: int = 512
    save_every: int = 50
    preview: bool = False  # draw the first examples (with --model also its answers) beside the CSV, and end
    device: str = "auto"
    seed: int = 0
    log: str = "logs/vlm.csv"
    output_dir: str = "out/vlm"
    resume: bool = False  # go on from --output_dir
    # any other field of TRL's GRPOConfig, as --trl.NAME VALUE
    trl: dict[str, str] = field(default_factory=lambda: {
        word.split("=")[0][6:].replace("-", "_"): "" for word in sys.argv if word.startswith("--trl.")})


def refuse(args, world):
    """Leaves with a message where the arguments don't go together."""
    at_least(args, beta=0.0, lr=0.0, per_device_train_batch_size=1, num_generations=2, max_completion_length=1,
             temperature=1e-3, steps=1, lora_r=1, sft_steps=1, sft_lr=0.0, eval_every=1, eval_examples=1, save_every=1)
    if args.per_device_train_batch_size % args.num_generations:
        die(f"--per_device_train_batch_size {args.per_device_train_batch_size} counts answers: wanted a multiple "
            f"of --num_generations {args.num_generations}")
    if args.engine == "nano" and (args.trl or world > 1):
        die("--trl.… and several processes go with --engine trl")
    if world > 1 and not args.model:
        die("several processes need --model: train the tiny one with one process")
    for package in ("transformers", "torchvision", *(["trl", "datasets"] if args.engine == "trl" else []),
                    *(["peft"] if args.use_lora else [])):
        need(package, "vlm")


def trl_config(args, objective, device):
    """TRL's GRPOConfig: what grpo.py's row says, the fields of Args, and what --trl.NAME adds."""
    from transformers import HfArgumentParser
    from trl import GRPOConfig
    o = objective
    ours = {"beta": args.beta, "learning_rate": args.lr, "num_generations": args.num_generations,
            "per_device_train_batch_size": args.per_device_train_batch_size, "max_steps": args.steps,
            "max_completion_length": args.max_completion_length, "temperature": args.temperature,
            "loss_type": "grpo" if o.ratio == "sequence" else args.loss_type, "scale_rewards": o.scale,
            "importance_sampling_level": o.ratio, "epsilon": o.eps_low, "epsilon_high": o.eps_high,
            "use_bias_correction_kl": o.kl_ratio, "sapo_temperature_pos": o.tau_pos,
            "sapo_temperature_neg": o.tau_neg, "seed": args.seed % 2**32, "output_dir": args.output_dir,
            "save_steps": args.save_every, "shuffle_dataset": False, "remove_unused_columns": False,
            "logging_steps": 1, "logging_nan_inf_filter": False}
    free = {"use_cpu": device.type == "cpu", "bf16": False, "gradient_checkpointing": False, "warmup_steps": 0,
            "lr_scheduler_type": "linear", "weight_decay": 0.0, "report_to": "none", "disable_tqdm": True,
            "disable_dropout": True, "save_total_limit": 1}
    parser = HfArgumentParser(GRPOConfig, allow_abbrev=False, add_help=False)
    parser.error = lambda message: die(f"--trl: {message}")
    kinds = {action.dest: action.nargs in ("+", "*") for action in parser._actions}
    for name, value in args.trl.items():
        if name in ours or name not in kinds:
            why = "has a flag of its own, or belongs to the script" if name in ours else "is no field of GRPOConfig"
            die(f"--trl.{name} {why}: see --help, or TRL's documentation of GRPOConfig for its {len(kinds)} fields")
        words = value.split() if kinds[name] else [value]
        free[name] = getattr(parser.parse_args([f"--{name}", *words]), name)
    try:
        return GRPOConfig(**ours, **free)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        die(f"TRL refuses this configuration: {' '.join(str(error).split())}")


def train_trl(args, config, path, examples, order, processor, scorer, run):
    """TRL's trainer; its callback seeds each step, evaluates, writes the CSV and remembers what a resume needs."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    class Bridge(TrainerCallback):
        def on_step_begin(self, _, state, control, model=None, **kwargs):
            self.row = run.evaluate(model)[0] if state.global_step % args.eval_every == 0 else {}
            self.clock = time.perf_counter()
            seed_step(args, state.global_step)

        def on_step_end(self, _, state, control, **kwargs):
            run.seconds += time.perf_counter() - self.clock
            control.should_save |= run.interrupt.asked
            control.should_training_stop |= run.interrupt.asked

        def on_log(self, _, state, control, logs=None, **kwargs):
            if "reward" not in logs:  # the summary at the end
                return
            checkpoint.finite(state.global_step - 1, args.output_dir, loss=logs["loss"], grad_norm=logs["grad_norm"])
            adv = torch.tensor(list(trainer._logs["advantages"]))
            run.write(state.global_step - 1, loss=logs["loss"], mean_r=logs["reward"], kl=logs.get("kl"),
                      entropy=logs["entropy"], token_adv=adv.abs().mean(), grad_norm=logs["grad_norm"],
                      length=logs["completions/mean_length"], clip_frac=logs.get("clip_ratio/region_mean"),
                      frac_zero_std=logs["frac_reward_zero_std"], **self.row)

        def on_save(self, _, state, control, **kwargs):
            if state.is_world_process_zero:
                run.save(state.global_step, model={})

    data = Dataset.from_dict({"index": order.flatten().tolist()}).with_transform(lambda rows: rows | {
        "prompt": [[{"role": "user", "content": examples[i]["prompt"]}] for i in rows["index"]],
        "image": [picture(examples[i]) for i in rows["index"]]})
    trainer = GRPOTrainer(path, scorer, config, data, processing_class=processor, callbacks=[Bridge()],
                          peft_config=lora(args.lora_r) if args.use_lora else None)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=f"{args.output_dir}/checkpoint-{run.start}" if run.start else None)
    return trainer.model


def seed_step(args, step):
    """What step `step` samples depends on (seed, step, rank) alone, in both engines and after a resume."""
    torch.manual_seed(args.seed * 1_000_003 + step + 10**6 * int(os.environ.get("RANK", 0)))


class Run:
    """What both engines share beside the loss: evaluation, the CSV, the state of a resume."""

    def __init__(self, args, processor, held_out, scorer, device, state):
        self.args, self.processor, self.held_out, self.device = args, processor, held_out, device
        self.scorer, self.interrupt = scorer, Interrupt()
        self.start, self.seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
        self.judge = copy.copy(scorer)
        self.judge.examples = held_out
        self.log = Log(args.log, COLUMNS, args.steps, self.start)

    def evaluate(self, model):
        """Greedy answers to held-out examples -> {accuracy, eval_r, eval_unparsed}, the texts."""
        training, texts, rewards = model.training, [], []
        model.eval()
        for part in torch.arange(len(self.held_out)).split(64):
            asked = [self.held_out[i] for i in part]
            inputs = inputs_of(self.processor, asked, self.device)
            texts += generate(model, inputs, self.processor, self.args.max_completion_length)[2]
            rewards += self.judge(texts[-len(part):], part.tolist())
        model.train(training)
        parts = Scorer.parts(texts, self.held_out)
        return {"accuracy": parts["accuracy_reward_coord"].mean(), "eval_r": torch.tensor(rewards).mean(),
                "eval_unparsed": 1 - parts["format"].mean()}, texts

    def write(self, step, **values):
        samples = (step + 1) * self.answers
        self.log.write(step=step, samples=samples, seconds=self.seconds, unparsed=self.scorer.unparsed,
                       peak_mem_mb=peak_mem_mb(self.device), **values)

    def save(self, step, **content):
        checkpoint.write(f"{self.args.output_dir}/state.pth", "state", step=step, seconds=self.seconds,
                         args=asdict(self.args), threads=torch.get_num_threads(), **content)


def main(args):
    # ---- set-up ----
    world = int(os.environ.get("WORLD_SIZE", 1))
    refuse(args, world)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if rank := int(os.environ.get("RANK", 0)):
        args = replace(args, log=f"{args.log}.rank{rank}.csv")
    device = pick_device(args.device)
    objective = replace(OBJECTIVES[args.loss_type], beta=args.beta)
    G, T = args.num_generations, args.max_completion_length
    state = args.resume and checkpoint.load_state(f"{args.output_dir}/state.pth", args,
                                                  "python -m vision.vlm_grpo", ("step", "model"))
    config = trl_config(args, objective, device) if args.engine == "trl" else None
    answers_a_step = config.generation_batch_size if config else args.per_device_train_batch_size
    B = answers_a_step // G
    path = args.model or f"{args.output_dir}/start"
    digits = {} if args.data and args.model else {"train": scenes(3000, args.seed, "train")}
    if not args.model and not state:
        clock = time.perf_counter()
        save_folder(path, *supervise(digits["train"], args.sft_steps, args.sft_lr, args.seed, device))
        print(f"supervised the tiny model for {time.perf_counter() - clock:.0f} s; it is in {path}")
    processor = load_processor(path)
    if args.data:
        train = load_examples(args.data, args.images_root, processor)
        held_out = load_examples(args.eval_data, args.images_root, processor) if args.eval_data else []
        cut = len(train) - max(1, len(train) // 10)
        train, held_out = (train, held_out) if held_out else (train[:cut], train[cut:])
    else:
        train, held_out = digits["train"], scenes(args.eval_examples, args.seed, "test")
    if len(train) < B:
        die(f"{len(train)} examples to train on: a step asks {B}, so give more, or a smaller "
            "--per_device_train_batch_size")
    scorer = Scorer(train, {name: getattr(args, name) for name in WEIGHTS},
                    load_reward(args.reward, ()) if args.reward else None)
    run = Run(args, processor, held_out[:args.eval_examples], scorer, device, state)
    run.answers = answers_a_step
    order = torch.stack([step_index(len(train), B, args.seed, step) for step in range(args.steps)])  # (steps, B)
    policy = load_model(path).to(device)
    before, first = run.evaluate(policy)
    print({k: round(float(v), 3) for k, v in before.items()}, first[:6])
    record = {"device": str(device), "objective": asdict(objective), "before": before}
    write_run_record(args.log, args, **record)
    if config:
        policy = train_trl(args, config, path, train, order, processor, scorer, run)
    else:
        policy = train_nano(args, objective, policy, train, order, processor, scorer, run)
    if run.interrupt.asked:
        run.log.close()
        run.interrupt.leave(resume_command())
    after, last = run.evaluate(policy)
    run.log.write(step=args.steps, **after)
    run.log.close()
    print({k: round(float(v), 3) for k, v in after.items()}, last[:6])


def train_nano(args, objective, policy, examples, order, processor, scorer, run):
    """The loop of train_grpo.py on this model."""
    G, T, device = args.num_generations, args.max_completion_length, run.device
    ref = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=0.0)
    for step in range(run.start, args.steps):
        row = run.evaluate(policy)[0] if step % args.eval_every == 0 else {}
        clock = time.perf_counter()

        # ---- rollout: G answers to each of B prompts ----
        seed_step(args, step)
        index = order[step].repeat_interleave(G).tolist()
        inputs = inputs_of(processor, [examples[i] for i in index], device)
        answers, mask, texts = generate(policy, inputs, processor, T, args.temperature)  # (N, T)

        # ---- reward ----
        reward = torch.tensor(scorer(texts, index), device=device).view(-1, G)  # (B, G)

        # ---- advantage: what the group's mean says ----
        adv = group_advantage(reward, objective.baseline, objective.scale)

        # ---- old and reference log-probabilities ----
        def grouped(x):
            return x.unflatten(0, (-1, G))  # (B, G, T)
        with torch.no_grad():
            logp_ref, _ = score(ref, inputs, answers, mask, args.temperature)

        # ---- update ----
        logp, entropy = score(policy, inputs, answers, mask, args.temperature)
        loss, stats = grpo_loss(grouped(logp), grouped(logp.detach()), grouped(logp_ref), adv, grouped(mask),
                                objective, max_len=T)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        checkpoint.finite(step, args.output_dir, loss=loss, grad_norm=grad_norm, **stats)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log ----
        run.seconds += time.perf_counter() - clock
        run.write(step, loss=loss, mean_r=reward.mean(), kl=stats["kl"], entropy=entropy[mask].mean(),
                  token_adv=adv.abs().mean(), length=mask.sum(1).float().mean(), clip_frac=stats["clip_frac"],
                  grad_norm=grad_norm, frac_zero_std=(reward == reward[:, :1]).all(1).float().mean(), **row)
        if run.interrupt.asked:
            break
    return policy


if __name__ == "__main__":
    main(parse(Args))
