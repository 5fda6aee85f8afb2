"""Grounding with Qwen2.5-VL: what an answer says, where it is in the original, one loss in two engines."""
import csv
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import REWARD_FILE, cli, numbers, read_csv
from PIL import Image, ImageDraw

pytest.importorskip("trl")

from vision import rewards, vlm_grpo  # noqa: E402
from vision.vlm.data import (  # noqa: E402
    Scorer,
    draw,
    load_data,
    load_examples,
    original,
    parse_answer,
    scenes,
    seen_size,
)
from vision.vlm.models import (  # noqa: E402
    generate,
    inputs_of,
    load_model,
    load_processor,
    lora,
    save_folder,
    score,
    supervise,
    tiny_model,
    tiny_processor,
)

SMALL = ["--device", "cpu", "--per_device_train_batch_size", 8, "--group_size", 4, "--steps", 3,
         "--eval_examples", 4, "--eval_every", 2, "--save_every", 2, "--max_new", 9]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A tiny model after 20 steps of supervision: it says places, not yet the right ones."""
    path = tmp_path_factory.mktemp("vlm") / "start"
    save_folder(path, *supervise(scenes(64, 0, "train"), 20, 3e-3, 0, "cpu"))
    return path


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def example(box=(10, 20, 50, 60), size=(112, 112), scales=(1.0, 1.0)):
    return {"prompt": "where?", "solution": list(box), "size": size, "scales": scales}


def user_file(n=12, name="data.json", **changed):
    """A user's data set: n images of two sizes with a bright box each; `changed`: of the last example."""
    rows = []
    for i in range(n):
        size = (150, 90) if i % 2 else (60, 60)
        box = [10 + i % 7, 12, 40, 50]
        image = Image.new("RGB", size)
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=(250, 250, 250))
        image.save(f"{i}.png")
        rows.append({"image": f"{i}.png", "prompt": "where is the 7?", "solution": box, "worth": i})
    rows[-1] |= changed
    Path(name).write_text(json.dumps(rows) if name.endswith("json") else "\n".join(map(json.dumps, rows)))
    return name


def run(*words, log="logs/vlm.csv"):
    cli(vlm_grpo, *SMALL, "--log", log, "--overwrite", *words)
    return read_csv(log)[1]


def fails(capsys, *words):
    """The one line that a run ends with, exit code 2."""
    with pytest.raises(SystemExit) as caught:
        cli(vlm_grpo, *words)
    assert caught.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


# ---- what a text says ----
@pytest.mark.parametrize("text, said", [
    ("(12, 34)", (12, 34)), ("12,34", (12, 34)), ("067,046", (67, 46)), ("[12.5, 34]", (12.5, 34)),
    ('{"point_2d": [12, 34], "label": "a 7"}', (12, 34)), ('{"x": 12, "y": 34}', (12, 34)),
    ("x=12, y=34", (12, 34)),
    ('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "seven"}]\n```', (1, 2, 30, 40)),
    ("(1,2),(30,40)", (1, 2, 30, 40)), ("I see 3 digits; the 7 is at (12, 34).", (12, 34)),
    ("(12, 34) or (56, 78)", (12, 34)), ("99999999999, 5", (99999999999, 5)),
    ("at 12 , 34, I think", (12, 34)),
    ("(-12, 34)", None), ("12, -34", None), ("−12, 34", None), ("1, 2, 3", None), ("1,2,3,4,5", None),
    ("12", None), ("12 34", None), ("", None), ("none", None), ("1e3, 5", None), ("nan, inf", None),
    ("(1, 2, 3) then (4, 5)", None), ("v1.2.3, 4", None),
    # thinking is no answer, nor is what was cut within it
    ("<think>not (1, 2)</think><answer>[10, 20, 30, 40]</answer>", (10, 20, 30, 40)),
    ("not (1, 2)</think> (3, 4)", (3, 4)), ("<think>maybe (1, 2)", None), ("<answer>(5, 6)", (5, 6)),
    ("1, 2: <answer>(5, 6)</answer>", (5, 6)), ("(1, 2) <answer>none</answer>", None),
    # full-width characters are read, any dash before a number is a minus
    ("（１２，３４）", (12, 34)), ("12、34", (12, 34)), ("\uff0d12, 34", None), ("\u201312, 34", None),
    ("at \u2013 12, 34", (12, 34)), ("10\u201320, 30", None), ("1, 2, 3px", None), ("12, 34px", None)])
