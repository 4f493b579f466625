"""Documents: every kind of file that training reads, and what it says of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers.processors import TemplateProcessing
from tokenizers_on_disk import MODEL, TEMPLATE, ids_of, tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_propd.training.data.documents import (
    DataError,
    Document,
    files_of,
    read_documents,
    rows_of,
    special_before,
)

Row = dict[str, Any]

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
MESSAGES = [
    *ASKED,
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"])}
    | {"value": turn["content"]}
    for turn in MESSAGES
]
ASKED_TEXT = "<system>Be brief.<user>2 + 2?<assistant>"
CHAT_TEXT = ASKED_TEXT + "4<user>Sure?<assistant>Yes."
CHAT = Document(ids_of(CHAT_TEXT), ids_of(ASKED_TEXT)[:-1])


def plain(text: str) -> Document:
    return Document(ids_of(text), [])


def question(text: str) -> Document:
    return Document([], ids_of(text)[:-1])


def read(*paths: Path, most_tokens: int = 10**9) -> list[Document]:
    return list(read_documents(list(paths), tokenizer(), most_tokens, "--data"))


def write(folder: Path, name: str, content: bytes | str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_rows(folder: Path, *rows: Row, name: str = "rows.jsonl") -> Path:
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def test_a_text_file_is_one_document_closed_by_the_end_of_text(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one line\n\nand another\n")
    (document,) = read(path)
    assert document == plain("one line\n\nand another\n")
    assert document.ids[-1] == tokenizer().eos_token_id


def test_folders_are_read_whole_but_for_binary_and_empty_files(tmp_path: Path) -> None:
    write(tmp_path, "b.py", "import os\n")
    write(tmp_path, "deep/er/a.py", "x = 1\n")
    write(tmp_path, "deep/latin.py", "name = 'café'\n".encode("latin-1"))
    write(tmp_path, "deep/binary.py", b"\x7fELF\0\0")
    write(tmp_path, "empty.py", "")
    found = read(tmp_path)
    expected = ["import os\n", "x = 1\n", "name = 'caf'\n"]
    assert sorted(d.ids for d in found) == sorted(ids_of(text) for text in expected)


def test_files_and_folders_of_different_kinds_are_read_together(tmp_path: Path) -> None:
    write(tmp_path, "folder/a.py", "pass\n")
    write_rows(tmp_path, {"text": "of JSON"}, name="folder/b.jsonl")
    pq.write_table(pa.table({"text": ["of Parquet"], "id": [7]}), tmp_path / "c.parquet")
    found = read(tmp_path / "folder", tmp_path / "c.parquet")
    expected = ["pass\n", "of JSON", "of Parquet"]
    assert sorted(d.ids for d in found) == sorted(ids_of(text) for text in expected)


def test_rows_with_text_are_documents_in_their_order(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"text": "first", "id": 1}, {"text": ""}, {"text": "last"})
    assert read(path) == [plain("first"), plain("last")]


def test_a_json_array_has_rows_too(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", json.dumps([{"text": "one"}, {"text": "two"}]))
    assert read(path) == [plain("one"), plain("two")]


@pytest.mark.parametrize(
    "row", [{"messages": MESSAGES}, {"conversations": SHAREGPT}], ids=["openai", "sharegpt"]
)
def test_chats_are_rendered_by_the_template(tmp_path: Path, row: Row) -> None:
    assert read(write_rows(tmp_path, row)) == [CHAT]


def test_parquet_may_hold_chats(tmp_path: Path) -> None:
    pq.write_table(pa.table({"messages": [MESSAGES]}), tmp_path / "a.parquet")
    assert read(tmp_path) == [CHAT]


def test_text_and_both_shapes_of_chats_may_share_a_file(tmp_path: Path) -> None:
    rows = {"messages": MESSAGES}, {"conversations": SHAREGPT}, {"text": "neither"}
    assert read(write_rows(tmp_path, *rows)) == [CHAT, CHAT, plain("neither")]


@pytest.mark.parametrize(
    ("chat", "text"),
    [
        (ASKED, "<system>Be brief.<user>2 + 2?<assistant>"),
        (MESSAGES[:4], "<system>Be brief.<user>2 + 2?<assistant>4<user>Sure?<assistant>"),
    ],
    ids=["a question", "after an answer"],
)
def test_chats_that_wait_for_an_answer_are_prompts_without_text(
    tmp_path: Path, chat: list[Row], text: str
) -> None:
    assert read(write_rows(tmp_path, {"messages": chat})) == [question(text)]


@pytest.mark.parametrize(
    "row",
    [
        {"turns": ["2 + 2?", "Sure?"], "category": "math"},
        {"prompt": "2 + 2?", "entry_point": "f"},
        {"prompt": [{"role": "user", "content": "2 + 2?"}]},
        {"question": "2 + 2?", "answer": "4"},
        {"instruction": "2 + 2?", "input": "", "output": "4"},
    ],
    ids=["turns", "prompt", "a chat in prompt", "question", "instruction"],
)
def test_questions_in_peoples_shapes_are_prompts(tmp_path: Path, row: Row) -> None:
    assert read(write_rows(tmp_path, row)) == [question("<user>2 + 2?<assistant>")]


def test_an_instruction_comes_before_its_input(tmp_path: Path) -> None:
    row = {"instruction": "Translate.", "input": "Ja", "output": "Yes"}
    expected = question("<user>Translate.\n\nJa<assistant>")
    assert read(write_rows(tmp_path, row)) == [expected]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}], "2 + 2?"),
        (None, ""),
    ],
    ids=["parts", "tool calls only"],
)
def test_turns_in_openais_other_shapes(tmp_path: Path, content: Any, text: str) -> None:
    path = write_rows(tmp_path, {"messages": [{"role": "user", "content": content}]})
    assert read(path) == [question(f"<user>{text}<assistant>")]


def test_a_question_may_follow_an_assistants_first_words(tmp_path: Path) -> None:
    first = {"role": "assistant", "content": "Hello!"}
    path = write_rows(tmp_path, {"messages": [first, *MESSAGES[1:]]})
    (document,) = read(path)
    assert document.chat == ids_of("<assistant>Hello!<user>2 + 2?<assistant>")[:-1]
    nobody = write_rows(tmp_path, {"messages": [first]}, name="nobody.jsonl")
    assert read(nobody) == [plain("<assistant>Hello!")]


def test_a_template_that_refuses_a_chat_is_named(tmp_path: Path) -> None:
    picky = tokenizer("{{ raise_exception('roles must alternate') }}")
    path = write_rows(tmp_path, {"messages": MESSAGES})
    with pytest.raises(DataError, match=r"rows\.jsonl: .*refuses a chat: roles must alt"):
        list(read_documents([path], picky, 10**9, "--data"))


def test_names_are_no_patterns(tmp_path: Path) -> None:
    write(tmp_path, "a[1]/b[x].txt", "text")
    write(tmp_path, "a[1]/c[x].jsonl", '{"text": "row"}\n')
    assert sorted(d.ids for d in read(tmp_path)) == sorted(
        d.ids for d in (plain("text"), plain("row"))
    )


def test_hidden_files_and_caches_in_folders_are_left_out(tmp_path: Path) -> None:
    for name in (".env", ".git/config", "__pycache__/a.txt", "package.json"):
        write(tmp_path, name, '{"name": 1}')
    assert read(tmp_path) == [plain('{"name": 1}')]


def test_reading_stops_after_enough_tokens(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}"} for i in range(400)]
    path = write_rows(tmp_path, *rows)
    everything, some = read(path), read(path, most_tokens=300)
    assert len(everything) == 400
    assert some[:-1] == everything[: len(some) - 1]
    cut = some[-1].ids
    assert cut == everything[len(some) - 1].ids[: len(cut)]
    assert sum(len(d.ids) for d in some) == 300 < sum(len(d.ids) for d in everything) / 2


def test_a_file_longer_than_that_is_cut(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "many words " * 200)
    assert read(path, most_tokens=50) == [Document(read(path)[0].ids[:50], [])]


def special(single: str, **tokens: int) -> PreTrainedTokenizerBase:
    """The demo's tokenizer with special tokens around a text."""
    loaded = AutoTokenizer.from_pretrained(MODEL)
    loaded.chat_template = TEMPLATE
    loaded.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=list(tokens.items())
    )
    return loaded


