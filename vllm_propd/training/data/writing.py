"""What the target writes for its heads: questions of its own, and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from vllm_propd.chats import ChatError, opening, render
from vllm_propd.training.data.documents import DataError

if TYPE_CHECKING:
    from vllm_propd.engine.target_text import TargetWriter

TOKENS_PER_ANSWER = 200
"""Fewer than a chat model's answers have: so many questions are enough."""

QUESTION_SHARE = 0.5
"""Of a sequence's tokens, the most that a question takes."""

Ids = list[list[int]]


def own_questions(
    writer: TargetWriter, tokenizer: PreTrainedTokenizerBase, count: int
) -> Ids:
    """Lets a chat model ask: at temperature 1 it goes on from the user's turn.

    Args:
        writer: the target.
        tokenizer: the target's.
        count: how many questions it writes; those that it does not end are dropped, and of
            equal ones all but one.

    Returns:
        Token ids of chats that wait for an answer, all different.

    Raises:
        DataError: the model has no chat template, or asks nothing.
    """
    try:
        start = tokenizer(opening(tokenizer), add_special_tokens=False)["input_ids"]
    except ChatError as error:
        raise DataError(f"--self-distill without --data: {error}") from error
    if not start:
        raise DataError(
            "--self-distill without --data: nothing in the model's chat template says "
            "where a question begins; give --data with questions"
        )
    most = int(QUESTION_SHARE * writer.longest) - len(start)
    asked = writer.write([start] * count, "own questions", most, temperature=1.0)
    texts = [
        tokenizer.decode(one.ids, skip_special_tokens=True).strip()
        for one in asked
        if one.ended
    ]
    chats = [
        render([{"role": "user", "content": text}], tokenizer, asks=True)
        for text in dict.fromkeys(texts)
        if text
    ]
    if not chats:
        raise DataError(
            "--self-distill without --data: the model asks nothing of itself; give --data "
            "with questions"
        )
    ids: Ids = tokenizer(chats, add_special_tokens=False)["input_ids"]
    return [one for one in ids if len(one) < writer.longest]


def answers(
    writer: TargetWriter,
    prompts: Ids,
    description: str,
    most_each: int | None = None,
    most_tokens: int | None = None,
) -> tuple[Ids, Ids]:
    """Lets the target answer, greedily.

    Returns:
        Token ids of those prompts that it came to, and of what it wrote after each.
    """
    found = writer.write(prompts, description, most_each, most_tokens)
    return [prompts[one.place] for one in found], [one.ids for one in found]
