"""Tasks: what counts as right, by hand; what is asked; a user's own file; a nano GPT that trains on one."""
import functools
import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import helpers
import pytest
import torch
from helpers import ROOT, cli, files, plain, read_csv, refused, weights
from hypothesis import example, given, settings
from hypothesis import strategies as st

import model
import plot
import reward
import sample
import sft
import tasks
import train_grpo
import train_ppo
from model import GPT, GPTConfig
from tasks import TASKS, Task, load_task
from utils import checkpoint
from utils.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.SIZES, "nano", helpers.TINY)
    return tmp_path


# ---- what is right ----
@pytest.mark.parametrize("name, row, completion, wanted", [
    ("add", {"answer": "68"}, "68", 1), ("add", {"answer": "68"}, "23 + 45 = 68.", 1),
    ("add", {"answer": "68"}, "The answer is **68**\n", 1), ("add", {"answer": "68"}, "68, not 67", 0),
    ("add", {"answer": "68"}, "168", 0), ("add", {"answer": "68"}, "068", 0),
    ("add", {"answer": "68"}, "", 0),
    ("add", {"answer": "68"}, "sixty-eight", 0), ("add", {"answer": "68"}, "٦٨", 0),
    ("sort", {"answer": "0112"}, "0112", 1), ("sort", {"answer": "0112"}, "0 1 1 2", 1),
    ("sort", {"answer": "0112"}, "The 4 digits: 0, 1, 1, 2.", 1), ("sort", {"answer": "0112"}, "012", 0),
    ("sort", {"answer": "0112"}, "01123", 0), ("sort", {"answer": "0112"}, "0112 and 3", 0),
    ("sort", {"answer": "0112"}, "", 0),
    ("reverse", {"answer": "cba"}, "cba", 1), ("reverse", {"answer": "cba"}, "Backwards: CBA!", 1),
    ("reverse", {"answer": "cba"}, "c b a", 0), ("reverse", {"answer": "cba"}, "cba it is", 0),
    ("reverse", {"answer": "cba"}, "", 0)])
def test_a_check_by_hand(name, row, completion, wanted):
    assert TASKS[name].reward(completion, row) == wanted


ROW = {"numbers": [3, 7, 2], "target": 13, "answer": "3*7-2"}  # 13 = 2 * 3 + 7


@pytest.mark.parametrize("completion, wanted", [
    ("2*3+7", 1), ("7+(2*3)", 1), ("7 + 2 * 3 = 13", 1), ("Let me see.\n2*3+7", 1), ("((((2)*3)+7))", 1),
    ("3*7-2", 0.1), ("3+7+2", 0.1), ("3-7/2", 0.1),
    ("13", 0), ("6+7", 0), ("2*3+7+0", 0), ("2*3+7*1", 0), ("2*3", 0), ("2*3+7+2", 0), ("", 0), ("= 13", 0),
    ("2*3+7\nI am sure.", 0), ("answer: 2*3+7", 0), ("7/(3-3)", 0), ("2/(3-3)+7", 0), ("7//(3-2)", 0),
    ("-2+7*3", 0), ("2*3*-7", 0), ("7**2**3", 0), ("3**7**2", 0), ("(2*3)+7)", 0), ("2(3)+7", 0),
    ("2 3 7", 0),
    ("2*3+7,", 0), ("2.0*3+7", 0), ("0x2*3+7", 0), ("02*3+7", 0), ("２*3+7", 0),
    ("4*3+1", 0), ("2*3+7 # sure", 0)])
def test_countdown_by_hand(completion, wanted):
    assert TASKS["countdown"].reward(completion, ROW) == wanted


def test_countdown_is_exact_and_survives_a_division_by_zero():
    assert TASKS["countdown"].reward("1/3*3", {"numbers": [1, 3, 3], "target": 1}) == 1
    assert TASKS["countdown"].reward("7/(3-3)", {"numbers": [3, 3, 7], "target": 1}) == 0
    assert TASKS["countdown"].reward("10/4*2", {"numbers": [10, 4, 2], "target": 5}) == 1  # 2.5 stays 2.5


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(max_size=120), st.text("0123456789+-*/() =\n._", max_size=120),
                 st.text("237+-*/()", min_size=5, max_size=12)))
