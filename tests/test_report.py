"""Samples beside a CSV, and report.py's page of them: numbers by other ways, bad input, a real browser."""
import html
import json
import math
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import helpers
import pytest
import torch
from helpers import cli, numbers, read_csv, rl, tiny, weights

import model
import report
import samples
import train_grpo
import train_ppo
from generate import score
from grpo import OBJECTIVES, group_advantage, grpo_loss
from policy import load_policy
from ppo import ppo_policy_loss
from utils import guard, page

SCRIPTS = {"grpo": train_grpo, "ppo": train_ppo}
HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
ODD = ["</script>", "<b>bold</b>", "\u202eabc", "\U0001f600", "&lt;", "\u2028", "\x00", "'\"`${1}"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(model.SIZES, "nano", helpers.TINY)
    monkeypatch.delenv("KILL_AT_CALL", raising=False)
    yield tmp_path
    guard.release()


def run(name, *words, log=None):
    log = log or f"{name}.csv"
    cli(SCRIPTS[name], *rl("--log", log, "--out", f"out-{log}", "--lr", 3e-3, *words, reward="share_of_e"))
    return Path(log.replace(".csv", ".samples.jsonl"))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# ---- the samples, recomputed ----
@pytest.mark.parametrize("name", SCRIPTS)
def test_samples_are_what_the_policies_say(name):
    """With eval_every 2 and 3 steps, the last update is that of step 2: `now` is then the saved policy."""
    every = lines(run(name, "--steps", 3, "--eval_every", 2))
    assert [(e["step"], e["updated"]) for e in every] == [(0, True), (2, True), (3, False)]
    ref, tokenizer = load_policy(tiny() / "policy.pth")
    after = load_policy(f"out-{name}.csv/policy.pth")[0]
    for e in every:
        assert len(e["prompts"]) == 4 and len({p["prompt"] for p in e["prompts"]}) > 1
        for prompt in e["prompts"]:
            rewards = [a["reward"] for a in prompt["answers"]]
            assert len(rewards) == 4
            start = tokenizer.encode(prompt["prompt"])
            for a in prompt["answers"]:
                tokens = torch.tensor([start + a["tokens"]])
                logp_ref, logp_end = (score(m, tokens, len(start)) for m in (ref, after))
                assert a["logp_ref"] == pytest.approx(logp_ref[0][0].tolist(), abs=2e-5)
                assert "".join(a["decoded"]) == tokenizer.decode(a["tokens"])
                assert a["text"] == tokenizer.decode(a["tokens"]).removesuffix("\n\n")
                assert a["reward"] == pytest.approx(a["text"].count("e") / max(1, len(a["text"])), abs=1e-6)
                if e["step"] == 0:
                    assert a["logp_old"] == pytest.approx(a["logp_ref"], abs=2e-5)
                    assert max(abs(x - y) for x, y in zip(a["logp"], a["logp_old"])) > 1e-3
                else:  # before the last update, and behind it, the policy is another one
                    assert a["logp"] == pytest.approx(logp_end[0][0].tolist(), abs=2e-5)
                    assert a["entropy"] == pytest.approx(logp_end[1][0].tolist(), abs=2e-4)
                    assert (a["logp"] == a["logp_old"]) is (not e["updated"])
            if name == "grpo":
                mean = sum(rewards) / 4
                std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 3)
                by_hand = [(r - mean) / (std + 1e-4) for r in rewards]
                assert [a["advantage"] for a in prompt["answers"]] == pytest.approx(by_hand, abs=1e-4)
    if name == "ppo":  # V = 0 and KL = 0 at the start: λ to the number of tokens to come, times R, whitened
        answers = [a for prompt in every[0]["prompts"] for a in prompt["answers"]]
        plain = [[0.95 ** (len(a["tokens"]) - 1 - t) * a["reward"] for t in range(len(a["tokens"]))]
                 for a in answers]
        flat = torch.tensor([x for row in plain for x in row], dtype=torch.float64)
        white = (flat - flat.mean()) / flat.std(correction=0)
        assert [x for a in answers for x in a["advantage"]] == pytest.approx(white.tolist(), abs=1e-4)


