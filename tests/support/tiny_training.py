"""Small models with tokenizers in folders, and data, for the tests of `qft.train`."""

import json

import torch
from models import llama
from models import t5 as gated_t5
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As most models ship it: it does not mark the answers."""
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<pad>", "</s>", "<|im_start|>", "<|im_end|>", "<image>"]
SIZE = 128 + len(SPECIAL)


def tokenizer(template=CHATML, **changes):
    """A token a character; ids are the characters', specials come behind them."""
    vocabulary = {chr(i): i for i in range(128)} | {name: 128 + i for i, name in enumerate(SPECIAL)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    options = {"unk_token": "?", "eos_token": "<|im_end|>", "pad_token": "<pad>"} | changes
    options = {k: v for k, v in options.items() if v is not None}
    found = PreTrainedTokenizerFast(tokenizer_object=made, additional_special_tokens=SPECIAL, **options)
    found.chat_template = template
    return found


def small_llama(seed=0):
    """Its head is large enough for adapters below it to make a difference."""
    model = llama(vocab_size=SIZE, hidden_size=32, intermediate_size=64, max_position_embeddings=256, seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(10)
    return model


def t5():
    return gated_t5(vocab_size=SIZE, feed_forward_proj="relu", dropout_rate=0.0)


def save_model(folder, template=CHATML, model=None, **changes):
    """A folder with a small model and a tokenizer; its path as text."""
    model = small_llama() if model is None else model
    model.save_pretrained(folder)
    tokenizer(template, **changes).save_pretrained(folder)
    return str(folder)


def chats(n=12):
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {'abcdef'[i % 6]}"},
                {"role": "assistant", "content": "abcdef"[i % 6] * 3},
            ]
        }
        for i in range(n)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def vision(tmp_path):
    """A small Llava over 4 patches, and pictures of two colours."""
    from PIL import Image
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    try:
        from transformers import CLIPImageProcessorPil as ImageProcessor
    except ImportError:
        from transformers import CLIPImageProcessor as ImageProcessor
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tok = tokenizer()
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=32),
        text_config=LlamaConfig(**sizes, vocab_size=SIZE, max_position_embeddings=256),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_seq_length=4,
    )
    folder = tmp_path / "m"
    made = LlavaForConditionalGeneration(config)
    made.lm_head.weight.data.mul_(10)
    made.save_pretrained(folder)
    side = {"height": 16, "width": 16}
    processor = LlavaProcessor(
        ImageProcessor(size=side, crop_size=side),
        tok,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}"
            "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    )
    processor.save_pretrained(folder)
    rows = []
    for i, colour in enumerate(["red", "blue"] * 4):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{i}.png")
        said = [{"role": "user", "content": "which?"}, {"role": "assistant", "content": colour}]
        rows.append({"images": [f"{i}.png"], "messages": said})
    return str(folder), write_jsonl(tmp_path / "d.jsonl", rows)


def quick(**changes):
    """Options of a run that takes seconds on a CPU."""
    return {
        "max_steps": 6,
        "batch_size": 2,
        "gradient_accumulation": 1,
        "lr": 1e-2,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "logging_steps": 1,
        "save_steps": 2,
        "warmup_ratio": 0.0,
        "scheduler": "constant",
        "optimize": "no",
        "device": "cpu",
        "log": "none",
        "progress": False,
        **changes,
    }


def adapter_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
