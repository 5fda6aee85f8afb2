"""OpenAI's CLIP in fp32: weights from a file, class texts, and a small one that learns digits offline.

A CLIP scores an image against every class's text (Radford et al., arXiv:2103.00020). Its zero-shot classifier
is softmax(s·cos), which is the policy of clip_grpo.py. The network is openai-clip's clip.model.CLIP.
Left out: other CLIPs' file layouts, images with their own captions. Run: python clip_grpo.py
"""
import re
import warnings
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F

from utils import checkpoint
from utils.cli import die, impatient, need
from utils.run import step_generator
from vision.data import digits, standard, step_index

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
FIELDS = ("embed_dim", "image_resolution", "vision_layers", "vision_width", "vision_patch_size",
          "transformer_width", "transformer_heads", "transformer_layers")
SIZES = {  # of openai-clip's names, by FIELDS; contexts of 77 tokens out of 49,408
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 512, 8, 12),
    "RN101": (512, 224, (3, 4, 23, 3), 64, None, 512, 8, 12),
    "RN50x4": (640, 288, (4, 6, 10, 6), 80, None, 640, 10, 12),
    "RN50x16": (768, 384, (6, 8, 18, 8), 96, None, 768, 12, 12),
    "RN50x64": (1024, 448, (3, 15, 36, 10), 128, None, 1024, 16, 12),
    "ViT-B/32": (512, 224, 12, 768, 32, 512, 8, 12),
    "ViT-B/16": (512, 224, 12, 768, 16, 512, 8, 12),
    "ViT-L/14": (768, 224, 24, 1024, 14, 768, 12, 12),
    "ViT-L/14@336px": (768, 336, 24, 1024, 14, 768, 12, 12)}
SMALL = (64, 32, 2, 128, 8, 64, 1, 2)  # LoRA of r = 8 is a tenth of 128 wide, a fifth of 64 wide
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of a {}.",)
OTHER_TEMPLATES = ("a drawing of a {}.", "{}")
DIGIT_TEMPLATES = ("a photo of the digit {}.", "a handwritten {}.")
OTHER_DIGIT_TEMPLATES = ("the number {}, drawn with a pen.", "an image of a {}.")


def clip_package():
    with warnings.catch_warnings(action="ignore"):  # openai-clip imports pkg_resources, which warns
        return need("clip", "clip")


# ---- the network ----
def config_of(sizes, context_length=77):
    return {**dict(zip(FIELDS, sizes)), "context_length": context_length, "vocab_size": 49408}


def load_clip(name, weights="openai", seed=0):
    """name: one of openai-clip's, whose weights are downloaded or random, or a file -> CLIP, its config."""
    if Path(name).is_file():
        return from_file(name)
    if name not in SIZES:
        die(f"--model {name!r} is neither a file nor known: wanted one of {', '.join(SIZES)}")
    if weights == "openai":
        return from_file(download(name))
    torch.manual_seed(step_generator(seed, 0, "start").initial_seed())
    return build(config_of(SIZES[name]))


def build(config):
    return clip_package().model.CLIP(**config).float().eval(), config


def download(name):
    """OpenAI's file of that name in ~/.cache/clip, fetched and checked by its SHA-256 if it isn't there."""
    url, folder = clip_package().clip._MODELS[name], Path.home() / ".cache" / "clip"
    try:
        with impatient():
            return clip_package().clip._download(url, str(folder))
    except (OSError, RuntimeError) as error:
        die(f"--model {name}: the weights aren't at {folder / Path(url).name} and can't be downloaded "
            f"({type(error).__name__}: {error}). Put {url} there, or give --weights random or a file's name.")


def from_file(path):
    """A JIT archive as OpenAI's, a state dict, or a file of clip_grpo.py -> CLIP in fp32, its config."""
    try:
        if zipfile.is_zipfile(path) and any("/code/" in n for n in zipfile.ZipFile(path).namelist()):
            with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated, OpenAI's files are not
                state = torch.jit.load(path, map_location="cpu").state_dict()
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler raises nearly anything
        die(f"{path} can't be read as weights ({type(error).__name__}): empty, truncated or foreign")
    try:
        state = state["model"] if state.get("format") == checkpoint.FORMAT else state
        state = {name: value.float() for name, value in state.items()}
        model = clip_package().model.build_model(state).float()  # it reads the sizes, and rounds to fp16
        model.load_state_dict(state)
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        die(f"{path} holds no CLIP of OpenAI's layout ({type(error).__name__}: {reason}): wanted an official "
            "file, its state dict, or the policy.pth of clip_grpo.py")
    return model, {"image_resolution": model.visual.input_resolution, "context_length": model.context_length}