@example("__import__('os').system('x')")
@example("2**3**7**" * 500 + "9")
@example("(" * 99)
@example("(" * 48 + "2*3+7" + ")" * 47)
@example("9" * 100_000)
@example("(" * 100_000 + "2*3+7" + ")" * 100_000)
@example("\x00")
@example("2*3+7/" * 10_000)
def test_countdown_never_fails_and_takes_no_time(completion):
    began = time.process_time()
    assert TASKS["countdown"].reward(completion, ROW) in (0, 0.1, 1)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("size", ["", ":1", ":2", ":4", ":9"])
def test_the_answers_of_countdown_are_right(size):
    task = load_task(f"countdown{size}")
    for row in task.rows(20, 3, held_out=False):
        exact = eval(re.sub("([0-9]+)", r"Fraction(\1)", row["answer"]), {"Fraction": Fraction})
        assert exact == row["target"] and 1 <= row["target"] <= 100
        assert sorted(map(int, re.findall("[0-9]+", row["answer"]))) == sorted(row["numbers"])
        assert task.reward(row["answer"], row) == 1


# ---- what is asked ----
@pytest.mark.parametrize("name", [*TASKS, "add:3", "sort:4", "reverse:9"])
def test_rows(name):
    task = load_task(name)
    train, held_out = task.rows(500, 10, held_out=False), task.rows(256, 0, held_out=True)
    assert train == task.rows(500, 10, held_out=False) != task.rows(500, 11, held_out=False)
    prompts = [row["prompt"] for row in train + held_out]
    assert len(set(prompts)) == len(prompts) == 756  # all different: the sides never meet
    assert all(task.reward(row["answer"], row) == 1 for row in train)
    assert task.reward("", train[0]) == 0


def test_the_right_answers():
    """By other code than the task's: what Python says."""
    for row in TASKS["add"].rows(50, 0, held_out=False):
        x, y = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\? Answer with the number only\.",
                                     row["prompt"]).groups())
        assert 1 <= min(x, y) <= max(x, y) <= 99
        assert row["answer"] == str(x + y) and row["short"] == f"{x}+{y}="
    for row in load_task("sort:4").rows(50, 0, held_out=False):
        assert re.findall("[0-9]", row["prompt"]) == list(row["short"][:-1]) and len(row["answer"]) == 4
        assert sorted(row["short"][:-1]) == list(row["answer"])
    for row in TASKS["reverse"].rows(50, 0, held_out=False):
        assert row["prompt"].split()[1] == row["short"][:-1] == "".join(reversed(row["answer"]))


def test_the_sides_are_the_same_in_every_process():
    code = "from tasks import TASKS; print(TASKS['add'].rows(256, 0, held_out=True))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                         env=helpers.environment(PYTHONHASHSEED="7"))
    assert run.stdout.strip() == str(TASKS["add"].rows(256, 0, held_out=True)), run.stderr
    assert "What is 28 + 65?" in run.stdout


def test_a_small_task_gives_all_it_has():
    task = load_task("add:1")
    train, held_out = task.rows(4096, 0, held_out=False), task.rows(256, 0, held_out=True)
    assert len(train) + len(held_out) == 81 and 3 <= len(held_out) <= 20


def test_worked_examples_are_of_the_training_side():
    held_out = {row["short"] for row in load_task("add:1").rows(256, 0, held_out=True)}
    rng = random.Random(0)
    worked = {load_task("add:1").worked(rng) for _ in range(300)}
    assert len(worked) > 50
    assert not {text.partition("=")[0] + "=" for text in worked} & held_out
    assert all(eval(text.replace("=", "==")) for text in worked)


def test_what_a_policy_reads():
    """Our tokenizers read the short form, a chat model's own the words; both sides have one width."""
    ours = train_tokenizer("char", "0123456789+=\n")
    train, held_out = TASKS["add"].prompts(ours, 0)
    assert train.tokens.shape == (4096, 6) and held_out.tokens.shape == (512, 6)
    assert ours.decode(train.tokens[0, train.pad[0]:].tolist()) == train.columns["short"][0]
    assert train.texts[0].startswith("What is ") and set(train.columns) == {"answer", "short"}
    chat = SimpleNamespace(encode_prompt=lambda prompt, short=None: list(prompt.encode()))
    train, _ = TASKS["add"].prompts(chat, 0)
    assert bytes(train.tokens[0, train.pad[0]:].tolist()).decode() == train.texts[0]


