"""Small models and data in local folders, in the place of those of the Hub that help and docs/command.md name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from PIL import Image
from timm.models._hub import save_for_hf

from lowrank.io.hub import load_splits
from lowrank.tasks.text import train_tokenizer

TOKENS = 280
WORDS = "a the good bad film was is not very long short and but ends starts well badly".split()  # noqa: SIM905 (words)
TEXTS = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 13)) for i in range(1, 41)]
SMALL: dict[str, Any] = dict(
    vocab_size=TOKENS, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
)
POSITIONS = 32
TEMPLATE = "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}{% endfor %}"
TASK = """task: my_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def save(model: Any, tokenizer: Any, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_models(folder: Path) -> dict[str, str]:
    """Name on the Hub -> folder or timm name of a small model."""
    torch.manual_seed(0)
    sentence, text, chat = (train_tokenizer(TEXTS, TOKENS, sentence=kind) for kind in (True, False, False))
    chat.chat_template = TEMPLATE
    bert = transformers.BertConfig(**SMALL, max_position_embeddings=POSITIONS)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, max_position_embeddings=POSITIONS))
    sizes = dict(SMALL, image_size=8, patch_size=4, num_labels=2)
    image = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    vit = timm.create_model("test_vit", num_classes=10)
    save_for_hf(vit, str(folder / "vit"), safe_serialization=True)
    return {
        "sentence-transformers/all-MiniLM-L6-v2": save(transformers.BertModel(bert), sentence, folder / "encoder"),
        "classifier": save(transformers.BertForSequenceClassification(bert), sentence, folder / "classifier"),
        "meta-llama/Llama-3.2-1B": save(llama, text, folder / "llama"),
        "meta-llama/Llama-3.2-1B-Instruct": save(llama, chat, folder / "instruct"),
        "image-classifier": save(
            image, transformers.ViTImageProcessor(size={"height": 8, "width": 8}), folder / "image"
        ),
        "timm:vit_base_patch16_224": f"timm:local-dir:{folder / 'vit'}",
    }


def make_data(folder: Path) -> dict[str, str]:
    """Name on the Hub -> folder of small data; both with the splits train and test."""
    images = np.random.default_rng(0).integers(0, 255, (6, 20, 20, 3), dtype=np.uint8)
    for split in ("train", "test"):
        for name in ("sentences", "lines"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(TEXTS)]
        (folder / "sentences" / f"{split}.jsonl").write_text("\n".join(rows))
        (folder / "lines" / f"{split}.txt").write_text("\n\n".join(TEXTS))
        for i, pixels in enumerate(images):
            path = folder / "images" / split / str(i % 2) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return {
        "SetFit/sst2": str(folder / "sentences"),
        "Salesforce/wikitext:wikitext-2-v1": str(folder / "lines"),
        "uoft-cs/cifar10": str(folder / "images"),
    }


def make_files(folder: Path) -> None:
    """The user's own files: texts, chats and a task."""
    (folder / "notes.txt").write_text("\n".join(TEXTS))
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[:9]}]} for text in TEXTS
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    questions = [
        {"question": text[:20].strip(), "choices": ["well", "badly"], "answer": i % 2}
        for i, text in enumerate(TEXTS[:6])
    ]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "my_task.yaml").write_text(TASK.format(path=folder / "questions.jsonl"))


def make_cifar10(folder: Path) -> Any:
    """Forty training and forty test images of ten classes, as `datasets` reads them; each run of ten has all classes."""
    for split in ("train", "test"):
        for label in range(10):
            (folder / split / f"class{label}").mkdir(parents=True)
            for i in range(4):
                image = Image.new("RGB", (32, 32), (25 * label, 250 - 25 * label, 60 * i))
                image.save(folder / split / f"class{label}" / f"{i}.png")
    rows = load_splits(str(folder))
    rows["train"] = rows["train"].select([4 * label + i for i in range(4) for label in range(10)])
    return rows


def make_dinov2(folder: Path) -> Path:
    """A tiny DINOv2 without a head."""
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    return folder
