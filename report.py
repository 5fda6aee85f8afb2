"""CSV logs and their samples -> one HTML page: curves, answers token by token, a token's own loss by hand.

The page needs no network. Its script is in utils/report.html. Each token's term of the loss comes from
grpo_loss or ppo_policy_loss themselves, and the page shows the steps that lead there.
Left out: what --tis_cap, --top_entropy and --overlong mask change; answers of several turns.
Run: python report.py logs/grpo.csv logs/ppo.csv --output logs/report.html
"""
import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import utils  # before torch: it sets how OpenMP's threads wait

import jinja2
import torch
import tyro
from torch.nn.utils.rnn import pad_sequence

from grpo import Objective, grpo_loss
from ppo import ppo_policy_loss
from utils.cli import atomic_write, beside, die, parse
from utils.figure import read_runs
from utils.page import LARGEST, panels, read_record, read_samples, with_steps

MARKS = b"script-src 'nonce-", b'{\n "runs": ['  # near the start of the page, and of --json's file


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[str, ...]] = ()  # CSVs; NAME-s0.csv, NAME-s1.csv … are one run
    output: str = ""  # the page; else beside the first CSV, with .html
    json: str = ""  # the page's data go there too


# ---- the loss of a token ----
def loss_terms(answers, loss):
    """Each token's part of the loss before the mean is taken -> [[a number a token], one list an answer].

    loss: an Objective, or PPO's ε. Each token is given as an answer of its own. Where the ratio is one of the
    whole answer, grpo_loss sees it all, with the advantage and the KL of all other tokens set to 0.
    """
    def column(name):
        rows = [a[name] if isinstance(a[name], list) else [a[name]] * len(a["tokens"]) for a in answers]
        rows = [[math.nan if x is None else x for x in row] for row in rows]
        return pad_sequence([torch.tensor(row, dtype=torch.float64) for row in rows], batch_first=True)

    logp, logp_old, logp_ref, adv = map(column, ("logp", "logp_old", "logp_ref", "advantage"))
    length = torch.tensor([len(answer["tokens"]) for answer in answers])
    mask = torch.arange(logp.shape[1]) < length[:, None]  # (G, T)
    whole = isinstance(loss, Objective) and loss.ratio == "sequence"
    columns = [x if whole else x.view(-1, 1) for x in (logp, logp_old, logp_ref, adv, mask)]

    def term(logp, logp_old, logp_ref, adv, mask, token):  # (T,) each; token is True at one place
        if not isinstance(loss, Objective):
            return ppo_policy_loss(logp[None], logp_old[None], adv[None], (mask & token)[None], loss)[0]
        adv, logp_ref = torch.where(token, adv, 0.0), torch.where(token, logp_ref, logp)
        by_group = [x[None, None] for x in (logp, logp_old, logp_ref, adv, mask)]
        return grpo_loss(*by_group, replace(loss, reduce="sum"), n_answers=1)[0]
    if not mask.any():
        return [[] for _ in answers]
    by_token = torch.vmap(term, (None, None, None, None, None, 0), chunk_size=64)  # bounds the memory
    each = torch.vmap(by_token, (0, 0, 0, 0, 0, None))
    values = each(*columns, torch.eye(columns[0].shape[1], dtype=torch.bool)).view(mask.shape)
    rows = [row[:n].tolist() for row, n in zip(values, length)]
    return [[float(f"{x:.10g}") if math.isfinite(x) else None for x in row] for row in rows]


def divisors(answers, loss, max_len):
    """What a token's term is divided by in the loss of this group, one number an answer."""
    lengths, G = [len(answer["tokens"]) for answer in answers], len(answers)
    if not isinstance(loss, Objective):
        return [max(1, sum(lengths))] * G
    by = {"answer": None, "token": max(1, sum(lengths)), "length": G * max_len, "sum": G}[loss.reduce]
    return [by or G * max(1, length) for length in lengths]


