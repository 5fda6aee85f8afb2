"""What GRPO and PPO hold in memory for one batch, counted without computing, and measured peaks beside it.

Weights, gradients, optimizer states: by shapes on the meta device. Activations: the tensors that autograd
keeps for the backward pass, counted while fake tensors (shapes, no data) go through the scripts' own calls.
The sum is what stands all the time plus the largest of rollout, scoring and update; gradients count as
standing though they come while activations go, so it can be somewhat high. One epoch, no --micro_batch, no
--grad_checkpoint. By themselves the scripts take 1 minibatch (GRPO) and 4 (PPO): the ratio is also that of
like with like. Peaks are of train_grpo.py and train_ppo.py in fresh processes, also less the same program's
with next to no work; a resident size holds what the allocator keeps, too.
Run: python benchmarks/scaling.py --memory
"""
import csv
import io
import os
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from floor import shared_by_itself
from fresh import config_of, point, program, reward_config, train, weights
from generate import score
from model import GPT
from ppo import ValueModel
from reward import RewardModel
from utils.cli import atomic_write, die
from utils.device import pick_autocast, write_run_record

RUNS = {"GRPO": ("train_grpo.py", 1), "GRPO, 4 minibatches": ("train_grpo.py", 4),
        "PPO": ("train_ppo.py", 1), "PPO, 4 minibatches": ("train_ppo.py", 4)}
RATIOS = (("GRPO", "PPO"), ("GRPO, 4 minibatches", "PPO, 4 minibatches"), ("GRPO", "PPO, 4 minibatches"))
STANDING = ("policy", "reference", "reward model", "value network", "gradients", "AdamW's moments")


def kept_for_backward(make, run, autocast):
    """Bytes that autograd keeps when run(*make()) is called on fake tensors, the modules' own weights apart.

    make: builds a list of modules. A storage that several tensors share is counted once.
    """
    kept = {}
    with FakeTensorMode():
        modules = make()
        own = {p.untyped_storage()._cdata for module in modules for p in module.parameters()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage  # the storage itself: a freed one's address would come again
            return tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast():
            graph = run(*modules)  # alive while the hooks are
        total = sum(storage.nbytes() for storage in kept.values())
        del graph
    return total


def held(config, B, G, P, T, ppo, minibatches, autocast):
    """Bytes of one algorithm by what holds them -> {name: bytes}; ppo: False is GRPO."""
    N, L, C = B * G, config.n_layer, config.n_embd
    n, r = weights(GPT, config), weights(RewardModel, reward_config(config))
    critic = weights(ValueModel, config) if ppo else 0
    rows = N // minibatches
    group = G if not ppo and shared_by_itself(P, T) else 1

    def forward(policy, *critics):
        tokens = torch.zeros(rows, P + T, dtype=torch.long)
        return [score(policy, tokens, P, 1.0, None, group), *(c(tokens[:, :-1]) for c in critics)]

    def modules():
        return [GPT(config).eval(), *([ValueModel(config).eval()] if ppo else [])]
    found = dict(zip(STANDING, (4 * n, 4 * n, 4 * r, 4 * critic, 4 * (n + critic), 8 * (n + critic))))
    found["activations (update)"] = kept_for_backward(modules, forward, autocast)
    logits = 4 * T * config.vocab_size  # an answer's, in float32
    found["logits in passing (update)"] = 3 * rows * logits  # logits, softmax, entropy; log-softmax is kept
    found["logits in passing (scoring)"] = 4 * N * logits
    found["KV cache (rollout)"] = 8 * L * C * (B * P + N * T)
    update = found["activations (update)"] + found["logits in passing (update)"]
    phases = update, found["logits in passing (scoring)"], found["KV cache (rollout)"]
    found["sum: standing + largest phase"] = sum(found[name] for name in STANDING) + max(phases)
    return found


def measured(config, p, args):
    """Peaks in MB of real steps -> {run: (peak, peak less the program's own)}."""
    found = {}
    for name, (script, minibatches) in RUNS.items():
        words = ["--reward", "model", "--minibatches", str(minibatches)]
        peak = train(config, p, args, script, steps=3, words=words)[1]  # AdamW's moments come with the first
        found[name] = peak, peak - program(args, script, words)
    return found


def table(args):
    """Prints a markdown table a size and the ratios, and writes memory.csv beside args.out."""
    B, G, P, T = args.base
    if B % 4:
        die(f"--base {args.base}: wanted a number of prompts that 4 minibatches divide, not {B}")
    autocast, dtype = pick_autocast(torch.device("cpu"), args.dtype)
    torch.set_num_threads(args.threads)
    rows, load = [], os.getloadavg()
    for model in args.memory_models:
        real = model.startswith("gpt2")
        config = config_of(model, max(1024, P + T), 50257) if real else config_of(model, P + T)
        columns = {name: held(config, B, G, P, T, script == "train_ppo.py", minibatches, autocast)
                   for name, (script, minibatches) in RUNS.items()}
        lines = [(what, [column[what] / 1e6 for column in columns.values()]) for what in columns["GRPO"]]
        if not real:
            peaks = measured(config, point(model, *args.base), args)
            lines.append(("measured peak", [peaks[name][0] for name in RUNS]))
            lines.append(("measured, less the program", [peaks[name][1] for name in RUNS]))
        print(f"\n{model}, a vocabulary of {config.vocab_size:,}, {B} x {G} answers of {T} tokens to prompts "
              f"of {P}, {dtype}; MB\n\n| | {' | '.join(RUNS)} |\n|---|" + "---:|" * len(RUNS))
        for what, values in lines:
            print(f"| {what} | " + " | ".join(f"{value:,.1f}" for value in values) + " |")
            rows += [{"model": model, "run": run, "what": what, "mb": f"{value:.5g}"}
                     for run, value in zip(RUNS, values)]
        print()
        for what, values in lines:
            if what.startswith(("sum", "measured")):
                mb = dict(zip(RUNS, values))
                shares = "; ".join(f"{a} needs {mb[a] / mb[b]:.2f} of {b}" for a, b in RATIOS)
                print(f"{what}: {shares} (the claim: about 0.5)")
    text = io.StringIO()
    writer = csv.DictWriter(text, ["model", "run", "what", "mb"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path = Path(args.out).with_name("memory.csv")
    atomic_write(path, text.getvalue().encode())
    write_run_record(path, args, device="cpu", compute=dtype, load_before=load)
    print(f"wrote {path} and {path.with_suffix('.json')}")
