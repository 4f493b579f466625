"""A row of a batch job, from its line to what an engine is given, and its answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tokenizers_on_disk import MODEL, tokenizer

from vllm_propd.batch import rows
from vllm_propd.batch.rows import ANSWERS, ERROR, SAMPLING, answer, answers, prepare
from vllm_propd.batch.tokenizer import TokenizerSource, load_tokenizer

CHAT = "<user>Hi<assistant>"


@pytest.fixture(autouse=True)
def _chat_template(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's tokenizer has no chat template of its own."""
    monkeypatch.setattr(rows, "load_tokenizer", lambda source: tokenizer())


def prepared(line: Any, **sampling: Any) -> dict[str, Any]:
    text = line if isinstance(line, str) else json.dumps(line)
    row = {"row": 3, "place": "a.jsonl:4", "line": text}
    return prepare(row, TokenizerSource(str(MODEL)), sampling)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"text": "def f("}, "def f("),
        ({"prompt": "def f("}, "def f("),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "<user>Hi<assistant>"),
        ({"question": "Hi"}, "<user>Hi<assistant>"),
        ({"turns": ["Hi", "And?"]}, "<user>Hi<assistant>"),
        (
            {"url": "/v1/chat/completions", "body": {"messages": [{"role": "user"}]}},
            "<user><assistant>",
        ),
        ({"url": "/v1/completions", "body": {"prompt": "def f("}}, "def f("),
        ({"url": None, "body": {"prompt": "def f("}}, "def f("),
        # Beside a chat, the other field is not the prompt: it may be the whole answered.
        ({"messages": [{"role": "user", "content": "Hi"}], "prompt": "p"}, CHAT),
        ({"messages": [{"role": "user", "content": "Hi"}], "text": "t"}, CHAT),
        ({"conversations": [{"from": "human", "value": "Hi"}], "text": "t"}, CHAT),
        ({"turns": ["Hi"], "prompt": "p", "text": "t"}, CHAT),
        ({"prompt": [{"role": "user", "content": "Hi"}], "text": "t"}, CHAT),
        ({"instruction": "Hi", "output": "Ho", "text": "Hi. Ho."}, CHAT),
        ({"messages": None, "prompt": "", "text": "def f("}, "def f("),
        ({"prompt": "def f(", "question": "Hi", "text": "t"}, "def f("),
    ],
)
def test_prompts_are_read_in_the_usual_shapes(row: dict[str, Any], prompt: str) -> None:
    found = prepared(row)
    assert not found[ERROR]
    assert found["prompt"] == prompt
    assert found["tokenized_prompt"] == tokenizer()(prompt)["input_ids"]


def test_a_row_has_its_own_id_or_its_place() -> None:
    assert prepared({"text": "a"})["id"] == "a.jsonl:4"
    assert prepared({"text": "a", "id": 17})["id"] == "17"
    assert prepared({"custom_id": "q-1", "body": {"prompt": "a"}})["id"] == "q-1"
    assert prepared({"text": "a", "id": None})["id"] == "a.jsonl:4"
    assert prepared({"text": "a", "custom_id": None, "id": 0})["id"] == "0"


def test_sampling_fields_of_a_row_win_over_the_jobs() -> None:
    found = prepared({"text": "a", "max_tokens": 5, "stop": "\n"}, temperature=0.5)
    assert found["sampling_params"] == SAMPLING | {
        "temperature": 0.5,
        "max_tokens": 5,
        "stop": ["\n"],
    }
    nested = {"text": "a", "sampling_params": {"temperature": 0, "top_k": 3}}
    found = prepared(nested, temperature=0.5)["sampling_params"]
    assert (found["temperature"], found["top_k"]) == (0.0, 3)
    assert isinstance(found["temperature"], float)


