"""The image GPT and the VQ tokenizer against the facts of LlamaGen's formats and loops that share no code.

Weights are always moved from their start: a fresh GPT gives all-zero logits, and would agree with anything.
"""
import argparse
import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from vision.c2i.image_gpt import IMAGE_GPTS, ImageGPT, ImageGPTConfig, Slots, rope_table, rotate
from vision.c2i.sampling import draw, guided_logits, guided_steps, kept_set, log_probs, score
from vision.c2i.vq import VQS, VQConfig, VQModel, downsample, group_norm, load_official

V, T, CLASSES = 13, 9, 5
CONFIG = ImageGPTConfig(32, 2, 4, V, T, CLASSES, n_kv_head=2, multiple_of=8)
SMALL_VQ = VQConfig(ch=16, ch_mult=(1, 2), z_channels=24, codebook_size=20, codebook_dim=4)


@pytest.fixture(autouse=True)
def same_numbers_each_time():
    torch.manual_seed(0)


def moved(model, by=0.15):
    for p in model.parameters():
        p.data.add_(by * torch.randn_like(p))
    return model.eval()


def tiny(**changes):
    torch.manual_seed(0)
    return moved(ImageGPT(dataclasses.replace(CONFIG, **changes)))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def some(n, *shape, seed=1):
    return torch.randint(n, shape, generator=seeded(seed))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0, check_dtype=False)


# ---- the formats ----
SIZES = {  # the facts: layers, heads, dim, feed-forward width, parameters
    "B": (12, 12, 768, 2048, 110_888_448), "L": (24, 16, 1024, 2816, 342_910_976),
    "XL": (36, 20, 1280, 3584, 774_699_520), "XXL": (48, 24, 1536, 4096, 1_410_972_672),
    "XXXL": (48, 40, 2560, 6912, 3_893_027_840), "1B": (22, 32, 2048, 5632, 1_199_616_000),
    "3B": (24, 32, 3200, 8704, 3_096_659_200), "7B": (32, 32, 4096, 11008, 6_614_589_440),
}


@pytest.mark.parametrize("name", SIZES)
def test_every_size_has_the_names_shapes_and_count_of_the_facts(name):
    layers, heads, d, f, count = SIZES[name]
    config = IMAGE_GPTS[f"GPT-{name}"]
    with torch.device("meta"):
        model = ImageGPT(config)
    want = {"cls_embedding.embedding_table.weight": (1001, d), "tok_embeddings.weight": (16384, d),
            "norm.weight": (d,), "output.weight": (16384, d)}
    for i in range(layers):
        want |= {f"layers.{i}.{k}.weight": shape for k, shape in {
            "attention.wqkv": (3 * d, d), "attention.wo": (d, d), "feed_forward.w1": (f, d),
            "feed_forward.w3": (f, d), "feed_forward.w2": (d, f), "attention_norm": (d,),
            "ffn_norm": (d,)}.items()}
    assert {k: tuple(w.shape) for k, w in model.state_dict().items()} == want
    assert len(want) == 7 * layers + 4
    assert sum(p.numel() for p in model.parameters()) == count
    assert config.n_head == heads and config.block_size == 256
    assert IMAGE_GPTS[name] is config
    assert list(IMAGE_GPTS) == [f"GPT-{k}" for k in SIZES]


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(KeyError, match="'M': wanted one of GPT-B, GPT-L"):
        IMAGE_GPTS["M"]


def test_feed_forward_width_with_a_multiplier_and_grouped_keys():
    c = ImageGPTConfig(96, 1, 8, V, T, CLASSES, n_kv_head=2, multiple_of=16, ffn_dim_multiplier=1.3)
    assert c.ffn_dim == 336  # 8·96/3 = 256, times 1.3 = 332.8 -> 332, up to 336
    assert ImageGPT(c).layers[0].attention.wqkv.weight.shape == ((8 + 2 * 2) * 12, 96)


