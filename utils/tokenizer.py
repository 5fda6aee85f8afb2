"""Tokenizers: `bpe` trained here on the corpus, `char` (nanoGPT's Shakespeare), `gpt2` (tiktoken's).

In `bpe` the blank line that ends a speech is one reserved token, so that "stop" is an action like any other.
Its merges are learned by byte-pair encoding (Sennrich et al., arXiv:1508.07909) and applied by tiktoken.
"""
from collections import Counter, defaultdict

import regex
import tiktoken

from utils.cli import die

BLANK_LINE = "\n\n"
# merges stay within a piece: a newline stands alone, so that a heading ("ROMEO:\n") always ends at a token's
# end; a word takes its leading space
PATTERN = r"\n| ?\p{L}+(?:'\p{L}+)?| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"


class Tokenizer:
    """encode, decode, vocab_size and stops (the token sequences that end a speech), for all three alike."""

    def __init__(self, name, table):
        self.name, self.table = name, table
        if name == "char":  # table: the characters, in order
            self.ids = {c: i for i, c in enumerate(table)}
            self.vocab_size = len(table)
            self.stops = [tuple(self.ids[c] for c in BLANK_LINE)] if "\n" in self.ids else []
        elif name == "bpe":  # table: the byte strings, latin-1 for the file's sake, in rank order
            ranks = {token.encode("latin-1"): i for i, token in enumerate(table)}
            self.encoding = tiktoken.Encoding("nanogrpo", pat_str=PATTERN, mergeable_ranks=ranks,
                                              special_tokens={BLANK_LINE: len(ranks)})
            self.vocab_size, self.stops = len(ranks) + 1, [(len(ranks),)]
        elif name != "gpt2":
            die(f"tokenizer {name!r} is unknown: wanted bpe, char or gpt2")
        else:  # tiktoken's own: before a heading the blank line is two tokens, but a model may say it as one
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:  # whatever its downloader raises offline
                die(f"tiktoken can't fetch its gpt2 vocabulary ({type(error).__name__}): run once where "
                    "there is a network, with TIKTOKEN_CACHE_DIR set, and bring that folder; or use "
                    "--tokenizer bpe")
            self.vocab_size, self.stops = self.encoding.n_vocab, [(198, 198), (628,)]

    def encode(self, text):
        if self.name == "char":
            unknown = sorted(set(text) - self.ids.keys())
            if unknown:
                die(f"the char tokenizer has never seen {unknown[:5]}: use text in the corpus's characters, "
                    "or bpe")
            return [self.ids[c] for c in text]
        special = {BLANK_LINE} if self.name == "bpe" else set()
        return self.encoding.encode(text, allowed_special=special, disallowed_special=())

    def decode(self, ids):
        if self.name == "char":
            return "".join(self.table[i] for i in ids)
        return self.encoding.decode(ids)

    def state(self):
        return {"name": self.name, "table": self.table}

    @staticmethod
    def load(state):
        return Tokenizer(state["name"], state["table"])


def train_tokenizer(name, text, vocab_size=1024):
    """A tokenizer for this corpus; vocab_size counts bpe's bytes, merges and stop token."""
    if name == "char":
        return Tokenizer("char", sorted(set(text)))
    if name == "gpt2":
        return Tokenizer("gpt2", [])
    if name != "bpe":
        die(f"--tokenizer {name!r} is unknown: wanted bpe, char or gpt2")
    if vocab_size < 258:
        die(f"--vocab_size {vocab_size} is too small: wanted at least 258 (256 bytes, a merge, the stop)")
    return Tokenizer("bpe", [token.decode("latin-1") for token in train_bpe(text, vocab_size - 1)])


def train_bpe(text, size):
    """The byte strings of a byte-level BPE in rank order, at most `size` of them.

    First the 256 bytes; then, again and again, the most frequent pair of neighbours becomes one symbol.
    """
    pieces = Counter(regex.findall(PATTERN, text))
    words = [([bytes([b]) for b in piece.encode()], count) for piece, count in pieces.items()]
    pairs, where = Counter(), defaultdict(set)  # how often a pair stands, and in which words
    for w, (word, count) in enumerate(words):
        for pair in zip(word, word[1:]):
            pairs[pair] += count
            where[pair].add(w)
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < size and pairs:
        # of equally frequent pairs the one of greater bytes: the same ranks on every machine
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        vocabulary.append(best[0] + best[1])
        for w in where.pop(best):
            word, count = words[w]
            for pair in zip(word, word[1:]):
                pairs[pair] -= count
            merged, i = [], 0
            while i < len(word):
                step = 2 if tuple(word[i:i + 2]) == best else 1
                merged.append(b"".join(word[i:i + step]))
                i += step
            for pair in zip(merged, merged[1:]):
                pairs[pair] += count
                where[pair].add(w)
            words[w] = (merged, count)
        del pairs[best]
    return vocabulary