@pytest.mark.parametrize(
    ("loaded", "first"),
    [
        (tokenizer(), []),
        (special("B $A", B=7), [7]),
        (special("B $A E", B=7, E=0), [7]),
        (special("$A E", E=0), []),
    ],
    ids=["none", "before", "around", "after"],
)
def test_text_begins_as_in_serving_and_chats_as_their_template(
    tmp_path: Path, loaded: PreTrainedTokenizerBase, first: list[int]
) -> None:
    assert special_before(loaded) == first
    path = write_rows(tmp_path, {"text": "a b"}, {"messages": MESSAGES})
    text, chat = read_documents([path], loaded, 10**9, "--data")
    assert text == Document(first + ids_of("a b"), [])
    assert chat == CHAT


def test_a_binary_file_that_was_named_is_refused(tmp_path: Path) -> None:
    binary, text = write(tmp_path, "a.txt", b"a\0b"), write(tmp_path, "b.txt", "b")
    assert read(tmp_path) == [plain("b")]
    with pytest.raises(DataError, match=r"^--data .*a\.txt: there is no data file"):
        read(text, binary)
    assert read(text, write(tmp_path, "empty.txt", "")) == [plain("b")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_row_with_nothing_in_it_is_found_by_its_number(tmp_path: Path, name: str) -> None:
    rows: list[Row] = [{"text": "a"}, {"text": "b"}, {"text": None}]
    if name == "a.jsonl":
        write_rows(tmp_path, *rows, name=name)
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    with pytest.raises(DataError, match=f"row 3 of .*{name}: a row .* with something"):
        read(tmp_path / name)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: there is no such file or folder"):
        read(tmp_path / "absent")


@pytest.mark.parametrize(
    "files", [{}, {"a.bin": b"a\0b", "b.txt": b""}], ids=["empty", "binary"]
)
def test_a_folder_without_data_is_named(tmp_path: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        write(tmp_path, name, content)
    with pytest.raises(DataError, match=f"{tmp_path.name}: there is no data file in it"):
        read(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"title": "a", "answer": "b"},
        {"messages": [], "answer": "b"},
        {"messages": ["a", "b"], "answer": "b"},
        {"messages": [{"content": "a"}], "answer": "b"},
    ],
    ids=["others", "no turns", "turns that are none", "no role"],
)
def test_rows_of_neither_text_nor_chat_are_refused_with_their_fields(
    tmp_path: Path, row: Row
) -> None:
    fields = ", ".join(sorted(row))
    with pytest.raises(DataError, match=f"rows.jsonl.*fields {fields}; needed is `text`"):
        read(write_rows(tmp_path, row))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("absent.jsonl", None),
        ("empty.txt", ""),
        ("others.jsonl", '{"title": "a"}'),
        ("broken.jsonl", '{"text": '),
        ("broken.parquet", "no Parquet"),
        ("chat.jsonl", json.dumps({"messages": MESSAGES})),
    ],
)
def test_errors_name_the_option_that_was_given(
    tmp_path: Path, name: str, content: str | None
) -> None:
    path = tmp_path / name
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(DataError, match=rf"^--held-out .*{name}"):
        list(read_documents([path], tokenizer(None), 10**9, "--held-out"))


