"""The best tokens of rows of logits: those of torch, whatever the type."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_propd.kernels.best_tokens import best_tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [5, 64, 1000, 49_152])
def test_the_best_are_torchs(dtype: torch.dtype, vocabulary: int) -> None:
    torch.manual_seed(0)
    logits = (8.0 * torch.randn(7, vocabulary)).to(dtype)
    rows = np.array([6, 0, 3])
    token, log_share = best_tokens(logits, rows, 8)()
    expected = logits[torch.from_numpy(rows)].float().topk(min(8, vocabulary))
    found = logits[torch.from_numpy(rows)].float().gather(1, torch.from_numpy(token))
    torch.testing.assert_close(found, expected.values, rtol=0.0, atol=0.0)
    if dtype == torch.float32:  # no ties
        assert token.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(
        log_share, expected.values.log_softmax(-1).numpy(), atol=1e-5
    )
    assert all(len(set(row)) == len(row) for row in token.tolist())


def test_of_equal_tokens_the_first() -> None:
    logits = torch.zeros(1, 200)
    logits[0, [150, 20]] = 1.0
    token, _ = best_tokens(logits, np.array([0]), 4)()
    assert token.tolist() == [[20, 150, 0, 1]]


def test_what_is_masked_is_no_token() -> None:
    logits = torch.full((2, 100), -torch.inf)
    logits[0, 7] = 3.0
    token, log_share = best_tokens(logits, np.array([0, 1]), 3)()
    assert token[0, 0] == 7 and log_share[0, 0] == 0.0
    assert not np.isfinite(log_share[0, 1:]).any() and not np.isfinite(log_share[1]).any()


def test_what_is_no_number_hides_no_token() -> None:
    logits = torch.full((1, 200), -1.0)
    logits[0, [3, 63, 140]] = torch.nan
    logits[0, [100, 190]] = torch.tensor([9.0, 8.0])
    token, _ = best_tokens(logits, np.array([0]), 2)()
    assert token.tolist() == [[100, 190]]


def test_rows_of_a_wider_tensor() -> None:
    """Where the vocabulary is padded, rows are not side by side."""
    wide = torch.randn(4, 80)
    token, _ = best_tokens(wide[:, :70], np.array([1, 2]), 5)()
    assert token.tolist() == wide[[1, 2], :70].topk(5).indices.tolist()