def test_parsing(text, said):
    assert parse_answer(text) == said


@pytest.mark.parametrize("text", ["1" + " " * 50_000, " " * 50_000, "(" * 50_000, "1 ," * 20_000 + "x",
                                  "x " * 20_000, "1,2" + "." * 50_000 + "a", "<think>" * 10_000,
                                  "<answer>" * 10_000, "</think>" * 10_000, "1" * 50_000 + ",1",
                                  "x" + " " * 50_000])
def test_a_long_answer_takes_no_long_time(text):
    """Linear: hundredths of a second. Quadratic were several seconds."""
    clock = time.process_time()
    parse_answer(text)
    assert time.process_time() - clock < 0.5


def test_rewards_by_hand():
    texts = ["(30, 40)", "(10, 20)", "(9, 20)", "10, 20, 50, 60", "30, 20, 50, 60", "no idea", "500, 40",
             "(-3, 40)"]
    parts = Scorer.parts(texts, [example()] * 8)
    assert parts["accuracy_reward_coord"].tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    assert parts["format"].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    assert parts["iou"].tolist() == [0, 0, 0, 1, 0.5, 0, 0, 0]
    diagonal = math.hypot(40, 40)
    assert parts["distance"].tolist() == pytest.approx([1, 0.5, 1 - math.hypot(21, 20) / diagonal, 0.5,
                                                        1 - 20 / diagonal, 0, 0, 0])
    point = torch.tensor([[[30.0, 40.0], [70.0, 80.0], [900.0, 0.0]]])
    assert rewards.distance(point, torch.tensor([[10.0, 20, 50, 60]])).tolist() == [[1, 0, 0]]


def test_weights_and_the_count_of_answers_without_a_place():
    scorer = Scorer([example()], {"accuracy_reward_coord": 1.0, "iou": 2.0, "distance": 0.0, "format": 0.25})
    answers = [[{"role": "assistant", "content": text}] for text in ("10, 20, 50, 60", "?")]
    assert scorer(completions=answers, index=[0, 0], trainer_state=None) == [3.25, 0.0]
    assert scorer.unparsed == 0.5


# ---- coordinates ----
@pytest.mark.parametrize("width, height", [(300, 200), (112, 112), (30, 40), (90, 150), (1000, 90)])
def test_what_the_model_sees_maps_back(processor, width, height):
    """Above max_pixels, at it, below min_pixels: the processor's own size, corners map there and back."""
    seen = seen_size(processor, width, height)
    image = Image.new("RGB", (width, height))
    grid = processor.image_processor(images=[image], return_tensors="pt")["image_grid_thw"][0]
    assert seen == (grid[2] * 14, grid[1] * 14)
    scales = (width / seen[0], height / seen[1])
    for x, y in ((0, 0), (width, height), (width, 0), (width / 3, height / 7)):
        there = (x / scales[0], y / scales[1])
        assert there[0] <= seen[0] + 1e-9 and there[1] <= seen[1] + 1e-9
        room = example(size=(width + 1, height + 1), scales=scales)
        back = original(tuple(round(v, 6) for v in there), room)
        assert back == pytest.approx((x, y), abs=1e-3)


def test_the_pixels_are_where_scales_say(processor):
    """A white box in a large image: its corners in what the processor made of it, mapped back."""
    image = Image.new("RGB", (336, 168))
    ImageDraw.Draw(image).rectangle((84, 42, 251, 125), fill=(255, 255, 255))
    seen = seen_size(processor, *image.size)
    assert seen[0] * seen[1] <= 112 * 112 and seen != image.size
    inputs = processor.image_processor(images=[image], return_tensors="pt")
    t, h, w = inputs["image_grid_thw"][0].tolist()
    patches = inputs["pixel_values"].view(h // 2, w // 2, 2, 2, 3, 2, 14, 14)
    pixels = patches.permute(4, 5, 0, 2, 6, 1, 3, 7)[0, 0]
    white = pixels.reshape(h * 14, w * 14) > 1.0
    rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
    corners = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])[:, 0].float()
    back = corners * torch.tensor([image.size[0] / seen[0], image.size[1] / seen[1]]).repeat(2)
    assert (back - torch.tensor([84.0, 42, 252, 126])).abs().max() < 4  # a pixel of what it saw is 3 wide


