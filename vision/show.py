"""The end of a vision run: a table, a figure of its curves, a picture of its answers before and after."""
import io
from pathlib import Path

import torch

from utils.cli import atomic_write
from utils.device import write_run_record
from vision.data import batches, standard


def of_test(name):
    """The CSV's column for what a run measures once, at its end, on the test: eval_r -> test_r."""
    return f"test_{name.removeprefix('eval_')}"


def report(run, data, validation, test, columns, panels, made):
    """Writes the CSV's last row and the record, prints a table, writes figure and picture beside the CSV.

    validation, test: [before, after], each numbers and answers. columns: {number: title} of the table.
    panels: the CSV's columns in the figure, none for no figure. made: what else was written.
    """
    from rich.console import Console
    from rich.table import Table

    from utils.figure import plot_panels
    args, results = run.args, dict(zip(("before", "after", "test_before", "test_after"), validation + test))
    run.finish(samples=run.counts["samples"], seconds=run.counts["seconds"], **results["after"][0],
               **{of_test(name): value for name, value in results["test_after"][0].items()})
    record = run.record | {name: row for name, (row, _) in results.items()}
    write_run_record(args.log, args, device=str(run.device), dtype=run.dtype, **record)
    table = Table(f"{len(data.val)} images, test {len(data.test)}", *columns.values())
    for name, (row, _) in results.items():
        table.add_row(name.replace("_", ", "), *(f"{row[key]:.3f}" for key in columns))
    Console().print(table)
    stem = Path(args.log).with_suffix("")
    images, truth, _ = next(batches(data.test, 10, bad_images=args.bad_images))
    images = standard(images, inverse=True) if data.normalised else images
    rows = {name: results[f"test_{name}"][1][:len(images)].cpu() for name in ("before", "after")}
    grid(f"{stem}_images.png", images, truth, rows, data.classes)
    if panels:
        made = [plot_panels([args.log], panels, f"{stem}.png", optional=True), *made]
    if skipped := sorted(data.train.skipped | data.val.skipped | data.test.skipped):
        print(f"skipped {len(skipped)} files that can't be read, {skipped[0]} among them")
    print(f"wrote {', '.join(map(str, [args.log, f'{stem}_images.png', *made]))}")


def grid(path, images, truth, rows, names=None):
    """Writes a PNG, atomically, with a row of images for each entry of rows ({"before": …, "after": …}).

    images (n, 3, H, W) in 0 … 1. truth and every value of rows hold n answers of one kind: class indices (n,)
    with their `names`, boxes (n, 4) as shares of the sides, or masks (n, H, W). Green is true, red is wrong.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    n, _, height, width = images.shape
    fig = Figure(figsize=(1.1 * n + 0.5, 1.25 * len(rows) + 0.1), layout="constrained")
    axes = fig.subplots(len(rows), n, squeeze=False)
    for line, (label, answers) in zip(axes, rows.items()):
        line[0].set_ylabel(label)
        for ax, image, true, answer in zip(line, images, truth, answers):
            ax.imshow(image.permute(1, 2, 0).clamp(0, 1).cpu().numpy())
            ax.set(xticks=[], yticks=[])
            if true.dim() == 0:
                right = true == answer
                caption = names[answer] if right else f"{names[answer]}, not {names[true]}"
                color = "#1a7f37" if right else "#c0392b"
                ax.set_title(caption[:22], fontsize=7, color=color, parse_math=False)
            elif true.shape == (4,):
                for box, color in ((true, "#2ecc71"), (answer, "#e74c3c")):
                    x1, y1, x2, y2 = (box.cpu() * torch.tensor([width, height, width, height]) - 0.5).tolist()
                    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, lw=1.5))
            else:
                shade = torch.zeros(height, width, 4)
                shade[answer.bool()] = torch.tensor([0.9, 0.2, 0.15, 0.5])
                ax.imshow(shade.numpy())
                ax.contour(true.cpu().numpy(), [0.5], colors="#2ecc71", linewidths=1)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    atomic_write(path, buffer.getvalue())
