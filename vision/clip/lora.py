"""LoRA for CLIP's visual transformer: W + (α/r)·B·A, only A and B trained (Hu et al., arXiv:2106.09685).

peft adapts an nn.Linear. CLIP's attention is an nn.MultiheadAttention. peft 0.21 rewrites its frozen weights
in the forward pass, and adapts its out_proj without effect. So each attention is first replaced by one that
has a Linear each for q, k, v and out. The reference is the same network with its adapters off.
Left out: the text tower (frozen), CLIP's ResNets. Run: python clip_grpo.py --use_lora --lora_r 8
"""
import copy
import re

import torch
import torch.nn.functional as F
from torch import nn

from utils import checkpoint
from utils.cli import die, need


class SplitAttention(nn.Module):
    """CLIP's nn.MultiheadAttention with its packed weights split. The output is the same to the bit."""

    def __init__(self, packed):
        super().__init__()
        self.heads = packed.num_heads
        weights, biases = packed.in_proj_weight.chunk(3), packed.in_proj_bias.chunk(3)
        self.q, self.k, self.v = (linear(*pair) for pair in zip(weights, biases))
        self.out = linear(packed.out_proj.weight, packed.out_proj.bias)

    def forward(self, x, key, value, need_weights=False, attn_mask=None):
        """x (L, N, D) -> (L, N, D), None; self-attention, so key and value are x."""
        L, N, D = x.shape
        q, k, v = (part(x).view(L, N * self.heads, -1).transpose(0, 1).view(N, self.heads, L, -1)
                   for part in (self.q, self.k, self.v))  # (N, heads, L, D/heads)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask)
        return self.out(mixed.permute(2, 0, 1, 3).reshape(L * N, D)).view(L, N, D), None


def linear(weight, bias):
    """An nn.Linear with copies of these weights."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def add_lora(visual, r=8, alpha=16, dropout=0.05):
    """The visual tower with adapters on q, k, v, out and both layers of each MLP. All else is frozen."""
    peft = need("peft", "clip")
    if not hasattr(visual, "transformer"):
        die("--use_lora: this CLIP sees with a ResNet, wanted one with a transformer, such as ViT-B/32")
    for block in visual.transformer.resblocks:
        block.attn = SplitAttention(block.attn)
    config = peft.LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout,
                             target_modules=r".*\.(attn\.(q|k|v|out)|mlp\.(c_fc|c_proj))")
    return peft.get_peft_model(visual, config).eval()


def check_gradients(visual, images):
    """AssertionError unless every B gets a gradient. B starts at 0, so the gradient of A is still 0."""
    visual(images).square().sum().backward()
    adapters = {name: p for name, p in visual.named_parameters() if "lora_" in name}
    idle = [name for name, p in adapters.items() if p.grad is None or ("lora_B" in name and not p.grad.any())]
    visual.zero_grad(set_to_none=True)
    if idle or not adapters:  # raised, not asserted: python -O drops assertions
        raise AssertionError(f"{len(idle)} of {len(adapters)} adapters get no gradient: {idle[:3]}")


def count(visual):
    """-> trainable parameters, all parameters but the adapters (those of the tower itself)."""
    trainable = sum(p.numel() for p in visual.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for name, p in visual.named_parameters() if "lora_" not in name)


# ---- files: the adapters alone, or the tower with them added ----
def save_adapter(path, visual, logit_scale):
    """The adapters and the one other number that was trained, a hundredth of a whole CLIP."""
    config = visual.peft_config["default"]
    checkpoint.write(path, "adapter", config={"r": config.r, "alpha": config.lora_alpha},
                     model=need("peft", "clip").get_peft_model_state_dict(visual),
                     logit_scale=logit_scale.detach())


def load_adapter(path, visual, logit_scale):
    """Fills a tower's adapters from the file. Those of other sizes end the run with a message."""
    peft = need("peft", "clip")
    content = checkpoint.load(path, "adapter", "python clip_grpo.py --use_lora --save_model",
                              ("config", "model", "logit_scale"))
    own = visual.peft_config["default"]
    wanted = {"r": own.r, "alpha": own.lora_alpha}
    shapes = [{k: v.shape for k, v in state.items()}
              for state in (content["model"], peft.get_peft_model_state_dict(visual))]
    if content["config"] != wanted or shapes[0] != shapes[1]:
        die(f"--lora_adapter {path} was made with {content['config']}, for {len(shapes[0])} matrices: wanted "
            f"{wanted}, and the {len(shapes[1])} of this tower. Give its --lora_r, --lora_alpha and model")
    peft.set_peft_model_state_dict(visual, content["model"])
    with torch.no_grad():
        logit_scale.copy_(content["logit_scale"])


def merged(visual):
    """W + (α/r)·B·A in CLIP's own layout: the state dict of a plain visual tower."""
    state = copy.deepcopy(visual).merge_and_unload().state_dict()
    for name in [name for name in state if re.search(r"\.attn\.q\.", name)]:
        parts = [state.pop(name.replace(".attn.q.", f".attn.{part}.")) for part in "qkv"]
        state[name.replace(".attn.q.", ".attn.in_proj_")] = torch.cat(parts)
    return {name.replace(".attn.out.", ".attn.out_proj."): value for name, value in state.items()}
