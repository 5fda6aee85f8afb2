"""clip_grpo.py and what it needs: LoRA to the bit, official files, exact gradients, resumes, bad input.

Oracles: CLIP's own code, enumeration of all groups, values worked by hand. Seeds are fixed.
"""
import copy
import itertools
import json
import math
import os
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import cli, numbers, plain, read_csv, weights
from PIL import Image

clip = pytest.importorskip("clip")
peft = pytest.importorskip("peft")
pytest.importorskip("sklearn")

import clip_grpo
from grpo import OBJECTIVES, group_advantage
from utils import checkpoint
from utils.log import SHARED
from vision import rewards
from vision.clip import data as clip_data, lora, model as clip_model
from vision.data import read_class
from vision.clip.model import SIZES, SMALL, build, config_of, fill, text_features
from vision.data import Images, digits, step_index

TINY = (64, 16, 1, 64, 8, 64, 1, 1)
REWARDS = '''
import json, os, signal
calls = 0

def share(completions, prompts, label, **columns):
    global calls
    calls += 1
    if str(calls) == os.environ.get("STOP_AT_CALL"):
        os.kill(os.getpid(), signal.SIGINT)
    with open("asked.json", "w") as file:
        json.dump([completions, prompts, label, sorted(columns)], file)
    return [float(a == b) for a, b in zip(completions, label)]

def nan(completions, **columns):
    return [float("nan")] * len(completions)
'''


def make(sizes=TINY, seed=0, context_length=24):
    torch.manual_seed(seed)
    return build(config_of(sizes, context_length))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("STOP_AT_CALL", raising=False)
    model, config = make()
    checkpoint.write("tiny.pth", "clip", config=config, model=model.state_dict())
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


STORED = "image_resolution", "context_length"  # what a run needs to know of a model from a file


@pytest.fixture
def refused(capsys):
    """refused(words, *wanted): the script ends with code 2 and a message that holds each of `wanted`."""
    def check(words, *wanted):
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            run(*words)
        out, err = capsys.readouterr()
        assert left.value.code == 2 and "Traceback" not in err + out
        for part in wanted:
            assert part in plain(err), f"{part!r} is not in: {err}"
    return check


def run(*words):
    cli(clip_grpo, "--device", "cpu", "--no-plot-metrics", "--overwrite", *words)


def tiny_run(*words):
    """Two epochs of 4 steps with a network that knows nothing."""
    run("--model", "tiny.pth", "--dataset", "digits", "--batch-size", 256, "--epochs", 2,
        "--group-size", 4, "--log-every", 1, "--lr", 1e-3, *words)


def column(name, path="logs/clip.csv"):
    return [float(row[name]) for row in read_csv(path)[1] if row[name]]


def image_folder(root, size=(40, 30), n=4, broken=False):
    """Two classes: images that are mostly red, or mostly blue, under noise."""
    generator = np.random.default_rng(0)
    for part, count in (("train", n), ("val", n)):
        for name, channel in (("red_thing", 0), ("blue_thing", 2)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 160, (size[1], size[0], 3))
                pixels[..., channel] += 90
                Image.fromarray(pixels.astype("uint8")).save(root / part / name / f"{i}.png")
    if broken:
        (root / "train" / "red_thing" / "0.png").write_bytes(b"\x89PNG no image")
    return root


