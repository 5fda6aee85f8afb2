"""Bad input: a short message (the value, what was wanted, what to do), exit code 2, nothing half-written.

Most cases run in this process, since main() leaves by SystemExit; a few subprocesses show that a user sees
the same.
"""
import http.server
import importlib.util
import io
import json
import os
import pickle
import resource
import subprocess
import sys
import threading
import time

import helpers
import pytest
import torch
from helpers import cli, files, plain, rl, tiny

import plot
import reward_model
import rlhf_demo
import sample
import sft
import train_grpo
import train_ppo
import train_trl
from model import GPT, GPTConfig
from policy import load_policy
from utils import checkpoint, text
from utils.cli import atomic_write
from utils.device import pick_device
from utils.log import Log
from utils.tokenizer import train_tokenizer

SCRIPTS = [sft, reward_model, train_grpo, train_ppo, sample, rlhf_demo, plot]
RL_SCRIPTS = [train_grpo, train_ppo, *([train_trl] if importlib.util.find_spec("trl") else [])]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test starts in an empty folder, so that whatever is written is seen."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(capsys):
    """refused(call, *wanted): `call` ends with code 2 and a message on stderr that holds each of `wanted`."""
    def check(call, *wanted):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            call()
        out, err = capsys.readouterr()
        assert left.value.code == 2
        assert "Traceback" not in err + out
        message = plain(err)
        assert 0 < len(message) < 700, message
        for part in wanted:
            assert part in message, f"{part!r} is not in: {message}"
        return err.strip()
    return check


def one_line(message):
    return message.startswith("error: ") and "\n" not in message


# ---- flags and values ----
@pytest.mark.parametrize("module", SCRIPTS, ids=lambda m: m.__name__)
def test_unknown_flag(module, refused, folder):
    refused(lambda: cli(module, "--no_such_flag", "3"), "no_such_flag")
    assert files(folder) == []


@pytest.mark.parametrize("module, words, wanted", [
    (train_grpo, ["--objective", "grpoo"], ["grpoo", "grpo",
     "dr_grpo", "dapo", "gspo", "cispo", "sapo", "rloo"]),
    (train_grpo, ["--dtype", "fp8"], ["fp8", "fp32", "bf16"]),
    (train_grpo, ["--gold", "wit"], ["wit", "taste", "sentiment", "meter"]),
    (train_grpo, ["--steps", "many"], ["many", "steps"]),
    (reward_model, ["--pool", "max"], ["max", "sum", "last"]),
    (sft, ["--tokenizer", "words"], ["words", "bpe", "char", "gpt2"]),
    (sft, ["--size", "huge"], ["huge", "nano"]),
    (sft, ["--preset", "huge"], ["huge", "demo", "char"]),
    (sft, ["--preset"], ["preset", "demo", "char"]),
    (sft, ["--data", "nowhere.txt"], ["nowhere.txt", "auto", "shakespeare", "play"]),
    (sft, ["--data", "play", "--vocab_size", "100"], ["vocab_size", "100", "258"]),
    (sft, ["--data", "play", "--steps", "0"], ["steps", "0", "at least 1"]),
    (sft, ["--data", "play", "--vocab_size", "258", "--block_size", "70000"],
     ["--block_size", "7000", "held-out", "bell_of_merrow.txt"]),
    (sft, ["--data", "play", "--vocab_size", "258", "--init", "gpt2"], ["--init", "--tokenizer gpt2"]),
    (sft, ["--grad_clip", "-1"], ["grad_clip", "-1"]),
    (sft, ["--data", "play", "--vocab_size", "258", "--beta2", "7"], ["AdamW", "beta", "7"]),
    (sft, ["--data", "play", "--device", "tpu"], ["tpu", "cpu", "cuda", "mps"]),
    (sample, ["--policy", "POLICY", "--start", ""], ["--start of 0 tokens", "at least one token"]),
    (sample, ["--policy", "POLICY", "--top_p", "0"], ["--top_p", "0", "(0, 1]"]),
    (sample, ["--policy", "POLICY", "--temperature", "-1"], ["temperature", "-1"]),
], ids=lambda x: " ".join(x) if isinstance(x, list) else getattr(x, "__name__", ""))
def test_values(module, words, wanted, refused, folder):
    words = [tiny() / "policy.pth" if w == "POLICY" else w for w in words]
    refused(lambda: cli(module, *words), *wanted)
    assert files(folder) == []