# ---- accuracy and pass@8 ----
def test_pass_at_8_by_hand():
    """Greedy: 1 of 3 is right. Of 8 samples: one, none, and nearly (0.9 is not right)."""
    greedy = torch.tensor([[1.0], [0.9], [0.0]])
    eight = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1.0], [0] * 8, [0.9] * 8])
    asked = []

    def ask(policy, tokenizer, prompts, max_new, samples, temperature, seed):
        asked.append((samples, max_new, temperature, seed))
        return [], {1: greedy, 8: eight}[samples]
    args = SimpleNamespace(max_new=5, temperature=0.7, seed=3, eval_pass8=True)
    numbers = reward.quality(args, SimpleNamespace(ask=ask), None, None, None, None)
    assert {name: round(value.item(), 4) for name, value in numbers.items()} == {
        "eval_acc": 0.3333, "eval_pass8": 0.3333}
    assert asked == [(1, 5, 0.7, 3), (8, 5, 0.7, 3)]


def test_each_answer_meets_its_own_question(monkeypatch):
    """Sample k of question k is right and all others are wrong: the rewards are the identity."""
    task, tokenizer = TASKS["add"], train_tokenizer("char", "0123456789+=\n")
    prompts = task.prompts(tokenizer, 0)[1].pick(torch.arange(8))
    asked = {}

    def sample_texts(policy, tokenizer, prompts, max_new, temperature, seed, top_k, group_size):
        asked[group_size] = top_k
        return None, None, None, [answer if i == k % group_size else "0" for i, answer in
                                  enumerate(prompts.columns["answer"]) for k in range(group_size)]
    monkeypatch.setattr(tasks, "sample_texts", sample_texts)
    assert torch.equal(task.ask(None, tokenizer, prompts, 4, 8)[1], torch.eye(8))
    assert task.ask(None, tokenizer, prompts, 4)[1].tolist() == [[1.0]] + [[0.0]] * 7
    assert asked == {8: 0, 1: 1}  # greedy draws from the likeliest token alone


def test_a_prompt_that_is_no_text(capsys):
    task = Task(lambda rng: {"prompt": 5, "answer": "5"}, lambda completion, row: 1.0)
    with pytest.raises(SystemExit) as stopped:
        task.rows(1, 0, held_out=False)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and "wanted text as prompt and answer" in said and "int" in said


# ---- a nano GPT ----
SFT = ["--tokenizer", "char", "--block_size", 24, "--batch_size", 8, "--steps", 30, "--eval_every", 15,
       "--warmup", 3, "--worked", 300, "--device", "cpu", "--dtype", "fp32",
       "--log", "sft.csv", "--out", "sft"]
RL = ["--policy", "sft/policy.pth", "--prompts_per_step", 4, "--group_size", 4, "--max_new", 6, "--steps", 3,
      "--eval_every", 2, "--eval_prompts", 16, "--device", "cpu", "--dtype", "fp32"]
ANY_DIGIT = '''
from tasks import Task


def sample(rng):
    return {"prompt": f"A digit after {rng.randrange(1000)}: ", "answer": "1"}


def reward(completion, row):
    """A third of the credit for each of the first three characters that is a digit."""
    return sum(character.isdigit() for character in completion[:3]) / 3


TASK = Task(sample, reward)
'''


@pytest.mark.parametrize("module", [train_grpo, train_ppo], ids=lambda m: m.__name__)
def test_sft_then_rl_on_a_task(module, capsys):
    cli(sft, "--data", "task:add", *SFT)
    said = capsys.readouterr().out
    assert re.search(r"What is \d+ \+ \d+\?.*\n", said) and "of 512 held-out questions" in said
    cli(module, *RL, "--task", "add", "--log", "rl.csv", "--out", "rl")
    assert re.search(r"held out: eval_r [\d.]+, eval_acc [\d.]+, eval_pass8 [\d.]+;", capsys.readouterr().out)
    header, rows = read_csv("rl.csv")
    assert [bool(row["eval_acc"]) for row in rows] == [True, False, True]
    assert all(0 <= float(row["eval_acc"]) * 16 == int(float(row["eval_acc"]) * 16) for row in rows[::2])
    assert all(row["gold"] == row["eval_gold"] == "" for row in rows)  # nothing of that kind was measured
    assert json.loads(open("rl.json").read())["eval_n"] == 16