# ---- LoRA ----
@pytest.mark.parametrize("width", [64, 128, 768])
def test_separate_attention_is_the_packed_one_to_the_bit(width):
    torch.manual_seed(0)
    packed = torch.nn.MultiheadAttention(width, width // 64)
    torch.nn.init.normal_(packed.in_proj_bias)  # zero by default: a lost bias would not be seen
    torch.nn.init.normal_(packed.out_proj.bias)
    apart, x = lora.SplitAttention(packed), torch.randn(17, 5, width)
    for low in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            want = packed(x, x, x, need_weights=False)[0]
            assert torch.equal(apart(x, x, x)[0], want)
            with torch.no_grad():  # where nn.MultiheadAttention could take another path
                assert torch.equal(apart(x, x, x)[0], packed.eval()(x, x, x, need_weights=False)[0])


def adapted(steps=0, lr=1e-2):
    """A tiny CLIP's tower, the same with adapters after some steps, and images."""
    model, _ = make()
    plain_tower, images = copy.deepcopy(model.visual), torch.randn(6, 3, 16, 16)
    torch.manual_seed(1)
    visual = lora.add_lora(model.visual, r=8, alpha=16, dropout=0.05)
    trained = [p for p in visual.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.2)
    for _ in range(steps):
        visual.train()
        F.cross_entropy(visual(images), torch.arange(6)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return plain_tower, visual.eval(), images


def test_lora_starts_as_the_base_to_the_bit_and_is_a_small_share():
    base, visual, images = adapted()
    assert torch.equal(visual(images), base(images))
    trainable, total = lora.count(visual)
    assert total == sum(p.numel() for p in base.parameters())
    assert trainable == 8 * (4 * (64 + 64) + 2 * (64 + 256))  # r·(in + out) for q, k, v, out, c_fc, c_proj
    trainable, total = lora.count(lora.add_lora(make(SMALL)[0].visual, r=8))
    assert trainable < 0.15 * total


def test_two_hundred_steps_leave_the_base_as_it_was_and_the_disabled_adapters_give_it_back():
    base, visual, images = adapted(steps=200)
    left = {k.replace("base_layer.", ""): v for k, v in visual.get_base_model().state_dict().items()
            if "lora_" not in k}
    names = {"attn.in_proj_": [".attn.q.", ".attn.k.", ".attn.v."], "attn.out_proj.": [".attn.out."]}
    for name, value in base.state_dict().items():
        parts = next((new for old, new in names.items() if old in name), None)
        if parts:
            stem, end = name.split(".attn.")
            value_now = torch.cat([left[stem + part + end.split("_")[-1].split(".")[-1]] for part in parts])
        else:
            value_now = left[name]
        assert torch.equal(value_now, value), name
    with visual.disable_adapter():
        assert torch.equal(visual(images), base(images))
    assert (visual(images) - base(images)).abs().max() > 0.1  # and they had learned something


def test_adapter_file_reloads_to_the_same_logits_and_merged_is_near():
    base, visual, images = adapted(steps=20)
    scale = torch.nn.Parameter(torch.tensor(2.5))
    lora.save_adapter("adapter.pth", visual, scale)
    assert os.path.getsize("adapter.pth") < 2e5
    _, other, _ = adapted()
    other_scale = torch.nn.Parameter(torch.tensor(0.0))
    lora.load_adapter("adapter.pth", other, other_scale)
    assert torch.equal(other(images), visual(images)) and other_scale.item() == 2.5
    base.load_state_dict(lora.merged(visual))
    assert 0 < (base(images) - visual(images)).abs().max() < 1e-5


def test_every_adapter_gets_a_gradient_and_one_without_is_found():
    _, visual, images = adapted()
    lora.check_gradients(visual, images)
    assert all(p.grad is None for p in visual.parameters())
    # on nn.MultiheadAttention itself peft's adapters of out_proj stay idle: what the swap is for
    naive = peft.get_peft_model(make()[0].visual, peft.LoraConfig(r=4, target_modules=["out_proj", "c_fc"]))
    with pytest.raises(AssertionError, match="adapters get no gradient"):
        lora.check_gradients(naive, images)


def test_lora_run_saves_adapter_and_merged_policy(capsys):
    tiny_run("--use-lora", "--save-model", "--epochs", 1)
    assert "9,216 of" in capsys.readouterr().out
    content = torch.load("out/clip/adapter.pth", weights_only=True)
    assert set(content["model"]) and all("lora_" in k for k in content["model"])
    after = column("top1")[-1]
    for words in (["--model", "out/clip/policy.pth"],
                  ["--use-lora", "--lora-adapter", "out/clip/adapter.pth"]):
        tiny_run(*words, "--epochs", 0, "--log", "logs/again.csv")
        assert column("top1", "logs/again.csv") == [after]
    tiny_run(*words, "--epochs", 0, "--save-model", "--out", "two")
    assert torch.equal(weights("two/policy.pth"), weights("out/clip/policy.pth"))


# ---- the method ----
def test_gradients_averaged_over_draws_are_the_exact_policy_gradient():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, requires_grad=True)
    label, n, G = torch.tensor([1, 3]), 4000, 8
    similarity = F.normalize(torch.randn(5, 4), dim=1)
    similarity = similarity @ similarity.T
    value = rewards.smooth(torch.arange(5).expand(2, 5), label, similarity, 0.5)  # (2, C): of every class
    exact, = torch.autograd.grad(-(F.softmax(logits, 1) * value).sum(1).mean(), logits)
    logp_all = F.log_softmax(logits.repeat(n, 1), dim=1)
    action = clip_grpo.draw(logp_all, G, torch.Generator().manual_seed(0))
    reward = rewards.smooth(action, label.repeat(n), similarity, 0.5)
    old = logp_all.detach().gather(1, action)[:, :, None]
    loss, stats = clip_grpo.bandit_loss(logp_all, old, action, group_advantage(reward, "mean", "none"),
                                        OBJECTIVES["dr_grpo"])
    drawn, = torch.autograd.grad(loss, logits)
    assert F.cosine_similarity(drawn.flatten(), exact.flatten(), dim=0) > 0.99
    torch.testing.assert_close(drawn, exact * (G - 1) / G, atol=0.005, rtol=0)  # the mean is G's own, too
    assert stats["ratio_max"] == 1


def test_with_the_groups_std_it_is_the_enumeration_of_all_groups():
    torch.manual_seed(0)
    logits, label, G = torch.tensor([[0.5, 0.0, -0.5]], requires_grad=True), torch.tensor([2]), 3
    groups = torch.tensor(list(itertools.product(range(3), repeat=G)))  # all 27
    logp_all = F.log_softmax(logits, dim=1).expand(27, 3)
    chance = logp_all.detach().gather(1, groups).sum(1).exp()
    adv = group_advantage(rewards.bandit(groups, label.expand(27)))
    exact, = torch.autograd.grad(-(chance[:, None] * adv * logp_all.gather(1, groups)).sum() / G, logits)
    many = F.log_softmax(logits, dim=1).expand(40_000, 3)
    action = clip_grpo.draw(many, G, torch.Generator().manual_seed(0))
    adv = group_advantage(rewards.bandit(action, label.expand(40_000)))
    loss, _ = clip_grpo.bandit_loss(many, many.detach().gather(1, action)[:, :, None], action, adv)
    drawn, = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(drawn, exact, atol=0.01, rtol=0)
    assert exact.abs().max() > 0.1 and (exact - drawn).norm() < 0.02 * exact.norm()


def test_classes_are_drawn_with_their_probability():
    p = torch.tensor([[0.5, 0.3, 0.2, 0.0]])
    action = clip_grpo.draw(p.log(), 20_000, torch.Generator().manual_seed(0))
    share = action[0].bincount(minlength=4) / 20_000
    torch.testing.assert_close(share, p[0], atol=0.015, rtol=0)  # 4 standard deviations


def test_kl_and_entropy_are_the_enumerated_ones():
    p, q = [0.7, 0.2, 0.1], [0.2, 0.5, 0.3]
    logs = torch.tensor([p]).log(), torch.tensor([q]).log()
    by_hand = sum(a * math.log(a / b) for a, b in zip(p, q))
    assert clip_grpo.exact_kl(*logs).mean().item() == pytest.approx(by_hand)
    assert clip_grpo.entropy(logs[0]).mean().item() == pytest.approx(-sum(a * math.log(a) for a in p))
    flat = [a ** 0.5 / sum(b ** 0.5 for b in p) for a in p]  # temperature 2
    assert clip_grpo.entropy(logs[0], 2.0).item() == pytest.approx(-sum(a * math.log(a) for a in flat))


def watch(monkeypatch, name):
    """Records what a function of the script is called with, and what it returns."""
    seen, function = [], getattr(clip_grpo, name)

    def watched(*args):
        seen.append((args, function(*args)))
        return seen[-1][1]
    monkeypatch.setattr(clip_grpo, name, watched)
    return seen


@pytest.mark.parametrize("words", [[], ["--use-lora", "--lora-dropout", "0.5"]])
def test_a_run_is_on_policy_at_first_and_logs_the_exact_kl(monkeypatch, words):
    kls, losses = watch(monkeypatch, "exact_kl"), watch(monkeypatch, "bandit_loss")
    tiny_run("--updates", 2, "--epochs", 1, *words)
    for (logp_all, ref_all), _ in kls:
        assert logp_all.requires_grad and not ref_all.requires_grad
    ratios = [stats["ratio_max"].item() for _, (_, stats) in losses]
    assert ratios[::2] == [1.0] * 4 and max(ratios[1::2]) > 1.001  # the first update on a rollout, the second
    for i, logged in enumerate(column("kl")):
        both = [(p.detach().double(), q.double()) for (p, q), _ in kls[2 * i:2 * i + 2]]
        means = []
        for p, q in both:
            each = [sum(math.exp(a) * (a - b) for a, b in zip(*rows)) for rows in zip(p.tolist(), q.tolist())]
            means.append(sum(each) / len(each))
        assert logged == pytest.approx(sum(means) / 2, rel=1e-4, abs=1e-7)
    assert kls[0][1].abs().max() == 0 and column("kl")[-1] > 1e-5
    entropies = [x / math.log(10) for x in column("entropy")]
    assert column("entropy_norm") == pytest.approx(entropies) and max(entropies) <= 1


def test_the_dropout_mask_of_a_draw_is_replayed(monkeypatch):
    losses = watch(monkeypatch, "bandit_loss")
    model, config = make()
    visual = lora.add_lora(model.visual, r=8)
    with torch.no_grad():
        for name, p in visual.named_parameters():
            p.normal_() if "lora_B" in name else None  # at B = 0 dropout wouldn't show
    lora.save_adapter("adapter.pth", visual, model.logit_scale)
    tiny_run("--updates", 3, "--epochs", 1, "--lr", 0, "--use-lora", "--lora-dropout", 0.5, "--lora-adapter",
             "adapter.pth")
    assert len(losses) == 12 and all(stats["ratio_max"] == 1 for _, (_, stats) in losses)


def test_masks_and_draws_are_of_two_random_streams(monkeypatch):
    """One seed for both would draw the class with the numbers that drop its features."""
    draws, seeds, real = watch(monkeypatch, "draw"), [], torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or real(seed))
    tiny_run("--epochs", 1, "--updates", 2, "--use-lora")
    of_draws = {args[2].initial_seed() for args, _ in draws}
    of_masks = seeds[-8:]  # four steps, two passes each
    assert len(of_draws) == len(set(of_masks)) == 4 and not of_draws & set(of_masks)
    assert of_masks[::2] == of_masks[1::2]


