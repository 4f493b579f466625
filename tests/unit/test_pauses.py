"""Pauses of drafting: taken where no tree pays, each load's its own."""

from __future__ import annotations

from itertools import pairwise

from vllm_propd.core.pauses import FIRST, LONGEST, Pauses


def probes(pauses: Pauses, steps: int, sequences: int = 8, share: float = 0.0) -> list[int]:
    """The steps after which the heads were asked, if their trees never pay."""
    found = []
    for step in range(steps):
        if pauses.asks(sequences, share):
            found.append(step)
            pauses.observe(paid=False)
    return found


def pay(pauses: Pauses, sequences: int, times: int = 1) -> None:
    for _ in range(times):
        pauses.asks(sequences)
        pauses.observe(paid=True)


def test_pauses_grow_while_trees_do_not_pay() -> None:
    found = probes(Pauses(), 400)
    gaps = [after - before for before, after in pairwise(found)]
    assert gaps[:5] == [FIRST + 1, 9, 17, 33, LONGEST + 1]
    assert set(gaps[4:]) == {LONGEST + 1}


def test_no_pause_while_nodes_are_verified() -> None:
    pauses = Pauses()
    for _ in range(50):
        assert pauses.asks(4)
        pauses.observe(paid=True)


def test_each_tree_that_pays_halves_the_next_pause() -> None:
    for trees, then in ((1, LONGEST // 2), (2, LONGEST // 4), (9, FIRST)):
        pauses = Pauses()
        probes(pauses, 400)
        pay(pauses, 8, trees)
        assert probes(pauses, LONGEST)[1] == then + 1


def test_each_load_has_its_own_pause() -> None:
    for load in (1, 32):
        pauses = Pauses()
        probes(pauses, 70)
        assert not pauses.asks(8)
        assert not pauses.asks(9)  # nearly the same load
        assert pauses.asks(load)


def test_heads_may_pay_where_texts_suggest_nothing() -> None:
    pauses = Pauses()
    probes(pauses, 70, share=1.0)
    assert not pauses.asks(8, 0.9)
    assert pauses.asks(8, 0.5)
    assert pauses.asks(8, 0.1)


def test_a_load_that_comes_again_goes_on_with_its_pause() -> None:
    pauses = Pauses()
    probes(pauses, 400)
    probes(pauses, 20, sequences=2)
    assert not pauses.asks(8)
    assert len(probes(pauses, LONGEST + 2)) == 1
    pay(pauses, 1)
    assert not pauses.asks(8)  # what pays at another load does not end it


def test_ranks_that_see_the_same_steps_pause_alike() -> None:
    one, other = Pauses(), Pauses()
    assert probes(one, 333, 5) == probes(other, 333, 5)


def test_a_step_whose_requests_are_gone_says_nothing() -> None:
    pauses = Pauses()
    for _ in range(10):
        assert pauses.asks(3)
