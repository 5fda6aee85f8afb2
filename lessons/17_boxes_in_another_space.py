"""The format reward rises to 1, and the IoU stays 0. Does the model not see?

Met in: VLM-R1#226, Visual-RFT#119.
Trap: a model gives a box in the coordinates that it knows: the pixels after its processor's resize, or
thousandths of the sides. The labels are pixels of the original image. Both look like four numbers.
Failure: the model's numbers are compared with the labels as they are.
Cure: each example has `scales`, pixels of the original for one unit of what the model says.
What tells them apart: what a perfect answer earns. Score one before any training; it must be near 1.
`python -m vision.vlm_grpo --preview` draws the true boxes and what the model says.
Run: python lessons/17_boxes_in_another_space.py
"""
from shared import show  # first: it finds all below
import torch
from vision.vlm.data import Scorer

SIZE, SEEN, N = (1280, 960), (448, 336), 200  # width and height of the file, and after the resize


def earned(unit, scales):
    """Perfect answers in the model's space; unit: how many pixels of the file are one of its units."""
    generator = torch.Generator().manual_seed(0)
    corner, side = torch.rand(2, N, 2, generator=generator)
    side = 0.1 + 0.2 * side  # shares of the image's sides
    corner = corner * (1 - side)
    boxes = torch.cat([corner, corner + side], 1) * torch.tensor(SIZE * 2)  # (N, 4), pixels of the file
    said = (boxes / torch.tensor(unit * 2)).round().int().tolist()
    texts = [", ".join(map(str, box)) for box in said]
    examples = [{"solution": box, "size": SIZE, "scales": scales} for box in boxes.tolist()]
    parts = Scorer.parts(texts, examples)
    return {"format": parts["format"].mean().item(), "IoU": parts["iou"].mean().item(),
            "IoU above 0.5": (parts["iou"] > 0.5).float().mean().item()}


def lesson():
    resized, thousandths = ([a / b for a, b in zip(SIZE, other)] for other in (SEEN, (1000, 1000)))
    return {"failure: pixels after the resize": earned(resized, (1, 1)),
            "cure: the same, with scales": earned(resized, resized),
            "failure: thousandths": earned(thousandths, (1, 1)),
            "cure: thousandths, with scales": earned(thousandths, thousandths)}


if __name__ == "__main__":
    show(lesson)