def test_logit_scale_is_clamped_at_100_and_can_be_frozen():
    model, config = make()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(150))
    checkpoint.write("tiny.pth", "clip", config=config, model=model.state_dict())
    tiny_run("--epochs", 1)
    assert max(column("logit_scale")) <= 100.001
    assert column("kl")[0] == pytest.approx(0, abs=1e-6)  # the reference is clamped alike
    for words, values in ((["--epochs", 1], 4), (["--epochs", 1, "--freeze-logit-scale"], 1)):
        model, config = make()
        checkpoint.write("tiny.pth", "clip", config=config, model=model.state_dict())
        tiny_run(*words)
        assert len(set(column("logit_scale"))) == values


def test_a_smooth_reward_gives_a_group_without_the_label_something_to_compare():
    model, _ = make()
    text = text_features(model, clip_model.DIGITS, clip_model.DIGIT_TEMPLATES)
    action, label = torch.tensor([[0, 4, 6, 8]]), torch.tensor([7])

    def reward(**flags):
        of_class = clip_data.reward_function(clip_grpo.Args(**flags), list(clip_model.DIGITS), text)
        return of_class(action, label, None, ["x"])
    hard, soft = reward(), reward(reward="smooth")
    assert group_advantage(hard).abs().max() == 0 and group_advantage(soft).abs().max() > 0.2
    cos = {(a, b): (text[a] * text[b]).sum().item() for a, b in itertools.permutations(range(10), 2)}
    tau = (1 - sum(cos.values()) / 90) / 10
    by_hand = [math.exp((cos[a, 7] - 1) / tau) for a in action[0].tolist()]
    assert soft[0].tolist() == pytest.approx(by_hand, rel=1e-2)
    soft = reward(reward="smooth", tau=0.1)
    by_hand = [math.exp((cos[a, 7] - 1) / 0.1) for a in action[0].tolist()]
    assert soft[0].tolist() == pytest.approx(by_hand, rel=1e-4)


