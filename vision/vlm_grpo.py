"""GRPO (arXiv:2402.03300) on Qwen2.5-VL (arXiv:2502.13923), which sees an image and says where something is.

--engine trl trains with TRL's GRPOTrainer; nothing of it is copied or overridden. --engine nano trains with
grpo.py in the loop below. Both see the same data in the same order, with the same seeds and the same reward.
Only the tokens of an answer carry loss, those of the prompt and the image do not.
Left out: several images a prompt; in nano also several processes, gradient accumulation and shared prompts.
Run: python -m vision.vlm_grpo, or with --model Qwen/Qwen2.5-VL-3B-Instruct --data FILE.json --images_root DIR
"""
import os
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import utils  # before torch: it sets how OpenMP's threads wait

import torch

from grpo import OBJECTIVES, group_advantage, grpo_loss
from utils import checkpoint, guard
from utils.cli import INPUTS, AtLeast, Interrupt, die, need, parse, refusing, resume_command
from utils.device import peak_mem_mb, pick_device, rank, world, write_run_record
from utils.log import SHARED, Log
from utils.rewards import load_reward
from utils.run import step_generator
from utils.trl import attach, given_fields, grpo_config
from vision.data import step_index
from vision.show import of_test
from vision.vlm import models, samples
from vision.vlm.data import Scorer, draw, load_data, picture, scenes
from vision.vlm.models import generate, greedy, inputs_of, load_model, lora, save_folder, score

MADE_BY = "python -m vision.vlm_grpo"
COLUMNS = [*SHARED, "samples", "seconds", "length", "clip_frac", "grad_norm", "frac_zero_std", "unparsed",
           "accuracy", "eval_r", "eval_unparsed", "peak_mem_mb", "test_accuracy", "test_r", "test_unparsed"]
WEIGHTS = ("accuracy_reward_coord", "iou", "distance", "format")


@dataclass
class Args:
    ALIASES: ClassVar[dict[str, str]] = {
        "num_generations": "group_size", "max_completion_length": "max_new", "output_dir": "out",
        "loss_type": "objective"}
    # ---- the algorithm ----
    engine: Literal["trl", "nano"] = "trl"  # TRL's trainer, or the loop of this file
    objective: Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "sapo"] = "grpo"  # a row of grpo.py
    per_device_train_batch_size: Annotated[int, AtLeast(1)] = 64  # answers a step and process, not prompts
    group_size: Annotated[int, AtLeast(2)] = 8  # answers to each prompt
    max_new: Annotated[int, AtLeast(1)] = 16  # tokens of an answer at most
    temperature: Annotated[float, AtLeast(1e-3)] = 1.0  # of sampling and scoring
    beta: Annotated[float, AtLeast(0.0)] = 0.04  # weight of the KL penalty
    lr: Annotated[float, AtLeast(0.0)] = 1e-4  # AdamW's learning rate; it falls linearly to 0
    steps: Annotated[int, AtLeast(1)] = 150  # rollouts, with one update each
    use_lora: bool = False  # train adapters on the text tower instead of all weights
    lora_r: Annotated[int, AtLeast(1)] = 16  # their rank
    trl: dict[str, str] = field(default_factory=given_fields)  # other fields of GRPOConfig: --trl.NAME VALUE
    seed: int = 0  # of the data and their splits, the order of prompts and the draws
    # ---- the task ----
    model: str = ""  # a folder or the hub's name; else a tiny one, first supervised on digit scenes
    data: str = ""  # JSON or JSONL of {image, prompt, solution}; else digit scenes
    images_root: str = "."  # the folder that the images of --data lie in
    eval_data: str = ""  # validation examples; else those of a tenth of --data's images
    test_data: str = ""  # test examples; else half of --eval_data, or those of a tenth of --data's images
    reward: str = ""  # FILE.py:FUNCTION instead of the weighted sum of the four rewards below
    accuracy_reward_coord: float = 1.0  # weight of: the first (x, y) lies in the box
    iou: float = 0.0  # weight of: intersection over union of the box
    distance: float = 0.0  # weight of: 1 at the centre of the box, falling to 0 a diagonal away
    format: float = 0.0  # weight of: the answer has a point or a box inside the image
    sft_steps: Annotated[int, AtLeast(1)] = 220  # steps of supervising the tiny model, at most
    start_accuracy: float = 0.5  # supervision ends when this share of 128 training scenes is answered right
    sft_lr: Annotated[float, AtLeast(0.0)] = 3e-3  # its learning rate
    eval_every: Annotated[int, AtLeast(1)] = 50  # steps between evaluations
    eval_examples: Annotated[int, AtLeast(1)] = 512  # of validation and of the test at most
    samples: Annotated[int, AtLeast(0)] = 4  # nano: validation examples that report.py shows; 0: none
    preview: bool = False  # draw the first examples beside the CSV (with --model its answers too), and end
    # ---- speed and memory: the algorithm stays the same ----
    device: str = "auto"  # auto, cpu, cuda, mps
    log: str = "logs/vlm.csv"  # the CSV of the run
    out: str = "out/vlm"  # folder of the checkpoint and the final model
    save_every: Annotated[int, AtLeast(1)] = 50  # steps between checkpoints
    resume: bool = False  # go on from the checkpoint in --out
    overwrite: bool = False  # begin anew in a finished run's place


