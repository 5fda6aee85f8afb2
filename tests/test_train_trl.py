"""train_trl.py: TRL reads our prompts, earns our rewards, and leaves our files; what it lacks is refused."""
import sys
from pathlib import Path

import pytest
import torch
from helpers import cli, files, numbers, read_csv, rl, tiny, weights

pytest.importorskip("trl")
tokenizers = pytest.importorskip("tokenizers")
import train_grpo  # noqa: E402
import train_trl  # noqa: E402
from grpo import OBJECTIVES  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from policy import load_policy  # noqa: E402
from reward import load_reward_model  # noqa: E402
from rollout import COLUMNS  # noqa: E402
from tasks import load_task  # noqa: E402
from utils import checkpoint  # noqa: E402
from utils.run import step_generator  # noqa: E402
from utils.text import completions  # noqa: E402
from utils.tokenizer import ChatTokenizer, train_tokenizer  # noqa: E402
from utils.trl import export, objective_fields, rollout_config  # noqa: E402

TEMPLATE = ("{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
            "{% if add_generation_prompt %}<s>{% endif %}")
TINY = ["--task", "add", "--prompts_per_step", 3, "--group_size", 4, "--max_new", 5, "--eval_prompts", 4,
        "--dtype", "fp32", "--device", "cpu", "--seed", 7]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A random chat model that says digits. Its tokenizer puts <s> before all text, as Llama 3's does."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["What is"], tokenizers.trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = ChatTokenizer("tiny", made.to_str(), [(1,)], TEMPLATE, special)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(tokenizer.vocab_size, 96, 2, 4, 2, 32, 64, 8))
    model.embed_tokens.weight.data[tokenizer.encode("0123456789</s>")] += 0.1
    path = tmp_path_factory.mktemp("chat") / "policy.pth"
    checkpoint.save(path, "policy", model, tokenizer)
    return path


def watch(monkeypatch, name):
    """What TRL's trainer passes to its method `name`, a tuple a call, and what that returns."""
    from trl import GRPOTrainer
    calls, method = [], getattr(GRPOTrainer, name)

    def watched(self, *args, **kwargs):
        calls.append((args, method(self, *args, **kwargs)))
        return calls[-1][1]
    monkeypatch.setattr(GRPOTrainer, name, watched)
    return calls


