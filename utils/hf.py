"""Weights from others' files, back to transformers' format: a folder, a hub name, or a .gguf (llama.cpp's).

Left out: pickled weights (.bin), since they can run code, and the K-quants of GGUF.
Run: python sft.py --init gpt2 --tokenizer gpt2, or python sample.py --policy smollm2
"""
import contextlib
import functools
import json
import re
from dataclasses import asdict
from pathlib import Path

from utils.cli import atomic_write, die, need
from utils.tokenizer import ChatTokenizer

PLAIN = {  # what model.py computes; a config that differs here is refused, not approximated
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "n_inner": None, "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True,
}
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "merges.txt"]
QUANTS = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")  # those of GGUF that are read
GGUF_SETTINGS = {  # GGUF's key behind the architecture's name: transformers'
    "context_length": "max_position_embeddings", "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
    "attention.key_length": "head_dim"}
GGUF_NAMES = {  # GGUF's part of a tensor's name: transformers'
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "blk": "model.layers",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


@contextlib.contextmanager
def readable(source):
    """Turns whatever damaged or unfitting files of others raise into a clear message."""
    try:
        yield
    except Exception as error:  # damaged JSON, a truncated file, weights of other names or shapes
        why = " ".join(str(error).split())[:80]
        die(f"{source} can't be read ({type(error).__name__}: {why}): wanted a whole config.json and "
            "model.safetensors that belong together, or a whole .gguf")


def find(source):
    """A folder in transformers' format, or a name in the hub or its cache -> the folder, or a message."""
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(need("huggingface_hub", "hf").snapshot_download(
                str(source), allow_patterns=WANTED, etag_timeout=5))
        except Exception as error:  # a dozen kinds of "can't reach it" that mean the same to the user
            die(f"{str(source)!r} is no file or folder here, the hub gave nothing ({type(error).__name__}). "
                "Download config.json, model.safetensors and the tokenizer's files where there is a network, "
                "and name their folder.")
    index = "model.safetensors.index.json"
    for name in ["config.json", index if (folder / index).is_file() else "model.safetensors"]:
        if not (folder / name).is_file():
            die(f"{folder} has no {name}: wanted a folder that transformers' save_pretrained wrote, with "
                "weights as .safetensors, or a file of `python sft.py`, such as out/sft/policy.pth")
    return folder


def read(source):
    """-> (the config.json as a dict, weights by transformers' names) of a folder, a hub name or a .gguf."""
    if str(source).endswith(".gguf"):
        return read_gguf(source)
    load_file, folder = need("safetensors.torch", "hf").load_file, find(source)
    with readable(folder):
        files, index = ["model.safetensors"], folder / "model.safetensors.index.json"
        if index.is_file():
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        weights = {name: w for file in files for name, w in load_file(folder / file).items()}
        return json.loads((folder / "config.json").read_text(encoding="utf-8")), weights


@functools.lru_cache(maxsize=1)  # model and tokenizer share the slow pass over a large vocabulary
def open_gguf(path):
    reader = need("gguf", "llm").GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors


def read_gguf(path):
    """The same of a .gguf: tensors are dequantised, names are transformers'."""
    gguf = need("gguf", "llm")
    if not Path(path).is_file():
        die(f"no file {path}: wanted a .gguf of the Llama, Qwen2 or Qwen3 architecture")
    with readable(path):
        import torch
        fields, tensors = open_gguf(path)
        kind = fields["general.architecture"]
        if kind not in ("llama", "qwen2", "qwen3"):
            die(f"{path} is of the architecture {kind!r}: wanted llama, qwen2 or qwen3")
        c = {theirs: fields[f"{kind}.{key}"] for key, theirs in GGUF_SETTINGS.items()
             if f"{kind}.{key}" in fields}
        weights = {}
        for tensor in tensors:
            quant = tensor.tensor_type.name
            if quant not in QUANTS:
                die(f"{path} has {tensor.name} as {quant}: {', '.join(QUANTS)} are read")
            if tensor.name == "rope_freqs.weight":
                die(f"{path} has scaled rotary positions: name its folder in transformers' format instead")
            name = ".".join(GGUF_NAMES.get(part, part) for part in tensor.name.split("."))
            w = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).float()
            if kind == "llama" and re.search(r"[qk]_proj\.weight", name):  # here neighbours turn
                heads = c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
                w = w.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
            weights[name] = w
        return c | {"model_type": kind, "vocab_size": len(weights["model.embed_tokens.weight"]),
                    "tie_word_embeddings": "lm_head.weight" not in weights}, weights


# ---- tokenizers ----
GGUF_SPLITS = {"smollm": None, "gpt-2": None, "default": None}  # how text is cut into words
for name, digits in {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}.items():
    GGUF_SPLITS[name] = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits +
                         r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def read_tokenizer(source):
    """The ChatTokenizer of a folder, a hub name or a .gguf; a message where it or its template is missing."""
    if str(source).endswith(".gguf"):
        return gguf_tokenizer(source)
    folder = find(source)
    if not (folder / "tokenizer.json").is_file():
        die(f"{folder} has no tokenizer.json: save the tokenizer there with transformers' save_pretrained")
    with readable(folder):
        config, how, c = (json.loads((folder / name).read_text(encoding="utf-8"))
                          if (folder / name).is_file() else {}
                          for name in ("tokenizer_config.json", "generation_config.json", "config.json"))
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        template = config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if (folder / "chat_template.jinja").is_file():
            template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
        if template is None and c["model_type"] != "gpt2":
            die(f"{folder} has no chat template: take an instruct model, or, to give a base model its "
                "prompts as they are, write {{ messages[0]['content'] }} to its chat_template.jinja")
        tokens = {key: config.get(key) for key in ("bos_token", "eos_token")}
        special = {key: t["content"] if isinstance(t, dict) else t for key, t in tokens.items()}
        eos = how.get("eos_token_id", c.get("eos_token_id"))
        ids = eos if isinstance(eos, list) else [eos]
        made = ChatTokenizer(str(source), text, [], template, special)
        ids += [made.encoding.token_to_id(special["eos_token"] or "")]
        made.stops = [(i,) for i in dict.fromkeys(ids) if i is not None]
    return made


