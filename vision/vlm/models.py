"""Qwen2.5-VL (arXiv:2502.13923): a tiny one made here or a published one; sampling and scoring of both.

Left out: video, several images a prompt.
"""
import os
import shutil
import tempfile
from pathlib import Path

import torch

from utils.cli import die, need, writing
from utils.run import step_generator
from vision.data import step_index
from vision.vlm.data import Scorer, picture

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
           "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}{% if c.type == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def lora(r):
    """peft's configuration of rank r: adapters on every linear layer of the text tower, none elsewhere."""
    from peft import LoraConfig
    return LoraConfig(r=r, lora_alpha=2 * r,
                      target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")


def tiny_processor(side=112):
    """Byte-level BPE with a token for each digit; images are resized to about side × side pixels."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    words = ["user\nassistant\n", *(f"where is the {d}?" for d in range(10))] * 9
    bpe.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0], padding_side="left",
        additional_special_tokens=SPECIAL)
    size = {"shortest_edge": 56 * 56, "longest_edge": side * side}  # transformers' names; both are areas
    image = transformers.Qwen2VLImageProcessor(size=size, image_mean=[0.1] * 3, image_std=[0.25] * 3)
    video = transformers.Qwen2VLVideoProcessor(size=size)
    return transformers.Qwen2_5_VLProcessor(image, tokenizer, video, chat_template=TEMPLATE)


def tiny_model(tokenizer):
    """Under a million random parameters. With the usual initializer_range of 0.02 it hardly learns."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL)))
    text = {"vocab_size": len(tokenizer), "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "mrope_section": [2, 7, 7]},
            "bos_token_id": None, "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"],
            "initializer_range": 0.08}
    vision = {"depth": 1, "hidden_size": 64, "num_heads": 4, "intermediate_size": 128, "out_hidden_size": 128,
              "fullatt_block_indexes": [0], "initializer_range": 0.08}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"],
                              video_token_id=ids["<|video_pad|>"], tie_word_embeddings=True,
                              vision_start_token_id=ids["<|vision_start|>"],
                              vision_end_token_id=ids["<|vision_end|>"], initializer_range=0.08)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def load_processor(path):
    """The processor of a folder or a hub's name, padding on the left; a message where there is none."""
    transformers = need("transformers", "vlm")
    try:
        return transformers.AutoProcessor.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        die(f"--model {path}: neither a folder with a model nor in the cache, and not to be had from the hub "
            f"({type(error).__name__}). With a network: `hf download {path}`, then give the folder it prints")


def load_model(path):
    """The model in fp32. A folder with adapters gives their base with the adapters added to its weights."""
    from transformers import AutoModelForImageTextToText
    try:
        if not has_adapter(path):
            return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        peft = need("peft", "vlm")
        base = load_model(peft.PeftConfig.from_pretrained(path).base_model_name_or_path)
        return peft.PeftModel.from_pretrained(base, path).merge_and_unload().requires_grad_(True)
    except Exception as error:  # safetensors and peft have errors of their own
        die(f"--model {path}: its weights can't be loaded ({str(error).split(chr(10))[0]})")


def has_adapter(path):
    return Path(path, "adapter_config.json").is_file()


def save_folder(path, *parts):
    """Writes a model and its processor as a folder. After a kill the old folder or the new one is whole."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(f".{os.getpid()}.tmp", f".{path.name}.", path.parent) as folder:
            for part in parts:
                part.save_pretrained(f"{folder}/new")
            shutil.rmtree(path, ignore_errors=True)
            os.replace(f"{folder}/new", path)


def inputs_of(processor, examples, device):
    """Images and instructions -> the tensors that the model takes. Prompts are padded on the left."""
    chats = [[{"role": "user", "content": [{"type": "image", "image": picture(e)},
                                           {"type": "text", "text": e["prompt"]}]}] for e in examples]
    return processor.apply_chat_template(
        chats, add_generation_prompt=True, tokenize=True, return_dict=True,
        processor_kwargs={"padding": True, "return_tensors": "pt"}).to(device)


def with_answers(inputs, answers, mask):
    """The same tensors with answers (N, T) behind the prompts."""
    # without the third one, 0 for text, Qwen2.5-VL's positions and so its logits would be silently wrong
    longer = dict(inputs)
    for name, values in (("input_ids", answers), ("attention_mask", mask.long()),
                         ("mm_token_type_ids", torch.zeros_like(answers))):
        if name in longer:
            longer[name] = torch.cat([longer[name], values], 1)
    return longer


def generate(model, inputs, processor, length, temperature=None):
    """-> answers (N, T), mask (N, T), True up to the stop token, texts (N). No temperature: greedy."""
    from transformers import GenerationConfig
    stops = model.generation_config.eos_token_id
    stops = {processor.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    draw = {"do_sample": False}
    if temperature:
        draw = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        **draw, max_new_tokens=length, eos_token_id=list(stops), repetition_penalty=1.0,
        pad_token_id=processor.tokenizer.pad_token_id, disable_compile=True,
        suppress_tokens=[model.config.image_token_id])  # as TRL does: an image token would have no features
    with torch.no_grad():
        answers = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1]:]
    stopped = torch.isin(answers, torch.tensor(list(stops), device=answers.device)).int()
    mask = stopped.cumsum(1) - stopped == 0  # no stop before this token
    texts = processor.batch_decode([a[m] for a, m in zip(answers, mask)], skip_special_tokens=True)
    return answers, mask, texts


def greedy(model, processor, examples, length, device):
    """The likeliest answers' texts, 64 examples at a time."""
    parts = [examples[i:i + 64] for i in range(0, len(examples), 64)]
    return [text for part in parts
            for text in generate(model, inputs_of(processor, part, device), processor, length)[2]]


def score(model, inputs, answers, mask, temperature):
    """Log-probability of the answers' tokens and the policy's entropy there: two (N, T)."""
    inputs, T = with_answers(inputs, answers, mask), answers.shape[1]
    logits = model(**inputs, logits_to_keep=T + 1, use_cache=False).logits  # (N, T + 1, V)
    dist = (logits[:, :-1].float() / temperature).log_softmax(2)
    logp = dist.gather(2, answers[:, :, None])[:, :, 0]
    return logp, -(dist.detach().exp() * dist.detach()).sum(2)


def supervise(examples, steps, lr, seed, device, until=1.0):
    """-> the tiny model, trained to say the centres of boxes as "067,046", and its processor."""
    torch.manual_seed(step_generator(seed, 0, "start").initial_seed())
    processor = tiny_processor()
    model = tiny_model(processor.tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        batch = [examples[i] for i in step_index(len(examples), 16, seed, step)]
        centres = [[(e["solution"][k] + e["solution"][k + 2]) / 2 for k in (0, 1)] for e in batch]
        texts = [f"{x:03.0f},{y:03.0f}<|im_end|>" for x, y in centres]
        answers = processor.tokenizer(texts, return_tensors="pt")["input_ids"].to(device)  # (B, 8)
        logp, _ = score(model, inputs_of(processor, batch, device), answers, torch.ones_like(answers), 1.0)
        (-logp.mean()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            texts = greedy(model, processor, examples[:128], 8, device)
            if Scorer.parts(texts, examples[:128])["accuracy_reward_coord"].mean() >= until:
                break  # GRPO has something left to learn
    return model, processor
