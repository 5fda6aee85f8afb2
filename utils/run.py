"""What a script calls for one training run: precision, random numbers, CSV, record, checkpoints, Ctrl-C."""
import time
from dataclasses import asdict

import torch

from utils import checkpoint, guard, ranks
from utils.cli import INPUTS, Interrupt, resume_command
from utils.device import peak_mem_mb, pick_autocast, rank, write_run_record
from utils.log import Log, add


def step_generator(seed, step, purpose="draw"):
    """The random numbers of one step, from (seed, step, purpose) alone: a resume needs no generator state.

    torch keeps 32 bits of a seed. Three of them are the purpose, so no two purposes of a run share a stream.
    """
    purposes = ("draw", "dropout", "order", "flip", "evaluation", "start", "split", "data")
    return torch.Generator().manual_seed(seed * 1_000_003 + step + (purposes.index(purpose) << 29))


class Run:
    """run = Run(…); run.hold(…); for step in run.steps(): …; run.finish()

    args: a script's dataclass with dtype, seed, log, out, track, resume and overwrite. total: of the steps.
    made_by: the command that starts such a run. save_every: steps between checkpoints; 0: only at Ctrl-C.
    """

    def __init__(self, args, columns, total, device, made_by, save_every, **record):
        self.args, self.columns, self.total, self.device = args, columns, total, device
        self.made_by, self.save_every, self.record = made_by, save_every, record
        self.autocast, self.dtype = pick_autocast(device, args.dtype)
        self.counts = {"step": 0, "seconds": 0.0, "samples": 0, "tokens": 0}
        torch.manual_seed(args.seed)

    def hold(self, about, export="", counts=None, writes=(), **parts):
        """Names what a checkpoint holds; with --resume, fills it from the last one -> that state, or None.

        about: plain values that make the file readable. parts: modules and optimizers. export: the kind of
        a second file, OUT/EXPORT.pth, with the model alone. writes: more results. counts: a resume's numbers.
        """
        self.about, self.export, self.parts, self.inputs = about, export, parts, dict(INPUTS)
        self.counts |= counts or {}
        self.files = [f"{self.args.out}/{name}.pth" for name in ("state", export) if name] + list(writes)
        wanted = *about, "model", *self.counts
        state = checkpoint.start(self.args, self.made_by, self.files, wanted, self.total)
        if state:
            checkpoint.restore(state, self.args.out, **parts)
            self.counts = {name: state[name] for name in self.counts}
        self.start = self.counts["step"]
        return state

    def save(self, step):
        """Writes OUT/state.pth, from which --resume goes on, and OUT/EXPORT.pth. Rank 0 writes for all."""
        self.counts["step"] = step
        if rank():
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        if self.export:
            checkpoint.write(self.files[1], self.export, **self.about, model=states["model"])
        checkpoint.write(self.files[0], "state", **self.about, **states, **self.counts,
                         args=asdict(self.args), script=checkpoint.script(self.args), inputs=self.inputs)

    def steps(self):
        """The steps that are left, saving between them. Nothing is written before the first is asked for."""
        checkpoint.take(self.args, self.files)
        self.csv = Log(self.args.log, self.columns, self.total, self.start, self.args.track, self.args)
        write_run_record(self.args.log, self.args, device=str(self.device), dtype=self.dtype, **self.record)
        self.interrupt = Interrupt()
        for self.step in range(self.start, self.total):
            if self.save_every and self.step % self.save_every == 0:
                self.save(self.step)
            self.sums = {}
            self.start_clock()
            yield self.step
            if max(ranks.gather([self.interrupt.asked])):  # a signal reached one of the processes
                self.save(self.step + 1)
                self.interrupt.leave(resume_command())
        if self.save_every:
            self.save(self.total)
        self.interrupt.over()

    def start_clock(self):
        """The step's seconds count from here. Call it after an evaluation, which is no training time."""
        self.clock = time.perf_counter()

    def add(self, stats, weight=1.0):
        """Adds weight × stats to the step's numbers; of names in _max the greatest stays."""
        add(self.sums, stats, weight)

    def update(self, optimizer, *modules, grad_clip, weight=1.0):
        """Adds up the processes' gradients, clips each module's, steps. A non-finite norm ends the run.

        weight: the update's share of the step. grad_norm is the first module's, before clipping.
        """
        for module in modules:
            ranks.add_gradients(module)
        norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), grad_clip) for module in modules]
        checkpoint.finite(self.step, self.args.out, grad_norm=norms[0], loss=self.sums.get("loss", 0.0))
        optimizer.step()
        optimizer.zero_grad()
        self.add({"grad_norm": norms[0]}, weight / ranks.world())

    def write(self, samples=0, tokens=0, due=True, **numbers):
        """A row of the CSV, if one is due: sums over all processes, `numbers`, counts, time and memory."""
        elapsed = time.perf_counter() - self.clock
        for name, more in (("seconds", elapsed), ("samples", samples), ("tokens", tokens)):
            self.counts[name] += more
        if not due:
            return
        here = {"peak_mem_mb": peak_mem_mb(self.device), "tokens_per_s": tokens / elapsed}
        known = {k: v for k, v in (ranks.total(self.sums) | self.counts | here).items() if k in self.columns}
        self.csv.write(**known | numbers | {"step": self.step})

    def finish(self, **numbers):
        """A last row of what was measured after the last step, if anything was; closes the CSV."""
        if numbers:
            self.csv.write(step=self.total, **numbers)
        self.csv.close()
        guard.release()
