"""Writing by the target: in the type that is fast, and a KV cache that holds who writes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MODEL, prompts_of

from vllm_propd.engine import target_text
from vllm_propd.engine.target_text import BLOCK, MOST_SEQUENCES, TargetWriter, _options
from vllm_propd.fast_dtype import fast_dtype
from vllm_propd.training.data.writing import answers

BYTES = {"float32": 4, "bfloat16": 2}


def per_token() -> int:
    """Of the demo model, all layers' keys and values."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODEL)
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * BYTES[fast_dtype("cpu")]


def test_as_many_write_together_as_the_cache_holds() -> None:
    options = _options(str(MODEL), BLOCK + 1)
    assert options["dtype"] == fast_dtype("cpu")
    assert options["max_num_seqs"] == MOST_SEQUENCES
    # Two blocks for each, and vLLM's own.
    blocks = 2 * MOST_SEQUENCES + 1
    assert options["kv_cache_memory_bytes"] == blocks * BLOCK * per_token()


@pytest.mark.parametrize(("room", "together"), [(0, 1), (5, 2), (9, 4)])
def test_fewer_write_where_memory_is_short(
    room: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = room * BLOCK * per_token() / target_text.CACHE_SHARE + 1
    monkeypatch.setattr(
        target_text.psutil, "virtual_memory", lambda: SimpleNamespace(available=free)
    )
    assert _options(str(MODEL), 2 * BLOCK)["max_num_seqs"] == together


@pytest.mark.usefixtures("engines_in_this_process")
def test_texts_are_written_in_order_until_there_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(target_text, "AHEAD", 4)
    prompts = [one["prompt_token_ids"] for one in prompts_of([4, 9, 12] * 5, seed=3)]
    with TargetWriter(str(MODEL), 64) as writer:
        every = writer.write(prompts, "all", most_each=9)
        some = writer.write(prompts, "some", most_each=9, most_tokens=1)
        asked = writer.write([prompts[0]] * 6, "sampled", most_each=9, temperature=1.0)
    assert [one.place for one in every] == list(range(15))
    assert all(len(one.ids) == 9 or one.ended for one in every)
    # What was begun is written to its end.
    assert [one.place for one in some] == list(range(4))
    assert len({tuple(one.ids) for one in asked}) > 1


@pytest.mark.usefixtures("engines_in_this_process")
def test_answers_of_a_killed_run_are_not_written_again(tmp_path: Path) -> None:
    prompts = [one["prompt_token_ids"] for one in prompts_of([4, 9, 12] * 3, seed=4)]
    file = tmp_path / "answers.jsonl"
    with TargetWriter(str(MODEL), 64) as writer:
        whole = answers(writer, prompts, file, "all", most_each=9)
        lines = file.read_text().splitlines(keepends=True)
        assert len(lines) == len(prompts) and whole[0] == prompts
        # Killed after five, in the middle of the sixth.
        file.write_text("".join(lines[:5]) + lines[5][:7])
        written: list[int] = []
        write = writer.write

        def counted(some: list[list[int]], *more: object, **named: object) -> object:
            written.append(len(some))
            return write(some, *more, **named)  # type: ignore[arg-type]

        writer.write = counted  # type: ignore[assignment, method-assign]
        assert answers(writer, prompts, file, "rest", most_each=9) == whole
        assert answers(writer, prompts, file, "none", most_each=9) == whole
        file.write_text("".join(lines[:5]))
        assert len(answers(writer, prompts, file, "some", 9, 9)[0]) == 5
    assert written == [4]
    assert len(file.read_text().splitlines()) == 5
