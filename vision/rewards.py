"""The rewards of an answer about an image: pure functions on tensors, (B, G, …) -> (B, G).

A reward that is the same for all answers of a group teaches nothing: "is the label among the policy's k best"
is such a one. So here every reward depends on the action that was *sampled*, and on the label.
"""
import torch


# ---- a class was drawn: action (B, G), label (B,) ----
def bandit(action, label):
    """1 for the true class, else 0."""
    return (action == label[:, None]).float()  # (B, G)


def topk(action, label, similarity, k=5):
    """1 − rank/k, and 0 from rank k on; rank: how many classes are nearer to the label than the sample.

    The label has rank 0 and earns 1. With k = 1 it is `bandit`. similarity (C, C) is as in `smooth`.
    """
    nearest = similarity.clone().fill_diagonal_(2.0)  # cosines end at 1: a class is nearest to itself
    rank = nearest.argsort(dim=1, descending=True, stable=True).argsort(1)  # (C, C)
    return (1 - rank[label].gather(1, action) / k).clamp(min=0)


def margin(action, label, probability, alpha=1.0):
    """1 for the true class y, −α·max(0, p(a) − p(y)) for a wrong one: π pays for preferring it to y.

    probability (B, C) is the policy's when it sampled, without gradient. With α = 0 it is `bandit`.
    """
    lead = (probability.gather(1, action) - probability.gather(1, label[:, None])).clamp(min=0)
    return bandit(action, label) - alpha * lead


def smooth(action, label, similarity, tau=0.3):
    """exp((s(a, y) − 1)/τ): 1 for the true class y, less for less similar ones; similarity s (C, C)."""
    return torch.exp((similarity[label].gather(1, action) - 1) / tau)


def class_similarity(features, label, n_classes):
    """Cosines between the class means of a frozen network's features (N, D) -> (C, C), 1 on the diagonal.

    The means are centred first. Features after a ReLU all point the same way: every cosine would be near 1.
    """
    total = torch.zeros(n_classes, features.shape[1], device=features.device).index_add_(0, label, features)
    mean = total / label.bincount(minlength=n_classes).clamp(min=1)[:, None]
    unit = torch.nn.functional.normalize(mean - mean.mean(0), dim=1)
    unit = unit * (label.bincount(minlength=n_classes) > 0)[:, None]  # a class never seen is like no other
    cosine = unit @ unit.T  # some CPUs round each half on its own
    return ((cosine + cosine.T) / 2).clamp(-1, 1).fill_diagonal_(1.0)


# ---- a box was drawn: (B, G, 4) as x1, y1, x2, y2, in the units of the target (B, 4) ----
def areas(box, target):
    """Areas of intersection, union and enclosing box, and which pairs are of two real boxes: (B, G) each."""
    target = target[:, None].expand_as(box)
    low, high = torch.maximum(box[..., :2], target[..., :2]), torch.minimum(box[..., 2:], target[..., 2:])
    around = torch.maximum(box[..., 2:], target[..., 2:]) - torch.minimum(box[..., :2], target[..., :2])
    sides = [(b[..., 2:] - b[..., :2]) for b in (box, target)]
    inter = (high - low).clamp(min=0).prod(-1)
    union = sum(s.prod(-1) for s in sides) - inter
    valid = torch.stack([(s > 0).all(-1) for s in sides]).all(0) & (union > 0)  # tiny sides' areas underflow
    return inter, union, around.prod(-1), valid


def iou(box, target):
    """Intersection over union, 0 … 1. A box without area or with swapped corners earns 0."""
    inter, union, _, valid = areas(box, target)
    return torch.where(valid, inter / union.where(valid, 1.0), 0.0)


def giou(box, target):
    """IoU − (enclosing − union)/enclosing, −1 … 1 (arXiv:1902.09630): boxes that are apart differ, too.

    A box without area earns 0, more than one that is apart. So a policy has to start where boxes overlap.
    """
    inter, union, around, valid = areas(box, target)
    value = inter / union.where(valid, 1.0) - (around - union) / around.where(valid, 1.0)
    return torch.where(valid, value, 0.0)


def point_in_box(point, box):
    """1 where the point (B, G, 2) lies in the box (B, 4), its edge included, else 0; 0 for an empty box."""
    box = box[:, None]  # (B, 1, 4)
    inside = (point >= box[..., :2]).all(-1) & (point <= box[..., 2:]).all(-1)
    return (inside & (box[..., 2:] > box[..., :2]).all(-1)).float()


def distance(point, box):
    """1 where the point (B, G, 2) is the centre of the box (B, 4). It falls to 0 one diagonal away."""
    centre, diagonal = (box[:, :2] + box[:, 2:]) / 2, (box[:, 2:] - box[:, :2]).norm(dim=1)
    away = (point - centre[:, None]).norm(dim=2) / diagonal[:, None].clamp(min=1e-9)
    return (1 - away).clamp(min=0)


# ---- a mask was drawn: (B, G, …) of 0 and 1, target (B, …) ----
def dice(mask, target):
    """2·|A∩B| / (|A| + |B|), 0 … 1; 0 where both are empty."""
    mask, target = mask.flatten(2).float(), target.flatten(1)[:, None].float()
    return 2 * (mask * target).sum(2) / (mask.sum(2) + target.sum(2)).clamp(min=1)


# ---- which of them score which answer; the first one also measures it ----
TASKS = {"class": ("bandit", "topk", "margin", "smooth"), "box": ("iou", "giou"), "mask": ("dice",)}
