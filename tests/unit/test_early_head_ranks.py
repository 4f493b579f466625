"""What an early head says of tokens: shares of the vocabulary agree with the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_propd.kernels.early_head_ranks import log_probs, ranks

relaxed = settings(deadline=None, max_examples=60)

Judge = Callable[..., torch.Tensor]


@dataclass
class Judged:
    """Early logits of some parents, children of theirs, and cuts of the vocabulary."""

    logits: torch.Tensor
    token: torch.Tensor
    place: torch.Tensor
    cuts: list[int]

    def by(self, judge: Judge) -> torch.Tensor:
        """What every rank computes from its share; they must agree, with the whole too."""
        bounds = [0, *self.cuts, self.logits.shape[1]]
        world = len(bounds) - 1
        barrier = Barrier(world, timeout=10)
        given = [torch.empty(0)] * world

        def on_rank(rank: int) -> torch.Tensor:
            def add(values: torch.Tensor) -> torch.Tensor:
                given[rank] = values
                barrier.wait()
                total = torch.stack(given).sum(0)
                barrier.wait()
                return total

            share = self.logits[:, bounds[rank] : bounds[rank + 1]]
            return judge(share, self.token, self.place, bounds[rank], add)

        with ThreadPoolExecutor(world) as pool:
            found = list(pool.map(on_rank, range(world)))
        assert all(torch.equal(other, found[0]) for other in found)
        whole = judge(self.logits, self.token, self.place, 0, lambda values: values)
        if judge is ranks:
            assert torch.equal(found[0], whole)
        torch.testing.assert_close(found[0], whole, rtol=1e-5, atol=1e-6)
        return found[0]

    def ranks(self) -> list[int]:
        rows = self.logits[self.place].tolist()
        tokens = self.token.tolist()
        return [
            sum(logit > row[token] for logit in row)
            for row, token in zip(rows, tokens, strict=True)
        ]

    def log_probs(self) -> torch.Tensor:
        every = self.logits.double().log_softmax(-1)
        return every[self.place, self.token].float()


@st.composite
def judged(draw: st.DrawFn) -> Judged:
    """Logits in quarters, which bfloat16 holds: equal ones are common."""
    vocab, parents = draw(st.integers(3, 12)), draw(st.integers(1, 4))
    children = draw(st.integers(0, 8))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))

    def numbers(low: int, high: int, count: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=count, max_size=count))

    quarters = torch.tensor(numbers(-60, 60, parents * vocab)) / 4
    token = torch.tensor(numbers(0, vocab - 1, children), dtype=torch.int64)
    place = torch.tensor(numbers(0, parents - 1, children), dtype=torch.int64)
    cuts = draw(st.sets(st.integers(1, vocab - 1), max_size=2))
    logits = quarters.view(parents, vocab).to(dtype)
    return Judged(logits, token, place, sorted(cuts))


@relaxed
@given(judged())
def test_ranks_count_the_tokens_that_the_head_prefers(case: Judged) -> None:
    found = case.by(ranks)
    assert found.dtype == torch.int64 and found.tolist() == case.ranks()


@relaxed
@given(judged())
def test_log_probs_are_the_softmaxs(case: Judged) -> None:
    found = case.by(log_probs)
    assert found.dtype == torch.float32 and (found <= 0).all()
    torch.testing.assert_close(found, case.log_probs(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [[], [1], [99, 100], [57, 900]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_vocabulary_in_uneven_shares(dtype: torch.dtype, cuts: list[int]) -> None:
    torch.manual_seed(0)
    logits = (8 * torch.randn(5, 1001)).to(dtype)
    token = logits.topk(20, -1).indices[:, ::3].flatten()
    case = Judged(logits, token, torch.arange(5).repeat_interleave(7), cuts)
    assert case.by(ranks).tolist() == case.ranks()
    if dtype == torch.float32:
        assert case.by(ranks).view(5, 7).tolist() == [[*range(0, 20, 3)]] * 5
    found = case.by(log_probs)
    torch.testing.assert_close(found, case.log_probs(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cuts", [[], [1], [1, 2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_are_no_numbers_are_hopeless(
    dtype: torch.dtype, cuts: list[int]
) -> None:
    """Sorted by paths, a NaN would come first on a GPU: roots would be dropped."""
    logits = torch.tensor([[math.nan] * 3, [0.0, math.nan, 1.0], [0.0, math.inf, 1.0]])
    place = torch.arange(3).repeat_interleave(3)
    case = Judged(logits.to(dtype), torch.tensor([0, 1, 2] * 3), place, cuts)
    assert case.by(log_probs).tolist() == [-math.inf] * 9


@pytest.mark.parametrize("cuts", [[2], [3], [2, 3], [1, 4]], ids=str)
def test_a_share_may_have_nothing_to_say(cuts: list[int]) -> None:
    row = torch.tensor([[0.0, 2.0, 1.0, -300.0, -400.0]])
    case = Judged(row, torch.tensor([1, 2, 0]), torch.zeros(3).long(), cuts)
    assert case.by(ranks).tolist() == [0, 1, 2]
    torch.testing.assert_close(case.by(log_probs), case.log_probs())


@pytest.mark.parametrize("cuts", [[], [1], [2], [1, 2]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [200.0, 1e4, 3e38])
def test_huge_differences_are_certain(
    size: float, dtype: torch.dtype, cuts: list[int]
) -> None:
    logits = torch.tensor([[0.0, size, -size], [size, -size, size]], dtype=dtype)
    place = torch.tensor([0, 0, 0, 1, 1, 1])
    case = Judged(logits, torch.tensor([0, 1, 2] * 2), place, cuts)
    assert case.by(ranks).tolist() == [1, 0, 2, 0, 2, 0]
    half = pytest.approx(-math.log(2))
    never = -math.inf
    assert case.by(log_probs).tolist() == [never, 0, never, half, never, half]