@pytest.mark.pictures
def test_the_picture_shows_boxes_where_they_are(processor):
    load = load_examples(user_file(2), ".", processor)
    draw("plain.png", load, {})
    draw("answers.png", load, {"answers": ["12, 34", "?"]})
    shown = torch.from_numpy(np.array(Image.open("plain.png").convert("RGB"))).int()
    green = (shown[..., 1] > 150) & (shown[..., 0] < 110) & (shown[..., 2] < 160)
    white = (shown > 240).all(2)
    rows, columns = green.any(1).nonzero()[:, 0], green.any(0).nonzero()[:, 0]
    assert green.sum() > 100 and len(rows) and len(columns)
    inner = white[rows[0] + 4:rows[-1] - 3]  # the rectangle that was drawn into the image fills the green one
    assert inner[:, columns[0] + 4:columns[0] + 20].float().mean() > 0.9


# ---- data ----
def test_json_and_jsonl_are_the_same(processor):
    one, two = (load_examples(user_file(4, name), ".", processor) for name in ("a.json", "a.jsonl"))
    assert one == two and len(one) == 4
    assert one[0]["solution"] == [10, 12, 40, 50] and one[1]["size"] == (150, 90) and one[1]["worth"] == 1


def test_a_point_stands_for_a_tenth_of_the_sides_and_scales_are_kept(processor):
    row = load_examples(user_file(1, solution=[30, 30], scales=[2, 3]), ".", processor)[0]
    assert row["solution"] == [27, 27, 33, 33] and row["scales"] == [2, 3]
    assert original((5, 4), row) == [10, 12] and original((31, 4), row) is None


@pytest.mark.parametrize("changed, said", [
    ({"image": "gone.png"}, "example 2: no image gone.png"), ({"solution": [40, 10, 20, 20]}, "inverted"),
    ({"solution": [10, 10, 90, 20]}, "example 2: solution"), ({"solution": [70, 10]}, "outside"),
    ({"solution": [1, 2, 3]}, "wanted [x1, y1, x2, y2] or [x, y]"), ({"solution": "1,2"}, "wanted [x1"),
    ({"prompt": None}, "example 2: wanted"),
    ({"solution": [float("nan"), 1, 2, 3]}, "example 2: solution"), ({"scales": [0, 1]}, "scales"),
    ({"image": "data.json"}, "example 2: data.json can't be read as an image")])
def test_bad_examples(capsys, start, changed, said):
    line = fails(capsys, *SMALL, "--model", start, "--data", user_file(3, **changed))
    assert said in line and not Path("out").exists()


def test_a_file_of_other_tools(processor):
    """A byte-order mark, and U+2028 within a string, which is no end of a line."""
    user_file(12, "a.jsonl")
    rows = Path("a.jsonl").read_text().replace("where is", "where\u2028is")
    Path("a.jsonl").write_text(rows, encoding="utf-8-sig")
    assert {row["prompt"] for row in load_examples("a.jsonl", ".", processor)} == {"where\u2028is the 7?"}


def test_an_image_is_never_in_two_parts(processor, capsys):
    rows = json.loads(Path(user_file(12)).read_text())
    for i, row in enumerate(rows):
        row["image"] = f"{i % 4}.png"  # three questions about each
    Path("data.json").write_text(json.dumps(rows))
    more = {"eval_data": user_file(10, "eval.json"), "test_data": user_file(3, "test.json")}
    for name in more.values():  # they have images of their own
        Path(name).write_text(Path(name).read_text().replace(".png", f".{name}.png"))
        for i in range(10):
            Path(f"{i}.{name}.png").write_bytes(Path(f"{i}.png").read_bytes())
    for seed, files, sizes in ((0, {}, [6, 3, 3]), (1, {}, [6, 3, 3]), (0, more, [12, 10, 3]),
                               (0, {"eval_data": "eval.json"}, [12, 5, 5])):
        parts = load_data(vlm_grpo.Args(data="data.json", seed=seed, **files), processor)
        images = [{row["image"] for row in part} for part in parts]
        assert sum(map(len, images)) == len(set.union(*images)) and list(map(len, parts)) == sizes
    assert "data.json: its 4 images are split, 2 + 1 + 1" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        load_data(vlm_grpo.Args(data="data.json", eval_data="data.json"), processor)
    assert left.value.code == 2 and "is in two of data.json, data.json" in capsys.readouterr().err