def refuse(args):
    """Ends with a message where the arguments don't go together."""
    if args.per_device_train_batch_size % args.group_size:
        die(f"--per_device_train_batch_size {args.per_device_train_batch_size} counts answers: wanted a "
            f"multiple of --group_size {args.group_size}")
    if args.engine == "nano" and (args.trl or world() > 1):
        die("--trl.NAME and several processes go with --engine trl only")
    if world() > 1 and not args.model:
        die("several processes need --model: one process makes the tiny one")
    if args.model and Path(args.out).resolve() in Path(args.model).resolve().parents:
        die(f"--model {args.model} lies in --out {args.out}, where this run writes: name another --out")
    for package in ("transformers", "torchvision", *(("trl", "datasets") if args.engine == "trl" else ()),
                    *(("peft",) if args.use_lora else ())):
        need(package, "vlm")


class Progress:
    """What both engines do around a step: seeds, evaluation, a row of the CSV, a checkpoint."""

    def __init__(self, args, processor, held_out, scorer, batch, device, state):
        self.args, self.processor, self.held_out, self.scorer = args, processor, held_out, scorer
        self.batch, self.device, self.interrupt = batch, device, Interrupt()  # batch: answers a step
        self.start = state["step"] if state else 0
        self.seconds = state["seconds"] if state else 0.0
        self.log = Log(args.log, COLUMNS, args.steps, self.start)

    def begin(self, step, model):
        """What a step samples depends on (seed, step, rank) alone, in both engines and after a resume."""
        self.measures = self.evaluate(model, self.held_out)[0] if step % self.args.eval_every == 0 else {}
        torch.manual_seed(step_generator(self.args.seed, step + rank() * 10**6).initial_seed())
        self.clock = time.perf_counter()

    def end(self):
        self.seconds += time.perf_counter() - self.clock
        return self.interrupt.asked

    def write(self, step, **values):
        checkpoint.finite(step, self.args.out, loss=values["loss"], grad_norm=values["grad_norm"])
        self.log.write(step=step, samples=(step + 1) * self.batch, seconds=self.seconds, **values,
                       **self.measures, unparsed=self.scorer.unparsed, peak_mem_mb=peak_mem_mb(self.device))

    def save(self, step, **parts):
        if not rank():  # rank 0 writes for all
            checkpoint.write(f"{self.args.out}/state.pth", "state", step=step, seconds=self.seconds,
                             args=asdict(self.args), inputs=dict(INPUTS),
                             **{name: part.state_dict() for name, part in parts.items()})

    def evaluate(self, model, examples):
        """Greedy answers to examples -> {accuracy, eval_r, eval_unparsed}, their texts."""
        was_training = model.training
        model.eval()  # gradient checkpointing would switch the cache off
        texts = greedy(model, self.processor, examples, self.args.max_new, self.device)
        model.train(was_training)
        judge = Scorer(examples, self.scorer.weights, self.scorer.custom)
        reward = judge(texts, range(len(texts)))
        accuracy = Scorer.parts(texts, examples)["accuracy_reward_coord"].mean().item()
        return {"accuracy": accuracy, "eval_r": sum(reward) / len(reward),
                "eval_unparsed": judge.unparsed}, texts


