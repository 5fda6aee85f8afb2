"""A tiny random Qwen2.5-VL with tokenizer and processor of its own; sampling and scoring of any such model.

Left out: video, several images a prompt.
"""
import os
import shutil
from pathlib import Path

import torch

from utils.cli import die, need, writing
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
    """peft's configuration: adapters on every linear layer of the text tower, none elsewhere."""
    from peft import LoraConfig
    layers = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    return LoraConfig(r=r, lora_alpha=2 * r, target_modules=layers)


def tiny_processor(side=112):
    """Byte-level BPE in which every digit is a token; images become near side × side pixels."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    words = ["user\nassistant\n", *(f"where is the {d}?" for d in range(10))] * 9
    bpe.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=SPECIAL[2], pad_token=SPECIAL[0],
                                        padding_side="left", additional_special_tokens=SPECIAL)
    size = {"shortest_edge": 56 * 56, "longest_edge": side * side}
    image = Qwen2VLImageProcessor(size=size, image_mean=[0.1] * 3, image_std=[0.25] * 3)  # scenes are dark
    return Qwen2_5_VLProcessor(image, tokenizer, Qwen2VLVideoProcessor(size=size), chat_template=TEMPLATE)


def tiny_model(tokenizer):
    """Under a million random parameters; with the usual initializer_range of 0.02 it barely learns."""
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
    """The processor of a folder or a hub's name, padded on the left; without the files one clear line."""
    transformers = need("transformers", "vlm")
    try:
        return transformers.AutoProcessor.from_pretrained(path, padding_side="left")
    except (OSError, ValueError) as error:
        die(f"--model {path}: neither a folder with a model nor in the cache, and not to be had from the hub "
            f"({type(error).__name__}). With a network: `hf download {path}`, then give the folder it prints")


def load_model(path, **kwargs):
    from transformers import AutoModelForImageTextToText
    try:
        return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **kwargs)
    except (OSError, ValueError) as error:
        die(f"--model {path}: its weights can't be loaded ({str(error).splitlines()[0]})")


def save_folder(path, *parts):
    """Writes a model and its processor as a folder; after a kill there is the old one or the new, whole."""
    path = Path(path)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            for part in parts:
                part.save_pretrained(tmp)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(tmp, path)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def trl_config(args, o, device):
    """TRL's GRPOConfig: the row o of grpo.py, the fields of Args, and what --trl.NAME adds."""
    from transformers import HfArgumentParser
    from trl import GRPOConfig
    ours = {"beta": o.beta, "learning_rate": args.lr, "num_generations": args.num_generations,
            "per_device_train_batch_size": args.per_device_train_batch_size, "max_steps": args.steps,
            "max_completion_length": args.max_completion_length, "temperature": args.temperature,
            "loss_type": "grpo" if o.ratio == "sequence" else args.loss_type, "scale_rewards": o.scale,
            "importance_sampling_level": o.ratio, "epsilon": o.eps_low, "epsilon_high": o.eps_high,
            "use_bias_correction_kl": o.kl_ratio, "sapo_temperature_pos": o.tau_pos,
            "sapo_temperature_neg": o.tau_neg, "seed": args.seed % 2**32, "output_dir": args.output_dir,
            "save_steps": args.save_every, "shuffle_dataset": False, "remove_unused_columns": False,
            "logging_steps": 1, "logging_nan_inf_filter": False}
    free = {"use_cpu": device.type == "cpu", "bf16": False, "gradient_checkpointing": False,
            "warmup_steps": 0, "lr_scheduler_type": "linear", "weight_decay": 0.0, "report_to": "none",
            "disable_tqdm": True, "disable_dropout": True, "save_total_limit": 1}
    parser = HfArgumentParser(GRPOConfig, allow_abbrev=False, add_help=False)
    parser.error = lambda message: die(f"--trl: {message}")
    takes_several = {action.dest: action.nargs in ("+", "*") for action in parser._actions}
    for name, value in args.trl.items():
        if name in ours or name not in takes_several:
            why = "the script sets it" if name in ours else "trl.GRPOConfig has no such field"
            die(f"--trl.{name}: {why}. Wanted a field of GRPOConfig that --help shows no flag for")
        words = value.split() if takes_several[name] else [value]
        free[name] = getattr(parser.parse_args([f"--{name}", *words]), name)
    try:
        return GRPOConfig(**ours, **free)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        die(f"TRL refuses this configuration: {' '.join(str(error).split())}")


