"""GRPO under your fingers: move a slider, and the number, its slope and the drawing follow.

The functions are those of grpo.py and micro_grpo.py; the notebook only draws.
Left out: text policies, PPO (ppo.py).
Run: marimo edit lessons/play.py    (marimo run lessons/play.py hides the code)
"""
import importlib.util
import sys

if importlib.util.find_spec("marimo") is None:
    print("error: the notebook lessons/play.py needs the package 'marimo', which isn't installed: "
          "pip install '.[notebook]', then marimo edit lessons/play.py", file=sys.stderr)
    sys.exit(2)

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="nanoGRPO: play")


@app.cell(hide_code=True)
def _():
    import copy
    import sys
    from dataclasses import replace
    from pathlib import Path

    import marimo as mo
    import matplotlib.pyplot as plt
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository's own modules
    import micro_grpo as micro
    from grpo import CHOICES, OBJECTIVES, group_advantage, grpo_loss, kl_penalty

    torch.set_num_threads(1)  # The tensors are tiny: a second thread costs more than it saves.
    if mo.app_meta().mode == "script":  # python lessons/play.py: the cells run, and nobody sees them
        print("this notebook is read in a browser: marimo edit lessons/play.py")
    mo.md("""
    # GRPO, to play with

    Four parts: the advantage, the clip, the KL penalty, and a run. Guess first, then move a slider.
    """)
    return CHOICES, OBJECTIVES, copy, group_advantage, grpo_loss, kl_penalty, micro, mo, plt, replace, torch


@app.cell(hide_code=True)
def _(CHOICES, mo):
    rewards = mo.ui.array([mo.ui.slider(0, 1, 0.05, value, show_value=True, label=f"R{i}")
                           for i, value in enumerate((0.25, 0.5, 0.5, 1.0), 1)])
    baseline = mo.ui.dropdown(CHOICES["baseline"], "mean", label="baseline")
    scale = mo.ui.dropdown(CHOICES["scale"], "group", label="scale")
    mo.vstack([mo.md("""
    ## 1. Rewards become advantages

    Four answers to one prompt. The advantage is (R − baseline) / scale. GRPO takes the group's mean and the
    group's standard deviation.

    - Make all rewards equal. What is left to learn?
    - Move one reward by 0.05 from there. How large are the advantages now, and why?
    - Take the baseline `none`. Which answers does the policy now make more likely?
    """), mo.hstack([mo.vstack(list(rewards)), mo.vstack([baseline, scale])], justify="start", gap=3)])
    return baseline, rewards, scale


@app.cell(hide_code=True)
def _(baseline, group_advantage, plt, rewards, scale, torch):
    adv = group_advantage(torch.tensor([rewards.value]), baseline.value, scale.value)[0]
    _figure, _axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    _bars = _axes.bar([f"answer {i}\nR = {r:.2f}" for i, r in enumerate(rewards.value, 1)], adv,
                      color=["#0072B2" if a > 0 else "#D55E00" for a in adv])
    _axes.bar_label(_bars, [f"{a:+.2f}" for a in adv], padding=2)
    _axes.axhline(0, color="#888888", linewidth=1)
    _axes.margins(y=0.2)
    _axes.set_ylabel("advantage")
    _figure
    return (adv,)


@app.cell(hide_code=True)
def _(mo):
    ratio = mo.ui.slider(0.4, 1.8, 0.02, 1.3, show_value=True, label="ratio r = π / π_old")
    eps = mo.ui.slider(0.05, 0.5, 0.05, 0.2, show_value=True, label="ε")
    token_adv = mo.ui.slider(-2, 2, 0.25, 1, show_value=True, label="advantage A")
    mo.vstack([mo.md("""
    ## 2. The ratio, the clip and the slope

    One token. The policy climbs min(r·A, clip(r, 1−ε, 1+ε)·A). The slope is the gradient with respect to
    the token's log-probability. Where the clip acts, it is 0.

    - Put r at 1. Is the slope 0 there?
    - For which sign of A does the clip act above 1+ε? And below 1−ε?
    """), ratio, eps, token_adv])
    return eps, ratio, token_adv


