"""The model against a slow loop without cache, plain-Python sampling, hand-worked stops and transformers."""
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import GroupCache, PromptCache, plain_attention
from generate import generate, score
from sampler import inverse_cdf, sampling_logp
from model import GPT, SIZES, GPTConfig

V = 11


def tiny(dropout=0.0):
    """Every parameter (biases and norms too) is moved from its start: zeros and ones would hide errors."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(V, block_size=24, n_layer=2, n_head=2, n_embd=16, dropout=dropout)).eval()
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    return model


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def draws(rows, T):
    return torch.rand(rows, T, generator=seeded(7))


def prompts(B, P):
    return torch.randint(V, (B, P), generator=seeded(1))


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@torch.no_grad()
def slow_answer(model, prompt, uniforms, temperature=1.0, top_k=0, stop=()):
    """One row, a full forward pass for each new token, the draw by counting up: no cache, batch or mask."""
    answer, logp = [], []
    for u in uniforms.tolist():
        logits = (model(torch.tensor([prompt + answer]))[0, -1].double() / temperature).tolist()
        cut = sorted(logits)[-top_k]  # top_k = 0: the smallest
        weight = [math.exp(x) if x >= cut else 0.0 for x in logits]
        action, cumulative = 0, weight[0]
        while cumulative <= u * sum(weight):
            action += 1
            cumulative += weight[action]
        answer.append(action)
        logp.append(math.log(weight[action] / sum(weight)))
        if any(answer[-len(s):] == list(s) for s in stop):
            break
    return answer, logp


def check_against_slow(prompt, G, T, pad=None, **kw):
    """generate() against slow_answer unpadded, against repeated prompts and score(); returns all lengths."""
    model, uniforms, P, lengths = tiny(), draws(len(prompt) * G, T), prompt.shape[1], set()
    tokens, logp, mask = generate(model, prompt, T, G, uniforms=uniforms, pad=pad, **kw)
    pad = torch.zeros(len(prompt), dtype=torch.long) if pad is None else pad
    prompt, pad = prompt.repeat_interleave(G, 0), pad.repeat_interleave(G)
    for n, row in enumerate(prompt):
        answer, want = slow_answer(model, row[pad[n]:].tolist(), uniforms[n], **kw)
        L = len(answer)
        lengths.add(L)
        assert torch.equal(tokens[n, :P], row) and tokens[n, P:P + L].tolist() == answer
        assert mask[n].tolist() == [True] * L + [False] * (T - L) and logp[n, L:].eq(0).all()
        close(logp[n, :L].tolist(), want)
    repeated = generate(model, prompt, T, uniforms=uniforms, pad=pad, **kw)  # each row its own prefill
    assert torch.equal(tokens, repeated[0]) and torch.equal(mask, repeated[2])
    close(logp, repeated[1])
    if not kw.get("top_k"):  # sampling and scoring are one policy, at every temperature
        close(score(model, tokens, P, kw.get("temperature", 1.0), pad)[0][mask], logp[mask])
    return lengths


@pytest.mark.parametrize("temperature, top_k", [(1.0, 0), (0.6, 0), (1.0, 1), (1.5, 3)])
def test_cached_generation_is_the_uncached_and_its_logp_the_score(temperature, top_k):
    check_against_slow(prompts(3, 5), G=3, T=12, temperature=temperature, top_k=top_k)


def test_left_padded_prompts_with_stops_answer_like_the_unpadded_alone():
    stop, pad = [(3,), (1, 2)], torch.tensor([0, 4, 6])
    lengths = check_against_slow(prompts(3, 7), 4, 12, pad, stop=stop, temperature=0.6)
    assert len(lengths) > 2  # the stops do cut


def test_score_is_the_definition_in_value_entropy_and_gradient():
    model, tokens = tiny(), prompts(2, 9)
    logp, entropy = score(model, tokens, 4, 0.6)
    dist = (model(tokens)[:, 3:-1].double() / 0.6).log_softmax(-1)
    want = dist.gather(-1, tokens[:, 4:, None])[..., 0]
    close(logp.double(), want)
    close(entropy.double(), -(dist.exp() * dist).sum(-1))
    assert logp.shape == entropy.shape == (2, 5) and not entropy.requires_grad
    close(*(torch.autograd.grad(x.sum(), model.wte.weight)[0] for x in (logp, want)), atol=1e-4)


def test_answers_of_one_token_are_scored_with_their_prompt_read_once():
    """--max_new 1, and samples that all stop at once: nothing of the answer is read."""
    model, tokens = tiny(), torch.cat([prompts(2, 6).repeat_interleave(3, 0), prompts(6, 1)], 1)
    pad = torch.tensor([2, 2, 2, 0, 0, 0])
    with torch.autocast("cpu", torch.bfloat16):  # in float32 torch's kernel bears what is empty
        both = score(model, tokens, 6, pad=pad), score(model, tokens, 6, 1.0, pad, 3)
    for alone, shared in zip(*both):
        assert shared.shape == (6, 1)
        close(alone, shared, 0.15)


def scripted(script):
    """A model that says `script`, whatever it reads, and notes the shapes of what it reads."""
    model, reads, script = tiny(), [], torch.tensor(script)
    hidden = model.hidden

    def watched(tokens, *args, **kw):
        reads.append(tuple(tokens.shape))
        return hidden(tokens, *args, **kw)

    model.hidden = watched
    model.logits = lambda _: 50.0 * F.one_hot(script[:, len(reads) - 1], V)
    return model, reads


def test_stops_by_hand():
    script = [[1, 5, 2, 2, 5, 1], [3, 3, 4, 1, 5, 1], [4, 3, 1, 4, 2, 0], [3, 1, 4, 3, 3, 4]]
    want = [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6, [1] * 6]  # the 3 before row 2 is its prompt's
    model, reads = scripted(script)
    tokens, logp, mask = generate(model, torch.tensor([[0, 1], [7, 3]]), 6, 2, stop=[(5,), (3, 4)])
    assert mask.dtype == torch.bool and mask.int().tolist() == want and logp[~mask].eq(0).all()
    assert torch.equal(tokens[:, 2:][mask], torch.tensor(script)[mask])
    assert reads == [(2, 2)] + [(4, 1)] * 5  # two prompts read once, the last action by nobody
    model, reads = scripted(script[:2])
    tokens, logp, mask = generate(model, torch.tensor([[0, 1]]), 6, 2, stop=[(5,), (3, 4)])
    assert mask.int().tolist() == want[:2] and tokens.shape == (2, 8) and logp.shape == (2, 6)
    assert reads == [(1, 2)] + [(2, 1)] * 2  # all answers have ended: so does the loop


def test_what_padding_and_the_tokens_after_a_stop_hold_changes_nothing():
    model, prompt, pad, u = tiny(), prompts(4, 6), torch.tensor([0, 2, 5, 3]), draws(8, 10)
    other = torch.where(torch.arange(6) < pad[:, None], (prompt + 4) % V, prompt)
    a, b = (generate(model, p, 10, 2, uniforms=u, pad=pad, stop=[(3,)]) for p in (prompt, other))
    mask, pad, tokens, changed = a[2], pad.repeat_interleave(2), a[0], b[0].clone()
    assert torch.equal(mask, b[2]) and not mask.all() and torch.equal(tokens[:, 6:], changed[:, 6:])
    close(a[1], b[1])
    changed[:, 6:][~mask] = (changed[:, 6:][~mask] + 5) % V
    for x, y in zip(score(model, tokens, 6, pad=pad), score(model, changed, 6, pad=pad)):
        close(x[mask], y[mask])
        assert (x[~mask] - y[~mask]).abs().max() > 0.1  # what was changed does matter to what comes after it
    without = score(model, tokens, 6)[0] - score(model, changed, 6)[0]
    assert without[mask].abs().max() > 0.1  # nor is `pad` idle
    score(model, tokens, 6, pad=pad)[0].sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("first", [None, 0, 3])
def test_attention_written_out_is_pytorchs(first):
    """What a CPU in bfloat16 takes, here in float64; first: how many keys stand before the queries' own."""
    q, k, v = (torch.randn(3, 2, T, 8, dtype=torch.float64, requires_grad=True) for T in (5, 5, 5))
    mask, causal = None, first is None
    if not causal:
        k, v = (torch.randn(3, 2, first + 5, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
        mask = torch.ones(3, 1, 5, first + 5, dtype=torch.bool).tril(first)
        mask[1, :, :, :first] = False  # a row whose prompt is padding
    ours = plain_attention(q, k, v, mask, 0.0)
    theirs = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    close(ours, theirs, 1e-12)
    weight = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (ours, theirs)]
    for a, b in zip(*grads):
        close(a, b, 1e-12)


@pytest.mark.parametrize("group, pad", [(1, None), (1, [0, 0, 2, 2]), (2, None), (2, [0, 0, 2, 2])])
def test_scores_in_bfloat16_are_near_those_in_float32(group, pad):
    model, pad = tiny(), None if pad is None else torch.tensor(pad)
    tokens = torch.cat([prompts(2, 6).repeat_interleave(2, 0), torch.randint(V, (4, 9))], 1)
    exact = score(model, tokens, 6, 1.0, pad, group)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = score(model, tokens, 6, 1.0, pad, group)
    for a, b in zip(exact, rounded):
        assert b.dtype == torch.float32 and a.std() > 0.3
        close(a, b, 0.1)
    assert not torch.equal(exact[0], rounded[0])  # it was bfloat16


@pytest.mark.parametrize("first", [8, 1])
def test_a_prompt_read_in_two_pieces_through_the_cache(first):
    model, tokens = tiny(), prompts(2, 9)
    for size in (0, 9 - first):  # the rest comes whole, or into a buffer
        prompt_cache = PromptCache()
        head = model.hidden(tokens[:, :first], cache=prompt_cache)
        rest = model.hidden(tokens[:, first:], cache=GroupCache(prompt_cache, 1, size))
        close(torch.cat([head, rest], 1), model.hidden(tokens))


def test_one_seed_one_answer_and_each_process_answers_its_slice_as_the_whole_batch_does():
    model, prompt = tiny(), prompts(4, 5)
    kw = {"max_new": 9, "group_size": 3, "stop": [(3,)]}
    same, again, other = (generate(model, prompt, generator=seeded(s), **kw) for s in (7, 7, 8))
    whole = generate(model, prompt, uniforms=draws(12, 9), **kw)  # draws: from seed 7 too
    assert all(torch.equal(x, y) and torch.equal(x, z) for x, y, z in zip(same, again, whole))
    assert not torch.equal(same[0], other[0])
    for low, high in [(0, 1), (1, 4)]:
        rows = slice(3 * low, 3 * high)
        tokens, logp, mask = generate(model, prompt[low:high], uniforms=draws(12, 9)[rows], **kw)
        assert torch.equal(mask, whole[2][rows])
        assert torch.equal(tokens[:, 5:][mask], whole[0][rows, 5:][mask])
        close(logp, whole[1][rows])


def test_answers_follow_the_models_distribution():
    """Chi-square, 10 degrees of freedom: above 50 with probability 2.7e-7 (the seed is fixed anyway)."""
    model, prompt, n = tiny(), prompts(1, 5), 20000
    tokens, _, _ = generate(model, prompt, 1, n, 2.0, generator=seeded(3))
    want = n * (model(prompt)[0, -1] / 2.0).softmax(-1)
    assert want.min() > 5
    assert ((tokens[:, 5].bincount(minlength=V) - want) ** 2 / want).sum() < 50


BELOW_ONE = [1 - 2.0 ** -24, math.nextafter(1.0, 0.0)]  # the largest draws of float32 and float64


def test_inverse_cdf_by_hand():
    logp = torch.tensor([[0.0, 0.25, 0.5, 0.0, 0.25, 0.0]]).log().expand(7, -1)
    u = torch.tensor([0.0, 0.2499, 0.2501, 0.7499, 0.7501, *BELOW_ONE], dtype=torch.float64)
    assert inverse_cdf(logp, u).tolist() == [1, 1, 2, 2, 4, 4, 4]
    assert inverse_cdf(torch.zeros(1, 2), torch.tensor([0.5])).tolist() == [1]  # "exceeds", not "reaches"


@given(st.lists(st.one_of(st.just(-math.inf), st.floats(-30, 5)), max_size=7), st.integers(0, 7))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_evenly_spaced_uniforms_give_every_action_its_share_and_none_to_probability_0(logits, at):
    logits.insert(at, 0.0)  # at least one action is possible
    n, logp = 400, torch.tensor([logits]).log_softmax(-1)
    edges = torch.tensor([0.0, *BELOW_ONE], dtype=torch.float64)
    u = torch.cat([(torch.arange(n).double() + 0.5) / n, edges])
    action = inverse_cdf(logp.expand(n + 3, -1), u)
    assert logp[0, action].isfinite().all()
    assert (action[:n].bincount(minlength=len(logits)) - n * logp[0].exp()).abs().max() < 1.001


def test_of_a_long_row_the_block_is_found_first():
    """The same token as by one long sum in float64, away from boundaries; never one of probability 0."""
    g = torch.Generator().manual_seed(19)  # in two rows the rounding of a block's start matters
    logits = 3 * torch.randn(200, 5001, generator=g)
    logits[:, 4300:4600] = logits[:, 5000] = logits[:100, :300] = logits[100:, :10] = -math.inf
    logp, u = logits.log_softmax(-1), torch.rand(200, generator=g, dtype=torch.float64)
    cdf = logp.double().exp().cumsum(-1)
    for u in (u, *(torch.full((200,), edge, dtype=torch.float64) for edge in (0.0, *BELOW_ONE))):
        action, want = inverse_cdf(logp, u), torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)
        assert logp.gather(1, action[:, None]).isfinite().all()
        assert (action == want[:, 0]).float().mean() > 0.98
    broken = inverse_cdf(torch.full((2, 5001), math.nan), torch.rand(2))  # the loss will say so, not an index
    assert ((0 <= broken) & (broken < 5001)).all()