def gguf_tokenizer(path):
    tokenizers = need("tokenizers", "llm")
    with readable(path):
        field = {key.removeprefix("tokenizer."): value for key, value in open_gguf(path)[0].items()}
        if "ggml.tokens" not in field:
            die(f"{path} has no tokenizer: wanted a model that llama.cpp's converter wrote")
        tokens, split = field["ggml.tokens"], field.get("ggml.pre", "default")
        if field["ggml.model"] != "gpt2" or split not in GGUF_SPLITS:
            die(f"{path} has the tokenizer {field['ggml.model']!r} {split!r}: wanted 'gpt2' with one of "
                f"{', '.join(GGUF_SPLITS)}. Name the model's folder in transformers' format instead.")
        if "chat_template" not in field:
            die(f"{path} has no chat template: take an instruct model")
        merges = [tuple(pair.split(" ")) for pair in field["ggml.merges"]]
        ids = {token: i for i, token in enumerate(tokens)}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(ids, merges))
        pre, pattern = tokenizers.pre_tokenizers, GGUF_SPLITS[split]
        first = pre.Split(tokenizers.Regex(pattern), "isolated") if pattern else pre.Digits(split == "smollm")
        second = pre.ByteLevel(add_prefix_space=False, use_regex=not pattern)
        made.pre_tokenizer = pre.Sequence([first, second])
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens([tokenizers.AddedToken(token, normalized=False)
                                 for token, kind in zip(tokens, field["ggml.token_type"]) if kind == 3])
        eos = field["ggml.eos_token_id"]
        special = {"bos_token": tokens[field.get("ggml.bos_token_id", eos)], "eos_token": tokens[eos]}
        return ChatTokenizer(Path(path).stem, made.to_str(), [(eos,)], field["chat_template"], special)


def write(folder, config, weights, tokenizer=None):
    """config.json, model.safetensors, and, given a tokenizer, its files and a generation_config.json."""
    safetensors, folder = need("safetensors.torch", "hf"), Path(folder)
    stops = [] if tokenizer is None else tokenizer.stops
    ids = [stop[0] for stop in stops if len(stop) == 1]
    # where the stop may also come as several tokens, no id can say that: transformers compares the text
    text = [] if len(ids) == len(stops) else [tokenizer.decode(stops[0])]
    eos = ids if ids and not text else None
    how = {"bos_token_id": None, "eos_token_id": eos[0] if eos and len(eos) == 1 else eos,
           "pad_token_id": eos and eos[0]}
    weights = {name: w.detach().cpu().contiguous() for name, w in weights.items()}
    atomic_write(folder / "config.json", json.dumps(config | how | {"dtype": "float32"}, indent=2).encode())
    atomic_write(folder / "model.safetensors", safetensors.save(weights, {"format": "pt"}))
    if tokenizer is not None:
        how |= {"stop_strings": text} if text else {}
        atomic_write(folder / "generation_config.json", json.dumps(how, indent=2).encode())
        tokenizer.export(folder)


def fill(model, weights, assign=False):
    """Loads weights of transformers' names and layout into a model of model.py or llama.py, in float32."""
    ours = {name.removeprefix("transformer.").removeprefix("model."): w for name, w in weights.items()}
    ours = {name: (ours[name].T if transposed(name) else ours[name]).float() for name in model.state_dict()}
    model.load_state_dict(ours, assign=assign)


# ---- GPT-2 ----
def transposed(name):  # transformers keeps GPT-2's projections as (in, out)
    return name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


def load_gpt2(source, model_class, config_class):
    """A folder in transformers' format, or a name in the hub or its cache -> the model, or a message."""
    c, weights = read(source)
    c = {**PLAIN, **c}
    wrong = [f"{k}={c[k]!r}" for k, v in PLAIN.items() if c[k] != v]
    if c.get("model_type") != "gpt2" or wrong:
        die(f"{source}/config.json is no plain GPT-2: model_type {c.get('model_type')!r} {' '.join(wrong)}")
    with readable(source):
        model = model_class(config_class(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"],
                                         c["n_embd"]))
        fill(model, weights)
    return model


def save_gpt2(model, folder, tokenizer=None):
    c = asdict(model.config)
    c = {k: c[k] for k in ("vocab_size", "n_layer", "n_head", "n_embd")} | {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": c["block_size"],
        "activation_function": "gelu_new", "tie_word_embeddings": True,
        "attn_pdrop": 0.0, "embd_pdrop": c["dropout"], "resid_pdrop": c["dropout"]}
    weights = {f"transformer.{k}": w.T if transposed(k) else w for k, w in model.state_dict().items()}
    write(folder, c, weights, tokenizer)
