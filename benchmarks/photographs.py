"""Are the weights of EfficientNet-Lite0 the published ones? Photographs -> five ImageNet classes each.

The photographs ship in scikit-image's wheel and the classes' words in torchvision: nothing is downloaded.
Each photograph is read in six ways. So the second table shows which preprocessing suits the weights.
--crops makes an image folder of two classes, to train on.
Left out: the accuracy on ImageNet, whose images are not at hand.
Run: python benchmarks/photographs.py --log logs/photographs.csv
"""
import csv
import importlib.metadata
import io
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402, F401  (before torch: it sets how OpenMP's threads wait)

import torch  # noqa: E402
import tyro  # noqa: E402

from utils.cli import atomic_write, die, need, parse  # noqa: E402
from utils.device import write_run_record  # noqa: E402
from vision.data import IMAGENET_MEAN, IMAGENET_STD, open_rgb, read_class, standard  # noqa: E402
from vision.lite0 import MEAN, STD, lite0  # noqa: E402

RIGHT = {  # ImageNet knows kinds of cats and of motorcycles: each class that names what a photograph shows
    "chelsea.png": ("tabby", "tiger cat", "Egyptian cat"), "coffee.png": ("espresso", "cup", "coffee mug"),
    "rocket.jpg": ("missile", "projectile"), "motorcycle_left.png": ("moped", "motor scooter"),
    "camera.png": ("tripod",)}
AS_TRAINED = ((MEAN,) * 3, (STD,) * 3)
COLOURS = {  # what is taken off, and what it is divided by
    "127 and 128": AS_TRAINED, "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD), "none": ((0.0,) * 3, (1.0,) * 3)}
READINGS = [(colours, by) for colours in COLOURS for by in ("bicubic", "bilinear")]  # the first: as trained
CROPS = {"train": (0, 256), "val": (256, 384), "test": (384, 512)}  # rows of a photograph of 512 × 512


@dataclass
class Args:
    files: tyro.conf.Positional[tuple[str, ...]] = ()  # your own photographs; none: five of scikit-image's
    log: str = "logs/photographs.csv"  # the probabilities
    crops: str = ""  # makes this folder of crops of grass and gravel, and does nothing else


def photograph(name):
    """The path of a photograph in scikit-image's wheel, which is not imported."""
    try:
        path = importlib.metadata.distribution("scikit-image").locate_file(f"skimage/data/{name}")
    except importlib.metadata.PackageNotFoundError:
        die("the photographs are those of scikit-image, which isn't installed: pip install '.[lite0]'")
    return Path(path)


@torch.no_grad()
def probabilities(net, path, colours="127 and 128", by="bicubic", size=224):
    """The photograph in a file, read in that way -> probabilities of the classes, (1000,)."""
    try:
        pixels, _ = read_class(size, False, path, 0, by=by)
    except (OSError, ValueError) as error:
        die(f"{path} can't be read as an image ({error})")
    x = standard(pixels, numbers=COLOURS[colours])
    x = standard(x, inverse=True, numbers=AS_TRAINED)  # since the network takes these numbers off by itself
    return net(x[None])[0].softmax(0)


def five(p, words):
    """The five likeliest classes -> [(word, probability)]."""
    top = p.topk(5)
    return [(words[i], value) for value, i in zip(top.values.tolist(), top.indices.tolist())]


def write_crops(root, sizes=(64, 32, 64), side=96, seed=0):
    """Crops of two photographs as root/{train,val,test}/{grass,gravel}/*.png: sizes images a class.

    The parts are other rows of the photographs, so that no pixel stands in two of them.
    """
    generator = torch.Generator().manual_seed(seed)
    for name in ("grass", "gravel"):
        image = open_rgb(photograph(f"{name}.png"))
        for (part, (top, bottom)), n in zip(CROPS.items(), sizes):
            folder = Path(root) / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(n):
                x = torch.randint(image.width - side + 1, (), generator=generator).item()
                y = torch.randint(top, bottom - side + 1, (), generator=generator).item()
                image.crop((x, y, x + side, y + side)).save(folder / f"{i}.png")


def main(args):
    if args.crops:
        write_crops(args.crops)
        print(f"wrote {args.crops}")
        return
    words = need("torchvision.models", "lite0").ResNet50_Weights.IMAGENET1K_V2.meta["categories"]
    net = lite0(published=True).eval()
    paths = [Path(file) for file in args.files] or [photograph(name) for name in RIGHT]

    rows = [["photograph", "colours", "resizing", "right", *(f"{x}{k}" for k in range(1, 6) for x in "cp")]]
    means, found = {}, 0
    for colours, by in READINGS:
        total = 0
        for path in paths:
            p = probabilities(net, path, colours, by)
            best, known = five(p, words), RIGHT.get(path.name, ())
            right = sum(p[words.index(word)].item() for word in known)
            total += right
            if (colours, by) == READINGS[0]:
                found += any(word in known for word, _ in best)
                print(f"{path.name:20}", ", ".join(f"{word} {value:.2f}" for word, value in best))
            cells = [x for word, value in best for x in (word, f"{value:.4f}")]
            rows.append([path.name, colours, by, f"{right:.4f}", *cells])
        means[colours, by] = total / len(paths)
    if not args.files:
        print(f"a right class is among the five likeliest for {found} of {len(paths)} photographs")
        for (colours, by), mean in means.items():
            print(f"colours {colours:12} {by:9} probability of the right classes {mean:.3f}")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    atomic_write(args.log, text.getvalue().encode())
    write_run_record(args.log, args, device="cpu")
    print(f"wrote {args.log}")


if __name__ == "__main__":
    main(parse(Args))
