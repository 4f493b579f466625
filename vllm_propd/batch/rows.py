"""A row of a job: from the line that it was to what an engine is given, and back.

Runs in Ray's workers. Rows have ``messages`` (or another shape of ``vllm_propd.chats``),
or ``prompt`` or ``text``, which are taken as they are; or they are requests of OpenAI's
batch format (``custom_id``, ``url``, ``body``).
"""

from __future__ import annotations

import json
from typing import Annotated, Any

import pyarrow
from pydantic import BeforeValidator, Field, Strict, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from vllm_propd.batch.tokenizer import TokenizerSource, load_tokenizer
from vllm_propd.chats import SHAPES, Chat, chat_of, half_character, question_of, render

ERROR = "__inference_error__"
"""Ray's column of errors: rows that have one pass the engine by."""

SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "max_tokens": None,
    "min_tokens": 0,
    "stop": None,
    "stop_token_ids": None,
    "bad_words": None,
    "allowed_token_ids": None,
    "ignore_eos": False,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "skip_special_tokens": True,
    "structured_outputs": None,
}
"""Sampling fields of a row, with vLLM's defaults. All rows have all of them: in Arrow's
tables, what one row lacks is None."""


def _no_flag(value: Any) -> Any:
    """Refuses true and false, which Python takes for numbers, and numbers in words."""
    if isinstance(value, bool | str):
        raise ValueError(f"{value!r} is no number")
    return value


_Int = Annotated[int, BeforeValidator(_no_flag), Field(ge=-(2**63), lt=2**63)]
"""What a column of Arrow's can hold."""

_INT = TypeAdapter(_Int)
_FLOAT = TypeAdapter(Annotated[float, BeforeValidator(_no_flag)])
_FLAG = TypeAdapter(Annotated[bool, Strict()])
_INTS = TypeAdapter(list[_Int])
_WORD = TypeAdapter(Annotated[str, Strict()])
_WORDS = TypeAdapter(list[Annotated[str, Strict()]])

KINDS: dict[str, tuple[TypeAdapter[Any], str]] = {
    **{name: (_FLOAT, "number") for name, v in SAMPLING.items() if type(v) is float},
    **{name: (_INT, "whole number") for name, v in SAMPLING.items() if type(v) is int},
    **{name: (_FLAG, "true or false") for name, v in SAMPLING.items() if type(v) is bool},
    "seed": (_INT, "whole number"),
    "max_tokens": (_INT, "whole number"),
    "stop": (_WORDS, "list of texts"),
    "stop_token_ids": (_INTS, "list of token ids"),
    "bad_words": (_WORDS, "list of texts"),
    "allowed_token_ids": (_INTS, "list of token ids"),
    "structured_outputs": (TypeAdapter(dict[str, Any]), "JSON object"),
}
"""Of each sampling field what checks a value, and what it has to be, in words."""

GRAMMARS: dict[str, tuple[TypeAdapter[Any], str]] = {
    "json": (_WORD, "JSON schema"),
    "regex": (_WORD, "text"),
    "choice": (_WORDS, "list of texts"),
    "grammar": (_WORD, "text"),
}
"""What ``structured_outputs`` may hold, as in ``KINDS``; a schema is written out: in
Arrow's tables all rows would have the fields of all schemas."""

ANSWERS = pyarrow.schema(
    [
        ("row", pyarrow.int64()),
        ("id", pyarrow.string()),
        ("text", pyarrow.string()),
        ("token_ids", pyarrow.list_(pyarrow.int64())),
        ("finish_reason", pyarrow.string()),
        ("num_prompt_tokens", pyarrow.int64()),
        ("num_tokens", pyarrow.int64()),
        ("acceptance_length", pyarrow.float64()),
        ("num_drafts", pyarrow.int64()),
        ("num_draft_tokens", pyarrow.int64()),
        ("num_accepted_tokens", pyarrow.int64()),
        ("error", pyarrow.string()),
    ]
)
"""The columns of answers, the same in every file: a column of nothing has no type."""