def test_boxes_in_another_unit_are_named(processor, capsys):
    rows = json.loads(Path(user_file(12)).read_text())
    Path("data.json").write_text(json.dumps([row | {"solution": [0.1, 0.2, 0.3, 0.4]} for row in rows]))
    load_examples("data.json", ".", processor)
    assert "shares of the sides" in capsys.readouterr().err


def test_pixels_are_those_of_the_upright_image(processor):
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("RGB", (90, 150)).save("0.jpg", exif=tags)  # it is shown 150 wide
    row = {"image": "0.jpg", "prompt": "?", "solution": [100, 10, 149, 80]}
    Path("a.jsonl").write_text(json.dumps(row))
    assert load_examples("a.jsonl", ".", processor)[0]["size"] == (150, 90)


@pytest.mark.parametrize("text, said", [
    ('{"a": ' + "9" * 5000 + "}", "line 1"), ('{"a": 1}\n' + "[" * 100_000, "wrong JSON at line 2"),
    ('{"image": "0.png", "prompt": "\\ud800", "solution": [1, 2]}', "wanted {image"),
    ("", "no examples"), ("[]", "no examples"), ('[{"a": 1},\n {"b" 2}]', "line 2, column 7"),
    ('{"a": 1}\n{"b": }\n', "line 2, column 7"), ("[1]", "example 0")])
def test_bad_files(capsys, start, text, said):
    Path("bad.json").write_text(text)
    assert said in fails(capsys, *SMALL, "--model", start, "--data", "bad.json")


@pytest.mark.parametrize("more, count, said", [
    ({"completions": "x"}, 12, "the key 'completions'"), ({"prompts": "x"}, 12, "the key 'prompts'"),
    ({}, 1, "examples of 1 images: wanted 3"), ({}, 2, "examples of 2 images: wanted 3")])
def test_keys_and_counts_that_cannot_be(processor, capsys, more, count, said):
    rows = json.loads(Path(user_file(12)).read_text())[:count]
    Path("data.json").write_text(json.dumps([row | more for row in rows]))
    with pytest.raises(SystemExit) as stopped:
        load_data(vlm_grpo.Args(data="data.json"), processor)
    assert stopped.value.code == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("words, said", [
    (["--group_size", 3], "--group_size 3"), (["--group_size", 1], "--group_size 1"),
    (["--trl.bananas", 1], "--trl.bananas"), (["--trl.beta", 1], "--trl.beta"),
    (["--trl.top_k", "many"], "top_k"), (["--trl.fp16", "True", "--trl.bf16", "True"], "TRL refuses"),
    (["--engine", "nano", "--trl.top_k", 5], "--engine trl"), (["--reward", "gone.py:f"], "gone.py"),
    (["--data", "gone.json"], "gone.json"), (["--resume"], "no state at"), (["--lr", -1], "--lr"),
    (["--model", "nowhere/at-all"], "hf download nowhere/at-all")])
def test_bad_arguments(capsys, start, words, said):
    assert said in fails(capsys, *SMALL, "--model", start, *words)


def test_historical_flags_are_the_canonical_ones(monkeypatch):
    read = []
    monkeypatch.setattr(vlm_grpo, "main", read.append)
    cli(vlm_grpo, *"--num_generations 4 --max-completion-length 5 --output_dir a --loss_type gspo".split(),
        "--trl.top_k", 5)
    cli(vlm_grpo, *"--group_size 4 --max_new 5 --out a --objective gspo --trl.top_k=5".split())
    assert read[0] == read[1] != vlm_grpo.Args() and read[0].trl == {"top_k": "5"}


def test_the_published_model_offline_ends_in_how_to_get_it(capsys):
    line = fails(capsys, *SMALL, "--model", "Qwen/Qwen2.5-VL-3B-Instruct", "--data", user_file(3))
    assert "hf download Qwen/Qwen2.5-VL-3B-Instruct" in line


