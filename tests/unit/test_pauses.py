"""Pauses of drafting: taken where no tree pays, each load's its own."""

from __future__ import annotations

from itertools import pairwise

from vllm_propd.core.pauses import FIRST, LONGEST, Pauses


def probes(pauses: Pauses, steps: int, sequences: int = 8) -> list[int]:
    """The steps after which trees were drafted, if no plan ever schedules one."""
    drafted, found = False, []
    for step in range(steps):
        pauses.observe(sequences, drafted, scheduled=False)
        drafted = pauses.drafting
        if drafted:
            found.append(step)
    return found


def test_pauses_grow_while_trees_do_not_pay() -> None:
    found = probes(Pauses(), 400)
    gaps = [after - before for before, after in pairwise(found)]
    assert gaps[:5] == [FIRST + 1, 9, 17, 33, LONGEST + 1]
    assert set(gaps[4:]) == {LONGEST + 1}


def test_no_pause_while_nodes_are_scheduled() -> None:
    pauses = Pauses()
    for _ in range(50):
        pauses.observe(4, drafted=True, scheduled=True)
        assert pauses.drafting


def test_each_scheduled_tree_halves_the_next_pause() -> None:
    for trees, then in ((1, LONGEST // 2), (2, LONGEST // 4), (9, FIRST)):
        pauses = Pauses()
        probes(pauses, 400)
        for _ in range(trees):
            pauses.observe(8, drafted=True, scheduled=True)
        assert probes(pauses, LONGEST)[1] == then + 1


def test_each_load_has_its_own_pause() -> None:
    for load in (1, 32):
        pauses = Pauses()
        probes(pauses, 70)
        assert not pauses.drafting
        pauses.observe(9, drafted=False, scheduled=False)
        assert not pauses.drafting  # nearly the same load
        pauses.observe(load, drafted=False, scheduled=False)
        assert pauses.drafting


def test_a_load_that_comes_again_goes_on_with_its_pause() -> None:
    pauses = Pauses()
    probes(pauses, 400)
    probes(pauses, 20, sequences=2)
    assert not pauses.drafting
    assert len(probes(pauses, LONGEST + 2)) == 1
    probes(pauses, 20, sequences=1)
    pauses.observe(1, drafted=True, scheduled=True)
    assert pauses.drafting  # and what pays at another load does not end it
    pauses.observe(8, drafted=False, scheduled=False)
    assert not pauses.drafting


def test_ranks_that_see_the_same_steps_pause_alike() -> None:
    one, other = Pauses(), Pauses()
    assert probes(one, 333, 5) == probes(other, 333, 5)


def test_a_step_without_drafted_sequences_says_nothing() -> None:
    pauses = Pauses()
    for _ in range(10):
        pauses.observe(3, drafted=False, scheduled=False)
        assert pauses.drafting