NO_PLACE = (
    "tools", "functions", "logit_bias", "logprobs", "top_logprobs", "echo", "suffix",
    "chat_template_kwargs", "documents",
)  # fmt: skip
"""Fields of OpenAI's requests that would change an answer, and that a row cannot have."""

TURNS = ("messages", "conversations", "turns")
"""Fields of chats, beside which ``prompt`` and ``text`` are none."""

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


class RowError(ValueError):
    """A row that cannot be answered; the message says why."""


def prepare(
    row: dict[str, Any], source: TokenizerSource, sampling: dict[str, Any]
) -> dict[str, Any]:
    """Turns a numbered row into what Ray's vLLM stage takes.

    Args:
        row: see ``batch.prompts.SCHEMA``.
        source: of the tokenizer, and of its chat template.
        sampling: the job's sampling fields; a row's own win.

    Returns:
        ``id``, ``prompt``, ``tokenized_prompt``, ``sampling_params``, and in ``ERROR`` why
        the row cannot be answered, or nothing.

    Raises:
        ValueError: the tokenizer cannot be loaded, which is no row's fault.
    """
    tokenizer = load_tokenizer(source)
    found = {"id": row["place"], "prompt": "", "tokenized_prompt": [0], ERROR: ""}
    params = {**SAMPLING, **sampling}
    try:
        fields = _fields(row["line"])
        ids = (fields.get("custom_id"), fields.get("id"), row["place"])
        found["id"] = next(str(one) for one in ids if one is not None)
        fields, of_body = _request(fields)
        params |= _sampling(fields, of_body)
        found["prompt"], found["tokenized_prompt"] = _prompt(fields, tokenizer)
    except (ValueError, RecursionError) as error:  # the latter of lists within lists
        found[ERROR] = str(error)
    return {**found, "sampling_params": params}


