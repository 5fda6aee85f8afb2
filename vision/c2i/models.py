"""The presets, models and rewards of c2i_grpo.py, and what it measures on digits.

The digits' models are trained here once, in --out. Left out: LlamaGen's own training, perceptual rewards.
Run: python -m vision.c2i_grpo
"""
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

from utils import checkpoint, dist, guard
from utils.cli import atomic_write, die, need, refusing
from utils.device import write_run_record
from utils.rewards import checked, load_reward
from utils.run import step_generator
from vision.c2i.data import digits
from vision.cnn import Classifier, build
from vision.data import standard, step_index
from vision.c2i.image_gpt import IMAGE_GPTS, ImageGPT, ImageGPTConfig
from vision.c2i.sampling import check_sampling
from vision.c2i.vq import VQS, VQConfig, VQModel, load_official

GPTS = {**IMAGE_GPTS, "digits": ImageGPTConfig(64, 3, 4, 64, 16, 10, multiple_of=32)}
TOKENIZERS = {**VQS, "digits": VQConfig(16, (1, 2), 32, 64, 4)}
# A field of Args that is None gets its value here: LlamaGen's, or the digits'.
LLAMAGEN = dict(
    gpt_model="GPT-B", vq_model="VQ-16", codebook_size=16384, codebook_embed_dim=8, image_size=256,
    downsample_size=16, num_classes=1000, dataset="imagenet", dtype="bf16", data_parallel="fsdp", lr=1e-5,
    eps=1e-4, epochs=100, sample_batch_size=32, train_batch_size=8, num_workers=8, save_every=0, log_every=10,
    eval_every=0)
DIGITS = dict(
    gpt_model="digits", vq_model="digits", codebook_size=64, codebook_embed_dim=4, image_size=8,
    downsample_size=2, num_classes=10, dataset="digits", dtype="fp32", data_parallel="ddp", lr=5e-4,
    eps=0.2, epochs=2, sample_batch_size=32, train_batch_size=32, num_workers=0, save_every=50, log_every=1,
    eval_every=20)


def resolve(args):
    """Fills in what is None, refuses what doesn't fit -> the arguments, and whether the run is on digits."""
    is_digits = args.vq_ckpt is None and args.data_path is None
    defaults = {**(DIGITS if is_digits else LLAMAGEN),
                "reward": "mse" if args.sampling == "teacher-forced" else "classifier"}
    args = replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})
    with refusing(what="--"):
        check_sampling(args.cfg_scale, args.temperature, args.top_k, args.top_p)
    factor, size = TOKENIZERS[args.vq_model].downsample, args.image_size
    batch = args.train_batch_size * args.gradient_accumulation_steps
    refusals = {  # message: whether it applies
        f"--downsample-size {args.downsample_size}: --vq-model {args.vq_model} has {factor}":
            args.downsample_size != factor,
        f"--image-size {size} is no multiple of the downsample factor {factor}": size % factor,
        f"--image-size {size}: wanted 256, 384 or 512": not is_digits and size not in (256, 384, 512),
        f"--num-classes {args.num_classes}: there are 10 digits": is_digits and args.num_classes != 10,
        "--data-path needs --vq-ckpt FILE, LlamaGen's tokenizer": not is_digits and args.vq_ckpt is None,
        "--vq-ckpt needs data: give --data-path DIR or --code-path DIR":
            not is_digits and not args.data_path and not args.code_path,
        "--extract-codes reads images: leave out --code-path": args.extract_codes and args.code_path,
        f"--sample-batch-size {args.sample_batch_size} is no multiple of {batch}, --train-batch-size times "
        "--gradient-accumulation-steps": args.sample_batch_size % batch,
        "--beta1, --beta2: wanted numbers below 1": max(args.beta1, args.beta2) >= 1,
        "--reward mse: a free sample has no true image. Wanted --sampling teacher-forced, or classifier":
            args.reward == "mse" and args.sampling == "autoregressive"}
    for message, applies in refusals.items():
        if applies:
            die(message)
    return args, is_digits