def test_schedule_warms_up_and_falls_to_zero():
    rates = [clip_grpo.learning_rate(step, 20, 2.0, 0.2) for step in range(20)]
    assert rates[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert rates[4:] == sorted(rates[4:], reverse=True) and 0 < rates[-1] < 0.02
    assert rates[12] == pytest.approx(1.0)  # half-way down the cosine
    assert all(clip_grpo.learning_rate(s, 3, 1.0, w) > 0 for s in range(3) for w in (0.0, 0.01, 1.0))


# ---- class texts ----
def test_articles_follow_the_sound():
    for word, want in {"apple": "an apple", "cat": "a cat", "hour": "an hour", "unicycle": "a unicycle",
                       "one": "a one", "eight": "an eight", "umbrella": "an umbrella"}.items():
        assert fill("a photo of a {}.", word) == f"a photo of {want}."
        assert fill("An {}", word) == want.capitalize()
    assert fill("the {} and a dog", "owl") == "the owl and a dog"
    assert fill("a big {}", "owl") == "a big owl"


def test_ensemble_is_the_unit_mean_of_unit_features():
    model, _ = make()
    words, templates = ["owl", "cat"], ("a photo of a {}.", "{}")
    single = []
    for texts in (["a photo of an owl.", "a photo of a cat."], ["owl", "cat"]):
        x = model.encode_text(clip.tokenize(texts, 24)).detach()
        single.append(x / x.norm(dim=1, keepdim=True))
    mean = (single[0] + single[1]) / 2
    torch.testing.assert_close(text_features(model, words, templates), mean / mean.norm(dim=1, keepdim=True))
    assert not torch.allclose(single[0], single[1], atol=1e-3)


def test_imagenet_folders_become_words():
    wnids = [f"n{i:08d}" for i in range(1000)]
    words = clip_data.class_words(wnids, "imagenet")
    assert words[0] == "tench" and words[-1] == "toilet tissue" and len(words) == 1000
    with open("names.txt", "w") as file:
        file.write("n00000001 goldfish, Carassius auratus\nn00000000 tench, Tinca tinca\n")
    assert clip_data.class_words(wnids[:2], "x", "names.txt") == ["tench", "goldfish"]
    assert clip_data.class_words(["sea_lion"], "x") == ["sea lion"]


# ---- files ----
class Official(clip.model.CLIP):
    """As OpenAI's archives: three numbers beside the weights."""

    def __init__(self, config):
        super().__init__(**config)
        for name in ("input_resolution", "context_length", "vocab_size"):
            value = config[name.replace("input", "image")]
            if hasattr(self, name):
                delattr(self, name)
            self.register_buffer(name, torch.tensor(value))

    def build_attention_mask(self):
        return torch.full((24, 24), float("-inf")).triu_(1)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_official_archive_and_state_dict_load_exactly():
    torch.manual_seed(0)
    config = config_of(TINY, 24)
    model = Official(config).eval()
    images, tokens = torch.randn(2, 3, 16, 16), clip.tokenize(["a cat", "an owl"], 24)
    archive = torch.jit.trace(model, (images, tokens))
    torch.save(model.state_dict(), "plain.pt")
    archive.save("exact.pt")
    want, original = model(images, tokens)[0], copy.deepcopy(model.state_dict())
    archive.half().save("half.pt")  # OpenAI's are in fp16; this casts `model` too
    for name in ("exact.pt", "plain.pt"):
        found, config_found = clip_model.load_clip(name)
        assert config_found == {name: config[name] for name in STORED}
        assert torch.equal(found(images, tokens)[0], want)
        assert {p.dtype for p in found.parameters()} == {torch.float32}
    found, _ = clip_model.load_clip("half.pt")
    for name, value in found.state_dict().items():
        assert torch.equal(value, original[name].half().float()) and value.dtype == torch.float32


def test_a_resnet_loads_too_and_keeps_its_statistics(tmp_path):
    model, config = make((64, 32, (1, 1, 1, 1), 8, None, 64, 1, 1))
    torch.save(model.state_dict(), "resnet.pt")
    found, config_found = clip_model.load_clip("resnet.pt")
    assert config_found == {name: config[name] for name in STORED}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(found.visual(x), model.visual(x))
    tiny_run("--model", "resnet.pt", "--epochs", 1, "--save-model")
    after = torch.load("out/clip/policy.pth", weights_only=True)["model"]
    for name, value in model.state_dict().items():
        if "running" in name:
            assert torch.equal(after[name], value)
    assert not torch.equal(after["visual.conv1.weight"], model.state_dict()["visual.conv1.weight"])


@pytest.mark.parametrize("name, parameters", [("ViT-B/32", 151_277_313), ("RN50", 102_007_137)])
def test_sizes_of_the_known_names(name, parameters):
    """The counts that openai/CLIP's notebooks print."""
    with torch.device("meta"):
        model = clip.model.CLIP(**config_of(SIZES[name]))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert set(SIZES) == set(clip.available_models())


def test_images_are_prepared_as_clip_does(tmp_path):
    generator = np.random.default_rng(0)
    for size in ((50, 33), (31, 64), (20, 20)):
        Image.fromarray(generator.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save("x.png")
        mine, _ = read_class(32, False, "x.png", 0, shorter=32, by="bicubic")
        with Image.open("x.png") as image:
            torch.testing.assert_close(clip_model.normalise(mine), clip.clip._transform(32)(image))


def test_rotation_turns_the_image():
    x = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(clip_data.rotated(x, 90.0), torch.rot90(x, 1, (2, 3)), atol=1e-5, rtol=0)


def test_evaluation_counts_by_hand():
    """Four images whose features rank six classes; a class's text is a unit vector."""
    ranks = torch.tensor([[6, 5, 4, 3, 2, 1], [5, 6, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1], [1, 2, 3, 4, 5, 6.0]])
    labels = torch.tensor([0, 0, 5, 2])  # first, second, last, fourth
    val = Images(ranks, labels, list("abcd"))
    texts = torch.eye(6), torch.eye(6).roll(-1, 0)
    scores, of_class, named = clip_data.evaluate(lambda x: x, val, *texts, False)
    assert named.tolist() == [0, 1, 0, 5]
    assert scores == {"top1": 0.25, "top5": 0.75, "top1_other_templates": 0.5}  # class c reads c + 1's rank
    assert of_class == [0.5, None, 0.0, None, None, 0.0]


# ---- runs ----
@pytest.mark.parametrize("words", [[], ["--use-lora", "--updates", "2"]])
def test_interrupted_and_resumed_is_bitwise_the_run_without(monkeypatch, capsys, words):
    words = [*words, "--reward", "rewards.py:share"]
    tiny_run(*words, "--save-model", "--log", "whole.csv", "--out", "whole")
    monkeypatch.setenv("STOP_AT_CALL", "6")
    with pytest.raises(SystemExit) as left:
        tiny_run(*words, "--save-model", "--log", "part.csv", "--out", "part")
    assert left.value.code == 130 and "--resume" in capsys.readouterr().out
    assert torch.load("part/state.pth", weights_only=True)["step"] == 6
    monkeypatch.delenv("STOP_AT_CALL")
    tiny_run(*words, "--save-model", "--log", "part.csv", "--out", "part", "--resume")
    assert numbers("part.csv") == numbers("whole.csv") and len(numbers("whole.csv")) == 9
    assert torch.equal(weights("part/policy.pth"), weights("whole/policy.pth"))
    assert not torch.equal(weights("whole/policy.pth"), weights("tiny.pth"))


def test_a_users_reward_gets_names_and_labels():
    tiny_run("--reward", "rewards.py:share", "--epochs", 1)
    completions, prompts, label, more = json.load(open("asked.json"))
    assert len(completions) == len(prompts) == len(label) == 256 * 4 and more == []
    assert set(completions) <= set(clip_model.DIGITS) and prompts[0] in digits(8, 0).train.names
    assert prompts[0] == prompts[3] != prompts[4] and label[0] == label[3]
    share = sum(a == b for a, b in zip(completions, label)) / 1024
    assert column("mean_r")[-1] == pytest.approx(share, abs=1e-6)


def test_ce_has_the_same_columns_and_the_same_batches(monkeypatch):
    logps = watch(monkeypatch, "class_logp")
    tiny_run("--method", "ce", "--log", "logs/ce.csv")
    logp_all, label = logps[0][1], digits().train.targets[step_index(1078, 256, 0, 0)]
    by_hand = -logp_all[range(256), label].mean() + 0.01 * (logp_all.exp() * logp_all).sum(1).mean()
    assert column("loss", "logs/ce.csv")[0] == pytest.approx(by_hand.item(), rel=1e-5)
    tiny_run()
    header, rows = read_csv("logs/ce.csv")
    assert header == read_csv("logs/clip.csv")[0] and header[:len(SHARED)] == SHARED
    assert column("top1", "logs/ce.csv")[0] == column("top1")[0]
    assert column("samples", "logs/ce.csv") == column("samples")
    assert all(row["clip_frac"] == row["ratio_max"] == row["token_adv"] == "" for row in rows)
    record = json.load(open("logs/ce.json"))
    assert record["args"]["method"] == "ce"
    classes = record["class_accuracy"]
    assert list(classes) == list(clip_model.DIGITS)
    labels = digits().test.targets
    mean = sum(c["after"] * n for c, n in zip(classes.values(), labels.bincount().tolist())) / len(labels)
    assert column("test_top1", "logs/ce.csv") == pytest.approx([mean]) == [record["test_after"]["top1"]]


def test_a_new_start_leaves_no_gradient_for_the_first_step():
    """Else the run that makes the start would differ from the next one, which reads it from its file."""
    model, config = clip_model.digits_start("start", accuracy=0.9, max_steps=2)
    assert all(p.grad is None for p in model.parameters())
    again, same_config = clip_model.digits_start("start", accuracy=0.9)
    assert config == same_config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))