def train_trl(args, config, path, examples, order, progress):
    """TRL's trainer. It calls progress around each step."""
    from datasets import Dataset
    from trl import GRPOTrainer
    data = Dataset.from_dict({"index": order.flatten().tolist()}).with_transform(lambda rows: rows | {
        "prompt": [[{"role": "user", "content": examples[i]["prompt"]}] for i in rows["index"]],
        "image": [picture(examples[i]) for i in rows["index"]]})
    model, last = path, f"{args.out}/checkpoint-{progress.start}"
    if progress.start and not args.use_lora:  # transformers' resume (5.23) looks for weights of other names
        model = load_model(last)
        model.config._name_or_path = path  # TRL loads the reference from there
    trainer = GRPOTrainer(model, progress.scorer, config, data, processing_class=progress.processor,
                          peft_config=lora(args.lora_r) if args.use_lora else None)
    attach(trainer, progress)
    trainer.train(resume_from_checkpoint=last if progress.start else None)
    if not progress.interrupt.asked:
        trainer.save_model(f"{args.out}/final")
    return trainer.model


def train_nano(args, objective, path, examples, order, progress, state):
    """The loop of train_grpo.py on this model."""
    G, device, processor = args.group_size, progress.device, progress.processor
    policy, ref = load_model(path).to(device), load_model(path).to(device)
    if args.use_lora:
        torch.manual_seed(args.seed)
        policy = need("peft", "vlm").get_peft_model(policy, lora(args.lora_r))
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0.0)
    if state:
        checkpoint.restore(state, args.out, model=policy, optimizer=optimizer)
    shown = samples.Samples(args, progress, ref, objective)

    for step in range(progress.start, args.steps):
        if step % args.save_every == 0:
            progress.save(step, model=policy, optimizer=optimizer)
        shown.draw(step, policy)
        progress.begin(step, policy)

        # ---- rollout: G answers to each of B prompts ----
        prompt_index = order[step].repeat_interleave(G).tolist()
        inputs = inputs_of(processor, [examples[i] for i in prompt_index], device)
        answers, mask, texts = generate(policy, inputs, processor, args.max_new, args.temperature)  # (N, T)

        # ---- reward ----
        reward = torch.tensor(progress.scorer(texts, prompt_index), device=device).view(-1, G)  # (B, G)

        # ---- advantage: what the group's mean says ----
        adv = group_advantage(reward, objective.baseline, objective.scale)

        # ---- old and reference log-probabilities ----
        with torch.no_grad():
            logp_ref, _ = score(ref, inputs, answers, mask, args.temperature)

        # ---- update: there is one a rollout, so logp_old is logp and the ratio is exactly 1 ----
        logp, entropy = score(policy, inputs, answers, mask, args.temperature)
        by_group = [x.view(*reward.shape, -1) for x in (logp, logp.detach(), logp_ref, mask)]  # (B, G, T)
        loss, stats = grpo_loss(*by_group[:3], adv, by_group[3], objective, max_len=args.max_new)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        checkpoint.finite(step, args.out, loss=loss, grad_norm=grad_norm, **stats)
        optimizer.param_groups[0]["lr"] = args.lr * (1 - step / args.steps)
        optimizer.step()
        optimizer.zero_grad()

        # ---- log ----
        stop = progress.end()
        progress.write(step, loss=loss, mean_r=reward.mean(), kl=stats["kl"], entropy=entropy[mask].mean(),
                       token_adv=adv.abs().mean(), length=mask.sum(1).float().mean(), grad_norm=grad_norm,
                       frac_zero_std=(reward == reward[:, :1]).all(1).float().mean(),
                       clip_frac=stats["clip_frac"])
        shown.write(step, policy)
        if stop:
            progress.save(step + 1, model=policy, optimizer=optimizer)
            return policy
    progress.save(args.steps, model=policy, optimizer=optimizer)
    save_folder(f"{args.out}/final", policy, processor)
    return policy


