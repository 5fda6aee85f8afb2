"""GRPO (arXiv:2402.03300) on a model that sees and says where: Qwen2.5-VL (arXiv:2502.13923).

--engine trl is TRL's GRPOTrainer, nothing of it copied or overridden; --engine nano is grpo.py in the loop
below: same data in the same order, same seeds, same reward. Only the answer's tokens carry loss.
Left out: several images a prompt; in nano several processes, accumulation and prompts prefilled once a group.
Run: python -m vision.vlm_grpo, or with --model Qwen/Qwen2.5-VL-3B-Instruct --data FILE.json --images_root DIR
"""
import copy
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint
from utils.cli import Interrupt, at_least, die, need, parse, resume_command
from utils.device import peak_mem_mb, pick_device, rank, world, write_run_record
from utils.log import SHARED, Log
from utils.rewards import load_reward
from vision.data import step_index
from vision.vlm.data import Scorer, draw, load_data, picture, scenes
from vision.vlm import models
from vision.vlm.models import generate, inputs_of, load_model, lora, save_folder, score

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
    lr: float = 1e-4  # falls linearly to 0
    per_device_train_batch_size: int = 64  # answers, not prompts
    num_generations: int = 8
    max_completion_length: int = 16
    temperature: float = 1.0
    steps: int = 150
    use_lora: bool = False
    lora_r: int = 16
    sft_steps: int = 220  # of the tiny model, at most:
    start_accuracy: float = 0.5  # it ends as soon as so many of 128 training scenes are right, on purpose
    sft_lr: float = 3e-3
    eval_every: int = 50
    eval_examples: int = 512
    save_every: int = 50
    preview: bool = False  # draw the first examples (with --model its answers too) beside the CSV, and end
    device: str = "auto"
    seed: int = 0
    log: str = "logs/vlm.csv"
    output_dir: str = "out/vlm"
    resume: bool = False  # go on from --output_dir
    # any other field of TRL's GRPOConfig, as --trl.NAME VALUE
    trl: dict[str, str] = field(default_factory=lambda: {
        word.split("=")[0][6:].replace("-", "_"): "" for word in sys.argv if word.startswith("--trl.")})


def refuse(args):
    """Leaves with a message where the arguments don't go together."""
    at_least(args, beta=0.0, lr=0.0, per_device_train_batch_size=1, num_generations=2, temperature=1e-3,
             max_completion_length=1, steps=1, lora_r=1, sft_steps=1, sft_lr=0.0, eval_every=1,
             eval_examples=1, save_every=1)
    several = world() > 1
    if args.per_device_train_batch_size % args.num_generations:
        die(f"--per_device_train_batch_size {args.per_device_train_batch_size} counts answers: wanted a "
            f"multiple of --num_generations {args.num_generations}")
    if args.engine == "nano" and (args.trl or several):
        die("--trl.NAME and several processes go with --engine trl only")
    if several and not args.model:
        die("several processes need --model: one process makes the tiny one")
    for package in ("transformers", "torchvision", *(("trl", "datasets") if args.engine == "trl" else ()),
                    *(("peft",) if args.use_lora else ())):
        need(package, "vlm")