def test_advantages_with_the_flags_that_shape_them():
    words = ["--steps", 1, "--overlong", "penalty", "--overlong_tokens", 4, "--kl_in_reward", "--beta", 0.3,
             "--objective", "rloo", "--sync_ref_every", 5]
    for e in lines(run("grpo", *words)):
        for prompt in e["prompts"]:
            earned = [a["reward"] - max(0.0, 1 + (len(a["tokens"]) - 12) / 4) -
                      0.3 * sum(x - y for x, y in zip(a["logp_old"], a["logp_ref"]))
                      for a in prompt["answers"]]
            others = [r - (sum(earned) - r) / 3 for r in earned]
            assert [a["advantage"] for a in prompt["answers"]] == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("name", SCRIPTS)
def test_samples_change_no_number_of_the_run(name):
    words = ["--steps", 4, "--eval_every", 2, "--epochs_per_rollout", 2]
    run(name, *words)
    assert not run(name, *words, "--samples", 0, log="none.csv").exists()
    assert numbers(f"{name}.csv") == numbers("none.csv")
    assert torch.equal(weights(f"out-{name}.csv/policy.pth"), weights("out-none.csv/policy.pth"))


def test_other_processes_than_the_first_draw_nothing(monkeypatch):
    monkeypatch.setattr(samples, "rank", lambda: 1)
    assert not run("grpo", "--steps", 1).exists()


# ---- a resume, and what is there already ----
@pytest.mark.parametrize("name, call", [("grpo", 11), ("ppo", 7)])
def test_resumed_samples_are_those_of_the_run_that_never_stopped(name, call, monkeypatch):
    """Stopped in step 4 or 2; of the reward's calls, an evaluation takes one and its samples another."""
    words = ["--steps", 6, "--eval_every", 2, "--save_every", 3]
    whole = run(name, *words, log="whole.csv")
    monkeypatch.setenv("KILL_AT_CALL", str(call))
    monkeypatch.setenv("KILL_WITH", "SIGINT")
    with pytest.raises(SystemExit):
        run(name, *words)
    monkeypatch.delenv("KILL_AT_CALL")
    path = Path(f"{name}.samples.jsonl")
    assert 0 < len(lines(path)) < len(lines(whole))
    with open(path, "a") as file:  # as if a later evaluation had been cut off by a kill
        file.write(json.dumps({"step": 5, "prompts": []}) + '\n{"step": 4, "pro')
    run(name, *words, "--resume")
    assert path.read_text() == whole.read_text()
    run(name, *words, "--resume")  # nothing is left to do, and the last line stays
    assert path.read_text() == whole.read_text()


def test_samples_of_another_tool_end_a_resume(capsys):
    """Nothing is written then; a new start in the run's place doesn't read them."""
    run("grpo", "--steps", 2)
    before = Path("grpo.csv").read_bytes()
    for text in ('{"prompt": "mine"}\n', "[" * 100_000 + "\n"):
        Path("grpo.samples.jsonl").write_text(text)
        with pytest.raises(SystemExit) as left:
            run("grpo", "--steps", 3, "--resume")
        guard.release()
        assert left.value.code == 2 and "grpo.samples.jsonl" in capsys.readouterr().err
        assert Path("grpo.samples.jsonl").read_text() == text and Path("grpo.csv").read_bytes() == before
    assert [e["step"] for e in lines(run("grpo", "--steps", 1, "--overwrite"))] == [0, 1]


def test_a_new_start_treats_samples_as_it_treats_the_csv(capsys):
    path = run("grpo", "--steps", 1)
    first = path.read_text()
    with pytest.raises(SystemExit):
        run("grpo", "--steps", 1)
    assert path.read_text() == first
    run("grpo", "--steps", 1, "--seed", 1)
    assert Path("grpo.samples.jsonl.bak").read_text() == first != path.read_text()
    run("grpo", "--steps", 1, "--seed", 1, "--samples", 0, "--overwrite")
    assert not path.exists()


# ---- a token's term of the loss ----
def made_up(seed=0, G=3, per_token=False, T=6):
    """A group whose ratios, clips and KLs are all at work; each answer has another length."""
    draw = torch.Generator().manual_seed(seed)
    answers = []
    for g in range(G):
        n = T - g
        old, noise, ref = (torch.randn(n, generator=draw, dtype=torch.float64) for _ in range(3))
        adv = torch.randn(n if per_token else 1, generator=draw, dtype=torch.float64).tolist()
        answers.append({
            "text": f"answer {g}", "tokens": list(range(n)), "decoded": [f" w{i}" for i in range(n)],
            "reward": float(g), "advantage": adv if per_token else adv[0],
            "logp_old": (-2 + 0.5 * old).tolist(), "logp": (-2 + 0.5 * old + 0.4 * noise).tolist(),
            "logp_ref": (-2 + 0.5 * ref).tolist(), "entropy": [1.5] * n})
    return answers


