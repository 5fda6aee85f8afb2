"""What the CNN, the ViT and CLIP share when a class is drawn: a contextual bandit, so T = 1.

The C classes can be enumerated. So KL and entropy are exact sums, where a text policy has only samples.
Left out: boxes and masks, whose rewards are in rewards.py. Run: python -m vision.cnn_grpo
"""
import torch

from utils import checkpoint
from utils.cli import die
from utils.rewards import load_reward
from vision import rewards
from vision.data import batches


# ---- the distribution over all actions ----
def draw(logp, group_size, generator):
    """G classes for each image, with replacement: log-probabilities (B, C) -> (B, G). NaN ends the run."""
    if logp.isnan().any():
        die("the policy gives no probabilities any more (NaN): lower --lr, go on from the last checkpoint")
    action = torch.multinomial(logp.exp().cpu(), group_size, replacement=True, generator=generator)
    return action.to(logp.device)


def exact_kl(logp, logp_ref):
    """KL(π‖π₀) = Σ_a π(a)·(log π(a) − log π₀(a)) over all V actions, in nats: (…, V) twice -> (…)."""
    return (logp.exp() * (logp - logp_ref)).sum(-1)


def entropy(logp, temperature=1.0):
    """−Σ_a π(a)·log π(a) over all V actions, in nats, of π at a temperature: (…, V) -> (…)."""
    logp = logp if temperature == 1 else (logp / temperature).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


# ---- rewards ----
def frac_zero_std(reward):
    """The share of groups that teach nothing: all rewards are equal (their float32 std need not be 0)."""
    return (reward == reward[:, :1]).all(1).float().mean()


def refuse_reward(name, task):
    """Leaves with a message where the reward does not score what the task draws: a class, a box or a mask."""
    others = [other for other, names in rewards.TASKS.items() if name in names and other != task]
    if others or task != "class" and name not in rewards.TASKS[task]:
        hint = "".join(f", or `python -m vision.vit_grpo --task {other}`" for other in others)
        die(f"--reward {name} doesn't score a {task}: wanted {', '.join(rewards.TASKS[task])}{hint}")


def class_reward(name, known, classes):
    """The reward of a drawn class, one of `known` {name: function} or FILE.py:FUNCTION.

    -> function (action (B, G), label (B,), probability (B, C), names of the B images) -> reward (B, G).
    A user's function gets names: completions of the drawn classes, label of the true ones, prompts of images.
    """
    if name in known:
        return lambda action, label, probability, names: known[name](action, label, probability)
    function = load_reward(name, known)

    def users_reward(action, label, probability, names):
        G = action.shape[1]
        scores = function(completions=[classes[a] for a in action.flatten().tolist()],
                          prompts=[image for image in names for _ in range(G)],
                          label=[classes[y] for y in label.tolist() for _ in range(G)])
        return torch.tensor(scores, device=action.device).view(action.shape)
    return users_reward


@torch.no_grad()
def pick_reward(name, args, data, start, device):
    """The reward of that name with the flags of args; the similarity is that of the start's features."""
    if name in (*rewards.TASKS["box"], *rewards.TASKS["mask"]):
        return lambda answer, target, probability, names: getattr(rewards, name)(answer, target)
    n_classes = len(data.classes)
    if name == "topk" and not 1 <= args.topk <= n_classes:
        die(f"--topk {args.topk}: wanted 1 to {n_classes}, the number of classes")
    if name in ("topk", "smooth"):
        features, labels = [], []
        for images, label, _ in batches(data.train, 64, 0, 0, 32, args.num_workers, args.bad_images):
            features.append(start.features(images.to(device)))
            labels.append(label.to(device))
        similarity = rewards.class_similarity(torch.cat(features), torch.cat(labels), n_classes)
    return class_reward(name, {
        "bandit": lambda action, label, probability: rewards.bandit(action, label),
        "topk": lambda action, label, probability: rewards.topk(action, label, similarity, args.topk),
        "margin": lambda action, label, p: rewards.margin(action, label, p, args.margin_alpha),
        "smooth": lambda action, label, probability: rewards.smooth(action, label, similarity, args.tau),
    }, data.classes)


# ---- the start, trained with a few labels ----
def supervised_steps(policy, train, steps, seed, lr=1e-3, **reading):
    """Yields (step, images, target) of at most 64 images, then applies the caller's gradients by AdamW."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr)
    loader = batches(train, min(64, len(train)), seed, 0, steps, **reading)
    for step, (images, target, _) in enumerate(loader):
        yield step, images, target
        optimizer.step()
        optimizer.zero_grad()


# ---- the best policy so far ----
def keep_best(run, policy, path, kind, numbers, metric, **content):
    """Writes the policy to `path` where numbers[metric] is the greatest so far (run.counts["best"])."""
    if numbers[metric] > run.counts["best"]:
        run.counts["best"] = numbers[metric]
        checkpoint.write(path, kind, model=policy.state_dict(), **{metric: numbers[metric]}, **content)