def reference_sampling(logits, top_k, top_p):
    """Top-k keeps all that tie with the k-th; then top-p keeps the likeliest until their mass is past p."""
    cut = sorted(logits, reverse=True)[min(top_k, len(logits)) - 1] if top_k else -math.inf
    weight = [math.exp(x) if x >= cut else 0.0 for x in logits]
    kept = []
    for i in sorted(range(len(logits)), key=lambda i: -weight[i]):
        if weight[i] and sum(weight[j] for j in kept) <= top_p * sum(weight):
            kept.append(i)
    total = sum(weight[i] for i in kept)
    return [math.log(weight[i] / total) if i in kept else -math.inf for i in range(len(logits))]


@given(st.integers(1, 9), st.integers(0, 10), st.sampled_from([0.01, 0.3, 0.6, 0.9, 1.0]), st.integers(0, 99))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_top_k_and_top_p_against_plain_python(size, top_k, top_p, seed):
    logits = 3 * torch.randn(2, size, generator=seeded(seed))
    want = torch.tensor([reference_sampling(row, top_k, top_p) for row in logits.tolist()])
    close(sampling_logp(logits, top_k, top_p), want)


@pytest.mark.parametrize("p, top_k, top_p, kept", [
    ([0.4, 0.25, 0.25, 0.1], 2, 1.0, [1, 1, 1, 0]),  # ties with the k-th stay
    ([0.4, 0.3, 0.2, 0.1], 0, 0.5, [1, 1, 0, 0]),
    ([0.4, 0.3, 0.2, 0.1], 2, 0.5, [1, 0, 0, 0]),  # top_k comes first: 0.4/0.7 reaches 0.5 alone
    ([0.2, 0.5, 0.3], 0, 0.0, [0, 1, 0]),
    ([0.5, 0.25, 0.25], 0, 0.5, [1, 1, 0])])  # top_p is reached exactly, so one more stays, as in LlamaGen
