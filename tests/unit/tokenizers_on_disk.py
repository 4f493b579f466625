"""The demo target's tokenizer, without and with a chat template that shows roles."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

MODEL = Path(__file__).parents[2] / "demo" / "model"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@cache
def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(MODEL)
    loaded.chat_template = template
    return loaded


def target_in(folder: Path) -> Path:
    """A target as far as it is read before an engine starts; returns its folder."""
    tokenizer(TEMPLATE).save_pretrained(folder)
    (folder / "config.json").write_text((MODEL / "config.json").read_text())
    return folder


def ids_of(text: str) -> list[int]:
    """Token ids of a document, its end included."""
    loaded = tokenizer()
    return [*loaded(text)["input_ids"], loaded.eos_token_id]