@app.cell(hide_code=True)
def _(OBJECTIVES, eps, grpo_loss, mo, plt, ratio, replace, token_adv, torch):
    def surrogate_of(r):
        """grpo_loss's objective of one token, and its slope in the token's log-probability."""
        logp = torch.full((1, 1, 1), float(r)).log().requires_grad_(True)  # (B, G, T)
        row = replace(OBJECTIVES["grpo"], eps_low=eps.value, eps_high=eps.value, beta=0.0)
        old, mask = torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
        loss, _ = grpo_loss(logp, old, old, torch.full((1, 1), float(token_adv.value)), mask, row)
        return -loss.item(), 0.0 - torch.autograd.grad(loss, logp)[0].item()

    _grid = torch.linspace(0.4, 1.8, 140)  # no point lies on a corner, where torch halves the slope
    _curve, _slopes = zip(*map(surrogate_of, _grid))
    surrogate, slope = surrogate_of(ratio.value)
    _figure, _axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
    _axes.plot(_grid, _curve, color="#0072B2", label="surrogate")
    _axes.plot(_grid, _slopes, color="#D55E00", linestyle="--", label="slope")
    _axes.plot([ratio.value] * 2, [surrogate, slope], "o", color="#000000")
    _axes.axvspan(1 - eps.value, 1 + eps.value, color="#EEEEEE", zorder=0, label="1−ε to 1+ε")
    _axes.set_xlabel("ratio r")
    _axes.legend()
    _said = f"At r = {ratio.value:.2f}: surrogate **{surrogate:+.2f}**, slope **{slope:+.2f}**."
    mo.vstack([_figure, mo.md(_said)])
    return slope, surrogate


@app.cell(hide_code=True)
def _(mo):
    tilt = mo.ui.slider(-2, 2, 0.1, 1, show_value=True, label="how far π is from π₀")
    draws = mo.ui.slider(steps=[1, 4, 16, 64, 256, 1024, 4096], value=64, show_value=True, label="draws")
    beta = mo.ui.slider(0, 1, 0.02, 0.04, show_value=True, label="β")
    mo.vstack([mo.md("""
    ## 3. β and three estimators of the KL

    π₀ draws three tokens with equal probability, and π leans to one side. An estimator sees only tokens that
    π has drawn. The exact KL adds up all three. A bar is one standard error to each side.

    - Which estimator is unbiased? Which one can be negative? Which one has the least spread?
    - The last two columns are the slope of β·k as a loss, in expectation. k1's is 0: it pulls nowhere. k3's
      is that of KL(π₀‖π).
    """), tilt, draws, beta])
    return beta, draws, tilt


@app.cell(hide_code=True)
def _(beta, draws, kl_penalty, mo, plt, tilt, torch):
    _logits = (tilt.value * torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)).requires_grad_(True)
    _logp = _logits.log_softmax(0)  # (3,)
    _ref = torch.full_like(_logp, 1 / 3).log()
    _pi = _logp.detach().exp()
    _kl = (_logp.exp() * (_logp - _ref)).sum()  # KL(π‖π₀)
    kl_exact = _kl.item()
    _want = torch.autograd.grad(_kl, _logits, retain_graph=True)[0].norm().item()
    _tokens = torch.multinomial(_pi, draws.value, True, generator=torch.Generator().manual_seed(0))
    _rows, kl_mean = [], {}
    _figure, _axes = plt.subplots(figsize=(7, 2.2), layout="constrained")
    for _name in ("k1", "k2", "k3"):
        _each = kl_penalty(_logp, _ref, _name)  # (3,): what each token would say
        _seen = _each.detach()[_tokens]  # (draws,)
        kl_mean[_name] = (_pi * _each.detach()).sum().item()
        _error = _seen.std(correction=0).item() / draws.value**0.5
        _axes.errorbar(_seen.mean(), _name, xerr=_error, fmt="o", color="#0072B2", capsize=4)
        _pull = torch.autograd.grad((_pi * _each).sum(), _logits, retain_graph=True)[0].norm().item()
        _rows.append({"estimator": _name, "mean of the draws": f"{_seen.mean():.3f}",
                      "expectation": f"{kl_mean[_name]:.3f}", "exact KL": f"{kl_exact:.3f}",
                      "slope of β·k": f"{beta.value * _pull:.4f}",
                      "slope of β·KL": f"{beta.value * _want:.4f}"})
    _axes.axvline(kl_exact, color="#D55E00", linestyle="--", label="exact KL(π‖π₀)")
    _axes.set_xlabel("nats a token")
    _axes.invert_yaxis()
    _axes.legend()
    mo.vstack([_figure, mo.ui.table(_rows, selection=None)])
    return kl_exact, kl_mean