def vq_names(mult, ch=128, z=256):
    """All shapes of the tokenizer by name, from the facts' description; a norm's and a bias's is (C,)."""
    want = {"quantize.embedding.weight": (16384, 8), "quantize.codebook_used": (65536,)}

    def norm(name, c):
        want[f"{name}.weight"] = want[f"{name}.bias"] = (c,)

    def conv(name, c_in, c_out, k):
        want[f"{name}.weight"], want[f"{name}.bias"] = (c_out, c_in, k, k), (c_out,)

    def res(name, a, b):
        norm(f"{name}.norm1", a)
        conv(f"{name}.conv1", a, b, 3)
        norm(f"{name}.norm2", b)
        conv(f"{name}.conv2", b, b, 3)
        if a != b:
            conv(f"{name}.nin_shortcut", a, b, 1)

    def attention(name, c):
        norm(f"{name}.norm", c)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", c, c, 1)
    conv("quant_conv", z, 8, 1)
    conv("post_quant_conv", 8, z, 1)
    for side, widths, blocks, wide in (("encoder", mult, 2, 0), ("decoder", mult[::-1], 3, len(mult) - 1)):
        widths = [ch * m for m in widths]
        deep = max(ch * m for m in mult)
        n = len(widths)
        conv(f"{side}.conv_in", *((3, ch) if side == "encoder" else (z, deep)), 3)
        conv(f"{side}.conv_out", *((deep, z) if side == "encoder" else (widths[-1], 3)), 3)
        norm(f"{side}.norm_out", deep if side == "encoder" else widths[-1])
        res(f"{side}.mid.0", deep, deep)
        attention(f"{side}.mid.1", deep)
        res(f"{side}.mid.2", deep, deep)
        c = ch if side == "encoder" else deep
        for i, width in enumerate(widths):
            for j in range(blocks):
                res(f"{side}.conv_blocks.{i}.res.{j}", c, width)
                c = width
                if i == n - 1 - wide:
                    attention(f"{side}.conv_blocks.{i}.attn.{j}", c)
            if i < n - 1:
                kind = "downsample" if side == "encoder" else "upsample"
                conv(f"{side}.conv_blocks.{i}.{kind}.conv", c, c, 3)
    return want


@pytest.mark.parametrize("name, mult, count", [("VQ-16", (1, 1, 2, 2, 4), 344), ("VQ-8", (1, 2, 2, 4), 300)])
def test_vq_has_the_names_and_shapes_of_the_facts(name, mult, count):
    with torch.device("meta"):
        model = VQModel(VQS[name])
    found = {k: tuple(w.shape) for k, w in model.state_dict().items()}
    assert len(found) == count
    assert len(list(model.parameters())) == count - 1 and len(list(model.buffers())) == 1
    assert found == vq_names(mult)
    assert VQS[name].downsample == int(name[3:])


# ---- loading ----
def gpt_files(weights, args):
    steps = {"optimizer": {"state": {0: torch.ones(1)}}, "steps": 7, "args": args}
    extra = {"freqs_cis": torch.ones(1), "layers.0.attention.kv_cache.k_cache": torch.ones(2),
             "layers.1.attention.kv_cache.v_cache": torch.ones(2)}
    wrong = {k: w + 1 for k, w in weights.items()}
    return {"bare": weights, "ddp": {"model": weights, **steps},
            "ddp with ema": {"model": weights, "ema": wrong, **steps},
            "module": {"module": weights}, "state_dict": {"state_dict": weights},
            "left-overs": {"model": {**weights, **extra}, **steps}}


@pytest.mark.parametrize("kind", ["bare", "ddp", "ddp with ema", "module", "state_dict", "left-overs"])
def test_every_wrapping_of_a_gpt_loads(tmp_path, kind):
    made = tiny()
    args = argparse.Namespace(gpt_model="GPT-B", lr=1e-4, betas=(0.9, 0.95))
    torch.save(gpt_files(made.state_dict(), args)[kind], tmp_path / "c2i.pt")
    model = load_official(ImageGPT(CONFIG), tmp_path / "c2i.pt")
    codes, labels = some(V, 2, T), some(CLASSES, 2)
    assert torch.equal(model.eval()(codes, labels), made(codes, labels))