@pytest.mark.parametrize("words, wanted", [
    (["--group_size", "0"], ["group_size", "0"]),
    (["--temperature", "0"], ["temperature", "0"]),
    (["--minibatches", "3"], ["minibatches", "3"]),
    (["--reward", "sentimen"], ["sentimen", "model", "sentiment", "meter", "FILE.py:FUNCTION"]),
    (["--reward", "gone.py:f"], ["gone.py"]),
    (["--lr", "-1"], ["lr", "-1"]),
    (["--grad_clip", "-1"], ["grad_clip", "-1"]),  # it would climb where it should descend
    (["--grad_clip", "nan"], ["grad_clip", "nan"]),
], ids=lambda x: " ".join(x))
@pytest.mark.parametrize("module", RL_SCRIPTS, ids=lambda m: m.__name__)
def test_rl_values(module, words, wanted, refused, folder):
    refused(lambda: cli(module, *rl(*words)), *wanted)
    assert files(folder) == []


@pytest.mark.parametrize("name", ["eps", "value_clip", "gamma", "lam", "lora_alpha"])
def test_ppos_own_values(name, refused, folder):
    refused(lambda: cli(train_ppo, *rl(f"--{name}", "-1")), name, "-1", "at least 0")
    assert files(folder) == []


@pytest.mark.parametrize("objective", ["grpo", "rloo", "dr_grpo", "sapo"])
def test_a_group_of_one(objective, refused, folder):
    message = refused(lambda: cli(train_grpo, *rl("--group_size", 1, "--objective", objective)),
                      "--group_size 1", objective, "at least 2")
    assert one_line(message)
    assert files(folder) == []


@pytest.mark.parametrize("objective", ["reinforce", "rloo"])
@pytest.mark.parametrize("words", [["--epochs_per_rollout", "2"], ["--minibatches", "2"]], ids=lambda w: w[0])
def test_without_a_ratio_only_one_update(objective, words, refused, folder):
    words = rl(*words, "--objective", objective)
    refused(lambda: cli(train_grpo, *words), objective, "off-policy", "1 epoch")
    assert files(folder) == []


def test_prompt_and_answer_longer_than_the_context(refused, folder):
    for module in RL_SCRIPTS:
        refused(lambda: cli(module, *rl("--max_new", 40)), "16", "40", "48", "--max_new", "shorten")
    refused(lambda: cli(reward_model, "--policy", tiny() / "policy.pth", "--data", "play", "--max_new", 40),
            "--prompt_len 32", "--max_new 40", "48", "shorten")
    refused(lambda: cli(sample, "--policy", tiny() / "policy.pth", "--max_new", 100), "--max_new 100", "48")
    assert files(folder) == []


def test_a_long_line_among_the_users_prompts(refused, folder):
    (folder / "p.jsonl").write_text(json.dumps({"prompt": "never " * 200}) + "\n")
    refused(lambda: cli(train_grpo, *rl("--prompts", "p.jsonl")), "--max_new 12", "48")
    assert files(folder) == ["p.jsonl"]


# ---- checkpoints ----
class Spy:
    """Unpickled without care, it would write a file."""

    def __reduce__(self):
        return (open, ("spied", "w"))


def torch_bytes(value, **kw):
    file = io.BytesIO()
    torch.save(value, file, **kw)
    return file.getvalue()