def test_a_missing_extra_is_named(capsys, monkeypatch, start):
    import sys
    monkeypatch.setitem(sys.modules, "trl", None)
    assert "pip install '.[vlm]'" in fails(capsys, *SMALL, "--model", start)


def test_few_examples(capsys, start):
    assert "1 examples to train on" in fails(capsys, *SMALL, "--model", start, "--data", user_file(3))


# ---- the tiny model, and the published size ----
def test_the_tiny_model_reloads_as_the_class_that_it_is(start, processor):
    model = load_model(start)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 1e5 < sum(p.numel() for p in model.parameters()) < 1e6
    assert load_processor(start).tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert processor.tokenizer.tokenize("067,046") == list("067,046")


def test_padding_and_a_neighbour_change_nothing(start):
    """Prompts of different lengths and images of different sizes in one batch: each scored as if alone."""
    model, processor = load_model(start), load_processor(start)
    examples = load_examples(user_file(2), ".", processor)
    examples[0]["prompt"] = "where, if anywhere, is the digit 7?"
    answers = torch.tensor([processor.tokenizer(text)["input_ids"] for text in ("067,046", "012,088")])
    mask = torch.ones_like(answers, dtype=torch.bool)
    with torch.no_grad():
        both, _ = score(model, inputs_of(processor, examples, "cpu"), answers, mask, 0.7)
        for i in (0, 1):
            inputs = inputs_of(processor, examples[i:i + 1], "cpu")
            alone, _ = score(model, inputs, answers[i:i + 1], mask[:1], 0.7)
            assert (alone[0] - both[i]).abs().max() < 1e-4


def test_greedy_answers_are_the_most_likely_tokens(start):
    """So what is sampled and what is scored is one policy: positions, image tokens and all."""
    model, processor = load_model(start), load_processor(start)
    inputs = inputs_of(processor, scenes(4, 1, "test"), "cpu")
    answers, mask, texts = generate(model, inputs, processor, 9)
    from vision.vlm.models import with_answers
    with torch.no_grad():
        logits = model(**with_answers(inputs, answers, mask), logits_to_keep=answers.shape[1] + 1).logits
    assert torch.equal(logits[:, :-1].argmax(2)[mask], answers[mask])
    assert len(texts) == 4 and all("<" not in text for text in texts)


def test_lora_of_the_published_3b_size():
    from peft import get_peft_model
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    text = {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2,
            "intermediate_size": 11008, "vocab_size": 151936, "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420,
              "out_hidden_size": 2048, "patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31]}
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision,
                                                                    tie_word_embeddings=True))
        total = sum(p.numel() for p in model.parameters())
        model = get_peft_model(model, lora(16))
    assert 3.7e9 < total < 3.8e9  # the published model's 3.75 billion
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    a_layer = 16 * (2 * (2048 + 2048) + 2 * (2048 + 256) + 3 * (2048 + 11008))  # q, o; k, v; the feed-forward
    assert sum(trained.values()) == 36 * a_layer == 29_933_568
    assert all("language_model" in name for name in trained)


