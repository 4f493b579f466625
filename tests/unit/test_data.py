"""Token ids on disk: the held-out share, the batches, the prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers_on_disk import ids_of, tokenizer

from vllm_propd.training.data.batches import (
    HELD_OUT,
    Epochs,
    TokenData,
    check_enough,
    load_data,
    prepare,
    save_written,
)
from vllm_propd.training.data.documents import DataError
from vllm_propd.training.data.packing import packed

VOCAB = 2048
LONG = "some words of a long document " * 20


def write_rows(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepared(
    path: Path, *held_out: Path, vocab_size: int = VOCAB, prompts_do: bool = False
) -> tuple[TokenData, TokenData]:
    folder, files = path.parent / "deep" / "work", ([path], list(held_out))
    return prepare(*files, tokenizer(), vocab_size, folder, 10**9, prompts_do)


def documents(data: TokenData) -> list[list[int]]:
    """The stream cut after each end of text; what has no end is cut off too."""
    ends = np.flatnonzero(data.tokens == tokenizer().eos_token_id) + 1
    return [part.tolist() for part in np.split(data.tokens, ends) if len(part)]


def counting(tokens: int, starts: tuple[int, ...] = ()) -> TokenData:
    """Data whose tokens are their own places."""
    return TokenData(np.arange(tokens, dtype=np.int32), np.array(starts, np.int64), [])


@pytest.mark.parametrize("count", [2 * HELD_OUT, 100])
def test_of_many_documents_each_sixteenth_is_held_out(tmp_path: Path, count: int) -> None:
    texts = [f"document {i}" for i in range(1, count + 1)]
    train, held_out = prepared(write_rows(tmp_path / "a.jsonl", texts))
    kept = texts[2 * HELD_OUT - 1 :: HELD_OUT]
    assert documents(held_out) == [ids_of(text) for text in kept]
    others = sorted(ids_of(text) for text in texts if text not in kept)
    assert sorted(documents(train)) == others


@pytest.mark.parametrize("count", [1, 3, HELD_OUT])
def test_of_few_documents_each_ones_end_is_held_out(tmp_path: Path, count: int) -> None:
    ids = [ids_of(f"{i} {LONG}") for i in range(count)]
    path = write_rows(tmp_path / "a.jsonl", [f"{i} {LONG}" for i in range(count)])
    train, held_out = prepared(path)
    cuts = [len(row) - len(row) // HELD_OUT for row in ids]
    starts = [row[:cut] for row, cut in zip(ids, cuts, strict=True)]
    ends = [row[cut:] for row, cut in zip(ids, cuts, strict=True)]
    np.testing.assert_array_equal(train.tokens, np.concatenate(starts))
    np.testing.assert_array_equal(held_out.tokens, np.concatenate(ends))
    assert len(held_out.tokens)


@pytest.mark.parametrize(("count", "kept"), [(1, 0), (2, 1), (3, 1), (4, 1), (16, 4)])
def test_of_few_questions_some_are_held_out_and_not_asked(
    tmp_path: Path, count: int, kept: int
) -> None:
    rows = [json.dumps({"question": f"question {i}"}) for i in range(count)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    train, held_out = prepared(path, prompts_do=True)
    both = [*map(tuple, train.chats), *map(tuple, held_out.chats)]
    assert len(held_out.chats) == kept
    assert len(both) == len(set(both)) == count


def test_of_few_chats_some_are_held_out_whole(tmp_path: Path) -> None:
    """Nothing is learnt of what heads are measured on."""
    said = [{"role": "assistant", "content": LONG}]
    asked = [[{"role": "user", "content": f"question {i}"}] for i in range(8)]
    rows = [json.dumps({"messages": one + said}) for one in asked]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(rows))
    train, held_out = prepared(path)
    assert (len(train.chats), len(held_out.chats)) == (6, 2)
    for chat in (str(ids)[1:-1] for ids in held_out.chats):
        assert chat in str(held_out.tokens.tolist())
        assert chat not in str(train.tokens.tolist())


def test_equal_prompts_are_one() -> None:
    chats = [[1, 2], [3], [1, 2], [3], [4]]
    data = TokenData(np.empty(0, np.int32), np.array([], np.int64), chats)
    assert sorted(data.prompts(9, 8, seed=0)) == [[1, 2], [3], [4]]


def test_nothing_is_lost_between_few_and_many(tmp_path: Path) -> None:
    texts = [f"{i} {LONG}" for i in range(HELD_OUT + 5)]
    train, held_out = prepared(write_rows(tmp_path / "a.jsonl", texts))
    both = np.concatenate([train.tokens, held_out.tokens])
    everything = np.concatenate([ids_of(text) for text in texts])
    np.testing.assert_array_equal(np.sort(both), np.sort(everything))
    assert 0 < len(held_out.tokens) < len(train.tokens) / 10


def test_explicit_held_out_files_leave_all_data_to_training(tmp_path: Path) -> None:
    texts, kept = [f"{i} {LONG}" for i in range(40)], ["to measure with"]
    path = write_rows(tmp_path / "a.jsonl", texts)
    train, held_out = prepared(path, write_rows(tmp_path / "b.jsonl", kept))
    assert documents(train) == [ids_of(text) for text in texts]
    assert documents(held_out) == [ids_of(text) for text in kept]


def test_an_earlier_runs_files_are_replaced(tmp_path: Path) -> None:
    prepared(write_rows(tmp_path / "a.jsonl", [LONG] * 40))
    train, held_out = prepared(write_rows(tmp_path / "b.jsonl", ["now"]))
    assert train.tokens.tolist() == ids_of("now") and not len(held_out.tokens)


def test_prepared_data_loads_again(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat}))
    train, _ = prepared(tmp_path / "a.jsonl")
    again = load_data(tmp_path / "deep" / "work", "train")
    assert train.tokens.tolist() == again.tokens.tolist()
    assert train.chats == again.chats == [ids_of("<user>q<assistant>")[:-1]]
    assert len(train.starts) == len(again.starts) == 0


def test_tokens_beyond_the_targets_vocabulary_are_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [LONG])
    largest = max(ids_of(LONG))
    prepared(path, vocab_size=largest + 1)
    with pytest.raises(DataError, match=f"token {largest}, .* knows {largest} only"):
        prepared(path, vocab_size=largest)


def test_files_without_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl: there is no text in it"):
        prepared(write_rows(tmp_path / "a.jsonl", ["", ""]))


def test_windows_of_plain_text_follow_each_other() -> None:
    data = counting(50)
    assert data.windows(9).tolist() == [0, 9, 18, 27, 36]
    ids, learn = data.rows(data.windows(9), 9)
    assert ids.dtype == np.int64 and ids.ravel().tolist() == list(range(45))
    assert learn.all() and learn.shape == ids.shape


def test_windows_begin_with_sequences_and_cover_them_all() -> None:
    starts = (0, 4, 7, 20, 22, 30)
    data = counting(40, starts)
    windows = data.windows(10).tolist()
    # The first window has two whole sequences; of the third one none has all.
    assert windows == [0, 7, 10, 20, 30]
    assert data.windows(41).tolist() == []
    assert counting(40, (0, 35)).windows(10).tolist() == [0, 10, 20, 25, 30]


def test_windows_cover_all_sequences_and_have_each_whole_that_fits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 25, size=rng.integers(1, 9))
        starts = np.cumsum(lengths) - lengths
        data = counting(int(lengths.sum()), tuple(starts.tolist()))
        windows = data.windows(10)
        assert (np.diff(windows) > 0).all()
        if lengths.sum() < 10:
            assert not len(windows)
            continue
        places = data.rows(windows, 10)[0]
        assert set(places.ravel()) == set(range(lengths.sum()))
        for start, length in zip(starts, lengths, strict=True):
            if length <= 10:
                inside = (windows <= start) & (start + length <= windows + 10)
                assert inside.any()


def test_all_that_the_target_wrote_is_learnt(tmp_path: Path) -> None:
    """Texts as long as a window, and longer ones of an older training."""
    prompts, texts = [[7] * 20] * 6, [[8] * n for n in (44, 44, 80, 44, 30, 60)]
    data = save_written(tmp_path, "distilled", prompts, texts, 64)
    places = data.windows(64)[:, None] + np.arange(64)
    assert set(places.ravel()) == set(range(len(data.tokens)))


def test_sequences_are_packed_into_few_windows(tmp_path: Path) -> None:
    lengths = np.array([6, 3, 9, 4, 12, 1, 7, 2])
    order = packed(lengths, 10)
    # 12 alone; then 9 with 1, 7 with 3, 6 with 4, and what is left.
    assert lengths[order].tolist() == [12, 9, 1, 3, 7, 6, 4, 2]
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 100, size=300)
    prompts = [[7] * int(n // 2) for n in lengths]
    texts = [[8] * int(n - n // 2) for n in lengths]
    data = save_written(tmp_path, "distilled", prompts, texts, 128)
    windows = data.windows(128)
    assert len(windows) <= 1.1 * lengths.sum() / 128
    learnt = data.rows(windows, 128)[1].sum()
    assert learnt >= sum(map(len, texts))


def test_the_target_is_learnt_from_where_it_wrote(tmp_path: Path) -> None:
    prompts, texts = [[1, 2, 3], [7]], [[4, 5, 6], [8, 9]]
    data = save_written(tmp_path, "distilled", prompts, texts, 6)
    assert data.tokens.tolist() == list(range(1, 10)) and data.starts.tolist() == [0, 6]
    for read in (data, load_data(tmp_path, "distilled")):
        ids, learn = read.rows(np.array([0]), 9)
        # Where the token after it is the target's own; the last has none after it.
        assert ids[learn].tolist() == [3, 4, 5, 7, 8, 9]


def test_an_epoch_has_each_window_once_and_the_seed_decides_the_order() -> None:
    epochs = Epochs(windows=10, size=4, seed=3)
    drawn = np.concatenate([epochs(step) for step in range(10)])
    for epoch in drawn.reshape(4, 10):
        assert sorted(epoch) == list(range(10))
    assert (drawn[:10] != drawn[10:20]).any()
    again = Epochs(windows=10, size=4, seed=3)
    assert [again(step).tolist() for step in (7, 0)] == [
        drawn[28:32].tolist(),
        drawn[:4].tolist(),
    ]
    other = Epochs(windows=10, size=4, seed=4)
    assert any((other(step) != epochs(step)).any() for step in range(3))


def test_more_windows_a_step_than_there_are_come_again() -> None:
    counts = np.bincount(Epochs(windows=3, size=7, seed=0)(0))
    assert sorted(counts.tolist()) == [2, 2, 3]
    counts = np.bincount(Epochs(windows=3, size=6, seed=0)(0))
    assert counts.tolist() == [2, 2, 2]


def test_questions_alone_need_a_target_that_answers(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"question": f"{i}?"}) + "\n" for i in range(40)))
    with pytest.raises(DataError, match=r"asks and does not answer; .*--self-distill"):
        prepared(path)
    train, held_out = prepare(
        [path], [], tokenizer(), VOCAB, tmp_path / "work", 10**9, prompts_do=True
    )
    assert (len(train.chats), len(held_out.chats)) == (39, 1)
    assert held_out.chats == [ids_of("<user>31?<assistant>")[:-1]]


def test_prompts_are_windows_of_plain_text() -> None:
    data = counting(500)
    prompts = data.prompts(200, 40, 3)
    assert all(p == list(range(p[0], p[0] + len(p))) for p in prompts)
    assert {len(prompt) for prompt in prompts} == set(range(16, 41))
    assert prompts == data.prompts(200, 40, 3) != data.prompts(200, 40, 4)
    assert {len(prompt) for prompt in data.prompts(20, 6, 3)} == {6}


def test_prompts_are_chats_that_fit_where_there_are_chats() -> None:
    chats = [[1, 2], [3], [4, 5, 6], [7, 8, 9, 10]]
    data = TokenData(np.arange(500, dtype=np.int32), np.array([], np.int64), chats)
    prompts = data.prompts(50, 3, 3)
    assert sorted(prompts) == [[1, 2], [3], [4, 5, 6]]  # each once
    assert prompts == data.prompts(50, 3, 3) != data.prompts(50, 3, 5)
    assert len(data.prompts(2, 3, 3)) == 2


def test_prompts_cut_from_text_begin_as_in_serving() -> None:
    tokens = np.tile(np.arange(1, 6), 30).astype(np.int32)
    data = TokenData(tokens, np.array([], np.int64), [[9]])
    assert data.prompts(5, 20, 3, begin=[1]) == [[9]]  # a chat's template has its own
    text = TokenData(tokens, np.array([], np.int64), [])
    prompts, bare = text.prompts(50, 20, 3, begin=[1]), text.prompts(50, 20, 3)
    assert any(row[0] == 1 for row in bare) and any(row[0] != 1 for row in bare)
    assert all(row[:2] != [1, 1] and row[0] == 1 for row in prompts)
    assert [len(row) for row in prompts] == [len(row) for row in bare]


def test_chats_that_are_left_out_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    chats = [[1, 2], [3], [4, 5, 6], [7, 8, 9, 10]]
    data = TokenData(np.empty(0, np.int32), np.array([], np.int64), chats)
    data.prompts(9, 4, 0)
    assert not capsys.readouterr().out
    data.prompts(9, 2, 0, "--held-out")
    assert "--held-out: 2 of 4 chats are left out" in capsys.readouterr().out


def test_text_beside_chats_is_no_prompt_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "?"}, {"text": "a"}, {"text": "b"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared(tmp_path / "a.jsonl", prompts_do=True)
    said = " ".join(capsys.readouterr().out.split())
    assert "--data: 2 documents ask nothing" in said and said.count("ask nothing") == 1
    prepared(write_rows(tmp_path / "b.jsonl", ["a", "b"]), prompts_do=True)
    prepared(tmp_path / "a.jsonl")
    assert "ask nothing" not in capsys.readouterr().out


def test_chats_that_are_all_too_long_are_refused() -> None:
    data = TokenData(np.arange(500, dtype=np.int32), np.array([], np.int64), [[1, 2, 3]])
    assert data.prompts(1, 3, 0) == [[1, 2, 3]]
    with pytest.raises(DataError, match=r"of 1 chats none .* 2 tokens; .*--length"):
        data.prompts(1, 2, 0)


def test_errors_of_prompts_name_the_option_that_was_given() -> None:
    chats = TokenData(np.arange(9, dtype=np.int32), np.array([], np.int64), [[1, 2, 3]])
    with pytest.raises(DataError, match=r"^--held-out: of 1 chats none"):
        chats.prompts(1, 2, 0, "--held-out")
    with pytest.raises(DataError, match="give more --held-out, or a smaller --length"):
        counting(9).prompts(1, 20, 0, "--held-out")


def test_files_to_measure_with_are_named_by_their_own_option(tmp_path: Path) -> None:
    path, absent = write_rows(tmp_path / "a.jsonl", [LONG]), tmp_path / "absent.jsonl"
    with pytest.raises(DataError, match=r"^--held-out .*absent\.jsonl: there is no such"):
        prepared(path, absent)
    with pytest.raises(DataError, match=r"^--data .*absent\.jsonl: there is no such"):
        prepared(absent, path)
    folder, empty = tmp_path / "work", write_rows(tmp_path / "b.jsonl", [""])
    for files in ([absent], [empty]):  # as `calibrate` gives them
        with pytest.raises(DataError, match=r"^--held-out "):
            prepare(
                files, files, tokenizer(), VOCAB, folder, 10**9, True, option="--held-out"
            )


def test_too_little_data_is_refused_with_the_counts() -> None:
    check_enough(counting(32), 32, "to train on")
    message = r"there are 32 tokens to train on; --length 33 needs more: .*smaller --length"
    with pytest.raises(DataError, match=message):
        check_enough(counting(32), 33, "to train on")
    starts, written = np.array([0, 4]), np.zeros(8, np.uint8)
    for said, enough in (([], False), ([3, 7], False), ([6, 7], True)):
        written[said] = 1
        data = TokenData(np.arange(8, dtype=np.int32), starts, [], written)
        if enough:
            check_enough(data, 4, "that the target wrote")
        else:
            with pytest.raises(DataError, match="8 tokens that the target wrote have not"):
                check_enough(data, 4, "that the target wrote")
    with pytest.raises(DataError, match="give more --distill-tokens, or a smaller"):
        check_enough(counting(32), 33, "that the target wrote", "--distill-tokens")