def padded(answers):
    T = max(len(a["tokens"]) for a in answers)

    def rows(name):
        return torch.tensor([[*a[name], *[0.0] * (T - len(a[name]))] for a in answers], dtype=torch.float64)
    adv = [{"advantage": a["advantage"] if isinstance(a["advantage"], list) else
            [a["advantage"]] * len(a["tokens"]), "tokens": a["tokens"]} for a in answers]
    mask = torch.tensor([[t < len(a["tokens"]) for t in range(T)] for a in answers])
    adv = torch.tensor([[*a["advantage"], *[0.0] * (T - len(a["tokens"]))] for a in adv], dtype=torch.float64)
    return *(rows(name)[None] for name in ("logp", "logp_old", "logp_ref")), adv[None], mask[None]


VARIANTS = {name: replace(o, beta=0.05) for name, o in OBJECTIVES.items()} | {
    "no KL": OBJECTIVES["grpo"] and replace(OBJECTIVES["grpo"], beta=0.0),
    "two-sided": replace(OBJECTIVES["grpo"], delta=1.3), "k1": replace(OBJECTIVES["grpo"], kl="k1"),
    "k2": replace(OBJECTIVES["grpo"], kl="k2"), "r·k3": replace(OBJECTIVES["grpo"], kl_ratio=True)}


@pytest.mark.parametrize("name", VARIANTS)
def test_terms_are_grpo_losss_own_and_add_up_to_it(name):
    o, answers = VARIANTS[name], made_up(3)
    terms, by = report.loss_terms(answers, o), report.divisors(answers, o, max_len=9)
    whole = grpo_loss(*padded(answers), o, max_len=9)[0]
    assert sum(x / n for row, n in zip(terms, by) for x in row) == pytest.approx(whole.item(), abs=1e-9)
    for a, row in zip(answers, terms):
        for t, term in enumerate(row):
            if o.ratio == "sequence":  # by hand: the token shares its answer's ratio, and has a KL of its own
                r = math.exp(sum(x - y for x, y in zip(a["logp"], a["logp_old"])) / len(row))
                A, d = a["advantage"], a["logp_ref"][t] - a["logp"][t]
                expected = -min(r * A, min(max(r, 1 - o.eps_low), 1 + o.eps_high) * A)
                expected += o.beta * (math.exp(d) - d - 1)
            else:
                one = [torch.tensor(a[k][t], dtype=torch.float64).view(1, 1, 1)
                       for k in ("logp", "logp_old", "logp_ref")]
                expected = grpo_loss(*one, torch.tensor([[a["advantage"]]], dtype=torch.float64),
                                     torch.ones(1, 1, 1), o, max_len=1)[0].item()
            assert term == pytest.approx(expected, abs=1e-9)


def test_terms_of_ppo_add_up_to_its_loss():
    answers = made_up(5, per_token=True)
    terms, by = report.loss_terms(answers, 0.2), report.divisors(answers, 0.2, 9)
    logp, logp_old, _, adv, mask = (x[0] for x in padded(answers))
    whole = ppo_policy_loss(logp, logp_old, adv, mask, 0.2)[0].item()
    assert sum(x / n for row, n in zip(terms, by) for x in row) == pytest.approx(whole, abs=1e-9)
    r = math.exp(answers[0]["logp"][1] - answers[0]["logp_old"][1])
    A = answers[0]["advantage"][1]
    assert terms[0][1] == pytest.approx(-min(r * A, min(max(r, 0.8), 1.2) * A), abs=1e-9)


# ---- what the page is made from ----
def write_run(name, answers=None, record=None, steps=3, evaluations=(0, 2), prompt="a prompt", **more):
    """A CSV, and if given a record and samples, as a run would have left them."""
    rows = [f"{s},{0.1 * s},{s - 1.5},{0.01 * s}" for s in range(steps)]
    Path(f"{name}.csv").write_text("\n".join(["step,loss,mean_r,kl", *rows, ""]))
    if record is not None:
        Path(f"{name}.json").write_text(json.dumps(record))
    if answers:
        with open(f"{name}.samples.jsonl", "w") as file:
            for step in evaluations:
                line = {"step": step, "updated": True, "prompts": [{"prompt": prompt, "answers": answers}]}
                file.write(json.dumps(line | more) + "\n")


