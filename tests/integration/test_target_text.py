"""Writing by the target: in the type that is fast, and a KV cache that holds who writes."""

from types import SimpleNamespace

import pytest
from conftest import MODEL

from vllm_propd.engine import target_text
from vllm_propd.engine.target_text import BLOCK, MOST_SEQUENCES, _options
from vllm_propd.fast_dtype import fast_dtype

BYTES = {"float32": 4, "bfloat16": 2}


def per_token() -> int:
    """Of the demo model, all layers' keys and values."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(MODEL)
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * BYTES[fast_dtype("cpu")]


def test_as_many_write_together_as_the_cache_holds() -> None:
    options = _options(str(MODEL), [100] * 500 + [BLOCK + 1])
    assert options["dtype"] == fast_dtype("cpu")
    assert options["max_num_seqs"] == MOST_SEQUENCES
    # A block for each, two for the longest, and vLLM's own.
    blocks = MOST_SEQUENCES + 2
    assert options["kv_cache_memory_bytes"] == blocks * BLOCK * per_token()


@pytest.mark.parametrize(("room", "together"), [(0, 1), (5, 2), (9, 4)])
def test_fewer_write_where_memory_is_short(
    room: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = room * BLOCK * per_token() / target_text.CACHE_SHARE + 1
    monkeypatch.setattr(
        target_text.psutil, "virtual_memory", lambda: SimpleNamespace(available=free)
    )
    assert _options(str(MODEL), [2 * BLOCK] * 9)["max_num_seqs"] == together