class Run:
    """What both engines share beside the loss: seeds, evaluation, the CSV, what a resume needs."""

    def __init__(self, args, processor, held_out, scorer, answers, device, state):
        self.args, self.processor, self.held_out, self.scorer = args, processor, held_out, scorer
        self.answers, self.device, self.interrupt = answers, device, Interrupt()
        self.start, self.seconds = (state["step"], state["seconds"]) if state else (0, 0.0)
        self.judge = copy.copy(scorer)
        self.judge.examples = held_out
        self.log = Log(args.log, COLUMNS, args.steps, self.start)

    def begin(self, step, model):
        """What a step samples depends on (seed, step, rank) alone, in both engines and after a resume."""
        self.row = self.evaluate(model)[0] if step % self.args.eval_every == 0 else {}
        torch.manual_seed(self.args.seed * 1_000_003 + step + rank() * 10**9)
        self.clock = time.perf_counter()

    def end(self):
        self.seconds += time.perf_counter() - self.clock
        return self.interrupt.asked

    def write(self, step, **values):
        checkpoint.finite(step, self.args.output_dir, **{k: values[k] for k in ("loss", "grad_norm")})
        self.log.write(step=step, samples=(step + 1) * self.answers, seconds=self.seconds, **values,
                       **self.row, unparsed=self.scorer.unparsed, peak_mem_mb=peak_mem_mb(self.device))

    def save(self, step, **content):
        checkpoint.write(f"{self.args.output_dir}/state.pth", "state", step=step, seconds=self.seconds,
                         args=asdict(self.args), threads=torch.get_num_threads(), **content)

    def evaluate(self, model):
        """Greedy answers to held-out examples -> {accuracy, eval_r, eval_unparsed}, their texts."""
        training, texts, reward = model.training, [], []
        model.eval()  # gradient checkpointing would switch the cache off
        for part in torch.arange(len(self.held_out)).split(64):
            inputs = inputs_of(self.processor, [self.held_out[i] for i in part], self.device)
            texts += generate(model, inputs, self.processor, self.args.max_completion_length)[2]
            reward += self.judge(texts[-len(part):], part.tolist())
        model.train(training)
        parts = Scorer.parts(texts, self.held_out)
        return {"accuracy": parts["accuracy_reward_coord"].mean().item(), "eval_r": sum(reward) / len(reward),
                "eval_unparsed": 1 - parts["format"].mean().item()}, texts