def test_the_reward_of_a_users_task_rises(folder, capsys):
    """3 digits in 3 characters are worth 1; π₀ makes 40 % digits. Trained on, they are nearly certain."""
    (folder / "digits.py").write_text(ANY_DIGIT)
    cli(sft, "--data", "task:digits.py", *SFT)
    cli(train_grpo, *RL, "--task", "digits.py:TASK", "--max_new", 5, "--steps", 25, "--lr", 3e-3, "--beta", 0,
        "--log", "rl.csv", "--out", "rl")
    rewards = [float(row["mean_r"]) for row in read_csv("rl.csv")[1]]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1, rewards
    assert not torch.equal(weights("sft/policy.pth"), weights("rl/policy.pth"))


def test_answers_out(capsys):
    cli(sft, "--data", "task:add:1", *SFT)
    cli(sample, "--policy", "sft/policy.pth", "--task", "add:1", "--answers_out", "a.jsonl",
        "--num_samples", 2)
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in open("a.jsonl")]
    held_out = load_task("add:1").rows(256, 0, held_out=True)
    assert [row["question"] for row in rows] == [row["prompt"] for row in held_out]
    right = [re.findall("[0-9]+", row["answer"])[-1:] == [wanted["answer"]]
             for row, wanted in zip(rows, held_out)]
    assert [row["verdict"] for row in rows] == ["right" if r else "wrong" for r in right]
    share = sum(right) / len(right)
    assert f"{share:.1%} ± {(share * (1 - share) / len(right)) ** 0.5:.1%} of {len(right)} held-out" in said
    assert said.count("What is") >= 2


def test_the_page_of_your_own_task(folder):
    """docs/tasks.md: its file has 20 lines, and its commands work, made shorter here."""
    page = (ROOT / "docs/tasks.md").read_text(encoding="utf-8").partition("## Write your own")[2]
    own = re.search(r"```python\n(.*?)```", page, re.S)[1]
    assert 15 <= len(own.splitlines()) <= 20
    (folder / "my_larger.py").write_text(own)
    modules = {"sft.py": sft, "train_grpo.py": train_grpo, "plot.py": plot, "sample.py": sample}
    lines = re.search(r"```bash\n(.*?)```", page, re.S)[1].replace("\\\n", "").splitlines()
    assert len(lines) == 4
    for line in lines:
        _, name, *words = shlex.split(line)
        short = ["--steps", 10, "--eval_every", 3] if "--steps" in words else []
        cli(modules[name], *words, *short)
    assert "logs/mine.png" in files(folder)
    accuracy = [float(row["eval_acc"]) for row in read_csv("logs/mine.csv")[1] if row["eval_acc"]]
    assert len(accuracy) == 4
    task = load_task("my_larger.py")
    texts = "31", " 31\n", "13", "", "x"
    assert [task.reward(text, {"answer": "31"}) for text in texts] == [1, 1, .1, 0, 0]