# ---- two engines, one loss ----
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo"])
def test_one_batch_through_both_engines(start, monkeypatch, loss_type):
    """Step 0, beta > 0: the same tokens, rewards, advantages (1e-6), loss (1e-5), gradient norm (1e-3)."""
    from trl import GRPOTrainer
    seen, compute = {}, GRPOTrainer._compute_loss

    def theirs(self, model, inputs):
        loss = compute(self, model, inputs)
        order = inputs["completion_ids"].tolist()
        seen["trl"] = sorted(zip(order, inputs["advantages"].tolist())), loss.item()
        return loss

    def ours(logp, logp_old, logp_ref, adv, mask, objective, **kwargs):
        loss, stats = vlm_grpo_loss(logp, logp_old, logp_ref, adv, mask, objective, **kwargs)
        seen["nano"] = sorted(zip(seen["answers"], adv.flatten().tolist())), loss.item()
        return loss, stats

    def sampled(*args):
        answers, mask, texts = vlm_generate(*args)
        if len(args) == 5:
            pad = torch.full_like(answers, args[2].tokenizer.pad_token_id)
            seen["answers"] = torch.where(mask, answers, pad).tolist()
        return answers, mask, texts
    vlm_grpo_loss, vlm_generate = vlm_grpo.grpo_loss, vlm_grpo.generate
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", theirs)
    monkeypatch.setattr(vlm_grpo, "grpo_loss", ours)
    monkeypatch.setattr(vlm_grpo, "generate", sampled)
    words = ["--model", start, "--steps", 1, "--beta", 0.5, "--distance", 1, "--format", 0.5,
             "--objective", loss_type]
    rows = {engine: run(*words, "--engine", engine, "--out", f"out/{engine}", log=f"{engine}.csv")[0]
            for engine in ("trl", "nano")}
    (trl, trl_loss), (nano, nano_loss) = seen["trl"], seen["nano"]
    assert [tokens for tokens, _ in trl] == [tokens for tokens, _ in nano]
    assert [a for _, a in nano] == pytest.approx([a for _, a in trl], abs=1e-6)
    assert any(abs(a) > 0.1 for _, a in nano)
    assert nano_loss == pytest.approx(trl_loss, abs=1e-5)
    bounds = {"mean_r": 1e-6, "token_adv": 1e-6, "kl": 1e-6, "loss": 1e-5, "entropy": 1e-4}
    for name, within in bounds.items():
        assert float(rows["nano"][name]) == pytest.approx(float(rows["trl"][name]), abs=within), name
    grad = float(rows["nano"]["grad_norm"])
    assert grad > 1e-3 and grad == pytest.approx(float(rows["trl"]["grad_norm"]), rel=1e-3)
    for name in ("samples", "length", "frac_zero_std", "unparsed", "accuracy", "eval_r"):
        assert rows["nano"][name] == rows["trl"][name], name