def broken_checkpoints():
    whole = (tiny() / "policy.pth").read_bytes()
    content = torch.load(tiny() / "policy.pth", weights_only=True)
    yield "empty", b""
    for share in (0.001, 0.1, 0.3, 0.5, 0.77, 0.9, 0.999):
        yield f"truncated to {share}", whole[:int(len(whole) * share)]
    yield "text", b"to be or not to be\n"
    yield "a picture", b"\x89PNG\r\n\x1a\n" + bytes(100)
    yield "an empty zip", b"PK\x05\x06" + bytes(18)
    yield "noise", bytes((7 * i * i + 13 * i) % 251 for i in range(300))
    yield "stray opcodes", b"\x80\x02" + bytes(range(48, 90))
    yield "pops from nothing", b"0."
    yield "a number", torch_bytes(3)
    yield "a bare state dict", torch_bytes(torch.nn.Linear(2, 2).state_dict())
    yield "a whole module", torch_bytes(torch.nn.Linear(2, 2))
    old = {"_use_new_zipfile_serialization": False}
    yield "a whole module, old format", torch_bytes(torch.nn.Linear(2, 2), **old)
    yield "a pickle with code", pickle.dumps(Spy())
    yield "a checkpoint with code", torch_bytes({**content, "more": Spy()})
    yield "another format", torch_bytes({**content, "format": "nanogrpo-0"})
    yield "a reward model", (tiny() / "reward.pth").read_bytes()


def test_broken_and_foreign_checkpoints(refused, folder):
    wrong = []
    for name, content in broken_checkpoints():
        (folder / "x.pth").write_bytes(content)
        try:
            refused(lambda: cli(sample, "--policy", "x.pth"), "x.pth", "python sft.py")
        except BaseException as error:  # collected: one run names all the kinds that get through
            wrong.append(f"{name}: {type(error).__name__} {str(error)[:80]}")
    assert not (folder / "spied").exists(), "code in a checkpoint was run"
    assert not wrong, "\n".join(wrong)
    assert files(folder) == ["x.pth"]


@pytest.mark.parametrize("drop", ["config", "model", "tokenizer"])
def test_a_checkpoint_with_a_part_missing(drop, refused, folder):
    content = torch.load(tiny() / "policy.pth", weights_only=True)
    torch.save({k: v for k, v in content.items() if k != drop}, "x.pth")
    refused(lambda: cli(sample, "--policy", "x.pth"), "x.pth", "python sft.py")


@pytest.mark.parametrize("kind", ["policy", "reward"])
@pytest.mark.parametrize("change", [{"config": {"n_layer": 2}}, {"config": {"layers": 1}},
                                    {"model": {"wte.weight": torch.zeros(2, 2)}}, {"model": 3}])
def test_a_checkpoint_that_does_not_fit_itself(kind, change, refused, folder):
    content = torch.load(tiny() / f"{kind}.pth", weights_only=True)
    for name, value in change.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    torch.save(content, "x.pth")
    words = rl("--policy", "x.pth") if kind == "policy" else rl("--reward_model", "x.pth")
    refused(lambda: cli(train_grpo, *words), "x.pth", "don't fit")


def test_numbers_beyond_their_range(refused, folder):
    refused(lambda: cli(train_grpo, *rl("--seed", 10**13)), "--seed", "wanted 0 to")
    refused(lambda: cli(train_grpo, *rl("--seed", -1)), "--seed", "wanted 0 to")
    refused(lambda: cli(sft, "--data", "play", "--dropout", 1.5), "--dropout 1.5", "below 1")


def test_missing_checkpoints_name_the_command(refused, folder):
    refused(lambda: cli(train_grpo), "out/sft/policy.pth", "python sft.py")
    refused(lambda: cli(train_ppo), "out/sft/policy.pth", "python sft.py")
    refused(lambda: cli(reward_model), "out/sft/policy.pth", "python sft.py")
    refused(lambda: cli(sample, "--policy", folder), str(folder), "python sft.py")  # a folder is no file
    for module in RL_SCRIPTS:
        refused(lambda: cli(module, *rl("--reward_model", "gone.pth")), "gone.pth", "python reward_model.py")
        refused(lambda: cli(module, *rl("--resume")), "state.pth", f"python {module.__name__}.py")
    assert files(folder) == []


