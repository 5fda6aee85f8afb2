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
    """encode, decode, vocab_size and stops (the token sequences that end a speech), for all three alike.

    table: the characters of `char`; the tokens of `bpe` in rank order, bytes as latin-1 for the file's sake.
    """

    def __init__(self, name, table):
        self.name, self.table = name, table
        if name == "gpt2":  # before a heading the blank line is two tokens, but a model may say it as one
            try:
                self.encoding = tiktoken.get_encoding("gpt2")
            except Exception as error:  # whatever its downloader raises offline
                die(f"tiktoken can't fetch its gpt2 vocabulary ({type(error).__name__}): run online with "
                    "TIKTOKEN_CACHE_DIR set and bring that folder, or use --tokenizer bpe")
            self.stops = [(198, 198), (628,)]
        else:
            pattern, code = (PATTERN, "latin-1") if name == "bpe" else ("(?s).", "utf-8")
            ranks = {token.encode(code): i for i, token in enumerate(table)}
            special = {BLANK_LINE: len(table)} if name == "bpe" else {}
            self.encoding = tiktoken.Encoding(
                name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
            self.stops = [tuple(self.encode(BLANK_LINE))] if "\n" in table else []
        self.vocab_size = self.encoding.n_vocab

    def encode(self, text):
        unknown = sorted(set(text) - set(self.table)) if self.name == "char" else []
        if unknown:
            die(f"the char tokenizer has never seen {unknown[:5]}: use its corpus's characters, or bpe")
        return self.encoding.encode(text, allowed_special={BLANK_LINE}, disallowed_special=())

    def encode_prompt(self, prompt, short=None):
        """A prompt as the policy reads it: a task's short form, where there is one."""
        return self.encode(short or prompt)

    def decode(self, ids):
        return self.encoding.decode(ids)

    def state(self):  # Tokenizer(**state) is the same one
        return {"name": self.name, "table": self.table}


def train_tokenizer(name, text, vocab_size=1024):
    """A tokenizer for this corpus; vocab_size counts bpe's bytes, merges and stop token."""
    if name == "bpe" and vocab_size < 258:
        die(f"--vocab_size {vocab_size} is too small: wanted at least 258 (256 bytes, a merge, the stop)")
    if name == "bpe":
        return Tokenizer(name, [token.decode("latin-1") for token in train_bpe(text, vocab_size - 1)])
    return Tokenizer(name, sorted(set(text)) if name == "char" else [])


def train_bpe(text, size):
    """The byte strings of a byte-level BPE in rank order, at most `size` of them.

    First the 256 bytes; then, again and again, the most frequent pair of neighbours becomes one symbol.
    """
    pieces = Counter(regex.findall(PATTERN, text))
    words = [[bytes([b]) for b in piece.encode()] for piece in pieces]
    counts = list(pieces.values())
    pairs, where = Counter(), defaultdict(set)  # how often a pair stands, and in which words

    def count(w, sign):
        for pair in zip(words[w], words[w][1:]):
            pairs[pair] += sign * counts[w]
            where[pair].add(w)

    for w in range(len(words)):
        count(w, 1)
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < size and pairs:
        # of equally frequent pairs the one of greater bytes: the same ranks on every machine
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] < 2:
            break
        vocabulary.append(best[0] + best[1])
        for w in where.pop(best):
            count(w, -1)
            merged = words[w][:1]
            for symbol in words[w][1:]:  # from the left: "aaa" becomes "aa", "a"
                if (merged[-1], symbol) == best:
                    merged[-1] += symbol
                else:
                    merged.append(symbol)
            words[w] = merged
            count(w, 1)
        del pairs[best]
    return vocabulary