def record_of(objective, **args):
    return {"args": {"max_new": 9, **args}, "command": "python train_grpo.py", "commit": "0123456789",
            "device": "cpu", "dtype": "fp32", "objective": asdict(objective)}


PPO_RECORD = {"args": {"max_new": 9, "eps": 0.2, "value_lr": 1e-3}, "commit": "0123456789"}


def make(*words):
    cli(report, *words)
    return json.loads(Path(words[words.index("--json") + 1]).read_text()) if "--json" in words else None


def refused(capsys, *words):
    before = sorted(Path().iterdir())
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli(report, *words)
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and sorted(Path().iterdir()) == before, error
    return error


def test_a_csv_without_samples_has_curves_and_says_how_to_get_samples(capsys):
    write_run("a")
    data = make("a.csv", "--json", "data.json")
    assert [(p["metric"], p["lines"][0]["y"]) for p in data["panels"]] == [
        ("mean_r", [-1.5, -0.5, 0.5]), ("kl", [0.0, 0.01, 0.02]), ("loss", [0.0, 0.1, 0.2])]
    assert data["samples"] == [] and "--samples" in capsys.readouterr().out
    text = Path("a.html").read_text()
    assert "--samples" in text and 'id="columns"' not in text


def test_seeds_are_one_run_with_a_band():
    write_run("a-s0", made_up(), record_of(OBJECTIVES["grpo"]))
    write_run("a-s1", made_up(1), record_of(OBJECTIVES["grpo"]))
    Path("a-s1.csv").write_text(Path("a-s1.csv").read_text().replace("2,0.2,0.5", "2,0.2,2.5"))
    data = make("a-s0.csv", "a-s1.csv", "--json", "data.json", "--output", "page.html")
    line = data["panels"][0]["lines"][0]
    assert line["y"] == [-1.5, -0.5, 1.5] and line["std"] == pytest.approx([0, 0, math.sqrt(2)], abs=1e-5)
    assert [run["name"] for run in data["runs"]] == ["a"]
    assert [s["name"] for s in data["samples"]] == ["a-s0", "a-s1"]


def test_tables_of_other_tools(capsys):
    Path("tb.csv").write_text("Wall time,Step,Value\n1,0,5\n2,1,6\n3,2,8\n")
    panels = {p["metric"]: p["lines"][0] for p in make("tb.csv", "--json", "d.json")["panels"]}
    assert panels["Value"]["x"] == [0, 1, 2] and panels["Value"]["y"] == [5, 6, 8]
    Path("c.csv").write_text("name,value\na,1\nb,2\n")
    assert "c.csv has no column step" in refused(capsys, "c.csv")
    Path("d.csv").write_text("not a table")
    assert "d.csv holds no table of numbers" in refused(capsys, "d.csv")
    assert "no_such.csv" in refused(capsys, "no_such.csv") and "no CSV given" in refused(capsys)


def test_a_file_torn_by_a_kill_gives_its_whole_rows(capsys):
    write_run("a", made_up(), record_of(OBJECTIVES["grpo"]), steps=6)
    for name in ("a.csv", "a.samples.jsonl"):
        Path(name).write_bytes(Path(name).read_bytes()[:-9])
    data = make("a.csv", "--json", "data.json")
    assert data["panels"][0]["lines"][0]["x"] == [0, 1, 2, 3, 4]
    assert [e["step"] for e in data["samples"][0]["evaluations"]] == [0]
    said = " ".join(data["runs"][0]["notes"])
    assert "a.csv ends within a line" in said and "a.samples.jsonl ends within a line" in said
    assert "a.csv ends within a line" in Path("a.html").read_text()


@pytest.mark.parametrize("line", ["{}", "[]", "7", "not JSON", "[" * 100_000, '{"step": 0, "prompts": []}',
                                  '{"step": 0, "prompts": [{"prompt": "a"}]}',
                                  '{"step": 0, "prompts": [{"prompt": "a", "answers": [{"text": "x"}]}]}'])
def test_samples_of_another_tool_are_one_line(line, capsys):
    write_run("a")
    Path("a.samples.jsonl").write_text(line + "\n")
    assert "a.samples.jsonl, line 1" in refused(capsys, "a.csv")


