"""What report.py's page shows, but for the loss: a run's curves, its record, its samples.

Left out: how it looks, which is in report.html beside this file.
"""
import json

from utils.cli import die
from utils.figure import GRID, LABELS, band, collect

STEPS = ("step", "Step", "_step", "global_step")  # what we and other tools call it
FIRST = [*GRID, "eval_r", "eval_gold", "eval_acc"]  # the panels that are open
COUNTS = {*STEPS, "samples", "tokens", "seconds", "peak_mem_mb", "tokens_per_s"}
EVALUATIONS = 40  # at most on a page
POINTS = 400  # of a curve at most
PER_TOKEN = ("logp", "logp_old", "logp_ref", "entropy")  # lists of an answer
LARGEST = 1e150  # of a curve or a sample: the square of it still fits


# ---- curves ----
def panels(runs):
    """-> [{metric, label, lines: [{run, x, y, std}]}], those of FIRST in front."""
    columns = {name for frames in runs.values() for frame in frames for name in frame}
    rest = sorted(columns - COUNTS - set(FIRST))
    curves_of = collect(runs, [*FIRST, *rest], "step", optional=True)
    names, result = list(runs), []
    for metric, of_run in curves_of.items():
        lines = []
        for name, curves in of_run.items():
            several = len(curves) > 1
            x, y, std = band(curves) if several else (*curves[0], None)
            kept = slice(None, None, -(-len(x) // POINTS) or 1)
            lines.append({"run": names.index(name), "x": short(x[kept], 12), "y": short(y[kept]),
                          "std": short(std[kept]) if several else None})
        result.append({"metric": metric, "label": LABELS.get(metric, metric), "first": metric in FIRST,
                       "lines": lines})
    return result


def short(values, digits=6):
    return [float(f"{value:.{digits}g}") for value in values]


def with_steps(runs):
    """The runs with their column of steps named step."""
    for frames in runs.values():
        for i, frame in enumerate(frames):
            name = next((name for name in STEPS if name in frame), None)
            if name is None:
                die(f"{frame.attrs['path']} has no column {', '.join(STEPS[:-1])} or {STEPS[-1]}; it has: "
                    f"{', '.join(frame)}. Wanted the CSV of a run")
            words = {column for column, cells in frame.attrs["words"].items() if cells} - {name, *FIRST}
            frames[i] = frame.where(frame.abs() <= LARGEST).drop(columns=words).rename(columns={name: "step"})
            frames[i].attrs = frame.attrs
    return runs


# ---- what lies beside a CSV ----
def read_record(path, notes):
    try:
        record = json.loads(path.read_text(encoding="utf-8"), parse_constant=str)  # inf
        json.dumps(record, allow_nan=False)  # 1e999 is inf, too, and no browser reads that
        if isinstance(record, dict) and isinstance(record.get("args", {}), dict):
            return record
    except Exception:  # a damaged file raises nearly anything, RecursionError included
        pass
    notes.append(f"no record of a run at {path.name}: arguments and commit are unknown")
    return {}


def read_samples(path, notes):
    """The evaluations in a run's NAME.samples.jsonl -> list of dicts, as samples.py writes them."""
    try:
        *lines, torn = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        die(f"can't read {path}: {error}")
    if torn:
        notes.append(f"{path.name} ends within a line, as a kill leaves it: that line is left out")
    evaluations = []
    for number, line in enumerate(lines, 1):
        try:
            evaluations.append(checked(json.loads(line, parse_constant=lambda name: None)))
        except Exception as error:  # other JSON than ours raises nearly anything
            die(f"{path}, line {number}: not the samples of a run ({type(error).__name__}: {error}): move it "
                "away, and the report has the curves alone")
    if len(evaluations) > EVALUATIONS:
        last = len(evaluations) - 1
        notes.append(f"{EVALUATIONS} of the {last + 1} evaluations in {path.name}, at equal distances")
        evaluations = [evaluations[round(i * last / (EVALUATIONS - 1))] for i in range(EVALUATIONS)]
    return evaluations


def checked(line):
    """The line, if it has what the page shows; else an error."""
    step = line["step"]
    answers = [answer for prompt in line["prompts"] for answer in prompt["answers"]]
    for answer in answers:
        n = len(answer["tokens"])
        adv = answer["advantage"] if isinstance(answer["advantage"], list) else [answer["advantage"]] * n
        lists = [answer["decoded"], adv, *(answer[name] for name in PER_TOKEN)]
        if {len(values) for values in lists} != {n}:
            raise ValueError("an answer's lists differ in length")
        numbers = [x for values in lists[1:] for x in values if x is not None]
        if not all(abs(x) <= LARGEST for x in [step, answer["reward"], *answer["tokens"], *numbers]):
            raise ValueError("a number is too large")
        if not all(isinstance(text, str) for text in [answer["text"], *answer["decoded"]]):
            raise ValueError("an answer or a token is no text")
    whole = all(prompt["answers"] and isinstance(prompt["prompt"], str) for prompt in line["prompts"])
    if not answers or not whole:
        raise ValueError("no prompt with answers")
    return line
