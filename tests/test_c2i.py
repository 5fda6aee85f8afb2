"""Class-to-image GRPO: one process against two, each mode's first ratio, resumes, flags, what is refused."""
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import helpers
import numpy as np
import pytest
import torch
from helpers import cli, files, read_csv
from PIL import Image

from vision import c2i_grpo
from vision.c2i import data as c2i_data
from vision.c2i import models as c2i_models
from vision.c2i import rollout
from vision.c2i.data import center_crop
from vision.c2i.models import frechet, judged
from vision.c2i.image_gpt import IMAGE_GPTS, ImageGPT, ImageGPTConfig
from vision.c2i.vq import VQS, VQConfig, VQModel
from vision.data import Images

SOME = ["--device", "cpu", "--vq-steps", 4, "--gpt-steps", 6, "--classifier-steps", 6, "--steps", 2,
        "--sample-batch-size", 8, "--train-batch-size", 4, "--group-size", 4, "--eval-images", 3,
        "--eval-every", 0, "--lr", 3e-3, "--log-image-every", 0, "--save-every", 0,
        "--overwrite"]
BRIGHT = """
def bright(images, labels):
    assert 0 <= images.min() and images.max() <= 1 and labels.max() < 10
    return images.mean((1, 2, 3)).tolist()


def dark(images, labels):
    return [-x for x in bright(images, labels)]
"""
TIMING = {"seconds", "sampling_s", "peak_mem_mb"}


@pytest.fixture(scope="session")
def stages(tmp_path_factory):
    """The digits' own models, hardly trained, made once."""
    folder = tmp_path_factory.mktemp("c2i")
    cli(c2i_grpo, *SOME, "--steps", 1, "--out", folder, "--log", folder / "c2i.csv")
    return folder / "digits"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, stages):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(stages, "checkpoints/digits")
    return tmp_path


def numbers(path="logs/c2i.csv"):
    return [{k: v for k, v in row.items() if k not in TIMING} for row in read_csv(path)[1]]


def run(*words, log="logs/c2i.csv"):
    cli(c2i_grpo, *SOME, "--log", log, *words)
    return numbers(log)


def weights(folder):
    state = torch.load(Path(folder) / "consolidated.pth", weights_only=True)
    return torch.cat([w.flatten() for w in state.values()])


def refused(capsys, *words, said):
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli(c2i_grpo, *words)
    message = capsys.readouterr().err
    assert left.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1, message
    assert said in message, message


# ---- the loop ----
MODES = [["--sampling", kind, *words] for kind in ("autoregressive", "teacher-forced")
         for words in ([], ["--top-k", 5], ["--top-p", 0.7], ["--cfg-scale", 2.0], ["--temperature", 0.6],
                       ["--cfg-scale", 1.7, "--temperature", 1.3, "--top-k", 20, "--top-p", 0.8])]


@pytest.mark.parametrize("words", MODES, ids=lambda words: " ".join(map(str, words)))
def test_what_is_sampled_is_what_is_scored(words):
    """The first ratio is 1, also when the policy has moved; the reference is scored on the same support."""
    rows = run("--train-batch-size", 8, "--steps", 3, *words)[:3]
    assert all(float(row["sampler_gap_max"]) < 1e-5 for row in rows)
    assert all(abs(float(row["ratio_max"]) - 1) < 1e-5 for row in rows)
    assert float(rows[0]["kl"]) == 0 and 0 < float(rows[2]["kl"]) < 5
    assert all(float(row["grad_norm"]) > 1e-4 for row in rows)


def test_the_gap_sees_a_scorer_that_forgets_a_setting(monkeypatch):
    """Else the test above could pass with a column of zeros."""
    true = rollout.score
    monkeypatch.setattr(rollout, "score", lambda *a, temperature, **kw: true(*a, temperature=1.0, **kw))
    assert float(run("--temperature", 0.6)[0]["sampler_gap_max"]) > 0.01


def test_several_updates_a_rollout_start_from_the_old_policy():
    rows = run("--eps", 1e-4)[:2]
    assert all(float(row["sampler_gap_max"]) < 1e-5 for row in rows)
    assert all(float(row["ratio_max"]) > 1 + 1e-4 and float(row["clip_frac"]) > 0.01 for row in rows)


def test_micro_batches_add_up():
    one = run("--train-batch-size", 8)
    two = run("--train-batch-size", 2, "--gradient-accumulation-steps", 4)
    for a, b in zip(one[:2], two[:2], strict=True):
        for name in ("loss", "mean_r", "kl", "entropy", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-6), name


