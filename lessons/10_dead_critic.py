"""PPO runs without an error, and the critic never learns.

Met in: CoursIA#15256.
Trap: the rollout collects values without a gradient, as it must. If the value loss takes these values, it is
a constant. The policy's loss has a gradient, so backward() of the sum doesn't complain.
Failure: value_loss(value_old, value_old, returns, mask).
Cure: the critic reads the answers again in the update: value_loss(value, value_old, returns, mask).
What tells them apart: explained_variance, 0 for a critic that knows nothing and 1 for one that knows all.
Run: python lessons/10_dead_critic.py
"""
from shared import P, log_prob, note, rollout, show, start, update  # first: it finds all below
import torch
from ppo import ValueModel, gae, ppo_policy_loss, token_reward, value_loss, whiten

UPDATES = 60


def train(detached):
    """The reward of lesson 1, less 1, plus 1 if the prompt ends below 6. A critic can know this part."""
    policy, optimizer, generator = start(seed=0, lr=1e-4)
    critic = ValueModel(policy.config)
    optimizer.add_param_group({"params": critic.parameters(), "lr": 1e-2})
    curves = {}
    for _ in range(UPDATES):
        tokens, reward, logp_old, mask = rollout(policy, generator)
        reward = reward - 1 + (tokens[:, P - 1] < 6).view(reward.shape)
        with torch.no_grad():
            value_old = critic(tokens[:, :-1])[:, P - 1:].view(mask.shape)  # where each token is predicted
        paid = token_reward(reward, logp_old, logp_old, mask, beta=0.0)
        adv, returns = gae(paid, value_old, mask)
        value = value_old if detached else critic(tokens[:, :-1])[:, P - 1:].view(mask.shape)
        loss, _ = ppo_policy_loss(log_prob(policy, tokens), logp_old, whiten(adv, mask), mask)
        loss_v, stats = value_loss(value, value_old, returns, mask)
        update(optimizer, loss + loss_v)
        note(curves, explained_variance=stats["explained_variance"], value_loss=loss_v)
    return curves


def lesson():
    return {"failure: values of the rollout": train(detached=True),
            "cure: values of the update": train(detached=False)}


if __name__ == "__main__":
    show(lesson)
