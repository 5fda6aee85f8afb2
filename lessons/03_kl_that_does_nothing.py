"""β is large, and the KL term does nothing. Or it pulls, but not where KL(π‖π₀) points.

Met in: open-instruct#534, trl#4967, trl#6503.
Trap: an estimator with the right value can have another gradient, since the loss takes the sampled tokens as
fixed. k1's gradient is 0 on average, whatever π₀ is. k3's gradient is that of KL(π₀‖π).
Failure: k1 as a loss. Only the KL term acts here, without any reward, and yet the KL stays.
Cure: k3, as GRPO has it. For the gradient of KL(π‖π₀) itself: k2, or k3 times the ratio.
What tells them apart: the KL after 200 updates. It is exact: a sum over all ten actions.
Run: python lessons/03_kl_that_does_nothing.py
"""
from shared import show  # first: it finds all below
import torch
from grpo import Objective, grpo_loss

STARTS, ACTIONS, SAMPLES, UPDATES, RATE = 8, 10, 64, 200, 0.2  # eight policies at once, each a row of logits


def kl(p, q):
    return (p.exp() * (p - q)).sum(1)  # (STARTS, ACTIONS) -> (STARTS,)


def penalty_gradient(logits, logp_ref, actions, objective):
    """Of answers of one token, actions (STARTS, n). All advantages are 0: only the KL term is left."""
    logp, ref = (x.gather(1, actions)[..., None] for x in (logits.log_softmax(1), logp_ref))
    adv, mask = torch.zeros(actions.shape), torch.ones(logp.shape)
    loss, _ = grpo_loss(logp, logp.detach(), ref, adv, mask, objective)
    return STARTS * torch.autograd.grad(loss, logits)[0]


def descend(**how):
    objective = Objective(beta=1.0, **how)
    generator = torch.Generator().manual_seed(0)
    logits, logp_ref = torch.randn(2, STARTS, ACTIONS, generator=generator).log_softmax(2)
    logits.requires_grad_(True)
    wanted = torch.autograd.grad(kl(logits.log_softmax(1), logp_ref).sum(), logits)[0]
    mean = sum(logits.detach().exp()[:, [a]] * penalty_gradient(
        logits, logp_ref, torch.full((STARTS, 1), a), objective) for a in range(ACTIONS))
    curve = []
    for _ in range(UPDATES):
        logp = logits.detach().log_softmax(1)
        curve.append(kl(logp, logp_ref).mean().item())
        actions = torch.multinomial(logp.exp(), SAMPLES, replacement=True, generator=generator)
        logits.data -= RATE * penalty_gradient(logits, logp_ref, actions, objective)
    # A gradient of rounding errors has no direction: eps makes its cosine 0.
    cosine = torch.cosine_similarity(mean, wanted, dim=1, eps=1e-4).mean()
    return {"KL(π‖π₀)": curve, "mean gradient": mean.norm(dim=1).mean().item(),
            "its cosine to KL's": cosine.item()}


def lesson():
    return {"failure: k1": descend(kl="k1"), "cure: k3": descend(kl="k3"), "cure: k2": descend(kl="k2"),
            "cure: ratio · k3": descend(kl="k3", kl_ratio=True)}


if __name__ == "__main__":
    show(lesson)