# ---- chance ----
def test_what_guesses_earn(folder, monkeypatch, capsys):
    """By hand; and on sums of one digit, counted anew."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import chance
    assert chance.rates([[1, 0], [0, 0], [0.5, 1], [1, 1.0]]) == {
        "acc": 0.5, "mean_r": 4.5 / 8, "any_right": 0.75}
    cli(chance, "add:1", "--out", "c.csv")
    train, held_out = ([row["answer"] for row in load_task("add:1").rows(4096, 0, side)]
                       for side in (False, True))
    table = read_csv("c.csv")[1]
    assert [row["guess"] for row in table] == [repr(max(train, key=train.count)), "8 drawn"]
    for row in table:
        assert int(row["questions"]) == len(held_out) and float(row["acc"]) <= float(row["any_right"])
    share = held_out.count(max(train, key=train.count)) / len(held_out)
    assert float(table[0]["acc"]) == float(table[0]["any_right"]) == pytest.approx(share, abs=1e-4)
    with pytest.raises(SystemExit):
        cli(chance)
    assert "no task is named" in capsys.readouterr().err


# ---- bad input ----
@functools.cache
def untrained():
    """The path of a tiny π₀ with random weights, whose characters are all of ASCII."""
    path = Path(tempfile.mkdtemp(prefix="nanogrpo-task-"), "policy.pth")
    tokenizer = train_tokenizer("char", "".join(map(chr, range(128))))
    checkpoint.save(path, "policy", GPT(GPTConfig(tokenizer.vocab_size, 64, *helpers.TINY)), tokenizer)
    return path


BAD = '''
import math
from tasks import Task


def sample(rng):
    return {"prompt": f"{rng.randrange(1000)}+1=", "answer": "2"}


RAISES = Task(sample, lambda completion, row: row["no_such"])
NOTHING = Task(sample, lambda completion, row: None)
NAN = Task(sample, lambda completion, row: math.nan)
NO_ROW = Task(lambda rng: "1+1=", len)
NO_ANSWER = Task(lambda rng: {"prompt": "1+1="}, len)
ONE = Task(lambda rng: {"prompt": "1+1=", "answer": "2"}, len)
INT = Task(lambda rng: {"prompt": str(rng.random()), "answer": 2}, len)
SHORT = Task(lambda rng: {"prompt": str(rng.random()), "answer": "2", "short": 1}, len)
KEYS = Task(lambda rng: {"prompt": str(rng.random()), "answer": "2", str(rng.random()): 1}, len)
NUMBER = 3
'''


@pytest.mark.parametrize("name, wanted", [
    ("ad", ["'ad'", "add, sort, reverse, countdown", "gym:NAME", "FILE.py:TASK"]), ("add:0", ["'add:0'"]),
    ("add:x", ["'add:x'"]), ("gym:", ["'gym:'"]), ("gone.py:TASK", ["no file gone.py"]),
    ("bad.py", ["bad.py has no task 'TASK'"]), ("bad.py:NONE", ["bad.py has no task 'NONE'"]),
    ("bad.py:NUMBER", ["int", "Task(sample, reward)"]),
    ("bad.py:RAISES", ["KeyError: 'no_such'", "bad.py, line"]), ("bad.py:NOTHING", ["None", "numbers"]),
    ("bad.py:NAN", ["nan", "finite"]), ("bad.py:NO_ROW", ["prompt and answer"]),
    ("bad.py:NO_ANSWER", ["'answer'", "prompt and answer"]), ("bad.py:ONE", ["too few different questions"]),
    ("bad.py:INT", ["sample gave 2 as answer: wanted text"]), ("bad.py:SHORT", ["sample gave 1 as short"]),
    ("bad.py:KEYS", ["row 2", "keys"])])
def test_a_bad_task(name, wanted, folder, capsys):
    (folder / "bad.py").write_text(BAD)
    with pytest.raises(SystemExit) as left:
        cli(train_grpo, *RL, "--policy", untrained(), "--task", name)
    message = capsys.readouterr().err
    assert left.value.code == 2 and message.startswith("error: --task") and message.count("\n") == 1, message
    for part in [name, *wanted]:
        assert part in plain(message)
    assert files(folder) == ["bad.py"]


def test_a_task_and_prompts_are_two_questions(capsys):
    with pytest.raises(SystemExit):
        cli(train_grpo, *RL, "--policy", untrained(), "--task", "add", "--prompts", "p.jsonl")
    assert "give one of them" in capsys.readouterr().err


def test_questions_as_long_as_the_context(folder, capsys):
    """The message names what was asked for, or the least: 0 stands for what fits."""
    (folder / "long.py").write_text(BAD.replace('+1=', '+1=' + 'x' * 80) + "LONG = Task(sample, len)\n")
    with pytest.raises(SystemExit):
        cli(sample, "--policy", untrained(), "--task", "long.py:LONG")
    message = capsys.readouterr().err
    assert "--max_new 1 don't fit" in message and "shorter questions" in message, message


def test_what_does_not_fit(capsys):
    for call in (lambda: cli(sft, "--data", "task:sort:9", *SFT, "--block_size", 8),
                 lambda: cli(train_grpo, *RL, "--policy", untrained(), "--task", "sort:9",
                             "--max_new", 90),
                 lambda: cli(sample, "--policy", untrained(), "--task", "add",
                             "--max_new", 90),
                 lambda: cli(sample, "--policy", untrained(), "--answers_out", "a.jsonl")):
        with pytest.raises(SystemExit) as left:
            call()
        message = capsys.readouterr().err
        assert left.value.code == 2 and message.startswith("error: "), message


def test_a_question_without_an_answer_is_asked_but_not_learnt_from(capsys):
    """None as answer says that only the check can tell."""
    task = Task(lambda rng: {"prompt": str(rng.random()), "answer": None}, len, "own.py:TASK")
    assert [row["answer"] for row in task.rows(3, 0, held_out=False)] == [None] * 3
    with pytest.raises(SystemExit):
        task.worked(random.Random(0))
    assert "own.py:TASK: its questions come without answers" in capsys.readouterr().err


# ---- reasoning-gym ----
class Doubling:
    """A dataset as reasoning-gym has them, with a scorer that raises at what is no number."""

    def __init__(self, size, seed, most=9):
        assert most > 0, "most must be positive"
        self.size, self.most = size, most

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"question": f" Double {i % (self.most + 1)}.\n", "answer": str(2 * (i % (self.most + 1))),
                "metadata": {"n": i}}

    def score_answer(self, answer, entry):
        return float(int(answer) == int(entry["answer"]))


@pytest.fixture
def reasoning_gym(monkeypatch):
    """A stand-in for the package, which needs many others."""
    config = SimpleNamespace(__annotations__={"most": int, "seed": int, "size": int})
    package = SimpleNamespace(create_dataset=lambda name, **settings: Doubling(**settings),
                              factory=SimpleNamespace(DATASETS={"double": (Doubling, config)}))
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)


def test_what_a_gym_task_makes_of_an_entry(reasoning_gym):
    """A nano GPT reads the question and a line break; what the scorer can't read earns 0."""
    task = load_task("gym:double:most=3")
    rows = task.rows(10, 0, held_out=False) + task.rows(10, 0, held_out=True)
    assert sorted(row["short"] for row in rows) == [f"Double {n}.\n" for n in range(4)]
    assert all(row["prompt"] == f" {row['short']}" for row in rows)
    for row in rows:
        n = int(row["short"][7])
        assert [task.reward(text, row) for text in (f" {2 * n}\n", f"{2 * n + 1}", "", "x")] == [1, 0, 0, 0]
    assert re.fullmatch(r"Double (\d)\.\n\d", text := task.worked(random.Random(0)))
    assert int(text[-1]) == 2 * int(text[7])
    assert len(load_task("gym:double:size=1:most=3").rows(10, 0, held_out=False)) == 1


