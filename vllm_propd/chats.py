"""Chats and questions, in the shapes that people's files have.

Known are rows with ``messages`` (OpenAI's), ``conversations`` (ShareGPT's), ``turns``
(MT-bench, Spec-Bench), ``prompt``, ``question``, ``instruction`` with ``input`` (Alpaca).
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, str]]
"""Turns of ``role`` and ``content``, as chat templates take them."""

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""ShareGPT's names of roles; others are OpenAI's already."""

SHAPES = "`messages`, `conversations`, `turns`, `prompt`, `question`, or `instruction`"


class ChatError(ValueError):
    """A chat that the model cannot be given; the message says why and what to do."""


def half_character(row: dict[str, Any]) -> str | None:
    """Returns what to say of a row with half of a character; None where it has none.

    JSON can escape one, and so it comes of texts that were cut; no tokenizer takes it.
    """
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"{error.object[error.start]!a}, half of a character, which is no text"
    return None


def chat_of(row: dict[str, Any]) -> Chat | None:
    """Returns a row's chat; None where it has none of the known shapes.

    A list of ``turns`` is what a user asks one after the other: the first one is taken.
    """
    for key in ("messages", "conversations", "prompt"):
        if isinstance(turns := row.get(key), list) and turns:
            return _turns_of(turns)
    if isinstance(turns := row.get("turns"), list) and turns:
        return _asked(turns[0]) if isinstance(turns[0], str) else _turns_of(turns)
    for key in ("prompt", "question", "instruction"):
        if isinstance(text := row.get(key), str) and text.strip():
            more = row.get("input") if key == "instruction" else None
            return _asked(f"{text}\n\n{more}" if more else text)
    return None


def _asked(text: str) -> Chat:
    return [{"role": "user", "content": text}]


def _turns_of(turns: list[Any]) -> Chat | None:
    chat = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role = turn.get("role", turn.get("from"))
        content = turn.get("content", turn.get("value"))
        if isinstance(content, list):  # OpenAI's parts; pictures have no text
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(part for part in parts if isinstance(part, str))
        if not isinstance(role, str):
            return None
        # A turn that only calls tools says nothing.
        chat.append({"role": ROLES.get(role, role), "content": str(content or "")})
    return chat


def question_of(chat: Chat) -> Chat:
    """Returns the part of a chat that waits for an answer; empty where there is none.

    It is the whole chat where the user (or a tool) has spoken last, else what comes before
    the assistant's first answer to the user.
    """
    roles = [turn["role"] for turn in chat]
    if "user" not in roles:
        return []
    if roles[-1] != "assistant":
        return chat
    return chat[: roles.index("assistant", roles.index("user"))]


def render(chat: Chat, tokenizer: PreTrainedTokenizerBase, asks: bool = False) -> str:
    """Renders a chat by the model's template.

    Args:
        chat: turns.
        tokenizer: the model's.
        asks: close it with the beginning of the assistant's turn.

    Raises:
        ChatError: there is no chat template, or it refuses the chat.
    """
    if tokenizer.chat_template is None:
        raise ChatError(
            "the model's tokenizer has no chat template: use a model that has one, or rows "
            "with `text`"
        )
    try:
        return str(
            tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=asks)
        )
    except TemplateError as error:
        raise ChatError(f"the model's chat template refuses a chat: {error}") from error


def opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """Returns what a chat begins with, up to the first word of the user.

    A model that goes on from there asks a question itself (Magpie, arXiv 2406.08464).

    Raises:
        ChatError: there is no chat template.
    """
    mark = "(what the user says)"
    return render(_asked(mark), tokenizer).partition(mark)[0]