def test_top_k_and_top_p_by_hand(p, top_k, top_p, kept):
    assert sampling_logp(torch.tensor([p]).log(), top_k, top_p).isfinite().int().tolist() == [kept]


def test_too_long_names_both_numbers():
    with pytest.raises(ValueError, match=r"\b25\b.*\b24\b"):
        tiny()(prompts(1, 25))
    with pytest.raises(ValueError, match=r"\b20\b.*\b5\b.*\b24\b"):
        generate(tiny(), prompts(1, 20), 5)
    assert generate(tiny(), prompts(1, 20), 4)[0].shape == (1, 24)
    assert score(tiny(), prompts(1, 25), 20)[0].shape == (1, 5)  # the last token is never read


def test_a_fresh_model_knows_nothing_and_dropout_sleeps_in_eval():
    torch.manual_seed(0)
    logp, entropy = score(GPT(GPTConfig(512, 32, *SIZES["nano"])), torch.randint(512, (8, 33)), 1)
    # tied rows of std 0.55/√C against a normed state of length √C: logits of std 0.55, so ln V ± 0.55²/2
    assert abs(-logp.mean() - math.log(512)) < 0.2 and abs(entropy.mean() - math.log(512)) < 0.2
    dropped, x = tiny(dropout=0.5), prompts(2, 9)
    assert torch.equal(dropped(x), tiny()(x))
    dropped.train()
    assert (dropped(x) - dropped(x)).abs().max() > 0.1


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A random tiny GPT-2 of transformers, none of its parameters trivial, and the folder it was saved to."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=V, n_positions=24, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return model, folder