def test_a_checkpoint_of_another_tokenizer(refused, folder):
    words = text.load_corpus("play")[0]
    char = train_tokenizer("char", words)
    checkpoint.save("char.pth", "policy", GPT(GPTConfig(char.vocab_size, 48, *helpers.TINY)), char)
    other = train_tokenizer("bpe", words[:40_000], 300)  # bpe as well, and of the same size, but other merges
    checkpoint.save("bpe.pth", "policy", GPT(GPTConfig(other.vocab_size, 48, *helpers.TINY)), other)
    before = files(folder)
    for policy, name in (("char.pth", "char"), ("bpe.pth", "bpe")):
        for module in RL_SCRIPTS:
            message = refused(lambda: cli(module, *rl("--policy", policy)),
                              "reward.pth", "another tokenizer", policy, name)
            assert one_line(message)
    assert files(folder) == before


def test_resume_with_other_arguments(refused, folder):
    cli(train_grpo, *rl("--steps", 1, reward="constant"))
    before = (folder / "logs/grpo.csv").read_bytes()
    refused(lambda: cli(train_grpo, *rl("--steps", 1, "--lr", "0.5", "--resume", reward="constant")),
            "--resume", "lr", "0.0001", "0.5")
    assert (folder / "logs/grpo.csv").read_bytes() == before


# ---- corpora and JSONL ----
def test_a_corpus_without_headings(refused, folder):
    (folder / "prose.txt").write_text("It was a dark and stormy night, and nobody spoke a word.\n" * 300)
    message = refused(lambda: cli(sft, "--data", "prose.txt"), "prose.txt", "no speaker headings", "ROMEO:")
    assert one_line(message)
    refused(lambda: cli(train_grpo, *rl("--data", "prose.txt")), "prose.txt", "no speaker headings")
    assert files(folder) == ["prose.txt"]


def test_a_corpus_that_is_no_text_or_too_short(refused, folder):
    (folder / "x.bin").write_bytes(b"\xff\xfe" * 2000)
    refused(lambda: cli(sft, "--data", "x.bin"), "x.bin", "UTF-8", "text")
    (folder / "short.txt").write_text("ROMEO:\nAh.\n")
    refused(lambda: cli(sft, "--data", "short.txt"), "short.txt", "11 characters", "1,000")


