"""The first run's judgement of texts: equal, parting at a tie, wrong, or not to be had."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_first_run.engines import PRUNED
from gpu_first_run.setting import BLOCKS, SPEED_DTYPE, TEXT_DTYPE, Setting
from gpu_first_run.speed import DYNAMIC
from gpu_first_run.texts import TIE, check_texts, compared, keep_plain

from vllm_propd.config import ProPDConfig

PLAIN = [[1, 2, 3, 4], [5, 6, 7, 8]]
MARGINS = [[1.0, 0.04, 0.5, 1.0], [1.0, 0.0625, 0.01, 1.0]]


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    made = Setting("cuda", tmp_path / "model", tmp_path)
    keep_plain(made, PLAIN, MARGINS)
    return made


@pytest.mark.parametrize(
    ("ours", "text", "right"),
    [
        (PLAIN, "2 of 2 equal", True),
        (
            [[1, 9, 9, 9], PLAIN[1]],
            "1 of 2 equal, 1 part at ties; 5 of 8 tokens before they part",
            True,
        ),
        (
            [PLAIN[0], [5, 6, 9, 9]],
            "1 of 2 equal, 1 part at ties; 6 of 8 tokens before they part",
            True,
        ),
        (
            [PLAIN[0], [5, 9, 7, 8]],
            "1 of 2 equal, 1 WRONG; 5 of 8 tokens before they part",
            False,
        ),
        (PLAIN[:1], "1 of 1 equal", True),
    ],
)
def test_texts_are_judged(
    ours: list[list[int]], text: str, right: bool, setting: Setting
) -> None:
    notes = setting.notes("an item")
    assert check_texts(setting, notes, "texts", ours) == right
    found: dict[str, Any] = setting.found("an item")
    assert found["texts"] == text
    wrong = [{"prompt": 1, "at": 1, "margin": 0.062}]
    assert found.get("texts, wrong") == (None if right else wrong)


@pytest.mark.parametrize("why", ["none", "half a file", "another model", "another device"])
def test_without_plain_texts_an_item_goes_on(why: str, setting: Setting) -> None:
    left = setting.folder / "plain.json"
    if why == "none":
        left.unlink()
    elif why == "half a file":
        left.write_text(left.read_text()[:9])
    elif why == "another model":
        setting = dataclasses.replace(setting, model=setting.folder / "inflated")
    else:
        setting = dataclasses.replace(setting, device="cpu")
    assert compared(setting, PLAIN) is None
    assert check_texts(setting, setting.notes("an item"), "texts", PLAIN)
    assert "nothing to compare with" in setting.found("an item")["texts"]


def last_bit(dtype: str) -> float:
    """Of a logit between 16 and 32: the demo model's reach 17."""
    return 16.0 * torch.finfo(getattr(torch, dtype)).eps


def test_rounding_alone_is_no_wrong_text(setting: Setting) -> None:
    """Two logits may each be a bit off; in the type that is compared, that is a tie."""
    assert setting.options(False)["dtype"] == TEXT_DTYPE
    assert 2 * last_bit(TEXT_DTYPE) < TIE < last_bit(SPEED_DTYPE)
    assert setting.options(True, **setting.speed_options())["dtype"] == SPEED_DTYPE
    rehearsal = dataclasses.replace(setting, device="cpu")
    assert rehearsal.options(True, **rehearsal.speed_options())["dtype"] == "float32"


def test_a_cache_that_is_listed_at_once() -> None:
    """And that holds what the largest batches draft."""
    options = Setting("cuda", Path("model"), Path()).options(False)
    assert options["num_gpu_blocks_override"] == BLOCKS
    assert Setting("cuda", Path(), Path()).options(
        True, num_gpu_blocks_override=None
    )["num_gpu_blocks_override"] is None  # fmt: skip
    assert 128 * options["max_model_len"] <= 16 * BLOCKS


@pytest.mark.parametrize("propd", [PRUNED, DYNAMIC])
def test_the_items_settings_are_settings(propd: dict[str, Any]) -> None:
    ProPDConfig.model_validate(propd)