@pytest.mark.slow
@pytest.mark.pictures
def test_reward_and_accuracy_rise_from_a_contrastive_start():
    """The small CLIP learns digits half-way, then six epochs of GRPO: +10 points where it began at 50 %."""
    run("--start-accuracy", 0.5, "--epochs", 6, "--lr", 1e-3, "--plot-metrics")
    top1, r = column("top1"), column("mean_r")
    assert 0.3 < top1[0] < 0.7 and top1[-1] > top1[0] + 0.1 and r[-1] > r[0] + 0.1
    assert os.path.isfile("out/clip/start-0.5-s0.pth")
    for end in (".png", "_images.png", ".json"):
        assert os.path.getsize(f"logs/clip{end}") > 50
    assert 0 < column("kl")[-1] and column("top1_rotated")[-1] < top1[-1]


@pytest.mark.pictures
def test_folder_of_images_with_bf16(capsys):
    image_folder(Path("made"), n=6, broken=True)
    words = ["--model", "tiny.pth", "--dataset", "made", "--epochs", 2, "--batch-size", 4,
             "--num-workers", 0, "--dtype", "bf16", "--log-every", 1, "--save-model"]
    run(*words, "--bad-images", "skip")
    assert "skipped 1 files" in capsys.readouterr().out
    assert json.load(open("logs/clip.json"))["dtype"] == "bf16"
    assert list(json.load(open("logs/clip.json"))["class_accuracy"]) == ["blue thing", "red thing"]
    state = torch.load("out/clip/state.pth", weights_only=True)
    assert {v.dtype for v in state["model"].values()} == {torch.float32}
    header, rows = read_csv("logs/clip.csv")
    assert all(row["top5"] == row["top1_rotated"] == "" for row in rows)  # of two classes, and not of digits