def loss_of(record, notes):
    """A run's loss by its record -> (Objective, PPO's ε or None; the same as the page wants it; max_new)."""
    args = record.get("args", {})
    try:
        max_len = int(args["max_new"])
        if "objective" in record:
            loss = Objective(**record["objective"])
            how = asdict(loss)
        else:
            args["value_lr"]  # PPO's alone
            loss = float(args["eps"])
            how = asdict(Objective(eps_low=loss, eps_high=loss, reduce="token")) | {"ppo": True}
        numbers = [how[name] or 0 for name in ("eps_low", "eps_high", "beta", "tau_pos", "tau_neg", "delta")]
        if max_len >= 1 and all(abs(x) <= LARGEST for x in numbers):
            return loss, how, max_len
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # a record of another kind
        pass  # as one that is not finite: the note says so
    notes.append("the record beside the CSV names no finite objective of grpo.py, so the page has no formula")
    return None, None, 1


def samples_of(csv, record, run, name, notes):
    """What the page shows of one CSV's samples, or None where there are none."""
    path = beside(csv, ".samples.jsonl")
    if not path.is_file():
        return None
    loss, how, max_len = loss_of(record, notes)
    vocabulary, evaluations = {}, read_samples(path, notes)
    for answers in (prompt["answers"] for evaluation in evaluations for prompt in evaluation["prompts"]):
        if loss is not None:
            for answer, term, by in zip(answers, loss_terms(answers, loss), divisors(answers, loss, max_len)):
                answer |= {"term": term, "divisor": by}
        for answer in answers:
            vocabulary |= zip(map(str, answer["tokens"]), answer.pop("decoded"))
    return {"run": run, "name": name, "objective": how, "max_new": max_len, "vocabulary": vocabulary,
            "evaluations": evaluations}


# ---- the page ----
def collected(files):
    """All that the page shows, as plain values."""
    runs = with_steps(read_runs(files))
    data = {"runs": [], "panels": panels(runs), "samples": []}
    for i, (name, frames) in enumerate(runs.items()):
        notes, records = [], []
        for frame in frames:
            csv = Path(frame.attrs["path"])
            if not csv.read_bytes().endswith((b"\n", b"\r")):
                notes.append(f"{csv.name} ends within a line, as a kill leaves it: that row is left out")
            records.append(read_record(beside(csv, ".json"), notes))
            label = name if len(frames) == 1 else csv.stem
            samples = samples_of(csv, records[-1], i, label, notes)
            data["samples"] += [samples] if samples and samples["evaluations"] else []
        if not any(samples["run"] == i for samples in data["samples"]):
            notes.append("no samples beside the CSV: train_grpo.py and train_ppo.py write them, unless "
                         "--samples is 0")
        steps = [int(frame["step"].dropna().max()) if frame["step"].notna().any() else 0 for frame in frames]
        data["runs"].append({"name": name, "files": [frame.attrs["path"] for frame in frames],
                             "last_step": max(steps), "notes": notes, "record": records[0]})
    return data


def page(data):
    """The data as HTML: one file, whose script is the only one that a browser may run."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    template = environment.from_string((Path(__file__).parent / "utils/report.html").read_text("utf-8"))
    nonce = hashlib.sha256(json.dumps(data).encode()).hexdigest()[:32]
    return template.render(data=data, nonce=nonce).encode("utf-8", "replace")


def main(args):
    if not args.files:
        die("no CSV given: python report.py logs/grpo.csv logs/ppo.csv")
    output = args.output or str(beside(args.files[0], ".html"))
    for flag, path, ending in (("output", output, ".html"), ("json", args.json, ".json")):
        records = [beside(csv, ".json").resolve() for csv in args.files]
        free = not os.path.isfile(path) or any(mark in Path(path).read_bytes()[:2000] for mark in MARKS)
        if path and (Path(path).suffix != ending or Path(path).resolve() in records or not free):
            die(f"--{flag} {path}: wanted a name that ends in {ending} and is no file of a run, nor another "
                "file that report.py hasn't written")
    data = collected(args.files)
    content = page(data)

    def both(file):  # where one can't be written, there is none
        file.write(content)
        if args.json:
            atomic_write(args.json, json.dumps(data, indent=1).encode())
            print(args.json)
    atomic_write(output, both)
    for run in data["runs"]:
        for note in run["notes"]:
            print(f"{run['name']}: {note}")
    print(f"{output}, {len(content) / 1e6:.1f} MB")


if __name__ == "__main__":
    main(parse(Args))
