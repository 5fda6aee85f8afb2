"""What graph.py records against the same work done eagerly; the CUDA graphs themselves where there is a GPU.

Run: python -m pytest tests/test_graph.py (on a GPU: -m gpu)
"""
import contextlib
import functools
from types import SimpleNamespace

import pytest
import torch
from helpers import DEVICES, gpu, refused

import train_grpo
from generate import ended, generate, score
import graph
from graph import Graphs, made_or_eager, one_pass, record
from llama import Llama, LlamaConfig
from model import GPT, GPTConfig
from ppo import ValueModel
from utils import ranks
from utils.device import peak_mem_mb, pick_autocast, pick_device


@pytest.fixture(autouse=True)
def no_failure_yet(monkeypatch):
    monkeypatch.setattr(graph, "FAILURES", [])


def make(kind):
    torch.manual_seed(0)
    if kind == "gpt":
        return GPT(GPTConfig(50, 160, 2, 2, 32)).eval()
    return Llama(LlamaConfig(50, 160, 2, 4, 2, 32, 64, 8)).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_fixed_buffers_decode_as_the_eager_step_does(kind, padded, device):
    """The same tokens, masks and log-probabilities over two lengths of the buffer; buffers are used twice."""
    model = make(kind).to(device)
    graph = Graphs(model)
    for seed in (1, 3):  # with 2 a number lies 3e-8 beside a boundary: some CPUs draw the neighbour
        g = torch.Generator().manual_seed(seed)
        prompt = torch.randint(50, (3, 7), generator=g).to(device)
        pad = torch.tensor([0, 2, 5], device=device) if padded else None
        uniforms = torch.rand(12, 90, generator=g).to(device)
        how = {"group_size": 4, "stop": [(3, 4), (7,)] if seed == 1 else [], "uniforms": uniforms, "pad": pad}
        want, got = generate(model, prompt, 90, **how), generate(model, prompt, 90, **how, graphs=graph)
        assert torch.equal(want[2], got[2]) and torch.equal(want[0].cpu()[:, 7:][want[2].cpu()],
                                                            got[0].cpu()[:, 7:][got[2].cpu()])
        torch.testing.assert_close(want[1], got[1], rtol=1e-4, atol=1e-5)
        for p in model.parameters():  # the next round samples from other weights
            p.data += 0.02 * torch.randn(p.shape, generator=g).to(device)


@pytest.mark.parametrize("device", DEVICES)
def test_the_half_precision_copy_follows_the_weights(device):
    """Without refresh it would sample from old weights; what it notes is near a float32 score."""
    model = make("gpt").to(device)
    graph = Graphs(model, "bf16")
    for p in model.parameters():
        p.data += 0.5 * torch.randn_like(p)
    prompt, g = torch.randint(50, (2, 7)).to(device), torch.Generator().manual_seed(0)
    uniforms = torch.rand(8, 20, generator=g).to(device)
    gaps = []
    for sampler in (lambda: graph.sampler, graph.refreshed):
        tokens, logp, _ = generate(sampler(), prompt, 20, 4, uniforms=uniforms, graphs=graph)
        with torch.no_grad():
            gaps.append((score(model, tokens, 7, group_size=4)[0] - logp).abs().mean().item())
    assert gaps[1] < 0.05 < 0.5 < gaps[0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind, G", [("gpt", 3), ("gpt", 4), ("llama", 4)])
def test_recorded_scores_and_gradients_are_the_eager_ones(kind, G, padded, device):
    """Fewer groups and shorter answers are filled up; two backward passes add up; new weights are read."""
    model, other = make(kind).to(device), make(kind).to(device)
    graphs = Graphs(model)

    def plain(module, tokens, pad):
        return score(module, tokens, 7, 0.7, pad, G, False)

    def by(tokens, pad):
        return one_pass(functools.partial(plain, model), model, tokens, pad, contextlib.nullcontext, graphs,
                        G)
    g = torch.Generator().manual_seed(0)
    for groups, T in ((3, 20), (2, 20), (1, 9), (3, 20)):
        rows = groups * G
        tokens = torch.randint(50, (rows, 7 + T), generator=g).to(device)
        pad = torch.tensor([0, 2, 5], device=device).repeat_interleave(G)[:rows] if padded else None
        weight = torch.randn(rows, T, generator=g).to(device)
        for part in (slice(None), slice(G)):  # the second with one group
            how = None if pad is None else pad[part]
            for module, scored in ((model, by), (other, functools.partial(plain, other))):
                logp, entropy = scored(tokens[part], how)
                (logp * weight[part]).sum().backward()
                with torch.no_grad():
                    again = scored(tokens[part], how)
                torch.testing.assert_close(again[0], logp.detach())
                kept = logp if module is model else kept
                if module is other:
                    torch.testing.assert_close(kept, logp, rtol=1e-4, atol=1e-5)
                    torch.testing.assert_close(again[1], entropy.detach(), rtol=1e-4, atol=1e-5)
        for p, q in zip(model.parameters(), other.parameters()):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
            change = 0.02 * torch.randn(p.shape, generator=g).to(device)
            p.data += change
            q.data += change
            p.grad = q.grad = None


@gpu
@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_eagerly_and_says_so(capsys):
    total = torch.zeros(1, device="cuda")

    def waits():  # a recording can't wait for a number
        total.add_(1 if total.item() >= 0 else 0)
    again = record(waits, total.device)
    before = total.item()
    again()
    assert total.item() == before + 1 and "no more CUDA graphs, so slower" in capsys.readouterr().err


def test_after_a_failure_no_recording_is_tried(capsys):
    """Parts of a decoding must not mix: a recording would hold buffers that an eager part replaces."""
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert made_or_eager(lambda: "recorded", "eager") == "recorded"
    assert made_or_eager(fails, "eager") == made_or_eager(lambda: "recorded", "eager") == "eager"
    assert capsys.readouterr().err == "no more CUDA graphs, so slower: CUDA out of memory\n"


def test_many_shapes_are_not_all_recorded():
    """As --dynamic_sampling makes them: each recording would keep a KV cache."""
    model = make("gpt")
    graphs, prompt = Graphs(model), torch.arange(20).view(10, 2)
    for n in (*range(1, 11), 9, 3):
        uniforms = torch.rand(2 * n, 5, generator=torch.Generator().manual_seed(n))
        want, got = (generate(model, prompt[:n], 5, 2, uniforms=uniforms, graphs=g) for g in (None, graphs))
        assert torch.equal(want[0], got[0])
    assert len(graphs.decodings) == 8


def test_a_full_gpu_records_no_more_updates_and_says_so_once(monkeypatch, capsys):
    """Without a GPU: stand-ins for its memory and for torch's recorder."""
    memory, asked = {"free": 3, "cached": 3}, []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (memory["free"], 10))
    monkeypatch.setattr(torch.cuda, "empty_cache",
                        lambda: memory.update(free=memory["free"] + memory["cached"], cached=0))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3e6)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables",
                        lambda module, inputs, **kw: asked.append(kw) or "recorded")
    module, inputs = torch.nn.Linear(1, 1), [SimpleNamespace(is_cuda=True)]
    graphs = Graphs(module)
    assert graphs.with_backward(module, inputs) == "recorded" and asked == [{"allow_unused_input": True}]
    assert graphs.with_backward(module, inputs) == "recorded"
    assert len(module.weight._backward_hooks) == 1  # it copies what the next replay overwrites
    memory["free"] = 4
    assert graphs.with_backward(module, inputs) is module
    memory["free"] = 9  # but an eager update came between
    assert graphs.with_backward(module, inputs) is module
    assert capsys.readouterr().err.count("half of the GPU is full") == 1
    assert peak_mem_mb(torch.device("cuda")) == 3