@pytest.mark.parametrize("change", [{"logp": [0.0]}, {"tokens": 3}, {"advantage": "x"}, {"entropy": None},
                                    {"reward": None}, {"reward": 1e999}, {"text": 4},
                                    {"logp_ref": ["a"] * 6}, {"logp": [10**400] * 6}, {"reward": 10**400},
                                    {"decoded": [1] * 6}, {"tokens": "abcdef"}, {"tokens": [None] * 6}])
def test_damaged_samples_are_one_line(change, capsys):
    answers = made_up()
    answers[0] |= change
    write_run("a", answers, record_of(OBJECTIVES["grpo"]))
    assert "a.samples.jsonl, line 1" in refused(capsys, "a.csv")


@pytest.mark.parametrize("value", [None, math.nan])
def test_numbers_that_are_not_finite_have_no_term(value):
    answers = made_up()
    answers[0]["logp_ref"][1] = value
    write_run("a", answers, record_of(OBJECTIVES["grpo"], lr=math.inf))
    shown = make("a.csv", "--json", "d.json")["samples"][0]["evaluations"][0]["prompts"][0]["answers"][0]
    assert not re.search(r"[:,\[](NaN|-?Infinity)\b", Path("a.html").read_text())  # no browser reads that
    assert [x is None for x in shown["term"]] == [False, True, *[False] * 4]
    answers[0] |= {"logp_ref": [0.0] * 6, "advantage": None}
    write_run("a", answers, record_of(OBJECTIVES["grpo"]))
    shown = make("a.csv", "--json", "d.json")["samples"][0]["evaluations"][0]["prompts"][0]["answers"]
    assert [set(map(type, a["term"])) for a in shown] == [{type(None)}, {float}, {float}]


@pytest.mark.parametrize("record", [None, {}, {"objective": {"no_such": 1}}, {"objective": 3}, {"args": 5},
                                    {"args": {"value_lr": 1, "eps": "x", "max_new": 9}},
                                    {"args": {"max_new": 9}, "objective": {"eps_low": "x"}}, [],
                                    {"args": {"max_new": "x"}, "objective": {}}])
def test_a_record_that_is_missing_or_strange_leaves_the_formula_out(record):
    write_run("a", made_up(), record)
    data = make("a.csv", "--json", "d.json")
    assert data["samples"][0]["objective"] is None and data["runs"][0]["notes"]


def data_of(path):
    """The page's data, read as strictly as a browser reads them."""
    text = re.search(r'id="data">(.+?)</script>', Path(path).read_text(), re.DOTALL)[1]
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"no browser reads {name}"))


@pytest.mark.parametrize("text", [
    "[" * 100_000, '{"x": 1e999}', '{"args": {"max_new": 1e999}, "objective": {}}',
    '{"args": {"max_new": 9}, "objective": {"eps_high": 1e999}}', '{"args": {"max_new": 0}, "objective": {}}',
    '{"args": {"max_new": 9}, "objective": {"eps_low": ' + "9" * 400 + "}}",
    '{"args": {"max_new": 9, "eps": Infinity, "value_lr": 1}}'])  # --eps inf is PPO without a clip
def test_a_record_beyond_floats_leaves_the_formula_out(text):
    write_run("a", made_up())
    Path("a.json").write_text(text)
    make("a.csv")
    data = data_of("a.html")
    assert data["samples"][0]["objective"] is None and data["runs"][0]["notes"]


def test_a_word_or_an_enormous_number_leaves_no_curve_out_but_its_own():
    Path("a.csv").write_text("step,loss,kl,note\n1234567,1,1e308,a\n1234568,2,-1e308,3\n")
    make("a.csv")
    panel, = data_of("a.html")["panels"]
    assert panel["metric"] == "loss" and panel["lines"][0]["x"] == [1234567, 1234568]


def test_a_message_about_a_file_of_another_kind_is_short(capsys):
    Path("a.txt").write_text("word" * 100_000 + ",b\n1,2\n")
    assert len(refused(capsys, "a.txt")) < 1600
    write_run("a", made_up(), record_of(OBJECTIVES["grpo"]))
    for name in ("a.samples.jsonl", "page.html"):
        Path("page.html").write_text("<p>a,b\n" * 3)
        assert "holds no table" in refused(capsys, name, "--output", "new.html")