WORKER = """
import os, sys
from helpers import cli
from vision import c2i_grpo
words = sys.argv[2:]
for kind in sys.argv[1].split(","):
    os.environ["LOCAL_WORLD_SIZE"] = "1" if kind == "hsdp" else "2"  # two nodes of one process
    sharded = ["--ckpt-sharded"] if kind == "fsdp" else []
    parallel, _, half = kind.partition("-")
    half = ["--grad-precision", "bf16"] + ["--dtype", "bf16"] * (parallel != "ddp") if half else []
    cli(c2i_grpo, *words, "--data-parallel", parallel, "--out", kind, "--log", f"{kind}.csv", *sharded,
        *half)
try:
    cli(c2i_grpo, *words, "--top-p", "2")
except SystemExit as left:
    print("left with", left.code)
"""


def two_processes(*words):
    """Runs WORKER as two ranks -> [(stdout, stderr)] of both."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = helpers.environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                                 PYTHONPATH=f"{helpers.ROOT}:{helpers.ROOT}/tests")
    processes = [subprocess.Popen([sys.executable, "-c", WORKER, *map(str, words)], text=True,
                                  env={**common, "RANK": str(r), "LOCAL_RANK": str(r)},
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE) for r in range(2)]
    said = [p.communicate(timeout=240) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], said
    return said


@pytest.mark.parametrize("kinds", [("ddp", "fsdp"), pytest.param(("sdp", "hsdp"), marks=pytest.mark.slow)],
                         ids=",".join)
def test_two_processes_equal_one_and_resume_on_one(folder, kinds):
    """5 steps of 2 updates; the run of two processes goes on as a run of one, whole or in shards."""
    shared = [*SOME, "--steps", 5, "--save-every", 3]
    cli(c2i_grpo, *shared, "--out", "one", "--log", "one.csv")
    want, want_weights = numbers("one.csv"), weights("one/0000005")
    for kind in kinds:
        shutil.copytree("checkpoints/digits", f"{kind}/digits")
    half = [*shared, "--sample-batch-size", 4, "--train-batch-size", 2]
    (out0, err0), (out1, err1) = two_processes(",".join(kinds), *half)
    assert err0.count("error: ") == 1 and "error: --top_p 2.0" in err0 and "error" not in err1
    assert "left with 2" in out0 and "left with 2" in out1 and "accuracy" in out0 and "accuracy" not in out1
    moved = (want_weights - weights("one/0000003")).abs().max()
    for kind in kinds:
        for a, b in zip(want, numbers(f"{kind}.csv"), strict=True):
            for name in set(a) - {"peak_mem_mb"}:
                one, two = (float(row[name] or "nan") for row in (a, b))
                assert one == pytest.approx(two, abs=1e-4, rel=1e-4, nan_ok=True), (kind, a["step"], name)
        sharded = kind == "fsdp"
        names = files(f"{kind}/0000003")
        assert (".metadata" in names) == sharded and ("consolidated.pth" in names) != sharded
        assert Path(f"{kind}/0000003/state_type.txt").read_text() == ("sharded" if sharded else "full")
        assert Path(f"{kind}/0000003/resume_step.txt").read_text() == "3"
        if not sharded:
            assert (weights(f"{kind}/0000005") - want_weights).abs().max() < 1e-4 < 0.01 * moved
        if kind != "ddp":
            shutil.rmtree(f"{kind}/0000005")
            cli(c2i_grpo, *shared, "--resume", "--out", kind, "--log", f"{kind}.csv")
            assert (weights(f"{kind}/0000005") - want_weights).abs().max() < 1e-4
            assert [r["step"] for r in numbers(f"{kind}.csv")] == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.slow
def test_half_precision_between_processes(folder):
    """Gradients in bf16 under DDP, all passes in bf16 under FSDP2: near float32 on one process, not equal.

    AdamW moves a weight by about lr an update. A gradient near 0 may change its sign, so after 4 updates two
    runs may differ by 8 · lr = 0.024 in single weights: they did by 0.022. The mean tells more.
    """
    shared = [*SOME, "--steps", 2, "--save-every", 2]
    cli(c2i_grpo, *shared, "--out", "one", "--log", "one.csv")
    for kind in ("ddp-half", "fsdp-half"):
        shutil.copytree("checkpoints/digits", f"{kind}/digits")
    two_processes("ddp-half,fsdp-half", *shared, "--sample-batch-size", 4, "--train-batch-size", 2)
    for kind in ("ddp-half", "fsdp-half"):
        gap = (weights(f"{kind}/0000002") - weights("one/0000002")).abs()
        assert 0 < gap.max() < 0.024 and gap.mean() < 3e-3, (kind, gap.max(), gap.mean())
        for a, b in zip(numbers("one.csv")[:1], numbers(f"{kind}.csv")):
            assert float(a["entropy"]) == pytest.approx(float(b["entropy"]), abs=0.02) and a != b


@pytest.mark.parametrize("words", [[], ["--ckpt-sharded"]], ids=["full", "sharded"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(words):
    shared = ["--save-every", 2, *words, "--group-size", 2]
    shutil.copytree("checkpoints/digits", "whole/digits")
    want = run(*shared, "--steps", 4, "--out", "whole", log="whole.csv")
    run(*shared, "--steps", 2)
    run(*shared, "--steps", 4, "--resume")
    assert numbers() == want
    final = "checkpoints/0000004"
    if not words:
        assert torch.equal(weights(final), weights("whole/0000004"))
    cut = run(*shared, "--steps", 1, "--out", "whole", "--gpt-ckpt", final, "--from-fsdp",
              "--train-batch-size", 8, log="cut.csv")
    assert cut[0]["kl"] == "0" and cut[0]["mean_r"] != want[0]["mean_r"]  # it began where the other ended


def test_a_resume_refuses_other_weights(llamagen, capsys):
    words = [*llamagen, "--save-every", 1, "--steps", 1]
    cli(c2i_grpo, *words)
    content = torch.load("vq.pt", weights_only=True)
    content["model"]["quantize.embedding.weight"] += 1
    torch.save(content, "vq.pt")
    refused(capsys, *words, "--steps", 2, "--resume", said="file vq.pt has changed")


def test_a_resume_notices_that_a_start_of_its_own_making_was_made_again(capsys):
    words = [*SOME, "--save-every", 1, "--steps", 1, "--out", "made"]
    cli(c2i_grpo, *words)  # it trains its starts itself: nothing of them is in `made` before
    content = torch.load("made/digits/reward-s0.pth", weights_only=True)
    next(iter(content["model"].values())).add_(1)
    torch.save(content, "made/digits/reward-s0.pth")
    refused(capsys, *words, "--steps", 2, "--resume", said="reward made/digits/reward-s0.pth has changed")


def test_a_resume_refuses_other_arguments(capsys):
    run("--save-every", 1, "--steps", 1)
    refused(capsys, *SOME, "--resume", "--lr", 1, said="began with lr 0.003, not 1.0")
    refused(capsys, *SOME, "--resume", "--sample-batch-size", 4, said="the global batch 8, not 4")
    refused(capsys, *SOME, "--resume", "--out", "nowhere", said="no checkpoint in nowhere")


# ---- every flag ----
@pytest.fixture(scope="module")
def base(stages, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(stages, folder / "digits")
    cli(c2i_grpo, *SOME, "--out", folder, "--log", folder / "c2i.csv")
    return numbers(folder / "c2i.csv")


@pytest.mark.parametrize("words", [
    ["--lr", 1e-3], ["--weight-decay", 5.0], ["--beta1", 0.5], ["--beta2", 0.5], ["--grad-clip", 0.01],
    ["--seed", 1], ["--group-size", 3], ["--sample-batch-size", 4], ["--train-batch-size", 8],
    ["--gradient-accumulation-steps", 2], ["--adv-clip-max", 0.5], ["--eps", 1e-3], ["--beta", 3.0],
    ["--dtype", "bf16"], ["--dtype", "fp16"], ["--codebook-size", 32],
    ["--codebook-embed-dim", 3], ["--image-size", 10], ["--vq-steps", 2], ["--gpt-steps", 2],
    ["--classifier-steps", 2], ["--steps", 1], ["--eval-images", 4], ["--eval-every", 1],
    ["--log-every", 2], ["--gpt-model", "GPT-B"], ["--vq-model", "VQ-8", "--downsample-size", 4],
    ["--reward", "rewards.py:bright"]], ids=lambda words: " ".join(map(str, words)))
def test_a_flag_changes_the_run(base, words, monkeypatch):
    Path("rewards.py").write_text(BRIGHT)
    monkeypatch.setitem(c2i_models.GPTS, "GPT-B", dataclasses.replace(c2i_models.GPTS["digits"], n_layer=2))
    monkeypatch.setitem(c2i_models.TOKENIZERS, "VQ-8", VQConfig(8, (1, 1, 1), 16))
    assert run(*words) != base


def test_the_same_flags_give_the_same_run(base):
    """Else the test above shows nothing; nor do the readers' number and the device's name change a number."""
    assert run("--num-workers", 1, "--dataset", "mine", "--backend", "gloo") == base
    assert json.loads(Path("logs/c2i.json").read_text())["args"]["dataset"] == "mine"


HISTORICAL = """--max-steps 2 --num-generations 3 --global-seed 4 --max-grad-norm 0.5 --ckpt-dir a --use-wandb
--ckpt-every 5 --mixed-precision fp16 --clip-range 0.1 --log-interval 6"""
CANONICAL = """--steps 2 --group_size 3 --seed 4 --grad_clip 0.5 --out a --save_every 5 --dtype fp16 --eps 0.1
--log_every 6 --track wandb"""


def test_historical_flags_are_the_canonical_ones(monkeypatch, capsys):
    read = []
    monkeypatch.setattr(c2i_grpo, "main", read.append)
    cli(c2i_grpo, *HISTORICAL.split())
    cli(c2i_grpo, *HISTORICAL.replace("-", "_").replace("__", "--").split())
    cli(c2i_grpo, *CANONICAL.split())
    assert read[0] == read[1] == read[2] != c2i_grpo.Args() and read[0].track == "wandb"
    refused(capsys, "--max-steps", 2, "--steps", 3, said="--steps")


def test_groups_of_equal_rewards_are_counted_whatever_their_reward():
    """The standard deviation of equal float32 rewards may be above 0, so the rewards are compared."""
    Path("rewards.py").write_text("def constant(images, labels):\n    return [0.1] * len(images)\n")
    rows = run("--reward", "rewards.py:constant", "--group-size", 8)
    assert [row["frac_zero_std"] for row in rows[:2]] == ["1", "1"] and rows[0]["token_adv"] == "0"
    assert torch.full((8,), 0.1).std() > 0


@pytest.mark.slow
def test_a_reward_of_the_users_is_raised():
    """Bright and dark images as it says, judged on the same draws; images come as 0 … 1, labels as 0 … 9."""
    Path("rewards.py").write_text(BRIGHT)
    words = ["--steps", 12, "--vq-steps", 30, "--lr", 3e-2, "--beta", 0, "--train-batch-size", 8]
    bright, dark = (float(run("--reward", f"rewards.py:{name}", *words)[-1]["eval_r"])
                    for name in ("bright", "dark"))
    assert bright > -dark + 0.003  # of equal policies: 0 exactly


def test_pictures_and_wandb(monkeypatch):
    seen = {"init": [], "log": []}
    wandb = types.ModuleType("wandb")
    wandb.Image = lambda path: f"image {path}"
    wandb.init = lambda **kw: seen["init"].append(kw) or types.SimpleNamespace(
        log=lambda values, step: seen["log"].append((step, values)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run("--steps", 3, "--log-image-every", 2, "--track", "wandb", "--wandb-project", "p",
        "--wandb-run-name", "r", "--wandb-entity", "e")
    assert os.environ.pop("WANDB_MODE") == "offline"
    (init,) = seen["init"]
    assert (init["project"], init["name"], init["entity"], init["config"]["lr"]) == ("p", "r", "e", 3e-3)
    images = [(step, v["images"]) for step, v in seen["log"] if "images" in v]
    assert images == [(s, f"image checkpoints/samples/{s:07d}.png") for s in (0, 2)]
    logged = [v["mean_r"] for _, v in seen["log"] if "mean_r" in v]
    assert logged == pytest.approx([float(row["mean_r"]) for row in numbers() if row["mean_r"]])
    assert files("checkpoints/samples") == ["0000000.png", "0000002.png"]
    assert Image.open("logs/c2i.png").size == (356, 364)  # 2 × 3 images a class, and labels
    run("--track", "wandb")
    assert seen["init"][1]["project"] == "autoreg-grpo" and seen["init"][1]["name"] == "c2i"
    run("--track", "tensorboard", "--steps", 1)
    assert len(seen["init"]) == 2 and "events.out.tfevents" in files("logs/c2i")[0]


def test_ctrl_c_saves_and_leaves(monkeypatch):
    class Asked(c2i_grpo.Interrupt):
        def __init__(self):
            super().__init__()
            self.asked = signal.SIGINT
    monkeypatch.setattr(c2i_grpo, "Interrupt", Asked)
    with pytest.raises(SystemExit) as left:
        run()
    assert left.value.code == 130 and Path("checkpoints/0000001/resume_step.txt").read_text() == "1"


# ---- LlamaGen's side: files, data sets, codes; small models under the names of the large ones ----
@pytest.fixture
def llamagen(monkeypatch, folder):
    """-> words; writes vq.pt, gpt.pt and a data set of 6 images; the classifier has random weights."""
    torch.manual_seed(0)
    monkeypatch.setitem(c2i_models.TOKENIZERS, "VQ-16", VQConfig(8, (1, 1, 1, 1, 1), 16, 1, 1))
    monkeypatch.setitem(c2i_models.GPTS, "GPT-B", ImageGPTConfig(16, 1, 2, 1, 1, 1, multiple_of=8))
    torch.save({"model": VQModel(VQConfig(8, (1, 1, 1, 1, 1), 16, 32, 8)).state_dict()}, "vq.pt")
    gpt = ImageGPT(ImageGPTConfig(16, 1, 2, 32, 256, 5, multiple_of=8))
    torch.nn.init.normal_(gpt.output.weight)
    torch.save({"model": gpt.state_dict()}, "gpt.pt")
    saved([3, 1, 4, 1, 0, 2])
    return ["--device", "cpu", "--vq-ckpt", "vq.pt", "--gpt-ckpt", "gpt.pt", "--data-path", "data",
            "--codebook-size", 32, "--num-classes", 5, "--sample-batch-size", 2, "--train-batch-size", 1,
            "--group-size", 2, "--num-workers", 0, "--epochs", 1, "--classifier", "resnet18",
            "--classifier-weights", "none", "--log-every", 1]


def saved(labels, path="data", image="image", label="label", split="train"):
    import datasets
    draws = np.random.default_rng(0)
    pixels = [draws.integers(0, 256, (8, 12, 3), np.uint8).repeat(40, 0).repeat(40, 1) for _ in labels]
    if image == "image":
        column = [Image.fromarray(x) for x in pixels]
    else:
        Path(path).mkdir(exist_ok=True)
        column = [f"{i}.png" for i in range(len(labels))]
        for name, x in zip(column, pixels):
            Image.fromarray(x).save(Path(path) / name)
    data = datasets.Dataset.from_dict({image: column, label: labels})
    datasets.DatasetDict({split: data}).save_to_disk(path)
    return pixels


def test_official_files_and_a_saved_data_set(llamagen):
    cli(c2i_grpo, *llamagen, "--epochs", 2)
    rows = numbers()
    assert len(rows) == 6 and all(row["accuracy"] == "" for row in rows)  # 6 images, 2 a step, two passes
    assert float(rows[0]["grad_norm"]) > 0 and float(rows[2]["kl"]) > 0
    assert float(rows[0]["sampler_gap_max"]) < 0.1  # bf16
    record = json.loads(Path("logs/c2i.json").read_text())["args"]
    wanted = {"gpt_model": "GPT-B", "vq_model": "VQ-16", "image_size": 256, "downsample_size": 16, "lr":
              1e-5, "dtype": "bf16", "data_parallel": "fsdp", "weight_decay": 0.01, "beta1": 0.9,
              "beta2": 0.95, "grad_clip": 1.0, "seed": 0, "top_k": 0, "top_p": 1.0,
              "temperature": 1.0, "adv_clip_max": 5.0, "eps": 1e-4, "wandb_project": "autoreg-grpo",
              "log_image_every": 100, "save_every": 0, "out": "checkpoints", "codebook_embed_dim": 8}
    assert {k: record[k] for k in wanted} == wanted
    table = {"codebook_size": 16384, "num_classes": 1000, "epochs": 100, "group_size": 8,
             "log_every": 10, "sample_batch_size": 32, "train_batch_size": 8,
             "gradient_accumulation_steps": 1, "num_workers": 8}
    args, is_digits = c2i_grpo.resolve(c2i_grpo.Args(vq_ckpt="x", data_path="y"))
    assert not is_digits and {k: getattr(args, k) for k in table} == table


def test_codes_are_written_and_read_and_the_true_image_counts(llamagen):
    """Teacher forcing on images, on the codes that --extract-codes wrote, and with n_aug = 2 of them."""
    forced = [*llamagen, "--dtype", "fp32", "--sampling", "teacher-forced", "--train-batch-size", 2]
    cli(c2i_grpo, *forced, "--extract-codes", "codes")
    assert files("codes") == [f"imagenet256_{part}/{i}.npy" for part in ("codes", "labels") for i in range(6)]
    codes, label = (np.load(f"codes/imagenet256_{part}/2.npy") for part in ("codes", "labels"))
    assert codes.shape == (1, 1, 256) and codes.dtype == np.int64 and label.tolist() == [4]
    cli(c2i_grpo, *forced)
    by_image = numbers()
    cli(c2i_grpo, *forced, "--code-path", "codes")
    by_code = numbers()
    assert [r["entropy"] for r in by_image[:1]] == [r["entropy"] for r in by_code[:1]]  # the same true codes
    assert by_image[0]["mean_r"] != by_code[0]["mean_r"]  # another true image: the tokenizer's own
    for i in range(6):
        path = f"codes/imagenet256_codes/{i}.npy"
        np.save(path, np.concatenate([np.load(path), np.zeros((1, 1, 256), np.int64)], 1))
    cli(c2i_grpo, *forced, "--code-path", "codes", "--overwrite")
    assert [r["entropy"] for r in numbers()] != [r["entropy"] for r in by_code]


def test_codes_of_an_earlier_data_set_do_not_mix_with_new_ones(llamagen, capsys):
    words = [*llamagen, "--extract-codes", "codes"]
    Path("codes/imagenet256_codes.part").mkdir(parents=True)  # of a run that was killed
    Path("codes/imagenet256_codes.part/9.npy").write_bytes(b"")
    cli(c2i_grpo, *words)
    before = files("codes")
    assert len(before) == 12
    saved([0, 1], "few")
    refused(capsys, *words, "--data-path", "few", said="imagenet256_codes is there already")
    assert files("codes") == before
    Path("codes/imagenet256_codes/._0.npy").write_bytes(b"x")  # macOS leaves these
    args = c2i_grpo.Args(code_path="codes", image_size=256, num_classes=5, codebook_size=32)
    assert len(c2i_data.load_data(args, False, 256)) == 6


def test_the_augmentation_is_not_drawn_with_the_codes_numbers(monkeypatch):
    seeds, real = [], c2i_data.step_generator
    monkeypatch.setattr(c2i_data, "step_generator", lambda *args: seeds.append(real(*args)) or seeds[-1])
    data = Images(range(8), range(8), range(8), lambda i, _: (torch.full((2, 3), i), torch.tensor(0)))
    list(c2i_data.batches(data, 4, 0, 0, 3, 0, 0, 1))
    assert len({g.initial_seed() for g in seeds}) == 3
    assert not {g.initial_seed() for g in seeds} & {real(0, step).initial_seed() for step in range(100)}


def odd_set(name, images, labels, kind):
    import datasets
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    datasets.Dataset.from_dict({"image": images, "label": labels}, features=features).save_to_disk(name)


@pytest.mark.parametrize("kind, labels, said", [
    ("float32", [0.5, 1.0], "torch.float"), ("bool", [True, False], "torch.bool"),
    ("string", list("01"), "odd"),
    ("list", [[0], [1]], "shape (2, 1)"), ("int64", [0, None], "odd")])
def test_labels_that_are_no_whole_numbers(llamagen, capsys, kind, labels, said):
    import datasets
    kind = datasets.List(datasets.Value("int64")) if kind == "list" else datasets.Value(kind)
    odd_set("odd", [Image.new("RGB", (16, 16))] * 2, labels, kind)
    refused(capsys, *llamagen, "--data-path", "odd", said=said)


def test_rows_without_an_image_and_undecoded_ones(llamagen, capsys):
    import datasets
    forced = [*llamagen, "--sampling", "teacher-forced"]
    images = [Image.new("RGB", (16, 16), (9 * i,) * 3) for i in range(4)]
    odd_set("none", [*images[:3], None], [0, 1, 2, 3], datasets.Value("int64"))
    refused(capsys, *forced, "--data-path", "none", "--extract-codes", "a", said="image 3 of --data-path")
    odd_set("good", images, [0, 1, 2, 3], datasets.Value("int64"))
    raw = datasets.load_from_disk("good").cast_column("image", datasets.Image(decode=False))
    raw.save_to_disk("raw")
    for name in ("good", "raw"):
        cli(c2i_grpo, *forced, "--data-path", name, "--extract-codes", name)
    one, two = (np.load(f"{name}/imagenet256_codes/3.npy") for name in ("good", "raw"))
    assert np.array_equal(one, two)


@pytest.mark.parametrize("image, label", [("image", "labels"), ("image_path", "label"), ("file", "label"),
                                          ("filepath", "labels")])
def test_columns_of_other_names(folder, image, label):
    pixels = saved([1, 0], image=image, label=label)
    args = c2i_grpo.Args(data_path="data", image_size=256, num_classes=2, sampling="teacher-forced")
    data = c2i_data.load_data(args, False, 256)
    x, y, _ = data[0]
    assert y == 1 and len(data) == 2 and x.shape == (3, 256, 256)
    assert x.min() < -0.9 and x.max() > 0.9
    want = np.array(Image.fromarray(pixels[0]).resize((384, 256), Image.Resampling.BICUBIC))[:, 64:320]
    assert np.array_equal(((x + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), want)


def test_center_crop():
    """Sizes by hand, and what is left of an image of stripes."""
    for size in ((300, 200), (64, 64), (50, 90), (128, 400), (129, 127)):
        assert center_crop(Image.new("RGB", size), 64).size == (64, 64)
    thirds = np.zeros((8, 24, 3), np.uint8)
    thirds[:, 8:16] = 255
    assert np.array(center_crop(Image.fromarray(thirds), 8)).min() == 255  # the middle square alone
    checks = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert set(np.unique(np.array(center_crop(Image.fromarray(checks), 8)))) <= {127, 128}  # a box's mean


# ---- the numbers of the evaluation ----
def test_frechet_of_gaussians_by_hand():
    torch.manual_seed(0)
    a = torch.randn(500, 6, dtype=torch.float64)
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + 3) == pytest.approx(6 * 9)
    twice = a.mean(0).square().sum() + a.var(0).sum()  # of 2·a: (2 - 1)² times mean and variance
    assert frechet(a, 2 * a) == pytest.approx(twice.item())
    b = torch.randn(400, 6, dtype=torch.float64) @ torch.randn(6, 6, dtype=torch.float64)
    product = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp(min=0).sqrt().sum()  # tr (C_a·C_b)^½
    want = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * product
    assert frechet(a, b) == pytest.approx(want.item())


def test_diversity_and_accuracy_by_hand():
    class Judge(torch.nn.Module):
        def forward(self, images):
            return torch.eye(10)[torch.tensor([0, 1, 1, 1])]

        def features(self, images):
            return images.flatten(1)[:, :2]
    images = torch.zeros(4, 3, 8, 8)
    images[1] += 0.5  # class 0: one pair, 0.5 apart
    images[3, :, :, :4] += 1  # class 1: half of the pixels 1 apart: RMS √½
    real = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    measures = judged(images, torch.tensor([0, 0, 1, 1]), Judge(), real)
    assert measures["accuracy"] == 0.75 and measures["diversity"] == pytest.approx((0.5 + 0.5 ** 0.5) / 2)
    of_three = [Judge().features(x) for x in (images[[0, 1, 3]], real)]  # equal numbers, spread over classes
    assert measures["frechet"] == pytest.approx(frechet(*of_three))


def test_a_judge_shares_neither_digits_nor_architecture_with_the_reward():
    few = {"vq_steps": 4, "gpt_steps": 6, "classifier_steps": 6}
    args, _ = c2i_models.resolve(c2i_grpo.Args(out="checkpoints", **few))
    vq, gpt, classifier, judges = c2i_models.load_models(args, True, torch.device("cpu"))
    names = [name for split in ("train", "val", "test") for name in c2i_data.digits(8, 0, split).names]
    assert len(set(names)) == len(names) == 1797
    kinds = {type(module) for module in classifier.modules()}
    for (judge, own), split in zip(judges, ("val", "test")):
        assert torch.equal(own, (c2i_data.digits(8, 0, split).images + 1) / 2)
        assert torch.nn.Conv2d in kinds - {type(module) for module in judge.modules()}
    assert c2i_data.load_data(args, True, 16).names == c2i_data.digits(8, 0).names  # what GRPO learns from


def test_the_test_is_measured_once_at_the_end():
    rows = run("--eval-every", 1)
    assert [bool(row["accuracy"]) for row in rows] == [True] * 3
    assert [bool(row["test_accuracy"] and row["test_frechet"]) for row in rows] == [False, False, True]
    measured = json.loads(Path("logs/c2i.json").read_text())["measured"]
    assert list(measured) == ["before", "after", "test, before", "test, after", "test, real digits"]
    assert measured["test, after"]["accuracy"] == pytest.approx(float(rows[2]["test_accuracy"]))


def test_a_grid_names_before_after_and_the_classes(monkeypatch):
    said, real = [], c2i_models.ImageDraw.ImageDraw.text
    monkeypatch.setattr(c2i_models.ImageDraw.ImageDraw, "text", lambda pen, at, text, *args, **kw:
                        said.append((*at, text)) or real(pen, at, text, *args, **kw))
    ramp = torch.arange(30.0).view(30, 1, 1, 1).expand(30, 3, 8, 8) / 30  # three images a class
    c2i_models.before_and_after("grid.png", ramp, 1 - ramp)
    with Image.open("grid.png") as image:
        pixels = np.array(image)
    lefts = {text: x for x, _, text in said if text in ("before", "after")}
    for title, values in (("before", ramp), ("after", 1 - ramp)):
        rows = [(y, text) for x, y, text in said if text[:5] == "class" and 0 < lefts[title] - x < 80]
        assert [text for _, text in rows] == [f"class {c}" for c in range(10)]
        for c, (y, _) in enumerate(rows):
            shown = pixels[y + 9, lefts[title]:]  # the row of images that the words stand beside
            wanted = 255 * values[3 * c:3 * c + 3, 0, 0, 0]
            assert shown[[5, 39, 73], 0].tolist() == pytest.approx(wanted.tolist(), abs=1)
            assert shown[33, 0] == 255  # a gap of two pixels
            assert (pixels[y:y + 18, lefts[title] - 64:lefts[title]] < 128).any()  # words are there


# ---- bad input ----
@pytest.mark.parametrize("words, said", [
    (["--top-p", 0], "--top_p 0.0: wanted a share in (0, 1]"),
    (["--image-size", 9], "--image-size 9 is no multiple of the downsample factor 2"),
    (["--downsample-size", 8], "--downsample-size 8: --vq-model digits has 2"),
    (["--num-classes", 11], "there are 10 digits"),
    (["--reward", "mse"], "a free sample has no true image"),
    (["--reward", "nice"], "wanted classifier, mse or FILE.py:FUNCTION"),
    (["--backend", "nccl"], "--backend nccl needs CUDA GPUs"),
    (["--train-batch-size", 3], "--sample-batch-size 8 is no multiple of 3"),
    (["--sample-batch-size", 1440], "a step takes 1440"),
    (["--group-size", 1], "--group_size 1 is too small: wanted at least 2"),
    (["--vq-ckpt", "vq.pt"], "--vq-ckpt needs data"),
    (["--data-path", "data"], "--data-path needs --vq-ckpt"),
    (["--gpt-ckpt", "none.pt"], "no checkpoint at none.pt"),
    (["--gpt-ckpt", "."], "is a folder: give --from-fsdp"),
    (["--gpt-ckpt", "none.pt", "--from-fsdp"], "is no folder: leave out --from-fsdp"),
    (["--code-path", "none"], "no none/imagenet8_codes/*.npy"),
], ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_what_does_not_fit_is_one_line(capsys, words, said):
    refused(capsys, *SOME, *words, said=said)


def test_several_class_slots_are_refused_by_tyro(capsys):
    with pytest.raises(SystemExit) as left:
        cli(c2i_grpo, *SOME, "--cls-token-num", 2)
    assert left.value.code == 2 and "--cls_token_num" in helpers.plain(capsys.readouterr().err)


def test_bad_files_are_one_line(llamagen, capsys):
    refused(capsys, *llamagen, "--image-size", 300, said="--image-size 300")
    refused(capsys, *llamagen, "--gpt-ckpt", "vq.pt", said="doesn't fit this ImageGPT")
    Path("cut.pt").write_bytes(Path("vq.pt").read_bytes()[:5000])
    refused(capsys, *llamagen, "--vq-ckpt", "cut.pt", said="cut.pt can't be read")
    refused(capsys, *llamagen, "--data-path", "none", said="--data-path none can't be read as a data set")
    refused(capsys, *llamagen, "--num-classes", 4, said="also has cls_embedding.embedding_table.weight (6,")
    saved([0, 5], "high")
    refused(capsys, *llamagen, "--data-path", "high", said="labels hold 5: wanted whole numbers from 0 to 4")
    saved([0, 1], "odd", label="kind")
    refused(capsys, *llamagen, "--data-path", "odd", said="has the columns image, kind: wanted one of label")
    saved([0, 1], "dev", split="test")
    refused(capsys, *llamagen, "--data-path", "dev", said="has the splits test: wanted one called train")
    saved([0, 1], "lost", image="file")
    (Path("lost") / "1.png").write_bytes(b"no image")
    forced = ["--sampling", "teacher-forced"]
    refused(capsys, *llamagen, "--data-path", "lost", *forced, said="image 1 of --data-path")
    Path("codes/imagenet256_codes").mkdir(parents=True)
    Path("codes/imagenet256_labels").mkdir()
    for codes, label, said in ((np.zeros((1, 1, 9), int), 0, "wanted (1, n_aug, 256)"),
                               (np.full((1, 1, 256), 32), 0, "hold 32: wanted whole numbers from 0 to 31"),
                               (np.zeros((1, 1, 256), int), 7, "hold 7: wanted whole numbers from 0 to 4")):
        for i in range(2):
            np.save(f"codes/imagenet256_codes/{i}.npy", codes)
            np.save(f"codes/imagenet256_labels/{i}.npy", np.array([label]))
        refused(capsys, *llamagen, "--code-path", "codes", "--overwrite", said=said)


# ---- minutes ----
@pytest.mark.slow
def test_digits_get_better_and_mse_raises_its_own_reward():
    """Seeds are fixed. 10 points are 5 standard errors of the difference of two shares of 1,000 images.

    The mse's mean over 15 steps has a standard error of 0.0005; over 60 steps it rose by 0.0026.
    """
    shared = ["--device", "cpu", "--vq-steps", 100, "--gpt-steps", 250, "--save-every", 0,
              "--log-image-every", 0]
    cli(c2i_grpo, *shared, "--steps", 20, "--lr", 1e-3, "--eval-every", 0)
    end = float(numbers()[-1]["accuracy"])
    cli(c2i_grpo, *shared, "--steps", 60, "--sampling", "teacher-forced", "--eval-every", 60)
    rows = numbers()
    start = float(rows[0]["accuracy"])
    assert 0.4 < start < 0.85 and end > start + 0.1
    reward = [float(row["mean_r"]) for row in rows if row["mean_r"]]
    assert sum(reward[-15:]) / 15 > sum(reward[:15]) / 15 + 0.001


@pytest.mark.slow
def test_a_step_of_gpt_b_under_torchrun(folder):
    """LlamaGen's sizes and the issue's command, on one class with two images; random weights."""
    torch.manual_seed(0)
    vq = VQModel(VQS["VQ-16"])
    torch.save({"model": vq.state_dict()}, "vq.pt")
    saved([7, 8])
    command = ("-m torch.distributed.run --nproc_per_node=1 -m vision.c2i_grpo --device cpu --vq-ckpt vq.pt "
               "--data-path data --sample-batch-size 1 --train-batch-size 1 --num-generations 2 --epochs 1 "
               "--num-workers 0 --classifier resnet18 --classifier-weights none --mixed-precision fp32 "
               "--ckpt-dir out --log-interval 1 --max-steps 1")
    done = subprocess.run(
        [sys.executable, *command.split()],
        env=helpers.environment(PYTHONPATH=str(helpers.ROOT)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = read_csv("logs/c2i.csv")[1]
    print(f"GPT-B, 2 images: {float(row['seconds']):.0f} s, sampling {float(row['sampling_s']):.0f} s, "
          f"{float(row['peak_mem_mb']):.0f} MB")
    assert float(row["grad_norm"]) > 0 and float(row["sampler_gap_max"]) < 1e-4
    assert IMAGE_GPTS["GPT-B"].n_layer == 12 and float(row["peak_mem_mb"]) > 1000