def inputs_of(processor, examples, device):
    """Images and instructions -> the tensors that the model takes, prompts padded on the left."""
    chats = [[{"role": "user", "content": [{"type": "image", "image": picture(e)},
                                           {"type": "text", "text": e["prompt"]}]}] for e in examples]
    kinds = {"padding": True, "return_tensors": "pt"}
    return processor.apply_chat_template(chats, add_generation_prompt=True, tokenize=True, return_dict=True,
                                         processor_kwargs=kinds).to(device)


def with_answers(inputs, answers, mask):
    """The same tensors with answers (N, T) behind the prompts; mask_token types of text are 0."""
    grown = dict(inputs)
    for name, more in (("input_ids", answers), ("attention_mask", mask.long()),
                       ("mm_token_type_ids", torch.zeros_like(answers))):
        if name in grown:  # without the third, Qwen2.5-VL's positions and so its logits are silently wrong
            grown[name] = torch.cat([grown[name], more], 1)
    return grown


def generate(model, inputs, processor, length, temperature=None):
    """-> answers (N, T), mask (N, T) that ends with the stop token, texts (N); no temperature: greedy."""
    from transformers import GenerationConfig
    stops = model.generation_config.eos_token_id
    stops = {processor.tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}
    how = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    config = GenerationConfig(
        **(how if temperature else {"do_sample": False}), max_new_tokens=length, eos_token_id=list(stops),
        repetition_penalty=1.0, pad_token_id=processor.tokenizer.pad_token_id, disable_compile=True,
        suppress_tokens=[model.config.image_token_id])  # as TRL does: no features would belong to it
    with torch.no_grad():
        answers = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1]:]
    stopped = torch.isin(answers, torch.tensor(list(stops), device=answers.device)).int()
    mask = stopped.cumsum(1) - stopped == 0
    texts = processor.batch_decode([a[m] for a, m in zip(answers, mask)], skip_special_tokens=True)
    return answers, mask, texts


def score(model, inputs, answers, mask, temperature):
    """log π of the answers' tokens and the policy's entropy there: (N, T) x2."""
    inputs, T = with_answers(inputs, answers, mask), answers.shape[1]
    logits = model(**inputs, logits_to_keep=T + 1, use_cache=False).logits  # (N, T + 1, V)
    logq = (logits[:, :-1].float() / temperature).log_softmax(2)
    return logq.gather(2, answers[:, :, None])[:, :, 0], -(logq.detach().exp() * logq.detach()).sum(2)


def supervise(examples, steps, lr, seed, device, until=1.0):
    """The tiny model after cross-entropy on "067,046", the centres of boxes; ends when `until` are right."""
    torch.manual_seed(seed)
    processor = tiny_processor()
    model = tiny_model(processor.tokenizer).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        asked = [examples[i] for i in step_index(len(examples), 16, seed, step)]
        centres = [[(e["solution"][k] + e["solution"][k + 2]) / 2 for k in (0, 1)] for e in asked]
        said = processor.tokenizer([f"{x:03.0f},{y:03.0f}<|im_end|>" for x, y in centres],
                                   return_tensors="pt")["input_ids"].to(device)  # (B, 8)
        logp, _ = score(model, inputs_of(processor, asked, device), said, torch.ones_like(said), 1.0)
        (-logp.mean()).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            texts = generate(model, inputs_of(processor, examples[:128], device), processor, 8)[2]
            if Scorer.parts(texts, examples[:128])["accuracy_reward_coord"].mean() >= until:
                break
    return model, processor