def test_a_long_answer_is_worked_out_token_by_token(monkeypatch):
    """Else time and memory grow with the square of its length: 0.9 s a group at 1,024 tokens."""
    sizes = set()

    def noted(logp, *rest, **more):
        sizes.add(logp.shape[-1])
        return grpo_loss(logp, *rest, **more)
    monkeypatch.setattr(report, "grpo_loss", noted)
    report.loss_terms(made_up(T=50), OBJECTIVES["dapo"])
    assert sizes == {1}
    report.loss_terms(made_up(T=50), OBJECTIVES["gspo"])  # whose ratio is one of the whole answer
    assert sizes == {1, 50}


def test_ten_runs_and_many_evaluations():
    for i in range(10):
        write_run(f"run{i}x", made_up(i), record_of(OBJECTIVES["grpo"]), evaluations=range(0, 200, 2))
    data = make(*(f"run{i}x.csv" for i in range(10)), "--json", "d.json", "--output", "ten.html")
    assert len(data["samples"]) == 10
    steps = [e["step"] for e in data["samples"][0]["evaluations"]]
    assert len(steps) == page.EVALUATIONS and steps[0] == 0 and steps[-1] == 198
    assert "40 of the 100 evaluations" in " ".join(data["runs"][0]["notes"])


def test_no_file_of_a_run_is_overwritten(capsys):
    write_run("a", made_up(), record_of(OBJECTIVES["grpo"]))
    for words in (["--output", "a.csv"], ["--json", "a.json"], ["--output", "page.txt"]):
        assert words[1] in refused(capsys, "a.csv", *words)


def test_no_other_file_is_overwritten_and_none_is_left_alone(capsys):
    write_run("a")
    write_run("b", made_up(), record_of(OBJECTIVES["grpo"]))
    Path("thesis.html").write_text("<title>My thesis</title>")
    Path("link.html").symlink_to("b.samples.jsonl")
    for words in (["--json", "b.json"], ["--output", "thesis.html"], ["--output", "link.html"],
                  ["--output", "a.csv/page.html", "--json", "data.json"]):
        before = {path: path.read_bytes() for path in Path().iterdir()}
        assert words[1] in refused(capsys, "a.csv", *words)
        assert {path: path.read_bytes() for path in Path().iterdir()} == before
    for _ in range(2):  # its own are replaced
        make("a.csv", "--output", "page.html", "--json", "data.json")


def test_hostile_text_stays_within_the_data():
    answers = made_up()
    answers[0] |= {"text": HOSTILE, "decoded": [HOSTILE, *ODD[:5]]}
    record = record_of(OBJECTIVES["grpo"], policy=HOSTILE) | {"command": HOSTILE, "commit": "<b>"}
    write_run("a<b>", answers, record, prompt=HOSTILE)
    make("a<b>.csv", "--output", "page.html")
    text = Path("page.html").read_text()
    assert text.count("</script>") == 2 and "<img src=x" not in text and "<b>" not in text
    assert json.loads(re.search(r'id="data">(.+?)</script>', text, re.DOTALL)[1])["samples"][0]["vocabulary"][
        "0"] in (HOSTILE, " w0")
    assert html.escape(HOSTILE, quote=True).replace("&#x27;", "&#39;") in text
    assert not re.search(r"(src|href)=[\"'](?!#|data:)", text.partition("<script")[0])  # nothing is fetched


# ---- in a browser ----
@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install '.[dev]'")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium:
        pytest.skip("no Chromium on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def opened(browser, request):
    """A function (file) -> its page. Any console error, page error or request ends the test in failure."""
    wrong, context = [], browser.new_context(viewport={"width": 1100, "height": 900})

    def open_page(path):
        tab = context.new_page()
        tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else
               wrong.append(asked.url))
        tab.set_default_timeout(8000)
        tab.goto(Path(path).resolve().as_uri())
        return tab
    yield open_page
    context.close()
    assert not wrong


def number(text):
    return float(text.replace("−", "-").replace("–", "nan"))


def result(tab, step):
    return number(tab.locator(f'[data-result="{step}"]').inner_text())