def test_from_pretrained_agrees_with_transformers(hf, tmp_path):
    from safetensors.torch import load_file, save_file
    theirs, folder = hf
    mine, tokens = GPT.from_pretrained(str(folder)).eval(), prompts(3, 24)
    close(mine(tokens), theirs(tokens).logits, atol=1e-4)
    attention, prompt = torch.ones(3, 6, dtype=torch.long), tokens[:, :6]
    attention[1, :4] = attention[2, :1] = 0
    greedy = theirs.generate(prompt, attention_mask=attention, do_sample=False, max_new_tokens=12,
                             eos_token_id=None, pad_token_id=0)
    assert torch.equal(generate(mine, prompt, 12, top_k=1, pad=torch.tensor([0, 4, 1]))[0], greedy)
    # OpenAI's own file on the hub has no "transformer." in its names and keeps the causal mask as a buffer
    weights = {k.removeprefix("transformer."): w for k, w in load_file(folder / "model.safetensors").items()}
    save_file(weights | {"h.0.attn.bias": torch.ones(1, 1, 24, 24)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert torch.equal(GPT.from_pretrained(str(tmp_path)).eval()(tokens), mine(tokens))


def test_transformers_loads_the_export_and_so_do_we(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours, tokens = tiny(), prompts(3, 24)
    ours.export_hf(tmp_path / "new" / "folder")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "new" / "folder").eval()
    close(theirs(tokens).logits, ours(tokens), atol=1e-4)
    back = GPT.from_pretrained(str(tmp_path / "new" / "folder"))
    assert back.config == ours.config
    dropped = tiny(dropout=0.5).train()  # the same masks at the same places: not on attention's weights
    dropped.export_hf(tmp_path / "dropped")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "dropped").train()
    torch.manual_seed(1)
    want = theirs(tokens).logits
    torch.manual_seed(1)
    close(dropped(tokens), want, atol=1e-4)
    assert all(torch.equal(w, back.state_dict()[k]) for k, w in ours.state_dict().items())


def refused(capsys, source):
    with pytest.raises(SystemExit) as stopped:
        GPT.from_pretrained(str(source))
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize("name, damage", [
    ("config.json", {"model_type": "llama"}), ("config.json", {"activation_function": "relu"}),
    ("config.json", {"scale_attn_by_inverse_layer_idx": True}),
    ("config.json", None), ("model.safetensors", None),
    ("config.json", {"layer_norm_epsilon": 0.1}), ("config.json", {"scale_attn_weights": False}),
    ("config.json", {"tie_word_embeddings": False}), ("config.json", {"n_inner": 32}),
    ("model.safetensors", {"n_layer": 4}),  # the config asks for a layer more than the weights have
    ("config.json", b"{"), ("config.json", b'{"model_type": "gpt2"}'),
    ("model.safetensors", b""), ("model.safetensors", b"short")])
def test_a_folder_that_holds_no_plain_gpt2_is_refused(hf, tmp_path, capsys, name, damage):
    files = {file: (hf[1] / file).read_bytes() for file in ("config.json", "model.safetensors")}
    if isinstance(damage, dict):
        files["config.json"] = json.dumps(json.loads(files["config.json"]) | damage).encode()
    else:
        files[name] = files[name][:-100] if damage == b"short" else damage
    for file, content in files.items():
        if content is not None:
            (tmp_path / file).write_bytes(content)
    assert name in refused(capsys, tmp_path)


def test_a_hub_name_without_a_network_says_what_to_bring(capsys):
    pytest.importorskip("huggingface_hub")  # conftest.py sets HF_HUB_OFFLINE
    said = refused(capsys, "nobody-of-nanogrpo/no-such-model")
    assert "nobody-of-nanogrpo/no-such-model" in said and "model.safetensors" in said