GOOD = {"prompt": "A:\n", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize("lines, wanted", [
    ([json.dumps(GOOD), json.dumps({k: v for k, v in GOOD.items() if k != "rejected"})], [
     "line 2", "'rejected'"]),
    ([json.dumps(GOOD), "", json.dumps({**GOOD, "chosen": 3})], ["line 3", "'chosen'"]),
    ([json.dumps(GOOD)] * 4 + ["{'prompt': 'x'}"], ["line 5", "not JSON", "column 2"]),
    ([json.dumps(GOOD), "[1, 2]"], ["line 2", "'prompt'"]),
    ([json.dumps(GOOD), '"prompt"'], ["line 2", "'prompt'"]),
    ([], ["empty", "prompt, chosen, rejected"]),
    ([json.dumps(GOOD)], ["at least 2"]),
    ([json.dumps(GOOD), json.dumps({**GOOD, "chosen": "never " * 90})], ["example 2", "48"]),
])
def test_pairs(lines, wanted, refused, folder):
    (folder / "pairs.jsonl").write_text("\n".join(lines))
    message = refused(lambda: cli(reward_model, "--policy", tiny() / "policy.pth", "--pairs", "pairs.jsonl"),
                      "pairs.jsonl", *wanted)
    assert one_line(message)
    assert files(folder) == ["pairs.jsonl"]


def test_pairs_that_are_missing_or_no_text(refused, folder):
    words = ["--policy", tiny() / "policy.pth", "--pairs", "pairs.jsonl"]
    refused(lambda: cli(reward_model, *words), "--pairs", "pairs.jsonl", "No such file")
    (folder / "pairs.jsonl").write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    refused(lambda: cli(reward_model, *words), "pairs.jsonl", "UTF-8")


@pytest.mark.parametrize("lines, wanted", [
    ([{"prompt": "A:\n"}, {"chosen": "x"}], ["line 2", "'prompt'"]),
    ([{"prompt": "A:\n", "worth": 1}, {"prompt": "B:\n"}], ["row 2", "keys"]),
    # names that the reward function's own arguments have
    ([{"prompt": "A:\n", "prompts": "x"}], ["'prompts'"]),
    ([{"prompt": "A:\n", "completions": "x"}], ["'completions'"]),
])
def test_prompts(lines, wanted, refused, folder):
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    refused(lambda: cli(train_grpo, *rl("--prompts", "p.jsonl", reward="constant")), "p.jsonl", *wanted)
    assert files(folder) == ["p.jsonl"]


# ---- reward functions ----
@pytest.mark.parametrize("name, wanted", [
    ("short", ["numbers for", "completions", "wanted one each"]), ("nan", ["nan", "finite"]),
    ("nothing", ["NoneType", "list of"]), ("words", ["list of"]),
    ("raises", ["KeyError", "'score'", "rewards.py, line"]),
    ("leaves", ["SystemExit: bye"]), ("no_such", ["no function 'no_such'"])])
@pytest.mark.parametrize("module", RL_SCRIPTS, ids=lambda m: m.__name__)
def test_reward_functions(module, name, wanted, refused, folder):
    spec = f"{tiny()}/rewards.py:{name}"
    message = refused(lambda: cli(module, *rl("--reward", spec)), spec, *wanted)
    assert one_line(message)
    assert files(folder) == []  # an earlier run's CSV and weights stay


def test_a_reward_file_with_a_syntax_error(refused, folder):
    (folder / "r.py").write_text("def f(:\n")
    refused(lambda: cli(train_grpo, *rl("--reward", "r.py:f")), "r.py", "SyntaxError", "line 1")
    assert files(folder) == ["r.py"]


# ---- CSV and figures ----
def test_a_csv_without_the_metric(refused, folder):
    (folder / "a.csv").write_text("step,loss,mean_r\n0,1,2\n1,1,3\n")
    refused(
    lambda: cli(
        plot,
        "--metric",
        "meen_r",
        "--output",
        "f.png",
        "a.csv"),
        "meen_r",
        "step, loss, mean_r",
         "a.csv")
    refused(lambda: cli(plot, "--metric", "loss", "--output", "f.png", "gone.csv"), "gone.csv")
    assert files(folder) == ["a.csv"]


# ---- where nothing can be written ----
@pytest.mark.parametrize("flag", ["--log", "--out"])
@pytest.mark.parametrize("module", RL_SCRIPTS, ids=lambda m: m.__name__)
def test_no_write_permission(module, flag, refused, folder):
    (folder / "file").write_text("x")  # below a file not even root can write
    words = rl(flag, folder / "file" / "a.csv", reward="constant")
    message = refused(lambda: cli(module, *words), "can't write", "file",
                      "another place")
    assert one_line(message)
    assert (folder / "file").read_text() == "x"
    assert not [f for f in files(folder) if f.endswith(".tmp")]


def test_no_write_permission_for_sft_and_reward_model(refused, folder, monkeypatch):
    monkeypatch.setitem(helpers.model.SIZES, "nano", helpers.TINY)
    (folder / "file").write_text("x")
    for flag in ("--log", "--out"):
        refused(
    lambda: cli(
        sft,
        "--data",
        "play",
        "--vocab_size",
        258,
        flag,
        "file/x"),
        "can't write",
         "file/x")
    words = ["--policy", tiny() / "policy.pth", "--data", "play", "--n_pairs", 64, "--prompt_len", 8,
             "--max_new", 8, "--held_out_pairs", 4, "--out", "file/x"]
    refused(lambda: cli(reward_model, *words), "can't write", "file/x")
    assert not [f for f in files(folder) if f.endswith(".tmp")]


def test_a_special_file_is_not_replaced(refused, folder):
    """--log /dev/null, typed by root, must not turn the device into a regular file for all programs."""
    os.mkfifo("pipe")
    refused(lambda: atomic_write(folder / "pipe", b"x"), "pipe")
    assert (folder / "pipe").is_fifo()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_under_the_csv(refused, folder):
    log = Log("a.csv", ["step", "loss"], 1)
    log.file.close()
    log.file = open("/dev/full", "w")
    message = refused(
    lambda: log.write(
        step=0,
        loss=1.0),
        "can't write a.csv",
        "No space left",
         "Free some space")
    assert one_line(message)


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import sft
import model
from utils.cli import parse
model.SIZES["nano"] = (1, 2, 32)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
del sys.argv[1:3]
sft.main(parse(sft.Args, sft.PRESETS))
"""


@pytest.mark.slow
def test_a_full_disk_under_a_checkpoint(folder):
    """Files may grow to 60 KB here: too few for a checkpoint. The old one stays, whole."""
    (folder / "out").mkdir()
    before = (tiny() / "policy.pth").read_bytes()
    for name in ("policy.pth", "state.pth"):
        (folder / "out" / name).write_bytes(before)
    words = ["--data", "play", "--vocab_size", 300, "--block_size", 16, "--batch_size", 2, "--steps", 2,
             "--eval_every", 1, "--out", "out", "--log", "a.csv", "--overwrite"]
    run = subprocess.run([sys.executable, "-c", LIMITED, str(helpers.ROOT), "60000", *map(str, words)],
                         capture_output=True, text=True, env=helpers.environment(), timeout=120)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    assert one_line(run.stderr.strip())
    assert "can't write out/state.pth" in run.stderr and "space" in run.stderr
    assert files(folder) == ["a.csv", "a.json", "out/policy.pth", "out/state.pth"]
    assert (folder / "out/policy.pth").read_bytes() == before


def test_a_full_disk_while_a_checkpoint_is_replaced(refused, folder):
    """The same in this process, at many limits: whatever write fails first, the old file is there, whole."""
    policy, tokenizer = load_policy(tiny() / "policy.pth")
    checkpoint.save("p.pth", "policy", policy, tokenizer)
    size, soft = os.path.getsize("p.pth"), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1, 4096, size // 3, size // 2, size - 4096, size - 1):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, soft[1]))
            refused(lambda: checkpoint.save("p.pth", "policy", policy, tokenizer), "can't write p.pth")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, soft)
        assert files(folder) == ["p.pth"]
        load_policy("p.pth")


# ---- device ----
def test_cuda_without_cuda(refused, folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in RL_SCRIPTS:
        refused(lambda: cli(module, *rl("--device", "cuda")), "--device cuda", "no CUDA GPU", "--device cpu")
    refused(lambda: cli(sft, "--data", "play", "--device", "cuda:1"), "cuda", "--device cpu")
    assert pick_device("auto").type in ("cpu", "mps")
    assert files(folder) == []


# ---- the download ----
@pytest.fixture
def server(monkeypatch, folder):
    """server(behaviour): Tiny Shakespeare's address is now a server on this machine; data/ is empty."""
    started = []

    def start(behaviour):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                behaviour(self)

            def log_message(self, *args):
                pass
        httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        httpd.daemon_threads = True
        threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True).start()
        started.append(httpd)
        monkeypatch.setattr(text, "SHAKESPEARE_URL", f"http://127.0.0.1:{httpd.server_address[1]}/input.txt")
        monkeypatch.setattr(text, "TIMEOUT", 0.3)
        monkeypatch.setattr(text, "DATA", folder / "data")
        monkeypatch.delenv("NANOGRPO_DATA", raising=False)
        for proxy in ("http_proxy", "https_proxy", "all_proxy"):  # a proxy would answer in the server's place
            monkeypatch.delenv(proxy, raising=False)
            monkeypatch.delenv(proxy.upper(), raising=False)
    yield start
    for httpd in started:
        httpd.shutdown()
        httpd.server_close()


