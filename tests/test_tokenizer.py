"""Tokenizers: round trips on any text, and the BPE against a trainer that recounts it all for every merge."""
from collections import Counter

import pytest
import regex
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.tokenizer import BLANK_LINE, PATTERN, Tokenizer, train_bpe, train_tokenizer

SPEECHES = ["ROMEO:\nBut, soft! what light through yonder window breaks?\nIt is the east, Juliet is the sun.",
            "JULIET:\nO Romeo, Romeo! wherefore art thou Romeo?\nDeny thy father and refuse thy name;",
            "ROMEO:\nShall I hear more, or shall I speak at this? I'll speak; the light, the light!"]
CORPUS = BLANK_LINE.join(SPEECHES * 3)
BPE = train_tokenizer("bpe", CORPUS, 320)
quick = settings(max_examples=150, deadline=None, derandomize=True)
text_like_ours = st.text(alphabet="ROMEO light'\n:,é1\u2014", max_size=60)


def split(text):
    """As lists of bytes, the pieces inside which merges live; a blank line separates and is no piece."""
    pieces = [piece for speech in text.split(BLANK_LINE) for piece in regex.findall(PATTERN, speech)]
    return [[bytes([b]) for b in piece.encode()] for piece in pieces]


def merge(word, pair):
    merged = []
    for symbol in word:  # from the left: "aaa" becomes "aa", "a"
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def naive_bpe(text, size):
    """The definition: for each merge, every neighbouring pair of the whole corpus is counted anew."""
    words, merges = split(text), []
    while 256 + len(merges) < size:
        count = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(count, key=lambda pair: (count[pair], pair), default=None)
        if best is None or count[best] < 2:
            break
        merges.append(best)
        words = [merge(word, best) for word in words]
    return merges


def test_pieces_by_hand():
    pieces = ["Don't", " go", ",", " ", " 12", " men", "!'", "\n", "\n", "ROMEO", ":", " ", "\n", "\n", "--"]
    assert regex.findall(PATTERN, "".join(pieces)) == pieces


def test_bpe_by_hand():
    # lo 4, ow 4, " l" 3, we 2: ow (o > l); then l+ow 4, " "+low 3, " low"+e 2; er, es, st stand once
    tokenizer = train_tokenizer("bpe", "low low lower lowest", 1000)
    assert tokenizer.table == [chr(b) for b in range(256)] + ["ow", "low", " low", " lowe"]
    assert tokenizer.encode("low lowest\n\nslow") == [257, 259, ord("s"), ord("t"), 260, ord("s"), 257]
    assert tokenizer.stops == [(260,)] and tokenizer.vocab_size == 261  # too small a corpus: no empty ids


@given(st.text(alphabet="aab \n'é", max_size=80), st.integers(257, 275))
@quick
def test_trainer_equals_the_naive_one(text, size):
    text = regex.sub("\n+", "\n", text)  # blank lines: below
    vocabulary = train_bpe(text, size)
    assert vocabulary[256:] == [a + b for a, b in naive_bpe(text, size)]
    assert len(set(vocabulary)) == len(vocabulary)  # one that came twice would shift the stop's id


def test_no_merge_is_learned_across_a_blank_line():
    text = "ab\n\ncd\n\n" * 5
    assert train_bpe(text, 300)[256:] == [a + b for a, b in naive_bpe(text, 300)] == [b"cd", b"ab"]


def test_trainer_and_encoder_equal_the_naive_ones_on_speeches():  # under another hash seed in every run
    merges = naive_bpe(CORPUS, 319)
    assert [token.encode("latin-1") for token in BPE.table[256:]] == [a + b for a, b in merges]
    vocabulary = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    unseen = "MERCUTIO:\nThe light of Romeo's 23 windows; shall thy\u2014\n\nname  refuse\n\n\nit?"
    want = []
    for speech in unseen.split(BLANK_LINE):
        for word in split(speech):
            for pair in merges:
                word = merge(word, pair)
            want += [vocabulary.index(symbol) for symbol in word]
        want.append(319)
    assert len(merges) == 63 and BPE.encode(unseen) == want[:-1]


@given(st.text(max_size=80))
@quick
def test_bpe_round_trip_on_any_text(text):
    ids = BPE.encode(text)
    assert BPE.decode(ids) == text and all(0 <= i < BPE.vocab_size for i in ids)


@given(text_like_ours, text_like_ours)
@quick
def test_a_blank_line_is_the_stop_and_a_heading_ends_at_a_tokens_end(before, after):
    assert BPE.encode(BLANK_LINE) == [319] and BPE.stops == [(319,)]
    ids = BPE.encode(before)
    assert ids.count(319) == before.count(BLANK_LINE) and BPE.decode(ids) == before
    heading, speech = before.rstrip("\n") + "\n\nROMEO:\n", after.lstrip("\n")
    assert BPE.encode(heading) + BPE.encode(speech) == BPE.encode(heading + speech)


@pytest.mark.parametrize("name", ["bpe", "char"])
def test_state_loads_as_the_same_tokenizer(name, tmp_path):
    tokenizer = train_tokenizer(name, CORPUS, 320)
    torch.save(tokenizer.state(), tmp_path / "t.pth")  # as checkpoints hold it: plain data only
    loaded = Tokenizer(**torch.load(tmp_path / "t.pth", weights_only=True))
    ids = loaded.encode(CORPUS)
    assert ids == tokenizer.encode(CORPUS) and loaded.decode(ids) == CORPUS
    assert (loaded.name, loaded.vocab_size, loaded.stops) == (name, tokenizer.vocab_size, tokenizer.stops)


def test_char_by_hand():
    tokenizer = train_tokenizer("char", "ba\n\nab")
    assert tokenizer.table == ["\n", "a", "b"] and tokenizer.vocab_size == 3 and tokenizer.stops == [(0, 0)]
    assert tokenizer.encode("ab\n\nb") == [1, 2, 0, 0, 2] and tokenizer.decode([2, 0, 1]) == "b\na"


def test_bad_input_is_refused_with_a_message(capsys, monkeypatch):
    def refused(call, *words):
        with pytest.raises(SystemExit) as stopped:
            call()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: ") and all(word in said for word in words)

    def offline(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", offline)
    refused(lambda: train_tokenizer("gpt2", ""), "TIKTOKEN_CACHE_DIR")
    refused(lambda: train_tokenizer("char", "ab").encode("abz"), "'z'")
    refused(lambda: train_tokenizer("bpe", CORPUS, 257), "257", "258")
    assert train_tokenizer("bpe", CORPUS, 258).vocab_size == 258