@gpu
@pytest.mark.gpu
def test_a_critic_that_leaves_a_head_unused_is_recorded(capsys):
    """The head of an untied Llama, which has no part in a value."""
    critic = ValueModel(LlamaConfig(50, 64, 1, 2, 2, 16, 32, 8, tied=False)).cuda()
    tokens = torch.arange(6, device="cuda")[None]
    [value] = one_pass(lambda tokens, pad: [critic(tokens, pad)], critic, tokens, None,
                       contextlib.nullcontext, Graphs(critic))
    value.sum().backward()
    assert critic.head.bias.grad == 6 and critic.trunk.lm_head.weight.grad is None
    assert capsys.readouterr().err == ""


def test_out_of_memory_is_a_line_that_names_the_flags(monkeypatch, capsys):
    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore lines")
    monkeypatch.setattr(train_grpo, "main", full)
    with pytest.raises(SystemExit) as stopped, ranks.one_voice():
        train_grpo.main(None)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1
    assert all(word in said for word in ("--micro_batch", "--grad_checkpoint", "--max_new", "20.00 GiB"))


@pytest.mark.parametrize("name, says", [("cuda:7", "cuda:0 to cuda:0"), ("cuda:x", "cuda:1"), ("tpu", "mps")])
def test_a_device_that_is_not_there(name, says, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    refused(capsys, lambda: pick_device(name), f"--device {name}" if ":7" in name else name, says)


@pytest.mark.parametrize("name, current", [("cuda:1", 1), ("cuda", -1)])  # -1 leaves it as it is
def test_the_gpu_that_is_named_becomes_the_current_one(name, current, monkeypatch):
    """Graphs are recorded on the current one: on another nothing would be recorded."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert pick_device(name) == torch.device(name) and chosen == [current]


def test_a_gpu_without_bfloat16(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    assert pick_autocast(torch.device("cuda"))[1] == "fp32"
    refused(capsys, lambda: pick_autocast(torch.device("cuda"), "bf16"), "Old GPU", "--dtype bf16", "auto")


def test_where_a_stop_ends():
    tokens = torch.tensor([[1, 2, 1, 2, 3], [2, 2, 3, 1, 1], [5, 1, 1, 1, 2]])
    assert ended(tokens, [(1, 2), (3,)]).tolist() == [[False, True, False, True, True],
                                                      [False, False, True, False, False],
                                                      [False, False, False, False, True]]
    assert not ended(tokens[:, :1], [(1, 2)]).any() and not ended(tokens, []).any()