def send(handler, content, claimed=None):
    handler.send_response(200)
    handler.send_header("Content-Length", str(claimed or len(content)))
    handler.end_headers()
    handler.wfile.write(content)


def stall(handler):
    send(handler, b"First", 1000)
    handler.wfile.flush()
    time.sleep(1.5)


OFFLINE = {
    "times out": lambda handler: time.sleep(1.5),
    "times out within the file": stall,
    "refuses": lambda handler: handler.send_error(503),
    "breaks off": lambda handler: send(handler, b"First Citizen:\n", 1_115_394),
    "talks nonsense": lambda handler: handler.wfile.write(b"hello\r\n\r\n"),
}


@pytest.mark.parametrize("behaviour", OFFLINE)
def test_a_download_that_fails(behaviour, server, refused, folder, capsys):
    server(OFFLINE[behaviour])
    message = refused(
    lambda: text.load_corpus("shakespeare"),
    "can't download",
    "input.txt",
    "NANOGRPO_DATA",
     "--data play")
    assert one_line(message)
    words, source = text.load_corpus("auto")  # falls back, and says so in one line
    out, err = capsys.readouterr()
    assert source == "bell_of_merrow.txt" and len(words) > 80_000
    assert out.count("\n") == 1 and "offline play" in out and err == ""
    assert files(folder) == []