def test_chats_need_a_chat_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"text": "fine"}, {"messages": MESSAGES})
    with pytest.raises(DataError, match=r"rows\.jsonl: .*no chat template"):
        list(read_documents([path], tokenizer(None), 10**9, "--data"))


@pytest.mark.parametrize("name", ["late.jsonl", "late.ndjson"])
def test_lines_have_fields_of_their_own(tmp_path: Path, name: str) -> None:
    rows = [{"text": "a"}] * 3 + [{"text": "b", "n": 1}, {"text": "c", "n": "x", "m": []}]
    write(tmp_path, name, "\ufeff" + "\n\n".join(map(json.dumps, rows)))
    found = [row for _, row in rows_of(files_of([tmp_path / name], "--data"), "--data")]
    assert found == rows
    write(tmp_path, name, "[1]")
    with pytest.raises(DataError, match=r"line 1 is not a JSON object"):
        list(rows_of(files_of([tmp_path / name], "--data"), "--data"))
    write(tmp_path, name, '{"text": "ok"}\n{"text": "ok \\ud83d"}')
    with pytest.raises(DataError, match=r"line 2 has '\\ud83d', half of a character"):
        list(rows_of(files_of([tmp_path / name], "--data"), "--data"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jsonl", '{"text": "a"}\n{"text": \n'),
        ("broken.json", "no JSON"),
        ("broken.parquet", "no Parquet"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    write(tmp_path, name, content)
    with pytest.raises(DataError, match=f"{name} cannot be read: .*(JSON|Parquet)"):
        read(tmp_path / name)
