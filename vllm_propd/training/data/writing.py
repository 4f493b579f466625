"""What the target writes for its heads: questions of its own, and answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from vllm_propd.chats import ChatError, opening, render
from vllm_propd.resume import write_whole
from vllm_propd.training.data.documents import DataError

if TYPE_CHECKING:
    from vllm_propd.engine.target_text import TargetWriter, Written

TOKENS_PER_ANSWER = 200
"""Fewer than a chat model's answers have: so many questions are enough."""

TOP_P = 0.9
"""Of sampled questions: what small models put beyond is no language."""

STARTS = (
    "What is", "Who was", "When did", "Where is", "Why do", "How do I", "How many",
    "Explain", "Describe", "Compare", "List five", "Give me a recipe for",
    "Give me advice on", "Plan a trip to", "Write a short story about", "Write a poem",
    "Write an email to", "Write a blog post about", "Pretend to be", "Imagine you are",
    "Write a Python function that", "Write a program in", "What does this code do?\n\n",
    "Summarize:", "Summarize the following article:\n\n", "Translate German to English:",
    "Translate the following sentence to Spanish:", "Read the text and answer:\n\n",
    "Here are some documents:\n\n", "Extract all names from this text:", "Classify",
    "Rewrite this sentence:", "Correct the grammar:", "Is it true that", "A farmer has",
    "A shop sells", "If a train", "Solve", "In the year", "The following is an article",
)  # fmt: skip
"""How people begin with the tasks that they give to chat models. A small model asks much
the same when it begins freely, which it does half of the time."""

Ids = list[list[int]]


def own_questions(
    writer: TargetWriter,
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    longest: int,
    option: str,
    remedy: str,
) -> Ids:
    """Lets a chat model ask: at temperature 1 it goes on from the user's turn.

    Args:
        writer: the target.
        tokenizer: the target's.
        count: how many questions it writes; those that it does not end are dropped, and of
            equal ones all but one.
        longest: the most tokens of a chat that asks; those with more are dropped, too.
        option: why the model asks, in the words of the command line, for errors.
        remedy: what to do where it cannot, for errors.

    Returns:
        Token ids of chats that wait for an answer, all different.

    Raises:
        DataError: the model has no chat template, or asks nothing that is short enough.
    """
    try:
        begun = opening(tokenizer)
    except ChatError as error:
        raise DataError(f"{option}: {error}") from error
    starts = [STARTS[i // 2 % len(STARTS)] if i % 2 else "" for i in range(count)]
    texts = [begun + one for one in starts]
    begins: Ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    if not all(begins):
        raise DataError(
            f"{option}: nothing in the model's chat template says where a question begins; "
            f"{remedy}"
        )
    # A long system prompt may leave no room for some, or for any.
    short = [both for both in zip(starts, begins, strict=True) if len(both[1]) < longest]
    prompts = [ids for _, ids in short]
    asked = writer.write(prompts, "own questions", longest, temperature=1.0, top_p=TOP_P)
    ended = [one for one in asked if one.ended and len(one.ids) > 1]
    texts = [
        (short[one.place][0] + tokenizer.decode(one.ids, skip_special_tokens=True)).strip()
        for one in ended
    ]
    chats = [
        render([{"role": "user", "content": text}], tokenizer, asks=True)
        for text in dict.fromkeys(texts)
        if text
    ]
    ids: Ids = tokenizer(chats, add_special_tokens=False)["input_ids"] if chats else []
    if not (found := [one for one in ids if len(one) <= longest]):
        raise DataError(
            f"{option}: the model asks nothing of itself in {longest} tokens, its chat "
            f"template's included; give a larger --length, or {remedy}"
        )
    return found


def answers(
    writer: TargetWriter,
    prompts: Ids,
    file: Path,
    description: str,
    most_each: int | None = None,
    most_tokens: int | None = None,
    temperature: float = 0.0,
) -> tuple[Ids, Ids]:
    """Lets the target answer.

    Args:
        writer: the target.
        prompts: token ids.
        file: every answer is kept there when it has ended, a JSON line each; those that are
            there already, of a killed run, are not written again.
        description: title of the progress bar.
        most_each: new tokens of each.
        most_tokens: new tokens after which no other answer is begun.
        temperature: 0: greedily.

    Returns:
        Token ids of those prompts that it came to, and of what it wrote after each.
    """
    found = _kept(file)
    left = [place for place in range(len(prompts)) if place not in found]
    if most_tokens is not None:
        most_tokens -= sum(map(len, found.values()))
    # Without a line that was cut off, which the next one would lengthen.
    write_whole(file, "".join(json.dumps(answer) + "\n" for answer in found.items()))
    with file.open("a") as opened:

        def on_text(text: Written) -> None:
            place = left[text.place]
            found[place] = text.ids
            opened.write(json.dumps([place, text.ids]) + "\n")
            opened.flush()

        if left and (most_tokens is None or most_tokens > 0):
            some = [prompts[place] for place in left]
            writer.write(
                some, description, most_each, most_tokens, temperature, on_text=on_text
            )
    places = sorted(found)
    return [prompts[place] for place in places], [found[place] for place in places]


def _kept(file: Path) -> dict[int, list[int]]:
    """Reads answers; a line that was cut off is none."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            place, ids = json.loads(line)
        except ValueError:
            continue
        found[place] = ids
    return found