@pytest.mark.parametrize("name", ["shakespeare", "auto"])
def test_a_download_of_something_else(name, server, refused, folder):
    server(lambda handler: send(handler, b"<html>please log in</html>"))
    refused(lambda: text.load_corpus(name), "SHA-256", "26 bytes", "86c4e6aa", "--data play")
    assert files(folder) == []


def test_a_download_that_succeeds(server, folder, monkeypatch):
    content = b"First Citizen:\nSpeak.\n\n"
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", text.hashlib.sha256(content).hexdigest())
    asked = []
    server(lambda handler: (asked.append(handler.path), send(handler, content)))
    for _ in "ab":
        assert text.load_corpus("auto") == (content.decode(), "tinyshakespeare")
    assert len(asked) == 1  # the second time it is read from data/
    assert files(folder) == ["data/tinyshakespeare/input.txt"]


def test_a_damaged_file_is_named(refused, folder, monkeypatch):
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_text("First Citizen:\n")
    monkeypatch.setenv("NANOGRPO_DATA", str(folder))
    refused(lambda: text.load_corpus("auto"), "input.txt", "15 bytes", "SHA-256", "Delete")


# ---- as a user sees it ----
@pytest.mark.parametrize("name, words, wanted", [
    ("train_grpo.py", [], ["out/sft/policy.pth", "python sft.py"]),
    ("train_grpo.py", ["--objective", "x"], ["objective", "gspo"]),
    pytest.param("sample.py", ["--policy", "x.pth"], ["x.pth", "python sft.py"], marks=pytest.mark.slow),
    pytest.param("plot.py", ["--metric", "q", "a.csv"], ["'q'", "step, loss"], marks=pytest.mark.slow),
])
def test_in_a_process_of_its_own(name, words, wanted, folder):
    (folder / "x.pth").write_bytes(b"")
    (folder / "a.csv").write_text("step,loss\n0,1\n")
    run = helpers.script(name, *words)
    assert run.returncode == 2, run.stderr
    assert run.stdout == "" and "Traceback" not in run.stderr
    for part in wanted:
        assert part in plain(run.stderr)
    assert files(folder) == ["a.csv", "x.pth"]