def test_trl_reads_our_prompts_and_earns_the_tasks_reward(chat, monkeypatch, capsys):
    """A step's prompts are train_grpo.py's to the token, in the template once; its rewards the check's."""
    read, rewarded = watch(monkeypatch, "_generate_single_turn"), watch(monkeypatch, "_calculate_rewards")
    # a check that gives more than 0 to random answers: the share of digits
    Path("mine.py").write_text("from tasks import TASKS, Task\ndef digits(text, row):\n"
                               "    return sum(c.isdigit() for c in text) / 5 + len(row['answer'])\n"
                               "TASK = Task(TASKS['add'].sample, digits)\n")
    words = ["--policy", chat, *TINY, "--task", "mine.py:TASK", "--steps", 2, "--lr", 1e-2]
    cli(train_trl, *words)
    policy, tokenizer = load_policy(chat)
    task = load_task("mine.py:TASK")
    train = task.prompts(tokenizer, 7)[0]
    header, rows = read_csv("logs/trl.csv")
    assert header == COLUMNS and [row["step"] for row in rows] == ["0", "1"]
    for step in range(2):
        index = train.draw(3, step_generator(7, step)).repeat_interleave(4).tolist()
        assert read[step][0][0] == [tokenizer.encode_prompt(train.texts[i]) for i in index]
        ids = rewarded[step][0][3]
        texts = [tokenizer.decode(answer) for answer in ids]
        wanted = [task.reward(text, {"answer": train.columns["answer"][i]}) for text, i in zip(texts, index)]
        assert rewarded[step][1].flatten().tolist() == pytest.approx(wanted)
        assert len(set(wanted)) > 2
        assert float(rows[step]["mean_r"]) == pytest.approx(sum(wanted) / 12, rel=1e-6)
        assert float(rows[step]["length"]) * 12 == pytest.approx(sum(map(len, ids)), rel=1e-6)
        cut = sum(len(answer) == 5 and answer[-1] != 1 for answer in ids)
        assert float(rows[step]["frac_cut"]) == pytest.approx(cut / 12, abs=1e-6)
    assert int(rows[1]["samples"]) == 24 and float(rows[0]["grad_norm"]) > 1e-3 and rows[0]["ref_logp"] == ""
    assert abs(float(rows[0]["kl"])) < 1e-6 < float(rows[1]["kl"])
    cli(train_grpo, *words[:-4], "--steps", 1, "--share_prompt", "no")
    same = ("eval_r", "eval_acc", "eval_pass8")
    assert [rows[0][name] for name in same] == [read_csv("logs/grpo.csv")[1][0][name] for name in same]

    # ---- the files ----
    trained, _ = load_policy("out/trl/policy.pth")
    assert not torch.allclose(weights("out/trl/policy.pth"), weights(chat), atol=1e-3)
    from transformers import AutoModelForCausalLM, AutoTokenizer
    for path in ("out/trl/hf", "out/trl/checkpoint-2"):
        theirs = AutoModelForCausalLM.from_pretrained(path)
        tokens = torch.arange(40).view(2, 20)
        torch.testing.assert_close(theirs(tokens).logits, trained(tokens), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained("out/trl/hf")("2")["input_ids"][0] == 0  # its own <s> is there again
    assert "2 steps" in capsys.readouterr().out


def test_a_policy_of_sft_reads_the_short_form(monkeypatch):
    read = watch(monkeypatch, "_generate_single_turn")
    cli(train_trl, "--policy", tiny() / "policy.pth", *TINY, "--steps", 1)
    tokenizer = load_policy(tiny() / "policy.pth")[1]
    train = load_task("add").prompts(tokenizer, 7)[0]
    index = train.draw(3, step_generator(7, 0)).repeat_interleave(4).tolist()
    assert read[0][0][0] == [tokenizer.encode(train.columns["short"][i]) for i in index]


def test_the_reward_models_score_and_several_updates(monkeypatch):
    """On the corpus with the reward model; a row of the CSV is two epochs of two minibatches of two parts."""
    seen, call = [], train_trl.Loop.__call__

    def watched(self, completion_ids, index, **kwargs):
        seen.append((completion_ids, index, call(self, completion_ids, index), self.env.train))
        return seen[-1][2]
    monkeypatch.setattr(train_trl.Loop, "__call__", watched)
    cli(train_trl, *rl("--steps", 2, "--minibatches", 2, "--epochs_per_rollout", 2, "--micro_batch", 1,
                       "--lr", 0.02, "--eval_every", 1))
    rows = read_csv("logs/trl.csv")[1]
    assert len(rows) == len(seen) == 2 and float(rows[0]["clip_frac"]) > 0 and rows[1]["eval_r"]
    model, _ = load_reward_model(tiny() / "reward.pth")
    for (ids, index, scores, train), row in zip(seen, rows):
        for answer, i, score in zip(ids, index, scores):
            tokens = torch.cat([train.tokens[i], torch.tensor(answer)])[None]
            mask = torch.ones(1, len(answer), dtype=torch.bool)
            assert model(tokens, mask).item() == pytest.approx(score, abs=1e-4)
        assert float(row["mean_r"]) == pytest.approx(sum(scores) / 16, abs=1e-5)
    assert files("out/trl")[0] == "README.md" and Path("out/trl/checkpoint-8").is_dir()


def test_flags_as_fields():
    """B 8, G 4: two epochs of two optimizer steps, four prompts each, two at a time."""
    args = train_trl.Args(prompts_per_step=8, group_size=4, minibatches=2, epochs_per_rollout=2,
                          micro_batch=2, steps=3, dtype="fp32", overlong="mask", entropy_coef=0.1,
                          top_entropy=0.2, sync_ref_every=5)
    config = rollout_config(OBJECTIVES["grpo"], args, torch.device("cpu"), 4)
    wanted = {"generation_batch_size": 32, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
              "steps_per_generation": 4, "num_iterations": 2, "max_steps": 12, "logging_steps": 4,
              "bf16": False,
              "mask_truncated_completions": True, "entropy_coef": 0.1, "top_entropy_quantile": 0.2,
              "sync_ref_model": True, "ref_model_sync_steps": 20, "ref_model_mixup_alpha": 1.0, "top_k": 0,
              "use_bias_correction_kl": False, "disable_dropout": True, "beta": 0.04, "adam_beta2": 0.99}
    assert {name: getattr(config, name) for name in wanted} == wanted


def test_the_learning_rate_falls_as_ours(monkeypatch):
    """To a fifth after two steps, linearly: 1 and 0.6 of it, as techniques.before_step sets them."""
    import transformers
    rates, step = [], transformers.TrainerCallback.on_step_begin

    def watched(self, args, state, control, optimizer=None, **kwargs):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(self, args, state, control, **kwargs)
    monkeypatch.setattr(transformers.trainer_callback.DefaultFlowCallback, "on_step_begin", watched)
    cli(train_trl, *rl("--steps", 2, "--lr", 0.01, "--lr_end", 0.2, reward="share_of_e"))
    assert rates == pytest.approx([0.01, 0.006])


def test_which_objectives_trl_has():
    """Whether they compute the same is in test_trl_parity.py."""
    taken = []
    for name, objective in OBJECTIVES.items():
        try:
            taken.append(name) if objective_fields(objective) else None
        except ValueError as error:
            assert "TRL has no equal" in str(error)
    assert taken == ["grpo", "dr_grpo", "dapo", "lite_ppo", "gspo", "luspo", "cispo", "sapo"]


def test_stopped_and_resumed_is_the_run_that_never_stopped(monkeypatch, capsys):
    words = rl("--steps", 3, "--eval_every", 2, "--lr", 0.01, "--minibatches", 2, "--epochs_per_rollout", 2,
               "--top_entropy", 0.5, "--entropy_coef", 0.01, "--overlong", "mask", reward="share_of_e")
    cli(train_trl, *words, "--log", "whole.csv", "--out", "out/whole")
    monkeypatch.setenv("KILL_AT_CALL", "2")  # before: an evaluation
    monkeypatch.setenv("KILL_WITH", "SIGINT")
    with pytest.raises(SystemExit) as caught:
        cli(train_trl, *words, "--log", "parts.csv")
    assert caught.value.code == 130 and "--resume" in capsys.readouterr().out
    assert len(read_csv("parts.csv")[1]) == 1
    monkeypatch.delenv("KILL_AT_CALL")
    for given, said in ((["--lr", 0.5], "--lr"), (["--sync_ref_every", 1], "--sync_ref_every")):
        with pytest.raises(SystemExit):
            cli(train_trl, *words, "--log", "parts.csv", "--resume", *given)
        assert said in capsys.readouterr().err
    cli(train_trl, *words, "--log", "parts.csv", "--resume")
    assert numbers("parts.csv") == numbers("whole.csv")
    assert torch.equal(weights("out/trl/policy.pth"), weights("out/whole/policy.pth"))
    cli(train_trl, *words, "--log", "parts.csv", "--resume")  # nothing is left to do
    assert numbers("parts.csv") == numbers("whole.csv")


@pytest.mark.parametrize("words, said", [
    (["--objective", "rloo"], "baseline='loo'"), (["--objective", "maxrl"], "scale='mean'"),
    (["--kl_in_reward"], "--kl_in_reward"), (["--dynamic_sampling", 1], "--dynamic_sampling"),
    (["--tis_cap", 2], "--tis_cap"),
    (["--lr_end", 2], "--lr_end"), (["--overlong", "penalty"], "--overlong penalty"),
    (["--group_size", 1], "--group_size 1"), (["--minibatches", 3], "--minibatches"),
    (["--micro_batch", 3], "--micro_batch"), (["--trl.nonsense", 1], "--trl.nonsense: trl.GRPOConfig has no"),
    (["--trl.learning_rate", 1], "--trl.learning_rate: the script sets it"), (["--trl.top_k", "x"], "top_k"),
    (["--trl.use_vllm", "True"], "TRL refuses"), (["--policy", "nothing.pth"], "nothing.pth")])
def test_bad_input_ends_with_one_line_and_no_file(words, said, capsys):
    with pytest.raises(SystemExit) as caught:
        cli(train_trl, *rl(reward="share_of_e"), *words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and said in error and "Traceback" not in error
    assert not files(".")


def test_a_stop_of_several_tokens_and_a_missing_package(monkeypatch, capsys):
    tokenizer = train_tokenizer("char", "0123456789+=\n")
    checkpoint.save("char.pth", "policy", GPT(GPTConfig(tokenizer.vocab_size, 48, 1, 2, 16)), tokenizer)
    with pytest.raises(SystemExit):
        cli(train_trl, "--policy", "char.pth", *TINY)
    assert "ends an answer at one token" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(SystemExit):
        cli(train_trl, "--policy", "char.pth", *TINY)
    assert "pip install '.[trl]'" in capsys.readouterr().err and files(".") == ["char.pth"]


def test_the_exported_tokenizer_is_ours(chat):
    """A π₀ of bpe and the chat model: the same ids, the same text before a stop, a pad of the vocabulary."""
    for path in (tiny() / "policy.pth", chat):
        policy, tokenizer = load_policy(path)
        reader = export(policy, tokenizer, "start")
        texts = [tokenizer.prompt(text) for text in ("What is 2 + 3?", "ROMEO:\n", "Zoë — 東京\n\nA")]
        ids = [tokenizer.encode(text) for text in texts]
        assert reader(text=texts)["input_ids"] == ids
        assert reader.eos_token_id == reader.pad_token_id == tokenizer.stops[0][0] < tokenizer.vocab_size
        answer = [*tokenizer.encode("2 + 3"), reader.eos_token_id]
        ours = completions(torch.tensor([answer]), torch.ones(1, len(answer), dtype=torch.bool), tokenizer)
        assert reader.batch_decode([answer], skip_special_tokens=True) == ours == ["2 + 3"]


@pytest.mark.slow
def test_two_processes():
    """Each has half of the prompts; one writes."""
    words = rl("--steps", 2, "--eval_every", 1, "--beta", 0.1, reward="share_of_e")
    cli(train_trl, *words, "--log", "one.csv")
    import subprocess

    from helpers import ROOT, environment
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--",
                           str(ROOT / "train_trl.py"), *map(str, words), "--log", "two.csv", "--overwrite"],
                          env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.count("held out") == 1, done.stderr
    one, two = read_csv("one.csv")[1], read_csv("two.csv")[1]
    assert [r["samples"] for r in one] == [r["samples"] for r in two] == ["16", "32"]
    assert one[0]["eval_r"] == two[0]["eval_r"] and float(two[0]["grad_norm"]) > 0
    assert abs(float(two[0]["loss"])) < 1e-6 and float(two[0]["length"]) * 16 == float(two[0]["tokens"])