def _fields(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"it is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RowError("it is not a JSON object")
    _check_text(fields)
    return fields


def _check_text(fields: dict[str, Any]) -> None:
    """Refuses halves of characters, which JSON can escape and nothing else can hold."""
    if half := half_character(fields):
        raise RowError(f"it has {half}")


def _request(fields: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Returns the fields of a request, and whether they are those of OpenAI's format."""
    if not isinstance(body := fields.get("body"), dict):
        return fields, False
    if (url := fields.get("url") or CHATS) not in (COMPLETIONS, CHATS):
        raise RowError(f"url {url}: only {COMPLETIONS} and {CHATS} are answered")
    return body, True


def sampling_of(given: dict[str, Any]) -> dict[str, Any]:
    """Returns a job's sampling fields, checked and typed as a row's.

    Raises:
        RowError: one has no such value.
    """
    _check_text(given)
    return _sampling({"sampling_params": given}, of_body=False)


def _sampling(fields: dict[str, Any], of_body: bool) -> dict[str, Any]:
    """Returns the sampling fields that a row sets itself."""
    given = fields.get("sampling_params") or {}
    if not isinstance(given, dict):
        raise RowError("sampling_params is not a JSON object")
    given = _set({name: fields.get(name) for name in SAMPLING}) | _set(given)
    if of_body:
        given |= _of_openai(fields)
    if unknown := sorted(given.keys() - SAMPLING.keys()):
        raise RowError(
            f"sampling_params {', '.join(unknown)}: a batch knows {', '.join(SAMPLING)}"
        )
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    if "structured_outputs" in given:
        given["structured_outputs"] = _grammar(given["structured_outputs"])
    return {name: _typed(name, v, *KINDS[name]) for name, v in _set(given).items()}


def _set(fields: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that have a value: in a row of Parquet all are there."""
    return {name: value for name, value in fields.items() if value is not None}


def _typed(name: str, value: Any, kind: TypeAdapter[Any], described: str) -> Any:
    """Returns a value of its field's type; ``kind`` and ``described`` are as in ``KINDS``.

    In Arrow's columns 0 and 0.5 are two types. And what an engine's core cannot decode ends
    the thread that reads its requests: all of them then wait for ever.
    """
    try:
        return kind.validate_python(value)
    except ValidationError:
        raise RowError(f"{name}: {value!r} is no {described}") from None


def _of_openai(body: dict[str, Any]) -> dict[str, Any]:
    """Returns what OpenAI names otherwise; refuses what has no place in a row."""
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise RowError(
                f"{name}: a row has one answer; give it as often as it is wanted"
            )
    if body.get("stream"):
        raise RowError("stream: a batch has nobody to stream to")
    if asked := sorted(name for name in NO_PLACE if body.get(name)):
        raise RowError(f"{', '.join(asked)}: a row has no place for it")
    found = {}
    if (most := body.get("max_completion_tokens")) is not None:
        found["max_tokens"] = most
    match body.get("response_format"):
        case None | {"type": "text"}:
            pass
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            found["structured_outputs"] = {"json": schema}
        case other:
            raise RowError(f"response_format {other}: text, or json_schema with a schema")
    return found


def _grammar(asked: Any) -> dict[str, Any] | None:
    """Returns what an answer has to keep to, or None where that is nothing."""
    if isinstance(asked, dict) and not (asked := _set(asked)):
        return None
    if not isinstance(asked, dict) or len(asked) != 1 or not asked.keys() <= {*GRAMMARS}:
        raise RowError(f"structured_outputs has one of {', '.join(GRAMMARS)}")
    ((name, value),) = asked.items()
    if name == "json" and isinstance(value, dict):
        value = json.dumps(value)
    typed = _typed(f"structured_outputs {name}", value, *GRAMMARS[name])
    return dict.fromkeys(GRAMMARS) | {name: typed}


def _prompt(
    fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[int]]:
    """Returns a row's prompt, and its token ids."""
    chat = chat_of(fields)
    if text := _raw(fields, chat):
        return text, tokenizer(text)["input_ids"]
    if chat is None:
        raise RowError(f"it has no prompt: rows have {SHAPES}, or `text`")
    if not (question := question_of(chat)):
        raise RowError("its chat has no turn of a user to answer")
    text = render(question, tokenizer, asks=True)
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def _raw(fields: dict[str, Any], chat: Chat | None) -> str:
    """Returns the text that a row has instead of a chat; empty where it has none."""
    if any(isinstance(turns := fields.get(name), list) and turns for name in TURNS):
        return ""
    if isinstance(prompt := fields.get("prompt"), str) and prompt:
        return prompt
    text = fields.get("text")
    return text if chat is None and isinstance(text, str) else ""


def answers(table: pyarrow.Table) -> pyarrow.Table:
    """Returns what is kept of rows that have passed the engine, as ``ANSWERS``."""
    rows = [answer(row) for row in table.to_pylist()]
    return pyarrow.Table.from_pylist(rows, schema=ANSWERS)


def answer(row: dict[str, Any]) -> dict[str, Any]:
    """Returns what is kept of an answered row, or of one with an error.

    The acceptance length is vLLM's ``mean_acceptance_length``: tokens per verified step,
    the bonus token included; None where nothing was drafted.
    """
    failed = bool(row.get(ERROR))
    known = {} if failed else row.get("metrics") or {}
    drafts = known.get("speculative_decoding") or {}
    return {
        "row": row["row"],
        "id": row["id"],
        "text": None if failed else row["generated_text"],
        "token_ids": None if failed else [int(t) for t in row["generated_tokens"]],
        "finish_reason": "error" if failed else known.get("finish_reason"),
        "num_prompt_tokens": None if failed else row["num_input_tokens"],
        "num_tokens": None if failed else row["num_generated_tokens"],
        "acceptance_length": drafts.get("mean_acceptance_length"),
        "num_drafts": drafts.get("num_spec_steps"),
        "num_draft_tokens": drafts.get("num_draft_tokens"),
        "num_accepted_tokens": drafts.get("num_accepted_draft_tokens"),
        "error": row[ERROR] if failed else None,
    }