def test_openais_names_are_known() -> None:
    schema = {"type": "object", "properties": {}}
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "max_completion_tokens": 9,
        "n": 1,
        "response_format": {"type": "json_schema", "json_schema": {"schema": schema}},
    }
    found = prepared({"custom_id": "1", "body": body})
    assert not found[ERROR]
    params = found["sampling_params"]
    assert params["max_tokens"] == 9
    assert json.loads(params["structured_outputs"]["json"]) == schema


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("no json", "it is not JSON"),
        ("[1]", "it is not a JSON object"),
        ({"answer": "42"}, "it has no prompt"),
        ({"messages": [{"role": "assistant", "content": "I"}]}, "no turn of a user"),
        ({"text": "a", "sampling_params": {"logit_bias": {"3": 1}}}, "logit_bias: a batch"),
        ({"text": "a", "sampling_params": 3}, "sampling_params is not a JSON object"),
        ({"text": "a", "temperature": "hot"}, "temperature: 'hot' is no number"),
        ({"text": "a", "temperature": True}, "temperature: True is no number"),
        ({"text": "a", "max_tokens": 10.5}, "max_tokens: 10.5 is no whole number"),
        ({"text": "a", "max_tokens": True}, "max_tokens: True is no whole number"),
        ({"text": "a", "seed": "1"}, "seed: '1' is no whole number"),
        ({"text": "a", "min_tokens": float("inf")}, "min_tokens: inf is no whole number"),
        ({"text": "a", "ignore_eos": "yes"}, "ignore_eos: 'yes' is no true or false"),
        ({"text": "a", "skip_special_tokens": 0}, "skip_special_tokens: 0 is no true"),
        ({"text": "a", "allowed_token_ids": ["a"]}, "is no list of token ids"),
        ({"text": "a", "stop_token_ids": 3}, "stop_token_ids: 3 is no list of token ids"),
        ({"text": "a", "stop": [1]}, "stop: [1] is no list of texts"),
        ({"text": "a", "bad_words": "x"}, "bad_words: 'x' is no list of texts"),
        ({"text": "a", "structured_outputs": {"xml": ""}}, "structured_outputs has one of"),
        ({"text": "a", "seed": 2**63}, "is no whole number"),
        ({"text": "a", "stop_token_ids": [2**70]}, "is no list of token ids"),
        ({"text": "a", "structured_outputs": 3}, "structured_outputs has one of"),
        (
            {"text": "a", "structured_outputs": {"regex": "a", "choice": ["a"]}},
            "structured_outputs has one of",
        ),
        (
            {"text": "a", "structured_outputs": {"choice": ["a", 1]}},
            "structured_outputs choice: ['a', 1] is no list of texts",
        ),
        ({"text": "a", "structured_outputs": {"regex": 5}}, "regex: 5 is no text"),
        ({"messages": ["Hi"], "text": "a"}, "it has no prompt"),
        ('{"text": "ok \\ud83d"}', "it has '\\ud83d', half of a character"),
        ('{"id": "\\ud83d", "text": "a"}', "it has '\\ud83d', half of a character"),
        ('{"\\udc00": 1, "text": "a"}', "it has '\\udc00', half of a character"),
        ("[" * 100_000, "recursion"),
        ({"body": {"prompt": "a", "best_of": 2}}, "best_of: a row has one answer"),
        ({"body": {"prompt": "a", "n": 0}}, "n: a row has one answer"),
        ({"body": {"prompt": "a", "n": 2}}, "n: a row has one answer"),
        ({"body": {"prompt": "a", "stream": True}}, "stream"),
        (
            {"body": {"prompt": "a", "tools": [{}], "echo": True}},
            "echo, tools: a row has no",
        ),
        ({"body": {"prompt": "a", "response_format": {"type": "xml"}}}, "response_format"),
        ({"url": "/v1/embeddings", "body": {"input": "a"}}, "/v1/embeddings"),
    ],
)
def test_what_cannot_be_answered_is_a_row_with_an_error(row: Any, why: str) -> None:
    found = prepared(row)
    assert why in found[ERROR]
    assert found["tokenized_prompt"] and found["sampling_params"].keys() == SAMPLING.keys()
    pyarrow.Table.from_pylist([found])