@pytest.mark.parametrize("engine", ["trl", "nano"])
def test_stopped_and_resumed_is_the_run_that_never_stopped(start, engine, monkeypatch, capsys):
    Path("mine.py").write_text(REWARD_FILE.replace('count("e")', 'count("0")'))
    words = ["--model", start, "--engine", engine, "--data", user_file(12), "--reward", "mine.py:share_of_e"]
    whole = run(*words, "--out", "out/whole", log="whole.csv")
    assert len(whole) == 4 and whole[3]["accuracy"] and not whole[3]["loss"]
    monkeypatch.setenv("KILL_AT_CALL", "4")  # before: two evaluations, at step 0 another
    monkeypatch.setenv("KILL_WITH", "SIGINT")
    with pytest.raises(SystemExit) as caught:
        run(*words, log="parts.csv")
    assert caught.value.code == 130 and "--resume" in capsys.readouterr().out
    assert len(read_csv("parts.csv")[1]) < 3
    monkeypatch.delenv("KILL_AT_CALL")
    with pytest.raises(SystemExit):
        run(*words, "--resume", "--lr", 1e-5, log="parts.csv")
    assert "--lr" in capsys.readouterr().err
    run(*words, "--resume", log="parts.csv")
    assert numbers("parts.csv") == numbers("whole.csv")
    assert Path("whole.samples.jsonl").is_file() is (engine == "nano")  # TRL's engine has none
    if engine == "nano":
        text = Path("whole.samples.jsonl").read_text()
        assert text == Path("parts.samples.jsonl").read_text()
        first, *_, last = map(json.loads, text.splitlines())
        answer, after = first["prompts"][0]["answers"][0], last["prompts"][0]["answers"][0]
        assert answer["logp_old"] == pytest.approx(answer["logp_ref"], abs=1e-5) != answer["logp"]
        assert after["logp"] == after["logp_old"] != after["logp_ref"] and not last["updated"]
        assert answer["reward"] == pytest.approx(answer["text"].count("0") / max(1, len(answer["text"])))
    one, two = (load_model(f"{out}/final").state_dict() for out in ("out/whole", "out/vlm"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    begun = load_model(start).state_dict()
    assert any(not torch.equal(begun[name], one[name]) for name in one)


def test_a_resume_on_other_data_is_refused(start, capsys):
    words = ["--model", start, "--engine", "nano", "--data", user_file(12), "--steps", 1]
    run(*words)
    user_file(11)
    assert "file data.json has changed" in fails(capsys, *SMALL, *words, "--steps", 2, "--resume")


@pytest.mark.parametrize("engine", ["trl", "nano"])
@pytest.mark.slow
def test_lora_trains_adapters_alone(start, engine):
    rows = run("--model", start, "--use_lora", "--lora_r", 2, "--engine", engine, "--steps", 2, "--lr", 1e-2,
               "--distance", 1, "--beta", 0.1)
    assert float(rows[0]["kl"]) == 0 and float(rows[0]["grad_norm"]) > 0 and float(rows[1]["kl"]) > 0
    assert Path("out/vlm/final/adapter_model.safetensors").is_file()


def test_a_run_goes_on_from_its_own_adapters(start, capsys):
    """The second run starts where the first one ended, in both engines, and its adapters name that start."""
    words = ["--model", start, "--engine", "nano", "--use_lora", "--lora_r", 2, "--steps", 2, "--lr", 0.03]
    run(*words, "--distance", 1, "--out", "one", log="one.csv")
    said = fails(capsys, *SMALL, "--model", "one/final", "--out", "one", "--log", "x.csv")
    assert "lies in --out one" in said
    ended = load_model("one/final")
    assert all(p.requires_grad for p in ended.parameters())
    weight = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(ended.state_dict()[weight], load_model(start).state_dict()[weight])
    for engine in ("nano", "trl"):
        words = ["--model", "one/final", "--engine", engine, "--use_lora", "--steps", 1, "--out", engine]
        row = run(*words, log=f"{engine}.csv")[0]
        assert float(row["kl"]) == 0
        base = json.loads(Path(engine, "final", "adapter_config.json").read_text())["base_model_name_or_path"]
        assert torch.equal(load_model(base).state_dict()[weight], ended.state_dict()[weight])


def test_damaged_weights_are_one_line(start, capsys):
    shutil.copytree(start, "cut")
    for file in Path("cut").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    assert "can't be loaded" in fails(capsys, *SMALL, "--model", "cut")


def test_a_field_of_trl_passes_through(start, monkeypatch):
    import trl
    seen = []
    monkeypatch.setattr(trl, "GRPOTrainer", lambda *args, **kwargs: seen.append(args[2]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("--model", start, "--trl.top_k", 7, "--trl.logging_first_step", "True", "--trl.adam-beta2=0.9",
            "--trl.gradient_accumulation_steps", 2, "--trl.reward_weights", "2.5")
    config = seen[0]
    assert (config.top_k, config.logging_first_step, config.adam_beta2) == (7, True, 0.9)
    assert config.reward_weights == [2.5]
    assert config.bf16 is False and config.loss_type == "grpo" and config.use_bias_correction_kl is False
    assert config.generation_batch_size == 16


@pytest.mark.pictures
def test_preview_draws_before_any_training(start, capsys):
    cli(vlm_grpo, "--preview", "--data", user_file(3), "--log", "logs/a.csv")
    cli(vlm_grpo, "--preview", "--data", "data.json", "--model", start, "--log", "logs/b.csv")
    assert Image.open("logs/a_preview.png").size[0] > 100 and Image.open("logs/b_preview.png").size[0] > 100
    assert sorted(os.listdir("logs")) == ["a_preview.png", "b_preview.png"] and not Path("out").exists()


# ---- minutes rather than seconds ----
@pytest.mark.slow
def test_supervision_and_grpo_raise_what_they_are_for():
    """From nothing, small: supervised reward above the constant answer's, and GRPO's weights moved."""
    examples = scenes(400, 0, "train")
    model, processor = supervise(examples, 40, 3e-3, 0, "cpu")
    save_folder("start", model, processor)
    rows = run("--model", "start", "--steps", 30, "--engine", "nano", "--format", 1, "--lr", 1e-3,
               "--temperature", 1.2, "--beta", 0, "--per_device_train_batch_size", 16)
    said = [float(row["mean_r"]) for row in rows if row["mean_r"]]
    assert sum(said[-8:]) > sum(said[:8])


@pytest.mark.slow
def test_a_users_json_of_200_examples_trains_from_the_command_line(start):
    import subprocess
    import sys

    from helpers import ROOT, environment
    user_file(200)
    words = [sys.executable, "-m", "vision.vlm_grpo", *map(str, SMALL), "--eval_examples", "20",
             "--model", start, "--data", "data.json"]
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "20 examples of validation" in done.stdout, done.stderr
    with open("logs/vlm.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