@pytest.mark.slow
def test_random_vit_b_32_learns_two_classes(tmp_path, monkeypatch):
    """A quarter of ViT-B/32's width, all of its 224 pixels and 12 layers; bf16 is here to run."""
    monkeypatch.setitem(SIZES, "ViT-B/32", (128, 224, 12, 192, 32, 128, 2, 2))
    image_folder(tmp_path / "made", size=(48, 48), n=16)
    words = ["--model", "ViT-B/32", "--weights", "random", "--dataset", "made", "--batch-size", 16,
             "--lr", 1e-3, "--num-workers", 0, "--log-every", 1]
    run(*words, "--epochs", 2)
    top1 = column("top1")
    assert top1[-1] > top1[0] + 0.2
    run(*words, "--epochs", 1, "--dtype", "bf16")
    assert json.load(open("logs/clip.json"))["dtype"] == "bf16" and column("kl")[-1] > 1e-3


# ---- bad input ----
def test_models_that_can_not_be_had(refused, monkeypatch, tmp_path):
    refused(["--model", "ViT-Z/9", "--dataset", "digits"], "'ViT-Z/9'", *SIZES)

    def offline(*args, **kw):
        raise socket.timeout("no route")
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(["--model", "ViT-B/32", "--dataset", "digits"], ".cache/clip/ViT-B-32.pt",
            "can't be downloaded", "https://openaipublic", "--weights random")
    assert socket.getdefaulttimeout() is None
    for name, content in (("empty.pt", b""), ("junk.pt", b"junk" * 99)):
        (tmp_path / name).write_bytes(content)
        refused(["--model", name, "--dataset", "digits"], name, "can't be read")
    torch.save({"weight": torch.ones(2)}, "other.pt")
    refused(["--model", "other.pt", "--dataset", "digits"], "other.pt", "no CLIP of OpenAI's layout")
    torch.save([1, 2], "list.pt")
    refused(["--model", "list.pt", "--dataset", "digits"], "list.pt")