@app.cell(hide_code=True)
def _(copy, micro, mo, torch):
    torch.manual_seed(0)
    policy = micro.Policy()
    examples, _ = micro.make_examples()
    micro.pretrain(policy, examples)
    reference = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), micro.LR, betas=(0.9, 0.95))

    def one_step():
        """micro_grpo.py's loop, once, with a fixed learning rate -> what the step saw and did."""
        prompts = examples[torch.randint(len(examples), (micro.B, 1)), :micro.P].expand(-1, micro.G, -1)
        tokens = micro.sample(policy, prompts)  # (B, G, P + T)
        reward = micro.reward_of(tokens)  # (B, G)
        adv = (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)
        logp_old, logp_ref = (micro.log_prob(p, tokens).detach() for p in (policy, reference))
        for _ in range(micro.UPDATES):
            loss, kl, _ = micro.grpo_loss(micro.log_prob(policy, tokens), logp_old, logp_ref, adv)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        change = (micro.log_prob(policy, tokens).detach() - logp_old).sum(2)  # (B, G)
        group = [{"answer": "".join("0123456789="[t] for t in row), "reward": f"{r:.2f}",
                  "advantage": f"{a:+.2f}", "probability, times": f"{c.exp():.2f}"}
                 for row, r, a, c in zip(tokens[0].tolist(), reward[0], adv[0], change[0])]
        return {"reward": reward.mean().item(), "kl": kl.item(), "group": group}

    history = []
    step = mo.ui.slider(1, 100, 1, 3, show_value=True, debounce=True, full_width=True, label="step")
    mo.vstack([mo.md("""
    ## 4. A run, step by step

    The policy of `micro_grpo.py`, after its supervised start, learns to sort four digits. Move the slider to
    the right: the missing steps are computed, each in about a tenth of a second. Move it back to see an
    earlier step.

    The table is one group. Its last column says by what factor the update changed an answer's probability.

    - Which answers become more likely? Look at the sign of the advantage.
    - Does an answer with advantage 0 keep its probability? It shares its tokens' weights with the others.
    """), step])
    return history, one_step, step


@app.cell(hide_code=True)
def _(history, mo, one_step, plt, step):
    while len(history) < step.value:
        history.append(one_step())
    _figure, _both = plt.subplots(1, 2, figsize=(7, 2.4), layout="constrained")
    for _axes, _name, _label in zip(_both, ("reward", "kl"), ("mean reward", "KL to π₀ (nats a token)")):
        _axes.plot(range(1, len(history) + 1), [row[_name] for row in history], ".-", color="#0072B2")
        _axes.axvline(step.value, color="#D55E00", linestyle="--")
        _axes.set_xlabel("step")
        _axes.set_ylabel(_label)
    _shown = history[step.value - 1]
    _said = f"Step {step.value}: mean reward **{_shown['reward']:.3f}**, KL **{_shown['kl']:.3f}**."
    mo.vstack([_figure, mo.md(_said), mo.ui.table(_shown["group"], selection=None)])
    return


if __name__ == "__main__":
    app.run()