def main(args):
    # ---- set-up ----
    refuse(args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    need("transformers", "vlm").utils.logging.disable_progress_bar()
    device = pick_device(args.device)
    objective = replace(OBJECTIVES[args.objective], beta=args.beta)
    results = [f"{args.out}/{name}" for name in ("state.pth", "final", "start")
               if not args.model or Path(args.out, name).resolve() != Path(args.model).resolve()]
    if not args.preview:
        checkpoint.earlier(args, results)
    state = args.resume and checkpoint.load_state(results[0], args, MADE_BY, ("step",))
    if state:
        checkpoint.left(results[0], state["step"], args.steps)
    config = grpo_config(objective, args, device, {
        "max_steps": args.steps, "save_steps": args.save_every, "logging_steps": 1,
        "per_device_train_batch_size": args.per_device_train_batch_size}) if args.engine == "trl" else None
    batch = config.generation_batch_size if config else args.per_device_train_batch_size  # answers a step
    path = args.model or f"{args.out}/start"
    processor = models.load_processor(path) if args.model else models.tiny_processor()
    train, held_out, test = load_data(args, processor)
    if state:
        guard.same_inputs(state.get("inputs", {}), results[0])
    scorer = Scorer(train, {name: getattr(args, name) for name in WEIGHTS},
                    load_reward(args.reward, ()) if args.reward else None)
    stem = args.log.removesuffix(".csv")
    if args.preview:
        model = load_model(path).to(device) if args.model else None
        texts = model and {"answers": greedy(model, processor, train[:10], args.max_new, device)}
        draw(f"{stem}_preview.png", train[:10], texts or {})
        print(f"wrote {stem}_preview.png: green the truth, red what the model says")
        return
    B = batch // args.group_size
    if len(train) < B:
        die(f"{len(train)} examples to train on, a step takes {B}: give more data or fewer answers a step")
    checkpoint.take(args, results)
    if not (args.model or state):
        clock = time.perf_counter()
        save_folder(path, *models.supervise(scenes(3000, args.seed, "train"), args.sft_steps, args.sft_lr,
                                            args.seed, device, args.start_accuracy))
        print(f"supervised the tiny model for {time.perf_counter() - clock:.0f} s: {path}")
    if models.has_adapter(path):  # the run begins with whole weights: TRL can't read an adapter's folder
        path = f"{args.out}/merged"
        if not state:
            save_folder(path, load_model(args.model), processor)
    order = torch.stack([step_index(len(train), B, args.seed, s) for s in range(args.steps)])  # (steps, B)
    progress = Progress(args, processor, held_out, scorer, batch, device, state)
    start = load_model(path).to(device)
    (before, _), (test_before, first_texts) = (progress.evaluate(start, part) for part in (held_out, test))
    record = {"device": str(device), "objective": asdict(objective), "before": before,
              "hf": {name: version(name) for name in ("transformers", *(["trl"] if config else []))}}
    write_run_record(args.log, args, **record)
    if args.engine == "trl":
        policy = train_trl(args, config, path, train, order, progress)
    else:
        policy = train_nano(args, objective, path, train, order, progress, state)
    if progress.interrupt.asked:
        progress.log.close()
        progress.interrupt.leave(resume_command())
    (after, _), (test_after, last_texts) = (progress.evaluate(policy, part) for part in (held_out, test))
    progress.log.write(step=args.steps, **after, **{of_test(name): v for name, v in test_after.items()})
    progress.log.close()
    guard.release()
    write_run_record(args.log, args, **record, after=after, test_before=test_before, test_after=test_after)
    draw(f"{stem}_images.png", test[:10], {"before": first_texts, "after": last_texts})
    for part, one, two in ((held_out, before, after), (test, test_before, test_after)):
        gains = ", ".join(f"{key} {one[key]:.3f} -> {two[key]:.3f}" for key in ("accuracy", "eval_r"))
        print(f"{len(part)} examples of {'the test' if part is test else 'validation'}, greedy: {gains}")
    print(f"{progress.seconds:.0f} s of training; wrote {args.log}, {stem}_images.png, {args.out}/final")


if __name__ == "__main__":
    refusing(torch.OutOfMemoryError, "fewer answers a step need less memory: ")(main)(parse(Args))