@pytest.mark.parametrize("name, wanted", [
    ("gym:no_such", ["gym:no_such is unknown to reasoning-gym: wanted double"]),
    ("gym:double:most", ["'most' is no setting", "max_terms=2"]),
    ("gym:double:most=x", ["'most=x' is no setting", "as Python writes it"]),
    ("gym:double:least=2", ["unexpected keyword argument 'least'", "Its settings: most, seed, size"]),
    ("gym:double:most=0", ["most must be positive", ". Its settings: most"])])
def test_a_bad_gym_task(name, wanted, reasoning_gym, capsys):
    with pytest.raises(SystemExit) as left:
        load_task(name)
    message = capsys.readouterr().err
    assert left.value.code == 2 and message.startswith(f"error: --task {name}"), message
    assert message.count("\n") == 1 and all(part in plain(message) for part in wanted), message


def test_a_gym_scorer_that_fails_on_its_own_answer_is_refused(reasoning_gym, capsys, monkeypatch):
    """Else every answer would earn 0 without a word: a module that the scorer wants may be missing."""
    def missing(self, answer, entry):
        raise ModuleNotFoundError("No module named 'sympy'")
    monkeypatch.setattr(Doubling, "score_answer", missing)
    refused(capsys, lambda: load_task("gym:double"), "gym:double", "No module named 'sympy'")


def test_gym(capsys):
    """reasoning-gym's own scorer: its own answers are right; a wrong one is not."""
    pytest.importorskip("reasoning_gym")
    task = load_task("gym:chain_sum:max_terms=3")
    rows = task.rows(20, 0, held_out=False)
    assert rows == task.rows(20, 0, held_out=False)
    for row in rows:
        exact = eval(re.search("[0-9+ -]+(?= =)", row["prompt"])[0])
        assert len(re.findall("[+-] ", row["prompt"])) <= 2
        assert row["answer"] == str(exact) and task.reward(f" {exact}\n", row) == 1
        assert task.reward(str(exact + 1), row) < 1
    with pytest.raises(SystemExit):
        load_task("gym:no_such")
    assert "--task gym:no_such is unknown to reasoning-gym: wanted ab, " in capsys.readouterr().err


def test_gym_without_the_package(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit):
        load_task("gym:basic_arithmetic")
    assert "pip install '.[gym]'" in capsys.readouterr().err