def test_a_tokenizer_that_cannot_be_loaded_is_no_rows_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "load_tokenizer", load_tokenizer)
    with pytest.raises(ValueError, match=r"(?s)cannot be loaded .* trust_remote"):
        prepare({"row": 0, "place": "", "line": ""}, TokenizerSource(str(tmp_path)), {})


def test_a_field_without_a_value_is_none() -> None:
    """A column of Parquet, or of a struct in it, that other rows fill."""
    empty = dict.fromkeys(("json", "regex", "choice", "grammar", "whitespace_pattern"))
    body = {"prompt": "a", "n": None, "best_of": None, "structured_outputs": empty}
    assert prepared({"body": body})["sampling_params"] == SAMPLING
    assert not prepared({"body": {"prompt": "a", "n": 1, "best_of": 1}})[ERROR]
    asked = {"text": "a", "structured_outputs": {**empty, "regex": "a+"}}
    found = prepared(asked)["sampling_params"]["structured_outputs"]
    assert {name: v for name, v in found.items() if v is not None} == {"regex": "a+"}
    nested = {"text": "a", "max_tokens": 5, "sampling_params": dict.fromkeys(SAMPLING)}
    nested["sampling_params"]["logit_bias"] = None
    found = prepared(nested)
    assert not found[ERROR] and found["sampling_params"] == SAMPLING | {"max_tokens": 5}


def test_whole_numbers_may_come_as_floats() -> None:
    """As a column of Parquet in which one row has none."""
    found = prepared(
        {"text": "a", "max_tokens": 10.0, "seed": 1.0, "stop_token_ids": [2.0]}
    )
    assert not found[ERROR]
    params = found["sampling_params"]
    asked = [params["max_tokens"], params["seed"], *params["stop_token_ids"]]
    assert asked == [10, 1, 2] and all(type(one) is int for one in asked)


def test_rows_of_all_kinds_fit_one_table() -> None:
    """What one row lacks must not reach another's sampling as None in place of a value."""
    lines = [
        {"text": "a"},
        {"text": "a", "temperature": 1, "stop": ["x"], "seed": 3},
        {"text": "a", "structured_outputs": {"choice": ["a", "b"]}},
        "no json",
    ]
    found = [prepared(line, temperature=0.0) for line in lines]
    table = pyarrow.Table.from_pylist(found).to_pylist()
    assert table == found


def test_an_answer_says_how_it_ended_and_what_drafts_gave() -> None:
    row = {
        "row": 3, "id": "q", ERROR: "", "generated_text": " x", "generated_tokens": [5, 6],
        "num_input_tokens": 4, "num_generated_tokens": 2,
        "metrics": {
            "finish_reason": "stop",
            "speculative_decoding": {
                "mean_acceptance_length": 2.0, "num_spec_steps": 1, "num_draft_tokens": 8,
                "num_accepted_draft_tokens": 1,
            },
        },
    }  # fmt: skip
    found = answer(row)
    assert found["finish_reason"] == "stop" and found["error"] is None
    assert (found["text"], found["token_ids"], found["num_tokens"]) == (" x", [5, 6], 2)
    assert (found["acceptance_length"], found["num_drafts"]) == (2.0, 1)
    plain = answer(row | {"metrics": {"finish_reason": "length"}})
    assert plain["acceptance_length"] is None and plain["finish_reason"] == "length"


def test_an_error_has_the_columns_of_an_answer() -> None:
    row = {"row": 3, "id": "q", ERROR: "it has no prompt"}
    (failed,) = answers(pyarrow.Table.from_pylist([row])).to_pylist()
    assert list(failed) == ANSWERS.names == list(answer(row))
    assert (failed["finish_reason"], failed["error"]) == ("error", "it has no prompt")
    assert failed["text"] is failed["token_ids"] is failed["num_tokens"] is None