def test_texts_that_do_not_fit(refused, tmp_path):
    tiny = ["--model", "tiny.pth", "--dataset"]
    refused([*tiny, "digits", "--templates", "a photo"], "'a photo'", "{}")
    refused([*tiny, "digits", "--other-templates", "{ }"], "'{ }'", "{}")
    refused([*tiny, "digits", "--templates", "{} " + "very " * 30], "longer than the model's context of 24")
    image_folder(tmp_path / "made")
    refused([*tiny, "made", "--classnames", "none.txt"], "none.txt", "No such file")
    (tmp_path / "latin.txt").write_bytes("red_thing r\u00f6t\n".encode("latin-1"))
    refused([*tiny, "made", "--classnames", "latin.txt"], "latin.txt", "UTF-8")
    (tmp_path / "names.txt").write_text("red_thing red thing\n")
    refused([*tiny, "made", "--classnames", "names.txt"], "blue_thing")
    for part in ("train", "val"):
        (tmp_path / "made" / part / "red_thing").rename(tmp_path / "made" / part / "n01440764")
    refused([*tiny, "made"], "n01440764", "--classnames")


def test_words_of_other_tools(tmp_path, capsys):
    """A byte-order mark, another Unicode form than the folder's, and two classes with one word."""
    apart = unicodedata.normalize("NFD", "caf\u00e9 coffee\ndog coffee, black\n")
    (tmp_path / "words.txt").write_text(apart, encoding="utf-8-sig")
    assert clip_data.class_words(["caf\u00e9", "dog"], "made", "words.txt") == ["coffee", "coffee"]
    assert "several classes are called coffee" in capsys.readouterr().out