# ---- models ----
def load_models(args, is_digits, device):
    """-> tokenizer, GPT, classifier of the reward or None, judges: from files or trained here."""
    torch.manual_seed(step_generator(args.seed, 0, "start").initial_seed())
    vq = VQModel(replace(TOKENIZERS[args.vq_model], codebook_size=args.codebook_size,
                         codebook_dim=args.codebook_embed_dim))
    config = replace(GPTS[args.gpt_model], vocab_size=args.codebook_size, num_classes=args.num_classes,
                     block_size=(args.image_size // args.downsample_size) ** 2)
    classifier, judges = None, []
    if is_digits:
        gpt, classifier = train_on_digits(args, vq, config)
        judges = [train_judge(args, split, device) for split in ("val", "test")]
    else:
        load_official(vq, args.vq_ckpt)
        gpt = load_gpt(args, config)
        if not args.gpt_ckpt:
            print(f"no --gpt-ckpt: {args.gpt_model}'s weights are random")
        if args.reward == "classifier":
            classifier = build(args.classifier, args.num_classes, args.classifier_weights)
    for frozen in (vq, classifier):
        if frozen is not None:
            frozen.to(device).eval().requires_grad_(False)
    return vq, gpt.to(device).eval(), classifier, judges


def load_gpt(args, config):
    path, is_folder = args.gpt_ckpt, args.from_fsdp
    if path is None:
        return ImageGPT(config)
    if Path(path).is_dir() != is_folder:
        die(f"--gpt-ckpt {path} is {'no folder: leave out' if is_folder else 'a folder: give'} --from-fsdp")
    if is_folder and (Path(path) / ".metadata").is_file():  # --ckpt-sharded wrote the folder
        gpt = ImageGPT(config)
        dist.load(path, gpt)
        return gpt
    with torch.device("meta"):
        gpt = ImageGPT(config)
    return load_official(gpt, path).float()


def train_on_digits(args, vq, config):
    """Trains the tokenizer -> GPT, classifier of the reward, both trained but a GPT of --gpt-ckpt."""
    train = digits(args.image_size, args.seed)
    x, y = train.images, train.targets
    with torch.no_grad():  # the codebook starts on the data: a code far from all images would stay unused
        vectors = vq.embed(x[:args.codebook_size]).flatten(0, 2)
        vq.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:args.codebook_size]])
    fit(args, "vq", vq, args.vq_steps, len(x), lambda i: vq.loss(x[i]))
    gpt = load_gpt(args, config)
    if not args.gpt_ckpt:
        with torch.no_grad():
            codes = vq.encode(x).flatten(1)  # (N, T)
        fit(args, "gpt", gpt, args.gpt_steps, len(x), lambda i: F.cross_entropy(
            gpt(codes[i, :-1], y[i]).flatten(0, 1), codes[i].flatten()))
    net = build("small", 10, "none")
    fit(args, "reward", net, args.classifier_steps, len(x),
        lambda i: F.cross_entropy(net((x[i] + 1) / 2), y[i]))
    return gpt, net


def train_judge(args, split, device):
    """-> a perceptron that learnt that split's digits, and these (N, 3, H, W) in 0 … 1.

    The reward's CNN is of another architecture and saw other digits. Each of the two splits has a judge.
    """
    own = digits(args.image_size, args.seed, split)
    x = (own.images + 1) / 2
    layers = nn.Flatten(), nn.Linear(x[0].numel(), 128), nn.ReLU(), nn.Linear(128, 10)
    judge = Classifier(nn.Sequential(*layers), 10)
    fit(args, f"judge_{split}", judge, args.classifier_steps, len(x),
        lambda i: F.cross_entropy(judge(x[i]), own.targets[i]))
    return judge.to(device).requires_grad_(False), x.to(device)