# ---- class texts ----
def fill(template, word):
    """The template with its word. The article follows the word's sound: a one, an eight, an hour."""
    vowel = re.match(r"(?!uni|use|eu|one\b|ute|ura)[aeiou]|hour|honest|heir|8|1[18]\b", word.lower())
    template = re.sub(r"\b([aA])n? \{\}", r"\1n {}" if vowel else r"\1 {}", template)
    return template.replace("{}", word)


@torch.no_grad()
def text_features(model, words, templates):
    """The prompt ensemble, section 3.1.4: the unit features' mean over templates, made unit -> (C, D)."""
    clip, total = clip_package(), 0.0
    for template in templates:
        if "{}" not in template:
            die(f"the template {template!r} has no {{}} for the class's name: wanted 'a photo of a {{}}.'")
        texts = [fill(template, word) for word in words]
        try:
            tokens = clip.tokenize(texts, model.context_length)
        except RuntimeError:
            longest = max(texts, key=len)
            die(f"{longest[:60]!r} … is longer than the model's context of {model.context_length} tokens")
        device = model.logit_scale.device
        parts = [model.encode_text(rows) for rows in tokens.to(device).split(256)]
        total = total + F.normalize(torch.cat(parts).float(), dim=1)
    return F.normalize(total, dim=1)


# ---- images ----
def normalise(images):
    """(x − mean) / std with CLIP's numbers, in fp32: (…, 3, H, W) in 0 … 1."""
    return standard(images.float(), numbers=(MEAN, STD))


# ---- the small CLIP's start ----
def digits_start(folder, seed=0, accuracy=0.72, max_steps=1000):
    """A small CLIP, trained by CLIP's contrastive loss on digits with captions, saved in `folder`.

    It stops at that zero-shot accuracy on 512 training images. Two images of equal captions are a pair, too.
    """
    path = Path(folder) / f"start-{accuracy:g}-s{seed}.pth"
    if path.is_file():
        return from_file(path)
    clip, train = clip_package(), digits(SMALL[1], seed).train
    torch.manual_seed(step_generator(seed, 0, "start").initial_seed())
    model, config = build(config_of(SMALL, context_length=24))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, fused=True)
    templates = (*DIGIT_TEMPLATES, *OTHER_DIGIT_TEMPLATES)
    tokens = clip.tokenize([fill(t, word) for word in DIGITS for t in templates], model.context_length)
    images = normalise(train.images)
    for step in range(max_steps):
        if step % 5 == 0:
            text = text_features(model, DIGITS, DIGIT_TEMPLATES)
            with torch.no_grad():
                right = (model.visual(images[:512]) @ text.T).argmax(1) == train.targets[:512]
            if right.float().mean() >= accuracy:
                break
        index = step_index(len(images), 64, seed, step)
        generator = step_generator(seed, 1 + step, "start")
        choice = torch.randint(len(templates), (len(index),), generator=generator)
        caption = train.targets[index] * len(templates) + choice
        pairs = (caption[:, None] == caption).float()
        pairs = pairs / pairs.sum(1, keepdim=True)
        image_side = F.normalize(model.visual(images[index]), dim=1)
        text_side = F.normalize(model.encode_text(tokens), dim=1)[caption]
        logits = model.logit_scale.exp() * image_side @ text_side.T
        loss = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
        loss.backward()
        optimizer.param_groups[0]["lr"] = 5e-4 * min(1, (step + 1) / 20)
        optimizer.step()
        optimizer.zero_grad()  # no gradient is left for the run that begins with this model
    print(f"small CLIP: {step} contrastive steps, {right.float().mean():.0%} of its digits right: {path}")
    checkpoint.write(path, "clip", config=config, model=model.state_dict())
    return from_file(path)  # as the next run begins