def test_settings_that_can_not_work(refused, tmp_path):
    tiny = ["--model", "tiny.pth", "--dataset", "digits"]
    refused([*tiny, "--group-size", "1"], "--group_size 1", "at least 2")
    refused([*tiny, "--lora-adapter", "x.pth"], "--use_lora")
    refused([*tiny, "--use-lora", "--lora-adapter", "x.pth"], "x.pth")
    refused([*tiny, "--reward", "nonsense"], "'nonsense'", "bandit, smooth or FILE.py:FUNCTION")
    refused([*tiny, "--reward", "rewards.py:nan"], "rewards.py:nan", "finite")
    refused([*tiny, "--resume"], "out/clip/state.pth")
    model, _ = make((64, 32, (1, 1, 1, 1), 8, None, 64, 1, 1))
    torch.save(model.state_dict(), "resnet.pt")
    refused(["--model", "resnet.pt", "--dataset", "digits", "--use-lora"], "ResNet", "ViT-B/32")
    _, visual, _ = adapted()
    lora.save_adapter("adapter.pth", visual, torch.zeros(()))
    refused([*tiny, "--use-lora", "--lora-r", "4", "--lora-adapter", "adapter.pth"], "'r': 8", "'r': 4")


def test_data_that_is_not_there_or_broken(refused, tmp_path, monkeypatch):
    refused(["--dataset", "nowhere", "--model", "tiny.pth"], "nowhere", "train/ and val/")
    refused(["--dataset", "imagenet", "--model", "tiny.pth"], "data/imagenet", "--data_path")
    refused(["--dataset", "cifar100"], "--model")
    image_folder(tmp_path / "made", broken=True)
    refused(["--dataset", "made", "--model", "tiny.pth", "--num-workers", "0"], "red_thing/0.png",
            "isn't readable")


def test_a_loss_that_is_not_finite_stops_the_run(refused, tmp_path):
    state = torch.load("tiny.pth", weights_only=True)
    state["model"]["visual.proj"][0, 0] = float("nan")
    torch.save(state, "tiny.pth")
    refused(["--model", "tiny.pth", "--dataset", "digits"], "step 0: not finite")
