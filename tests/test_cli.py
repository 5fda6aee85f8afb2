"""The command line: canonical and historical names of flags, groups of --help, least values."""
import contextlib
import inspect
import io
import re
import runpy
import sys
from dataclasses import dataclass, field, is_dataclass
from typing import Annotated, ClassVar, Literal

import pytest
from helpers import ROOT, plain

import sft
from utils import cli


@dataclass
class Args:
    # ---- the algorithm ----
    steps: Annotated[int, cli.AtLeast(1)] = 5  # training steps
    beta: Annotated[float | None, cli.AtLeast(0.0)] = None  # weight of the KL; None: none
    # ---- the task ----
    words: tuple[str, ...] = ()  # several
    engine: dict[str, str] = field(default_factory=lambda: {"bf16": ""})  # any field, as --engine.NAME
    # ---- speed and memory: the algorithm stays the same ----
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the matrix products
    resume: bool = False  # go on
    ALIASES: ClassVar[dict[str, str]] = {"grpo_steps": "steps", "use_amp": "dtype=bf16", "kl_coef": "beta"}


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["x.py", *words])
    return cli.parse(Args)


@pytest.mark.parametrize("words, want", [
    ([], Args()),
    (["--grpo_steps", "3"], Args(steps=3)), (["--grpo-steps=3"], Args(steps=3)),
    (["--steps", "3"], Args(steps=3)), (["--grpo_steps", "3", "--grpo-steps", "4"], Args(steps=4)),
    (["--use-amp", "--resume"], Args(dtype="bf16", resume=True)),
    (["--use_amp", "--dtype", "bf16"], Args(dtype="bf16")),
    (["--kl-coef", "0.5", "--beta=0.5"], Args(beta=0.5)), (["--kl_coef", "None"], Args()),
    (["--words", "a", "b", "--engine.bf16", "True"], Args(words=("a", "b"), engine={"bf16": "True"}))])
def test_a_flag_has_two_names_and_one_value(monkeypatch, words, want):
    assert parsed(monkeypatch, *words) == want


@pytest.mark.parametrize("words, message", [
    (["--grpo_steps", "3", "--steps", "4"],
     "error: --grpo_steps 3 and --steps 4: these are names of one flag, --steps. Give one of them\n"),
    (["--use-amp", "--dtype", "fp32"],
     "error: --use_amp bf16 and --dtype fp32: these are names of one flag, --dtype. Give one of them\n"),
    (["--steps", "0"], "error: --steps 0 is too small: wanted at least 1\n"),
    (["--kl-coef", "-1"], "error: --beta -1.0 is too small: wanted at least 0.0\n")])
def test_what_does_not_go_together_is_one_line(monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as ended:
        parsed(monkeypatch, *words)
    assert ended.value.code == 2 and capsys.readouterr().err == message


def shown_help(run):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        run()
    assert ended.value.code == 0
    return plain(out.getvalue())


def test_help_has_three_groups_the_least_value_and_the_historical_name(monkeypatch):
    text = shown_help(lambda: parsed(monkeypatch, "--help"))
    titles = ("algorithm options", "task options", "speed_and_memory options")
    places = [text.index(title) for title in titles]
    assert places == sorted(places)
    assert "training steps; at least 1; formerly --grpo_steps (default: 5)" in text
    assert "ALIASES" not in text


def test_the_presets_are_in_the_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--help"])
    with pytest.raises(SystemExit):
        cli.parse(sft.Args, sft.PRESETS)
    assert "--preset demo" in plain(capsys.readouterr().out)


SCRIPTS = ["train_grpo.py", "train_ppo.py", "train_trl.py", "sft.py", "reward_model.py", "clip_grpo.py",
           "vision/cnn_grpo.py", "vision/vit_grpo.py", "vision/c2i_grpo.py", "vision/vlm_grpo.py"]


@pytest.mark.parametrize("path", SCRIPTS)
def test_every_flag_of_a_script_has_a_group_and_a_word(monkeypatch, path):
    module = path.removesuffix(".py").replace("/", ".")
    args_class = runpy.run_module(module)["Args"]
    monkeypatch.setitem(sys.modules, args_class.__module__, sys.modules[__name__])  # for parse's description
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    source = (ROOT / path).read_text(encoding="utf-8")
    body = source[source.index("class Args"):]
    body = body[:body.index("\n\n\n")]
    body += "".join(inspect.getsource(part) for part in args_class.__mro__[1:] if is_dataclass(part))
    banners = re.findall(r"# ---- (the \w+|speed and memory)", body)
    assert list(dict.fromkeys(banners)) == ["the algorithm", "the task", "speed and memory"]
    fields = re.findall(r"^    ([a-z]\w*): ", body, re.MULTILINE)
    bare = [name for name in fields if not re.search(rf"^    {name}: .*  # \w", body, re.MULTILINE)
            and not re.search(rf"  # [^\n]+\n    {name}: ", body)]
    assert fields and not bare, f"{path}: no comment at {', '.join(bare)}"


HISTORICAL = {"grpo_steps", "kl_coef", "eval_interval", "global_seed", "num_generations", "max_grad_norm",
              "ckpt_dir", "ckpt_every", "mixed_precision", "output_dir", "clip_range", "max_steps",
              "loss_type"}


@pytest.mark.parametrize("path", SCRIPTS)
def test_one_idea_has_one_name_in_all_scripts(path):
    module = path.removesuffix(".py").replace("/", ".")
    args_class = runpy.run_module(module)["Args"]
    flags, aliases = set(args_class.__dataclass_fields__), getattr(args_class, "ALIASES", {})
    targets = {new.partition("=")[0] for new in aliases.values()}
    assert not HISTORICAL & flags and not set(aliases) & flags and targets <= flags