def train_trl(args, config, path, examples, order, run):
    """TRL's trainer; its callback seeds each step, evaluates, writes the CSV, saves what a resume needs."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOTrainer

    class Bridge(TrainerCallback):
        def on_step_begin(self, _, state, control, model=None, **kwargs):
            run.begin(state.global_step, model)

        def on_step_end(self, _, state, control, **kwargs):
            if run.end():
                control.should_save = control.should_training_stop = True

        def on_log(self, _, state, control, logs=None, **kwargs):
            if "reward" in logs:  # not the summary at the end
                adv = torch.tensor(trainer._logs["advantages"])
                run.write(state.global_step - 1, loss=logs["loss"], mean_r=logs["reward"], kl=logs.get("kl"),
                          entropy=logs["entropy"], token_adv=adv.abs().mean(), grad_norm=logs["grad_norm"],
                          length=logs["completions/mean_length"], frac_zero_std=logs["frac_reward_zero_std"],
                          clip_frac=logs.get("clip_ratio/region_mean"))

        def on_save(self, _, state, control, **kwargs):
            if state.is_world_process_zero:
                run.save(state.global_step, model={})  # TRL's own files are in checkpoint-STEP

    data = Dataset.from_dict({"index": order.flatten().tolist()}).with_transform(lambda rows: rows | {
        "prompt": [[{"role": "user", "content": examples[i]["prompt"]}] for i in rows["index"]],
        "image": [picture(examples[i]) for i in rows["index"]]})
    model, began = path, f"{args.output_dir}/checkpoint-{run.start}"
    if run.start and not args.use_lora:  # transformers' resume (5.23) looks for them under other names
        model = load_model(began)
        model.config._name_or_path = path  # where TRL takes the reference from
    trainer = GRPOTrainer(model, run.scorer, config, data, processing_class=run.processor,
                          callbacks=[Bridge()], peft_config=lora(args.lora_r) if args.use_lora else None)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=began if run.start else None)
    if not run.interrupt.asked:
        trainer.save_model(f"{args.output_dir}/final")
    return trainer.model


def train_nano(args, objective, path, examples, order, run, state):
    """The loop of train_grpo.py on this model."""
    G, T, device, processor = args.num_generations, args.max_completion_length, run.device, run.processor
    policy, ref = load_model(path).to(device), load_model(path).to(device)
    if args.use_lora:
        torch.manual_seed(args.seed)
        policy = need("peft", "vlm").get_peft_model(policy, lora(args.lora_r))
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    if state:
        policy.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def save(step):
        run.save(step, model=policy.state_dict(), optimizer=optimizer.state_dict())

    def grouped(x):
        return x.unflatten(0, (-1, G))  # (B, G, T)

    for step in range(run.start, args.steps):
        if step % args.save_every == 0:
            save(step)
        run.begin(step, policy)

        # ---- rollout: G answers to each of B prompts ----
        index = order[step].repeat_interleave(G).tolist()
        inputs = inputs_of(processor, [examples[i] for i in index], device)
        answers, mask, texts = generate(policy, inputs, processor, T, args.temperature)  # (N, T)

        # ---- reward ----
        reward = torch.tensor(run.scorer(texts, index), device=device).view(-1, G)  # (B, G)

        # ---- advantage: what the group's mean says ----
        adv = group_advantage(reward, objective.baseline, objective.scale)

        # ---- old and reference log-probabilities ----
        with torch.no_grad():
            logp_ref, _ = score(ref, inputs, answers, mask, args.temperature)

        # ---- update ----
        logp, entropy = score(policy, inputs, answers, mask, args.temperature)
        loss, stats = grpo_loss(grouped(logp), grouped(logp.detach()), grouped(logp_ref), adv, grouped(mask),
                                objective, max_len=T)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        checkpoint.finite(step, args.output_dir, loss=loss, grad_norm=grad_norm, **stats)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log ----
        stop = run.end()
        run.write(step, loss=loss, mean_r=reward.mean(), kl=stats["kl"], entropy=entropy[mask].mean(),
                  token_adv=adv.abs().mean(), length=mask.sum(1).float().mean(), clip_frac=stats["clip_frac"],
                  grad_norm=grad_norm, frac_zero_std=(reward == reward[:, :1]).all(1).float().mean())
        if stop or step + 1 == args.steps:
            save(step + 1)
        if stop:
            break
    else:
        save_folder(f"{args.output_dir}/final", policy, processor)
    return policy


def main(args):
    # ---- set-up ----
    refuse(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    need("transformers", "vlm").utils.logging.disable_progress_bar()
    device, objective = pick_device(args.device), replace(OBJECTIVES[args.loss_type], beta=args.beta)
    state = args.resume and checkpoint.load_state(f"{args.output_dir}/state.pth", args,
                                                  "python -m vision.vlm_grpo", ("step", "model"))
    config = models.trl_config(args, objective, device) if args.engine == "trl" else None
    answers = config.generation_batch_size if config else args.per_device_train_batch_size  # a step
    path = args.model or f"{args.output_dir}/start"
    processor = models.load_processor(path) if args.model else models.tiny_processor()
    train, held_out = load_data(args, processor)
    scorer = Scorer(train, {name: getattr(args, name) for name in WEIGHTS},
                    load_reward(args.reward, ()) if args.reward else None)
    stem = args.log.removesuffix(".csv")
    if args.preview:
        said = generate(load_model(path).to(device), inputs_of(processor, train[:10], device), processor,
                        args.max_completion_length)[2] if args.model else None
        draw(f"{stem}_preview.png", train[:10], {"answers": said} if said else {})
        print(f"wrote {stem}_preview.png: green the truth, red what the model says")
        return
    B = answers // args.num_generations
    if len(train) < B:
        die(f"{len(train)} examples to train on, and a step asks {B}: give more data or fewer answers a step")
    if not (args.model or state):
        clock = time.perf_counter()
        digits = scenes(3000, args.seed, "train")
        save_folder(path, *models.supervise(digits, args.sft_steps, args.sft_lr, args.seed, device,
                                             args.start_accuracy))
        print(f"supervised the tiny model for {time.perf_counter() - clock:.0f} s: {path}")
    order = torch.stack([step_index(len(train), B, args.seed, s) for s in range(args.steps)])  # (steps, B)
    run = Run(args, processor, held_out[:args.eval_examples], scorer, answers, device, state)
    before, first = run.evaluate(load_model(path).to(device))
    record = {"device": str(device), "objective": asdict(objective), "before": before,
              "hf": {name: version(name) for name in ("transformers", *(["trl"] if config else []))}}
    write_run_record(args.log, args, **record)
    policy = train_trl(args, config, path, train, order, run) if config else \
        train_nano(args, objective, path, train, order, run, state)
    if run.interrupt.asked:
        run.log.close()
        run.interrupt.leave(resume_command())
    after, last = run.evaluate(policy)
    run.log.write(step=args.steps, **after)
    run.log.close()
    write_run_record(args.log, args, **record, after=after)
    draw(f"{stem}_images.png", run.held_out[:10], {"before": first, "after": last})
    gains = ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in ("accuracy", "eval_r"))
    print(f"{len(run.held_out)} held-out examples, greedy: {gains}; {args.steps} steps, {run.seconds:.0f} s; "
          f"wrote {args.log}, {stem}_images.png, {args.output_dir}/final")


if __name__ == "__main__":
    main(parse(Args))
