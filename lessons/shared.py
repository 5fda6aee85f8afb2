"""What all lessons share: the way to the repository's modules, a tiny task, the table and the figure.

A lesson is a function `lesson()` -> {row: {column: number}}. A row's name begins with "failure: " or
"cure: ", but for rows that only compare. A list of numbers is a curve: the table shows its first and last.
Run: by a lesson, as in python lessons/01_loss_is_zero.py
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a lesson runs from any folder

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)
import torch  # noqa: E402
from generate import generate, score  # noqa: E402
from model import GPTConfig  # noqa: E402
from utils.cli import atomic_write, die  # noqa: E402

torch.set_num_threads(1)  # The tensors are tiny: a second thread costs more than it saves.
B, G, P, T, VOCAB = 8, 8, 4, 6, 12  # prompts, answers to each, tokens of a prompt and of an answer


# ---- a task that a tiny policy learns in seconds ----
def tiny_policy(seed, vocab_size=VOCAB, block_size=16, dropout=0.0):
    """An untrained GPT of one block, in eval mode; the global generator starts from the seed."""
    torch.manual_seed(seed)
    return GPTConfig(vocab_size, block_size, n_layer=1, n_head=2, n_embd=32, dropout=dropout).build().eval()


def rollout(policy, generator, temperature=1.0):
    """Answers to random prompts -> tokens (B·G, P + T), reward (B, G), logp_old and mask (B, G, T).

    An answer earns the share of its tokens that are below 6. An untrained policy earns about 0.5.
    """
    prompts = torch.randint(VOCAB, (B, P), generator=generator)
    tokens, logp_old, mask = generate(policy, prompts, T, G, temperature, generator=generator)
    reward = (tokens[:, P:] < 6).float().mean(1)
    return tokens, reward.view(B, G), logp_old.view(B, G, T), mask.view(B, G, T)


def log_prob(policy, tokens, temperature=1.0):
    """Of the answers: tokens (B·G, P + T) -> (B, G, T)."""
    return score(policy, tokens, P, temperature)[0].view(B, G, T)


def adam(policy, lr):
    return torch.optim.AdamW(policy.parameters(), lr, weight_decay=0.0)


def start(seed, lr, **config):
    """What a run begins with -> tiny policy, its optimizer, the generator of its draws."""
    policy = tiny_policy(seed, **config)
    return policy, adam(policy, lr), torch.Generator().manual_seed(seed)


def note(curves, **numbers):
    """Adds a step's numbers to their curves."""
    for name, x in numbers.items():
        curves.setdefault(name, []).append(x.item())


def update(optimizer, loss):
    """One step of the optimizer -> the gradient's norm before it was clipped to 1."""
    optimizer.zero_grad()
    loss.backward()
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    return grad_norm


# ---- the table and the figure ----
def columns(rows):
    return list(dict.fromkeys(column for row in rows.values() for column in row))


def shown(x):
    """Three digits of a number; of a curve, its first and its last number."""
    return f"{x[0]:.3g} -> {x[-1]:.3g}" if isinstance(x, list) else f"{x:.3g}"


def table(rows):
    """Rows -> plain text: a line a row, aligned columns."""
    lines = [["", *columns(rows)]]
    for name, row in rows.items():
        lines.append([name, *(shown(row[column]) if column in row else "" for column in columns(rows))])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
                     for line in lines)


def figure(rows, path):
    """A panel a column: curves as lines, single numbers as bars. A row keeps its colour."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from utils.figure import COLORS, DASHES, STYLE
    with rc_context(STYLE):
        fig = Figure(figsize=(max(6.4, 3.2 * len(columns(rows))), 3.2), layout="constrained")
        for i, column in enumerate(columns(rows)):
            ax = fig.add_subplot(1, len(columns(rows)), i + 1, title=column)
            for k, (name, row) in enumerate(rows.items()):
                if isinstance(row.get(column), list):
                    ax.plot(row[column], color=COLORS[k % 7], linestyle=DASHES[k % 5], label=name)
                    ax.set_xlabel("step")
                    ax.locator_params(axis="x", integer=True)
                elif column in row and abs(row[column]) < float("inf"):  # no bar of an inf or a NaN
                    ax.bar(k, row[column], color=COLORS[k % 7], label=name)
                    ax.set_xticks([])
        fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=2)
        atomic_write(path, lambda file: fig.savefig(file, format="png", dpi=150))


def show(lesson):
    """Prints what the lesson says and its table; with --plot it also draws logs/NAME.png."""
    script = Path(sys.argv[0])
    if sys.argv[1:] not in ([], ["--plot"]):
        die(f"{script.name} {' '.join(sys.argv[1:])}: wanted no argument, or --plot")
    print(lesson.__globals__["__doc__"].strip(), end="\n\n", flush=True)
    rows = lesson()
    print(table(rows))
    if sys.argv[1:]:
        figure(rows, f"logs/{script.stem}.png")
        print(f"wrote logs/{script.stem}.png")
