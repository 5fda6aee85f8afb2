"""No error, no reward: the model answers, and never rightly. What did it read, and what could it say?

Met in: CoursIA#11304.
Trap: a chat model was taught within a template. Without it a question is text of another kind.
Failure: the question is encoded as it is. Or max_new ends each answer before its result.
Cure: the template around the question, and room for the whole answer. Print one prompt as the model sees it.
What tells them apart: the share of right answers, and the share of answers that max_new cut.
Run: python lessons/19_no_chat_template.py
"""
from types import SimpleNamespace

from shared import adam, show, tiny_policy, update  # first: it finds all below
import torch
from generate import sample_texts, score
from tasks import Task, last
from techniques import cut_off
from utils.text import as_prompts
from utils.tokenizer import Tokenizer

ROWS = [{"prompt": f"{x}+{y}=", "answer": str(x + y)} for x in range(1, 10) for y in range(10 - x, 10)]
LETTERS = sorted(set("0123456789+=\n" + "user: bot: that makes."))


class Chat(Tokenizer):
    def prompt(self, text, short=None):
        return f"user: {text}\nbot: "


def chat_model(tokenizer):
    """A GPT that learns, within the template, to answer by a sentence and a blank line."""
    model = tiny_policy(seed=0, vocab_size=tokenizer.vocab_size, block_size=40)
    tokens = torch.tensor([tokenizer.encode_prompt(row["prompt"]) +
                           tokenizer.encode(f"that makes {row['answer']}.\n\n") for row in ROWS])
    optimizer = adam(model, lr=1e-2)
    for _ in range(250):
        update(optimizer, -score(model, tokens, prompt_len=15)[0].mean())
    return model


def ask(model, tokenizer, max_new):
    prompts = as_prompts(ROWS, tokenizer, "the lesson")
    tokens, _, mask, texts = sample_texts(model, tokenizer, prompts, max_new, top_k=1)  # greedy
    print(f"{tokenizer.decode(prompts.tokens[0].tolist())!r} -> {texts[0]!r}")
    right = Task(None, last("[0-9]+")).scores(texts, prompts.texts, **prompts.columns)
    cut = cut_off(SimpleNamespace(tokens=tokens[:, None], mask=mask[:, None]), tokenizer.stops, max_new)
    return {"right": sum(right) / len(right), "cut": cut.float().mean().item()}


def lesson():
    model = chat_model(chat := Chat("char", LETTERS))
    return {"failure: no template": ask(model, Tokenizer("char", LETTERS), 20),
            "failure: max_new 8": ask(model, chat, 8), "cure: template, max_new 20": ask(model, chat, 20)}


if __name__ == "__main__":
    show(lesson)