def test_an_fsdp_folder_loads_and_a_meta_model_takes_the_files_tensors(tmp_path):
    made = tiny().bfloat16()
    torch.save(made.state_dict(), tmp_path / "consolidated.pth")
    with torch.device("meta"):
        model = ImageGPT(CONFIG)
    load_official(model, str(tmp_path))
    codes, labels = some(V, 2, T), some(CLASSES, 2)
    assert torch.equal(model.eval()(codes, labels), made(codes, labels))
    assert all(p.requires_grad and p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("kind", ["ema", "model", "state_dict", "bare"])
def test_every_wrapping_of_a_vq_loads(tmp_path, kind):
    made = moved(VQModel(SMALL_VQ))
    made.quantize.codebook_used.fill_(3)
    weights = made.state_dict()
    wrong = {k: w + 1 for k, w in weights.items()}
    file = {"ema": {"model": wrong, "ema": weights}, "model": {"model": weights, "state_dict": wrong},
            "state_dict": {"state_dict": weights}, "bare": weights}[kind]
    torch.save(file, tmp_path / "vq.pt")
    model = load_official(VQModel(SMALL_VQ), tmp_path / "vq.pt")
    assert all(torch.equal(w, weights[k]) for k, w in model.state_dict().items())


def refused(capsys, call, *wanted):
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        call()
    message = capsys.readouterr().err
    assert left.value.code == 2
    assert message.startswith("error: ") and message.count("\n") == 1 and len(message) < 700
    for part in wanted:
        assert part in message, f"{part!r} is not in: {message}"


@pytest.mark.parametrize("change, wanted", [
    (lambda w: w.pop("layers.1.feed_forward.w2.weight"), ["lacks layers.1.feed_forward.w2.weight"]),
    (lambda w: w.update(extra=torch.ones(1)), ["also has extra"]),
    (lambda w: (w.pop("norm.weight"), w.update({f"x{i}": torch.ones(1) for i in range(9)})),
     ["lacks norm.weight (32,); also has x0 (1,); also has x1 (1,) (in all 1 lost, 9 too many)"]),
    (lambda w: w.update({"norm.weight": torch.ones(8)}),
     ["lacks norm.weight (32,); also has norm.weight (8,)"]),
])
def test_a_key_that_does_not_fit_is_named(tmp_path, capsys, change, wanted):
    weights = dict(tiny().state_dict())
    change(weights)
    path = tmp_path / "c2i.pt"
    torch.save({"model": weights}, path)
    model = tiny()
    before = {k: w.clone() for k, w in model.state_dict().items()}
    refused(capsys, lambda: load_official(model, path), str(path), "doesn't fit this ImageGPT", *wanted)
    assert all(torch.equal(w, before[k]) for k, w in model.state_dict().items())


def test_a_vq_tolerates_no_left_overs(tmp_path, capsys):
    model = VQModel(SMALL_VQ)
    torch.save({"model": {**model.state_dict(), "freqs_cis": torch.ones(1)}}, tmp_path / "vq.pt")
    refused(capsys, lambda: load_official(model, tmp_path / "vq.pt"), "also has freqs_cis")


class Foreign:
    pass


def test_files_that_are_no_checkpoint(tmp_path, capsys):
    model, path = tiny(), tmp_path / "c2i.pt"
    refused(capsys, lambda: load_official(model, path), f"no checkpoint at {path}")
    refused(capsys, lambda: load_official(model, tmp_path), "consolidated.pth")
    torch.save(model.state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    refused(capsys, lambda: load_official(model, path), str(path), "truncated")
    path.write_bytes(b"")
    refused(capsys, lambda: load_official(model, path), "empty")
    torch.save({"model": model.state_dict(), "args": Foreign()}, path)
    refused(capsys, lambda: load_official(model, path), "argparse.Namespace")
    torch.save({"optimizer": {}, "steps": 3}, path)
    refused(capsys, lambda: load_official(model, path), "no state dict (found optimizer, steps)", "module")
    torch.save([1, 2], path)
    refused(capsys, lambda: load_official(model, path), "found list")


def test_the_earlier_names_of_the_modules_still_import():
    from vision import image_gpt, sampling, vq
    names = {image_gpt: ["IMAGE_GPTS", "ImageGPT", "ImageGPTConfig", "Slots", "check_sampling", "draw",
                         "guide", "guided_steps", "in_range", "load_official", "rope_table", "rotate"],
             vq: ["VQS", "VQConfig", "VQModel", "downsample", "group_norm", "in_range", "load_official"],
             sampling: ["check_sampling", "draw", "guide", "guided_logits", "guided_steps", "inverse_cdf",
                        "kept_set", "log_probs", "score"]}
    assert not [name for module, wanted in names.items() for name in wanted if not hasattr(module, name)]
    assert image_gpt.ImageGPT is ImageGPT and vq.VQModel is VQModel and sampling.score is score


# ---- the GPT's pass ----
def slow_logits(model, codes, label):
    """One row in float64: codes a list, label an int -> (len + 1, V); a loop a query, complex rotations."""
    c, w = model.config, {k: x.double() for k, x in model.state_dict().items()}
    grid, hd, kv = math.isqrt(c.block_size), c.dim // c.n_head, c.n_kv_head or c.n_head

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    def turn(x, slot):
        if slot == 0:
            return 0 * x
        row, column = divmod(slot - 1, grid)
        out = []
        for pair in range(hd // 2):
            k, place = (pair, row) if pair < hd // 4 else (pair - hd // 4, column)
            z = complex(x[2 * pair], x[2 * pair + 1])
            z *= complex(math.cos(place * 10000 ** (-2 * k / (hd / 2))),
                         math.sin(place * 10000 ** (-2 * k / (hd / 2))))
            out += [z.real, z.imag]
        return torch.tensor(out, dtype=torch.float64)
    x = torch.stack([w["cls_embedding.embedding_table.weight"][label], *w["tok_embeddings.weight"][codes]])
    for i in range(c.n_layer):
        part = f"layers.{i}."
        qkv = norm(x, w[part + "attention_norm.weight"]) @ w[part + "attention.wqkv.weight"].T
        q, k, v = qkv.split([c.n_head * hd, kv * hd, kv * hd], -1)
        rows = []
        for t in range(len(x)):
            heads = []
            for h in range(c.n_head):
                g = h * kv // c.n_head  # neighbouring heads share keys
                at = slice(g * hd, g * hd + hd)
                query = turn(q[t, h * hd:h * hd + hd], t)
                scores = torch.stack([query @ turn(k[s, at], s) for s in range(t + 1)]) / math.sqrt(hd)
                heads.append(scores.softmax(0) @ v[:t + 1, at])
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ w[part + "attention.wo.weight"].T
        y = norm(x, w[part + "ffn_norm.weight"])
        gate = y @ w[part + "feed_forward.w1.weight"].T
        y = gate * gate.sigmoid() * (y @ w[part + "feed_forward.w3.weight"].T)
        x = x + y @ w[part + "feed_forward.w2.weight"].T
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
def test_forward_equals_a_slow_pass_in_complex_numbers(n_kv_head):
    model = tiny(n_kv_head=n_kv_head)
    codes, labels = some(V, 2, T), torch.tensor([3, CLASSES])
    logits = model(codes, labels)
    assert logits.abs().max() > 0.5
    for row in range(2):
        close(logits[row], slow_logits(model, codes[row].tolist(), labels[row].item()))


def test_forward_takes_any_number_of_codes_and_looks_only_back():
    model = tiny()
    codes, labels = some(V, 3, T), some(CLASSES, 3)
    full = model(codes, labels)
    assert full.shape == (3, T + 1, V) and full.dtype == torch.float32
    for n in range(T + 1):
        assert model(codes[:, :n], labels).shape == (3, n + 1, V)
        close(model(codes[:, :n], labels), full[:, :n + 1])
    close(model.train()(codes, labels), full)  # the dropouts are 0
    close(model(codes.int(), labels.int()), full)
    for t in range(T):  # code t moves what follows it, logits t + 1 on
        other = codes.clone()
        other[:, t] = (other[:, t] + 1) % V
        change = (model(other, labels) - full).abs().amax((0, 2))
        assert change[:t + 1].max() < 1e-6 < 1e-3 < change[t + 1:].min()


def test_a_fresh_model_takes_all_codes_to_be_equally_likely():
    assert torch.equal(ImageGPT(CONFIG)(some(V, 2, T), some(CLASSES, 2)), torch.zeros(2, T + 1, V))


def test_the_class_slot_has_no_query_and_no_key():
    model, seen = tiny(), []
    slots = Slots(CONFIG, "cpu", cached=True)
    model.layers[0].attention.wo.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(torch.zeros(2, 0, dtype=torch.long), torch.tensor([1, 2]), slots)
    keys, values = slots.kv[model.layers[0].attention]
    assert torch.equal(keys[:, :, 0], torch.zeros(2, 2, 8)) and values[:, :, 0].abs().min() > 0
    close(seen[0].view(2, 4, 8), values[:, :, 0].repeat_interleave(2, 1))  # it sees itself alone
    model(torch.tensor([[3], [4]]), None, slots)
    assert keys[:, :, 1].abs().max() > 0.1
    table = rope_table(CONFIG)
    assert table.shape == (1 + T, 4, 2) and torch.equal(table[0], torch.zeros(4, 2))


def test_rope_is_a_complex_product_by_row_and_column():
    c = ImageGPTConfig(24, 1, 2, V, 16, CLASSES)  # head_dim 12, grid 4
    x = torch.randn(2, 17, 2, 12, generator=seeded(0))
    z = torch.view_as_complex(x.view(2, 17, 2, 6, 2))
    factor = torch.zeros(17, 6, dtype=torch.complex128)
    for row, column, k in itertools.product(range(4), range(4), range(3)):
        speed, slot = 10000 ** (-2 * k / 6), 1 + 4 * row + column
        factor[slot, k] = complex(math.cos(row * speed), math.sin(row * speed))
        factor[slot, 3 + k] = complex(math.cos(column * speed), math.sin(column * speed))
    want = torch.view_as_real(z * factor[:, None]).flatten(-2)
    close(rotate(x, rope_table(c)), want, 1e-6)
    assert rotate(x.bfloat16(), rope_table(c)).dtype == torch.bfloat16


def test_the_rotations_stay_exact_when_the_model_is_cast():
    model = tiny()
    codes, labels = some(V, 4, T), some(CLASSES, 4)
    want = model(codes, labels)
    assert rope_table(model.bfloat16().config).dtype == torch.float32
    assert [k for k in model.state_dict() if "rope" in k or "freqs" in k] == [] and not list(model.buffers())
    logits = model(codes, labels)
    assert logits.dtype == torch.float32
    close(logits, want, 0.1)
    keys = Slots(CONFIG, "cpu", cached=True)
    model(codes, labels, keys)
    assert keys.table.dtype == torch.float32 and keys.kv[model.layers[1].attention][0].dtype == torch.bfloat16


@pytest.mark.parametrize("field", ["token_dropout_p", "attn_dropout_p", "resid_dropout_p", "ffn_dropout_p"])
def test_each_dropout_acts_in_train_mode_alone(field):
    torch.manual_seed(0)
    model, plain = tiny(**{field: 0.5}), tiny()
    codes, labels = some(V, 3, T), some(CLASSES, 3)
    close(model(codes, labels), plain(codes, labels))
    assert (model.train()(codes, labels) - plain(codes, labels)).abs().max() > 1e-2


# ---- sampling ----
def slow_kept(logits, top_k, top_p):
    """logits: a list -> the set of ids that stay, by sorting and adding up; top-k first."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = [i for i in order if logits[i] >= logits[order[min(top_k, len(order)) - 1]]]
    total, kept, mass = sum(math.exp(logits[i]) for i in order), [], 0.0
    for i in order:
        if top_p < 1 and mass > top_p:
            break
        kept.append(i)
        mass += math.exp(logits[i]) / total
    return set(kept)


@torch.no_grad()
def slow_image(model, label, uniforms, cfg_scale=1.0, cfg_interval=-1, temperature=1.0, top_k=0, top_p=1.0):
    """One image, a full uncached pass a code, the official loop's conditions spelled out."""
    codes, logps, sets = [], [], []
    for step, u in enumerate(uniforms.tolist()):
        def last(label):
            before = torch.tensor([codes], dtype=torch.long).view(1, -1)
            return model(before, torch.tensor([label]))[0, -1].double()
        logits = last(label)
        i = step - 1  # decode steps count from 0 behind the prefill
        flag = step == 0 or not (cfg_interval > -1 and i > cfg_interval)
        if cfg_scale > 1 and flag:
            null = last(model.config.num_classes)
            logits = null + cfg_scale * (logits - null)
        logits = (logits / temperature).tolist()
        kept = slow_kept(logits, top_k, top_p)
        weight = [math.exp(x) if n in kept else 0.0 for n, x in enumerate(logits)]
        action, cumulative = 0, weight[0]
        while cumulative <= u * sum(weight):
            action += 1
            cumulative += weight[action]
        codes.append(action)
        logps.append(math.log(weight[action] / sum(weight)))
        sets.append(kept)
    return codes, logps, sets


MODES = [{}, {"temperature": 0.6}, {"temperature": 1.7, "top_k": 5}, {"top_p": 0.7},
         {"top_k": 6, "top_p": 0.8}, {"cfg_scale": 2.5}, {"cfg_scale": 2.0, "cfg_interval": 0},
         {"cfg_scale": 2.0, "cfg_interval": 3},
         {"cfg_scale": 3.0, "cfg_interval": 100}, {"cfg_scale": 0.5}, {"top_k": 1},
         {"cfg_scale": 1.5, "cfg_interval": 2, "temperature": 0.8, "top_k": 7, "top_p": 0.9}]


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_cached_sampling_equals_the_slow_loop_and_its_score(mode):
    model = tiny()
    labels, G = torch.tensor([1, 4, 0]), 2
    uniforms = torch.rand(3 * G, T, generator=seeded(3))
    codes, logp, kept = model.sample(labels, uniforms, G, **mode)
    assert codes.dtype == torch.int32 and codes.shape == logp.shape == (3 * G, T)
    assert (kept is None) == (not mode.get("top_k") and "top_p" not in mode)
    labels = labels.repeat_interleave(G)
    for row in range(3 * G):
        want, want_logp, sets = slow_image(model, labels[row].item(), uniforms[row], **mode)
        assert codes[row].tolist() == want
        close(logp[row], torch.tensor(want_logp))
        if kept is not None:
            assert [set(x.nonzero()[:, 0].tolist()) for x in kept[row]] == sets
    scoring = {k: v for k, v in mode.items() if k not in ("top_k", "top_p")}
    scored, entropy = score(model, codes, labels, kept=kept, **scoring)
    close(scored, logp)
    assert scored.requires_grad and not entropy.requires_grad and scored.dtype == torch.float32
    dist = log_probs(guided_logits(model, codes[:, :-1], labels, *[mode.get("cfg_scale", 1.0),
                     mode.get("cfg_interval", -1)]), mode.get("temperature", 1.0), kept).exp()
    close(dist.sum(-1), torch.ones(3 * G, T))
    close(entropy, -(dist * dist.clamp(min=1e-30).log()).sum(-1))
    scored.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_the_modes_differ():
    """Else the test above could pass with a setting that does nothing."""
    model, labels = tiny(), torch.arange(CLASSES).repeat(4)
    uniforms = torch.rand(20, T, generator=seeded(3))
    logps = [model.sample(labels, uniforms, **mode)[1] for mode in MODES]
    pairs = itertools.combinations(range(len(MODES)), 2)
    same = [(a, b) for a, b in pairs if torch.equal(logps[a], logps[b])]
    assert same == [(0, MODES.index({"cfg_scale": 0.5}))]  # guidance below 1 is none, as in LlamaGen


def test_generate_is_sample_and_follows_its_generator():
    model, labels = tiny(), some(CLASSES, 4)
    mode = {"cfg_scale": 1.5, "cfg_interval": 4, "temperature": 0.9, "top_k": 8, "top_p": 0.95}
    a, b, c = (model.generate(labels, **mode, generator=seeded(s)) for s in (5, 5, 6))
    assert torch.equal(a, b) and not torch.equal(a, c)
    uniforms = torch.rand(4, T, generator=seeded(5))
    assert torch.equal(a, model.sample(labels, uniforms, **mode)[0])
    assert a.shape == (4, T) and a.dtype == torch.int32


def test_greedy_takes_the_likeliest():
    model, labels = tiny(), torch.arange(CLASSES)
    for scale in (1.0, 2.0):
        codes = model.generate(labels, cfg_scale=scale, top_k=1, generator=seeded(0))
        assert torch.equal(codes.long(), guided_logits(model, codes[:, :-1], labels, scale).argmax(-1))


def test_guided_steps_are_those_of_the_official_loop():
    for interval, n in itertools.product(range(-1, 12), range(1, 10)):
        want = sum(step == 0 or not (interval > -1 and step - 1 > interval) for step in range(n))
        assert guided_steps(n, 2.0, interval) == want
        assert guided_steps(n, 1.0, interval) == 0


def test_kept_set_against_sorting_and_adding_up():
    logits = 2 * torch.randn(40, V, generator=seeded(0))
    logits[20:] = logits[20:].round()  # many ties
    for top_k, top_p in itertools.product((0, 1, 3, V, 50), (1.0, 0.9, 0.5, 1e-6)):
        kept = kept_set(logits, top_k, top_p)
        for row, found in zip(logits.double().tolist(), kept):
            want, found = slow_kept(row, top_k, top_p), set(found.nonzero()[:, 0].tolist())
            if top_p == 1:
                assert found == want
            assert sorted(row[i] for i in found) == sorted(row[i] for i in want)  # which of a tie may differ


def test_kept_set_at_its_boundaries():
    half = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert kept_set(half, top_k=3).tolist() == [[True] * 4]  # the fourth ties with the third
    assert kept_set(half, top_k=2).tolist() == [[True, True, False, False]]
    assert kept_set(half, top_p=0.4).tolist() == [[True, False, False, False]]
    assert kept_set(half, top_p=0.6).tolist() == [[True, True, False, False]]
    exact = torch.zeros(1, 4)  # masses 1/4, 1/2, …: at 1/2 nothing is past the threshold until the third code
    assert kept_set(exact, top_p=0.5).sum() == 3 and kept_set(exact, top_p=0.49).sum() == 2
    both = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()  # of the two likeliest the first has 4/7 > 0.5
    assert kept_set(both, top_k=2, top_p=0.5).tolist() == [[True, False, False, False]]
    assert kept_set(both, top_p=0.5).tolist() == [[True, True, False, False]]


def test_a_tiny_temperature_is_greedy_and_draws_follow_their_probabilities():
    logits = torch.randn(6, V, generator=seeded(0))
    for temperature in (0.0, 1e-6):
        action, logp, _ = draw(logits, torch.rand(6, generator=seeded(1)), temperature)
        assert torch.equal(action, logits.argmax(-1))
        close(logp, torch.zeros(6))
    u = (torch.arange(10_000) + 0.5) / 10_000
    action, logp, _ = draw(logits[:1].expand(10_000, V), u, 0.7)
    share = torch.bincount(action, minlength=V) / 10_000
    close(share, (logits[0] / 0.7).softmax(-1), 2e-4)


def test_teacher_forcing_draws_and_scores_on_the_true_context():
    model = tiny()
    truth, labels = some(V, 3, T), some(CLASSES, 3)
    logits = guided_logits(model, truth[:, :-1], labels, 2.0, 3)
    assert logits.shape == (3, T, V)
    actions, logp, kept = draw(logits, torch.rand(3, T, generator=seeded(2)), 0.8, 6, 0.9)
    assert actions.shape == logp.shape == (3, T) and kept.shape == (3, T, V)
    assert not torch.equal(actions, truth)
    close(score(model, actions, labels, 2.0, 3, 0.8, kept, context=truth)[0], logp)


def test_bad_settings_are_named():
    model, labels = tiny(), torch.tensor([0, 1])
    for setting, value in (("top_p", 0.0), ("top_p", 1.5), ("top_p", float("nan")), ("temperature", -1.0),
                           ("top_k", -1), ("cfg_scale", float("inf"))):
        with pytest.raises(ValueError, match=f"{setting} {value}"):
            model.generate(labels, **{setting: value})
    for odd in (CLASSES, -1):
        with pytest.raises(ValueError, match=f"labels hold {odd}: wanted whole numbers from 0 to 4"):
            model.generate(torch.tensor([0, odd]))
    with pytest.raises(ValueError, match="labels hold 6"):  # the null class, 5, may be scored
        model(some(V, 1, T), torch.tensor([CLASSES + 1]))
    with pytest.raises(ValueError, match="codes hold 13: wanted whole numbers from 0 to 12"):
        model(torch.full((2, 3), V), labels)
    with pytest.raises(ValueError, match="at most 9 codes a row"):
        model(some(V, 2, T + 1), labels)
    with pytest.raises(ValueError, match=r"labels \(2,\): wanted"):
        model(some(V, 3, T), labels)
    for change, said in (({"dim": 30}, "dim 30"), ({"dim": 24}, "multiple of 4"),
                         ({"n_kv_head": 3}, "n_kv_head 3"), ({"block_size": 8}, "block_size 8: wanted")):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(CONFIG, **change)


# ---- the tokenizer ----
def slow_vq(model, x, side):
    """The encoder or the decoder from its weights by name: norms by moments, attention by einsum."""
    w = {k.removeprefix(side): v for k, v in model.state_dict().items() if k.startswith(side)}

    def norm(x, name):
        c = x.shape[1]
        groups = x.reshape(len(x), min(32, c), -1)
        var, mean = torch.var_mean(groups, 2, correction=0, keepdim=True)
        groups = (groups - mean) / (var + 1e-6).sqrt()
        return groups.view(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def conv(x, name, padding=1, stride=1):
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], stride, padding)

    def swish(x):
        return x * torch.sigmoid(x)

    def res(x, name):
        h = conv(swish(norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = conv(swish(norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (conv(x, f"{name}.nin_shortcut", 0) if f"{name}.nin_shortcut.weight" in w else x)

    def attention(x, name):
        h = norm(x, f"{name}.norm")
        q, k, v = (conv(h, f"{name}.{part}", 0).flatten(2) for part in "qkv")
        weights = (torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1])).softmax(2)
        return x + conv(torch.einsum("bij,bcj->bci", weights, v).view(x.shape), f"{name}.proj_out", 0)

    def middle(x):
        return res(attention(res(x, "mid.0"), "mid.1"), "mid.2")
    x = conv(x, "conv_in")
    x = middle(x) if side == "decoder." else x
    for i in range(len(model.config.ch_mult)):
        for j in range(3 if side == "decoder." else 2):
            x = res(x, f"conv_blocks.{i}.res.{j}")
            x = attention(x, f"conv_blocks.{i}.attn.{j}") if f"conv_blocks.{i}.attn.{j}.q.weight" in w else x
        if f"conv_blocks.{i}.downsample.conv.weight" in w:
            wider = torch.zeros(*x.shape[:2], x.shape[2] + 1, x.shape[3] + 1)
            wider[:, :, :-1, :-1] = x
            x = conv(wider, f"conv_blocks.{i}.downsample.conv", 0, 2)
        if f"conv_blocks.{i}.upsample.conv.weight" in w:
            x = conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"conv_blocks.{i}.upsample.conv")
    x = middle(x) if side == "encoder." else x
    return conv(swish(norm(x, "norm_out")), "conv_out")


@pytest.mark.parametrize("config", [SMALL_VQ, VQConfig(32, (1, 2, 2), 16, 30, 5)], ids=["2", "3 levels"])
@torch.no_grad()
def test_vq_equals_a_slow_pass_and_the_nearest_code(config):
    model = moved(VQModel(config), 0.05)
    model.quantize.embedding.weight.normal_(generator=seeded(1))
    step = config.downsample
    images = torch.rand(2, 3, 4 * step, 3 * step, generator=seeded(0)) * 2 - 1
    z = slow_vq(model, images, "encoder.")
    z = torch.einsum("bchw,dc->bhwd", z, model.quant_conv.weight[:, :, 0, 0]) + model.quant_conv.bias
    close(model.embed(images), z / z.norm(dim=-1, keepdim=True))
    codes = model.encode(images)
    assert codes.shape == (2, 4, 3) and codes.dtype == torch.int64 and len(codes.unique()) > 3
    book = model.quantize.embedding.weight / model.quantize.embedding.weight.norm(dim=1, keepdim=True)
    for b, i, j in itertools.product(range(2), range(4), range(3)):
        unit = z[b, i, j] / z[b, i, j].norm()
        distances = [(unit - e).square().sum().item() for e in book]
        assert codes[b, i, j] == distances.index(min(distances))
    q = book[codes]
    q = torch.einsum("bhwd,cd->bchw", q, model.post_quant_conv.weight[:, :, 0, 0])
    want = slow_vq(model, q + model.post_quant_conv.bias[:, None, None], "decoder.")
    decoded = model.decode(codes)
    assert decoded.shape == images.shape and decoded.std() > 1e-3
    close(decoded, want)
    model.quantize.embedding.weight.mul_(torch.rand(config.codebook_size, 1, generator=seeded(3)) + 0.5)
    assert torch.equal(model.encode(images), codes)  # lengths don't matter
    close(model.decode(codes.int()), decoded)


@torch.no_grad()
def test_decode_takes_a_flat_square():
    model = moved(VQModel(SMALL_VQ))
    codes = some(20, 2, 4, 4)
    assert model.decode(codes).shape == (2, 3, 8, 8)
    assert torch.equal(model.decode(codes.flatten(1)), model.decode(codes))


def test_small_layers_by_hand():
    down = downsample(1)
    torch.nn.init.zeros_(down.conv.bias)
    torch.nn.init.ones_(down.conv.weight)
    x = torch.arange(16.0).view(1, 1, 4, 4)
    # 3 × 3 sums from the corners (0, 0), (0, 2), (2, 0), (2, 2); what lies right or below is 0
    assert down(x).flatten().tolist() == [45.0, 2 + 3 + 6 + 7 + 10 + 11, 8 + 9 + 10 + 12 + 13 + 14, 50.0]
    assert [group_norm(c).num_groups for c in (8, 16, 32, 48, 64, 128, 512)] == [8, 16, 32, 16, 32, 32, 32]
    assert group_norm(64).eps == 1e-6


def test_the_vq_loss_and_its_straight_through_gradient():
    model = moved(VQModel(SMALL_VQ), 0.05)
    images = torch.rand(4, 3, 8, 8, generator=seeded(0)) * 2 - 1
    loss = model.loss(images)
    loss.backward()
    book_grad, conv_grad = model.quantize.embedding.weight.grad.clone(), model.quant_conv.weight.grad.clone()
    with torch.no_grad():
        z, codes = model.embed(images), model.encode(images)
        q = F.normalize(model.quantize.embedding.weight, dim=1)[codes]
        mse, gap = (model.decode(codes) - images).square().mean(), (z - q).square().mean()
    close(loss, mse + 1.25 * gap)
    # the codebook learns from the gap alone; the encoder from β·gap and from the decoder's gradient at q
    model.zero_grad()
    (model.quantize.lookup(codes) - z).square().mean().backward()
    close(model.quantize.embedding.weight.grad, book_grad, 1e-6)
    model.zero_grad()
    leaf = q.clone().requires_grad_()
    (model.from_vectors(leaf) - images).square().mean().backward()
    at_z = model.embed(images)
    torch.autograd.backward([at_z], [leaf.grad + 0.25 * 2 * (z - q) / z.numel()])
    close(model.quant_conv.weight.grad, conv_grad, 1e-6)
    assert conv_grad.abs().max() > 1e-5 and book_grad.abs().max() > 1e-5


def test_vq_refuses_what_does_not_fit():
    model = VQModel(SMALL_VQ)
    for shape in ((1, 3, 7, 8), (1, 3, 8, 9), (1, 1, 8, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match="multiples of 2, the downsample factor"):
            model.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"codes have shape \(2, 15\)"):
        model.decode(some(20, 2, 15))
    with pytest.raises(ValueError, match="codes hold 20: wanted whole numbers from 0 to 19"):
        model.decode(torch.full((1, 2, 2), 20))
