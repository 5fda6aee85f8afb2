"""Tokenizers: `bpe` trained on the corpus, `char` (nanoGPT's), `gpt2` (tiktoken's), and a chat model's own.

In `bpe` the blank line that ends a speech is one reserved token, so that "stop" is an action like any other.
Its merges are learned by byte-pair encoding (Sennrich et al., arXiv:1508.07909) and applied by tiktoken.
"""
import functools
import json
from collections import Counter, defaultdict
from pathlib import Path

import regex
import tiktoken

from utils.cli import atomic_write, die, need, refusing

BLANK_LINE = "\n\n"
# merges stay within a piece: a newline stands alone, so that a heading ("ROMEO:\n") always ends at a token's
# end; a word takes its leading space. Learning takes the square of a piece's length, so it has an end, for
# text without spaces
PATTERN = r"\n| ?\p{L}{1,32}+(?:'\p{L}{1,32}+)?| ?\p{N}{1,32}+| ?[^\s\p{L}\p{N}]{1,32}+|\s"


class Tokenizer:
    """encode, decode, vocab_size and stops (the token sequences that end a speech), for all three alike.

    table: the characters of `char`; the tokens of `bpe` in rank order, bytes as latin-1 for the file's sake.
    """
    stop_text = BLANK_LINE

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
        return self.encode(self.prompt(prompt, short))

    def decode(self, ids):
        return self.encoding.decode(ids)

    def prompt(self, text, short=None):  # a chat model's has a template
        return short or text

    def state(self):  # load_tokenizer(state) is the same one
        return {"name": self.name, "table": self.table}

    def export(self, folder):
        """Writes the files from which transformers' AutoTokenizer makes one of the same ids."""
        eos = BLANK_LINE if self.name == "bpe" else None
        write_tokenizer(folder, fast_tokenizer(self).to_str(), {"eos_token": eos, "pad_token": eos}, None)


class ChatTokenizer:
    """A pretrained model's own, with its chat template: the same fields, and plain values as its state.

    source: the text of a tokenizer.json. special: bos_token and eos_token, as text or None.
    """
    stop_text = ""  # decode leaves it out

    def __init__(self, name, source, stops, template, special):
        self.name, self.source, self.template, self.special = name, source, template, special
        self.stops = [tuple(stop) for stop in stops]
        self.encoding = need("tokenizers", "llm").Tokenizer.from_str(source)
        self.vocab_size = self.encoding.get_vocab_size()

    def encode(self, text):
        with refusing(Exception, f"{self.name}: its tokenizer can't read {text[:40]!r}: "):
            return self.encoding.encode(text, add_special_tokens=False).ids

    def decode(self, ids):  # without the stop and the other tokens that stand for no text
        return self.encoding.decode(ids)

    def prompt(self, text, short=None):
        """What the model reads for a user's text: the chat template's turns, up to the answer's beginning."""
        if self.template is None:
            return text
        turn = {"role": "user", "content": text}
        return self.compiled.render(messages=[turn], add_generation_prompt=True, **self.special)

    @functools.cached_property
    def compiled(self):  # once: a task has thousands of prompts
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(self.template)

    encode_prompt = Tokenizer.encode_prompt  # prompt() ignores the short form

    def state(self):
        return {"name": self.name, "source": self.source, "stops": self.stops, "template": self.template,
                "special": self.special}

    def export(self, folder):
        special = self.special | {"pad_token": self.special["eos_token"]}
        write_tokenizer(folder, self.source, special, self.template)


def load_tokenizer(state):
    return (ChatTokenizer if "source" in state else Tokenizer)(**state)


def write_tokenizer(folder, source, special, template):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= special | ({"chat_template": template} if template else {})
    atomic_write(Path(folder) / "tokenizer.json", source.encode())
    atomic_write(Path(folder) / "tokenizer_config.json", json.dumps(config, indent=2).encode())


def fast_tokenizer(ours):
    """The package tokenizers' twin of a Tokenizer."""
    tokenizers = need("tokenizers", "hf")
    models, split = tokenizers.models, tokenizers.pre_tokenizers
    if ours.name == "char":
        made = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(ours.table)}))
        made.pre_tokenizer = split.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        made.decoder = tokenizers.decoders.Fuse()
        return made
    # GPT-2's custom: a byte is itself if it is printable, else a letter from 256 on
    alphabet = sorted(split.ByteLevel.alphabet())
    others = [byte for byte in range(256) if chr(byte) not in alphabet]
    letters = dict(zip([ord(letter) for letter in alphabet if ord(letter) < 256] + others, alphabet))
    ranks = {"".join(letters[byte] for byte in token): rank
             for token, rank in ours.encoding._mergeable_ranks.items()}
    # tiktoken joins any two neighbours whose union has a rank, the lowest rank first
    cuts = [(token[:i], token[i:]) for token in ranks for i in range(1, len(token))]
    merges = [cut for cut in cuts if cut[0] in ranks and cut[1] in ranks]
    made = tokenizers.Tokenizer(models.BPE(ranks, merges, ignore_merges=True))
    made.pre_tokenizer = split.Sequence([
        split.Split(tokenizers.Regex(ours.encoding._pat_str), "isolated"),
        split.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(text, normalized=False)
                             for text in ours.encoding._special_tokens])
    return made


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

    def merge(w, best):
        """From the left: "aaa" becomes "aa", "a"."""
        word, i = words[w], 0
        while best[0] in word[i:-1]:
            i = word.index(best[0], i)
            if word[i + 1] == best[1]:
                word[i:i + 2] = [best[0] + best[1]]
            i += 1

    for w in range(len(words)):
        count(w, 1)
    vocabulary = [bytes([b]) for b in range(256)]
    while len(vocabulary) < size and pairs:
        # of equally frequent pairs the one of greater bytes: the same ranks on every machine
        most = max(pairs.values())
        if most < 2:
            break
        best = max(pair for pair, n in pairs.items() if n == most)
        vocabulary.append(best[0] + best[1])
        for w in where.pop(best):
            count(w, -1)
            merge(w, best)
            count(w, 1)
    return vocabulary