def test_the_page_of_a_real_run_in_a_browser(opened):
    """GRPO beside PPO: the slider, a token by the mouse and by keys, its sum against JSONL, CSV and loss."""
    for name in SCRIPTS:
        run(name, "--steps", 5, "--eval_every", 2, "--minibatches", 2)
    make("grpo.csv", "ppo.csv", "--output", "page.html")
    tab = opened("page.html")
    rows = {(row[0], row[1]): row[2:] for row in
            (r.split("\t") for r in tab.locator("#ends tbody tr").evaluate_all(
                "rows => rows.map(r => [...r.children].map(c => c.textContent).join('\\t'))"))}
    for name in SCRIPTS:
        column = [float(row["mean_r"]) for row in read_csv(f"{name}.csv")[1]]
        shown = [number(x) for x in rows["mean reward (score)", name]]
        assert shown == pytest.approx([column[0], column[-1], min(column), max(column)], abs=1e-5)
    assert tab.locator("#first svg").count() >= 5 and tab.locator("#first .curve").count() >= 10

    assert tab.locator("#shown").inner_text() == "step 4"
    slider = tab.locator("#step")
    slider.focus()
    slider.press("Home")
    assert tab.locator("#shown").inner_text() == "step 0"
    slider.press("ArrowRight")
    assert tab.locator("#shown").inner_text() == "step 2"
    tab.locator("#prompts label", has_text="3").click()
    for side, name in enumerate(SCRIPTS):
        g, t = 1, 4
        answers = lines(f"{name}.samples.jsonl")[1]["prompts"][2]["answers"]
        a = answers[g]
        card = tab.locator(f"#card-{side}-{g}")
        assert f"reward {a['reward']:.3g}" in card.inner_text()
        card.locator(".token").nth(t).click()
        assert tab.locator(".sum").count() == 1
        r = math.exp(a["logp"][t] - a["logp_old"][t])
        A = a["advantage"][t] if name == "ppo" else a["advantage"]
        assert r != 1 and result(tab, "ratio") == pytest.approx(r, abs=1e-6)
        policy = -min(r * A, min(max(r, 0.8), 1.2) * A)
        assert result(tab, "policy") == pytest.approx(policy, abs=2e-6)
        term, tokens = policy, sum(len(x["tokens"]) for x in answers)
        if name == "grpo":
            one = [torch.tensor([[[a[k][t]]]], dtype=torch.float64) for k in ("logp", "logp_old", "logp_ref")]
            o = replace(OBJECTIVES["grpo"], beta=0.05)
            term = grpo_loss(*one, torch.tensor([[A]], dtype=torch.float64), torch.ones(1, 1, 1), o)[0].item()
            assert result(tab, "term") == pytest.approx(term, abs=1e-6)
            tokens = len(a["tokens"]) * 4
        assert float(tab.locator("[data-term]").get_attribute("data-term")) == pytest.approx(term, abs=1e-6)
        assert "give the same" in tab.locator(".sum").inner_text()
        assert result(tab, "share of the group’s loss") == pytest.approx(term / tokens, abs=1e-6)

    # keys: Escape closes and gives the focus back, the arrow moves it, Enter opens
    tab.keyboard.press("Escape")
    assert tab.locator(".sum").count() == 0
    assert tab.evaluate("document.activeElement.dataset.place") == "1/1/4"
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    assert tab.locator(".sum h4").inner_text().startswith("Token 6 of")
    assert tab.locator("[aria-expanded=true]").get_attribute("data-place") == "1/1/5"

    # colours: five of them, each with its number in the label of a token
    a = lines("grpo.samples.jsonl")[1]["prompts"][2]["answers"][0]
    seen = {"ratio": math.exp(a["logp"][2] - a["logp_old"][2]), "entropy": a["entropy"][2],
            "change": math.exp(a["logp"][2]) - math.exp(a["logp_ref"][2])}
    for colour, value in seen.items():
        tab.locator("#colours label", has_text=colour).click()
        title = tab.locator("#card-0-0 .token").nth(2).get_attribute("title")
        assert number(title.split()[-1]) == pytest.approx(value, rel=6e-3)
    tab.locator("#right").select_option(label="grpo, before")
    assert "before the update of step 0" in tab.locator("#columns article").nth(1).inner_text()
    tab.set_viewport_size({"width": 390, "height": 844})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    unnamed = tab.evaluate("""[...document.querySelectorAll("button, input, select, svg[role]")].filter(e =>
        !(e.getAttribute("aria-label") || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)""")
    assert unnamed == []


