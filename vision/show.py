"""A picture of what a vision policy answers: a row a policy (before, after), a column an image."""
import io

import torch

from utils.cli import atomic_write


def grid(path, images, truth, rows, names=None):
    """Writes a PNG, atomically.

    images (n, 3, H, W) in 0 … 1; truth and every value of rows ({"before": …, "after": …}) hold n answers of
    one kind: class indices (n,) with their `names`, boxes (n, 4) as shares of the sides, or masks (n, H, W) of
    0 and 1. A class caption is green where right, red where wrong; the true box or outline is green, the
    answer's red.
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
                ax.set_title(caption[:22], fontsize=7, color="#1a7f37" if right else "#c0392b")
            elif true.shape == (4,):
                for box, color in ((true, "#2ecc71"), (answer, "#e74c3c")):
                    x1, y1, x2, y2 = (box.cpu() * torch.tensor([width, height, width, height]) - 0.5).tolist()
                    ax.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, color=color, linewidth=1.5))
            else:
                shade = torch.zeros(height, width, 4)
                shade[answer.bool()] = torch.tensor([0.9, 0.2, 0.15, 0.5])
                ax.imshow(shade.numpy())
                ax.contour(true.cpu().numpy(), [0.5], colors="#2ecc71", linewidths=1)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=130)
    atomic_write(path, buffer.getvalue())