def fit(args, name, model, steps, n, loss):
    """Trains a model of the digits. OUT/digits/NAME-s{seed}.pth keeps it for runs with equal flags."""
    path = Path(args.out) / "digits" / f"{name}-s{args.seed}.pth"
    made_of = {k: getattr(args, k) for k in ("image_size", "codebook_size", "codebook_embed_dim", "vq_model",
                                            "vq_steps", "gpt_model", "gpt_steps", "classifier_steps")}
    made_of["images"] = n
    content = checkpoint.load(path, name, "python -m vision.c2i_grpo", ("made_of",)) if path.is_file() else {}
    if content.get("made_of") == made_of:
        model.load_state_dict(content["model"])
        return
    print(f"training the digits' {name}, {steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for step in range(steps):
        loss(step_index(n, 64, args.seed, step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    checkpoint.write(path, name, made_of=made_of, model=model.state_dict())
    guard.note(f"{name} {path}", path)  # as a run notes it that reads the file


@torch.no_grad()
def decode(vq, codes, chunk=64):
    """codes (N, T) -> images (N, 3, H, W) in 0 … 1, `chunk` at a time, always in float32."""
    return torch.cat([((vq.decode(part) + 1) / 2).clamp(0, 1) for part in codes.split(chunk)])


# ---- rewards ----
def pick_reward(args, classifier, is_digits):
    """-> a function: images (N, 3, H, W) in 0 … 1, labels (N,), the true images or None -> reward (N,)."""
    if args.reward == "mse":
        return lambda images, labels, truth: -(images - truth).square().flatten(1).mean(1)
    if args.reward == "classifier":
        @torch.no_grad()
        def log_probability(images, labels, truth):
            if not is_digits:  # torchvision's classifiers want ImageNet's size and normalisation
                images = standard(F.interpolate(images, (224, 224), mode="bilinear", antialias=True))
            return classifier(images).log_softmax(1).gather(1, labels[:, None])[:, 0]
        return log_probability
    function, spec = load_reward(args.reward, ("classifier", "mse")).args

    def by_function(images, labels, truth):
        names = [f"an image of class {y}" for y in labels.tolist()]  # a message about a bad score shows them
        scores = checked(lambda completions, prompts: function(images, labels), spec, names, labels)
        return torch.tensor(scores, device=labels.device)
    return by_function


# ---- evaluation ----
def frechet(a, b):
    """|μ_a - μ_b|² + tr(C_a + C_b - 2·(C_a·C_b)^½) of features (N, D), (M, D): arXiv:1706.08500, eq. 6."""
    a, b = a.double(), b.double()
    value, vector = torch.linalg.eigh(a.T.cov())
    root = vector * value.clamp(min=0).sqrt() @ vector.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * cross).item()


@torch.no_grad()
def judged(images, labels, judge, real):
    """-> {accuracy, diversity, frechet} of images (N, 3, H, W), labels (N,); the judge is never a reward.

    frechet is the distance to the judge's own digits in its features, with equal numbers of both. diversity
    is the RMS difference of two images of a class, the mean over pairs, then over classes.
    """
    spread = [F.pdist(images[labels == c].flatten(1)).mean() for c in labels.unique()]
    n = min(len(images), len(real))
    some = images[torch.linspace(0, len(images) - 1, n).long()]  # of all classes alike
    return {"accuracy": (judge(images).argmax(1) == labels).float().mean().item(),
            "diversity": torch.stack(spread).mean().item() / images[0].numel() ** 0.5,
            "frechet": frechet(judge.features(some), judge.features(real[:n]))}


def picture(path, images, rows):
    """Writes images (rows · n, 3, H, W) in 0 … 1 as a PNG of `rows` lines, small ones enlarged -> path."""
    images = F.interpolate(images.float(), scale_factor=max(1, 32 // images.shape[-1]))
    save_image = need("torchvision.utils", "c2i").save_image
    atomic_write(path, lambda file: save_image(images, file, "png", nrow=len(images) // rows, pad_value=1.0))
    return path


def before_and_after(path, *both):
    """Writes two grids as a PNG, a row a class; both: images (10 · n, 3, H, W) in 0 … 1, sorted by class."""
    tiles = F.interpolate(torch.cat(both), scale_factor=max(1, 32 // both[0].shape[-1]))
    tiles = F.pad(tiles, (0, 2, 0, 2), value=1.0).unflatten(0, (2, 10, -1))[:, :, :10]  # with gaps between
    side, n = tiles.shape[-1], tiles.shape[2]
    sheet = Image.new("RGB", (2 * (n * side + 76), 10 * side + 24), "white")
    pen = ImageDraw.Draw(sheet)
    for title, grid, x in zip(("before", "after"), tiles, (72, n * side + 148)):
        pen.text((x, 2), title, "black", font_size=16)
        for c, row in enumerate(grid):  # (n, 3, side, side)
            pen.text((x - 64, 24 + c * side + side // 4), f"class {c}", "black", font_size=16)
            pixels = (row.permute(2, 0, 3, 1).flatten(1, 2) * 255).round().byte().cpu().numpy()
            sheet.paste(Image.fromarray(pixels), (x, 24 + c * side))
    atomic_write(path, lambda file: sheet.save(file, "png"))
    return path


def report(args, log, steps, before, after, judges, **record):
    """Closes the CSV. On digits: its last row, a table, and a picture of each class before and after."""
    if judges:
        val, device = digits(args.image_size, args.seed, "val"), after[1].device
        labels = torch.arange(10, device=device).repeat_interleave(args.eval_images)
        tested = judged(after[1], labels, *judges[1])
        rows = {"before": before[0], "after": after[0],
                "test, before": judged(before[1], labels, *judges[1]), "test, after": tested,
                "test, real digits": judged(judges[0][1], val.targets.to(device), *judges[1])}
        log.write(step=steps, **after[0], test_accuracy=tested["accuracy"], test_frechet=tested["frechet"])
        write_run_record(args.log, args, **record, measured=rows)
        print(f"{'':18}{'accuracy':>10}{'diversity':>11}{'Fréchet':>9}")
        for name, row in rows.items():
            print(f"{name:18}{row['accuracy']:>10.1%}{row['diversity']:>11.3f}{row['frechet']:>9.2f}")
        print(f"wrote {before_and_after(Path(args.log).with_suffix('.png'), before[1], after[1])}")
    log.close()
    print(f"wrote {args.log}" + f" and {args.out}/{steps:07d}" * bool(args.save_every))