def test_every_objective_is_worked_out_as_grpo_loss_does(opened):
    for i, (name, o) in enumerate(VARIANTS.items()):
        write_run(f"run{i}x", made_up(i), record_of(o))
    write_run("ppo", made_up(2, per_token=True), PPO_RECORD)
    files = [*(f"run{i}x.csv" for i in range(len(VARIANTS))), "ppo.csv"]
    data = make(*files, "--output", "page.html", "--json", "d.json")
    tab = opened("page.html")
    gaps = tab.evaluate("""data.samples.map(s => s.evaluations[0].prompts[0].answers.flatMap(a =>
        a.term.map((term, t) => Math.abs(term - sumOf(s, a, t)[1]))))""")
    assert [len(tokens) for tokens in gaps] == [6 + 5 + 4] * len(files)
    assert max(map(max, gaps)) < 1e-8
    ratios = [[(math.exp(x - y), a["advantage"]) for x, y in zip(a["logp"], a["logp_old"])]
              for sample in data["samples"][:-1] for a in sample["evaluations"][0]["prompts"][0]["answers"]]
    i = 3 * list(VARIANTS).index("dapo")
    assert any(r > 1.28 and A > 0 for r, A in sum(ratios[i:i + 3], []))  # its upper clip holds somewhere
    assert any(r < 0.8 and A < 0 for r, A in sum(ratios, []))
    for i, sample in enumerate(data["samples"]):
        tab.locator("#left").select_option(value=str(2 * i))
        for g, t in ((0, 1), (2, 3)):
            tab.locator(f"#card-0-{g} .token").nth(t).click()
            a = sample["evaluations"][-1]["prompts"][0]["answers"][g]
            shown = tab.locator(".sum").inner_text()
            assert "give the same" in shown, shown
            last = tab.locator(".sum [data-result]").last
            assert number(last.inner_text()) == pytest.approx(a["term"][t] / a["divisor"], abs=1e-6)


def test_hostile_text_is_shown_and_never_run(opened):
    answers = made_up(T=9)
    answers[0] |= {"text": HOSTILE, "decoded": [HOSTILE, *ODD], "tokens": list(range(100, 109))}
    write_run("a<b>", answers, record_of(OBJECTIVES["grpo"], policy=HOSTILE) | {"command": HOSTILE},
              prompt=HOSTILE + "\u202e" + ODD[3])
    make("a<b>.csv", "--output", "page.html")
    tab = opened("page.html")
    assert tab.evaluate("window.broken") is None and tab.locator("img").count() == 0
    assert tab.locator("script").count() == 2 and tab.locator("main b").count() == 0
    assert tab.locator("#prompt").inner_text() == HOSTILE + "⟨U+202E⟩" + ODD[3]
    shown = tab.locator("#card-0-0 .token").all_inner_texts()
    assert shown[:5] == [HOSTILE, "</script>", "<b>bold</b>", "⟨U+202E⟩abc", "\U0001f600"]
    assert shown[5:] == ["&lt;", "⟨U+2028⟩", "⟨U+0000⟩", ODD[7]]
    tab.locator("#card-0-0 .token").first.click()
    assert HOSTILE in tab.locator(".sum").inner_text() and tab.evaluate("window.broken") is None
    assert HOSTILE in tab.locator("#runs ~ p code").inner_text()


def test_numbers_that_are_missing_or_many_or_large(opened):
    answers = made_up()
    answers[0]["logp_ref"][0] = None
    write_run("a", answers, record_of(OBJECTIVES["grpo"]))
    Path("b.csv").write_text("step,loss\n1e20,1\n")
    make("a.csv", "b.csv", "--output", "page.html")
    tab = opened("page.html")
    for colour in ("KL", "change"):
        tab.locator("#colours label", has_text=colour).click()
        assert tab.locator("#card-0-0 .token").first.get_attribute("title").endswith(" –")
    assert tab.evaluate("greatest(Array(300000).fill(-2)) - least(Array(300000).fill(3))") == -5
    assert "Math.max(..." not in Path("page.html").read_text()  # a call takes no 100,000 arguments
    make("b.csv", "--output", "large.html")
    assert "NaN" not in opened("large.html").locator("#first").inner_html()


def test_a_page_of_curves_alone_opens(opened):
    write_run("a")
    make("a.csv")
    tab = opened("a.html")
    assert tab.locator("#first svg").count() == 3 and tab.locator("#answers").count() == 0
    assert group_advantage(torch.tensor([[0.0, 1.0]])).shape == (1, 2)
