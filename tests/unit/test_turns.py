"""Whose turn it is, and what it is compared with."""

from __future__ import annotations

import pytest

from vllm_propd.bench.timing.turn import Turn
from vllm_propd.bench.timing.turns import OFTEN, Turns, fast_steps, in_turns, turns_in

SECONDS = 2.0
"""Of every turn; they follow one another without a gap."""


def turn(tokens_per_s: float, place: int = 0, group: int = 0) -> Turn:
    return Turn(
        began=SECONDS * place,
        seconds=SECONDS,
        tokens=round(SECONDS * tokens_per_s),
        texts=[[group]],
        group=group,
    )


def turns_of(*taken: tuple[str, float]) -> Turns[Turn]:
    turns: Turns[Turn] = Turns()
    for place, (arm, tokens_per_s) in enumerate(taken):
        turns.add(arm, turn(tokens_per_s, place))
    return turns


@pytest.mark.parametrize(
    ("arms", "order"),
    [
        ("A", "AAA"),
        ("AB", "ABABA"),
        ("ABCDEFGHI", "ABCDEFGHIABCDEFGHIA"),
        ("ABCDEFGHIJ", "ABCDEFGHIAJABCDEFGHIAJA"),
    ],
)
def test_the_first_arm_comes_again_after_eight_others(arms: str, order: str) -> None:
    taken: list[str] = []
    for arm in in_turns(arms, lambda arm: taken.count(arm) < 2 * arms.count(arm)):
        taken.append(arm)
    assert "".join(taken) == order
    assert turns_in(len(arms), 2) == len(order)


def test_who_has_had_enough_takes_no_more_turns() -> None:
    wanted, taken = {"A": 0, "B": 3, "C": 1, "D": 2}, ["start"]
    for arm in in_turns("ABCD", lambda arm: taken.count(arm) < wanted[arm]):
        taken.append(arm)
    assert "".join(taken[1:]) == "ABCD" + "ABD" + "AB" + "A"


def test_nobody_has_a_turn_where_none_needs_one() -> None:
    assert list(in_turns("AB", lambda arm: arm == "A")) == []


def test_the_share_of_what_an_arm_needs_is_of_rounds_and_of_seconds() -> None:
    turns = turns_of(("plain", 10), ("b", 30), ("b", 30))
    assert turns.share("b", rounds=3) == pytest.approx(2 / 3)
    assert turns.share("b", rounds=2) == 1.0
    assert turns.share("b", rounds=2, seconds=8 * SECONDS) == pytest.approx(0.25)


def steps_of(group: int, *steps: tuple[int, float, int]) -> Turn:
    """A turn of steps: draft tokens, seconds, tokens that came out."""
    drafted, seconds, tokens = zip(*steps, strict=True)
    return Turn(
        began=0.0,
        seconds=sum(seconds),
        tokens=sum(tokens),
        texts=[[group]],
        group=group,
        step_seconds=list(seconds),
        step_kinds=[(1, count) for count in drafted],
    )


def test_groups_of_prompts_count_alike() -> None:
    """Of the first group there are two turns, of the second one."""
    turns: Turns[Turn] = Turns()
    turns.add("plain", steps_of(0, (0, 1.0, 4), (0, 1.0, 4)))
    turns.add("plain", steps_of(1, (0, 1.0, 4), (0, 1.0, 4)))
    turns.add("b", steps_of(0, (3, 1.0, 12)))
    turns.add("b", steps_of(0, (3, 1.0, 12)))
    turns.add("b", steps_of(1, (3, 1.0, 8)))
    assert turns.ratio("b") == pytest.approx((12 / 4 + 8 / 4) / 2)
    assert turns.latest("b").texts == [[0], [1]]
    assert turns.latest("b").tokens == 20


def at_once(group: int) -> Turn:
    """A turn whose texts all end with their first tokens."""
    return Turn(whole_s=0.1, texts=[[group]], group=group)


def test_texts_that_end_at_once_are_in_no_ratio() -> None:
    turns: Turns[Turn] = Turns()
    for arm, tokens in (("plain", 4), ("b", 12)):
        turns.add(arm, at_once(0))
        turns.add(arm, steps_of(1, *[(0, 1.0, tokens)] * OFTEN))
    assert turns.ratio("b") == pytest.approx(3.0)
    assert [turns.tokens_per_s(arm) for arm in ("plain", "b")] == [4.0, 12.0]
    assert [turns.when(one) for one in turns.decoding("b")] == [OFTEN / 2]
    assert turns.steps("b") == {(1, 0): [1.0] * OFTEN}
    assert turns.latest("b").texts == [[0], [1]]


def test_a_group_that_ends_at_once_in_one_arm_only_is_in_no_ratio() -> None:
    """Sampled texts differ."""
    turns: Turns[Turn] = Turns()
    turns.add("plain", at_once(0))
    turns.add("plain", steps_of(1, (0, 1.0, 4)))
    turns.add("b", steps_of(0, (0, 1.0, 9)))
    turns.add("b", steps_of(1, (0, 1.0, 8)))
    assert turns.ratio("b") == pytest.approx(2.0)


def test_where_all_texts_end_at_once_there_is_no_speed() -> None:
    turns: Turns[Turn] = Turns()
    for arm in ("plain", "b"):
        turns.add(arm, at_once(0))
    assert turns.ratio("b") == turns.tokens_per_s("b") == 0.0


def test_what_slows_steps_down_does_not_shape_the_ratio() -> None:
    """Plain vLLM loses half its speed for most of the time, b a tenth."""
    turns: Turns[Turn] = Turns()
    for slow in (True, True, True, False, True):
        plain, small, large = (2.0, 1.1, 4.4) if slow else (1.0, 1.0, 4.0)
        turns.add("plain", steps_of(0, *[(0, plain, 1)] * 8))
        # A step without drafts is not measured by those with some.
        turns.add("b", steps_of(0, (0, small, 1), (5, large, 6), (0, small, 1)))
    assert turns.ratio("b") == pytest.approx(8 / 6)
    assert turns.ratio("plain") == 1.0
    assert {kind: len(laps) for kind, laps in turns.steps("b").items()} == {
        (1, 0): 10,
        (1, 5): 5,
    }


def test_luck_does_not_shape_the_ratio() -> None:
    """A turn that happened to accept more is no faster one."""
    turns: Turns[Turn] = Turns()
    turns.add("plain", steps_of(0, (0, 1.0, 1)))
    for accepted in (1, 2, 6):
        turns.add("b", steps_of(0, (5, 1.0, accepted)))
    assert turns.ratio("b") == pytest.approx(3.0)


def test_steps_of_rare_sizes_are_no_slower_ones() -> None:
    """Disturbed as any others: of two the faster one is at the lower third."""
    often = [0.9 + 0.1 * i for i in range(3 * OFTEN)]
    found = fast_steps({(1, 4): often, (1, 9): [3.0] * 2, (1, 7): [4.0]})
    third, half = often[len(often) // 3] / 0.9, often[len(often) // 2] / 0.9
    assert found[1, 4] == pytest.approx(0.9)
    assert found[1, 9] == pytest.approx(3.0 / third, rel=0.06)
    assert found[1, 7] == pytest.approx(4.0 / half, rel=0.06)


def test_steps_of_rare_sizes_alone_count_as_they_are() -> None:
    found = fast_steps({(1, 4): [2.0, 3.0], (1, 5): [4.0]})
    assert found == {(1, 4): 2.0, (1, 5): 4.0}


def test_steps_of_a_batch_that_shrinks_are_not_compared_with_those_of_a_full_one() -> None:
    """Texts end by themselves: more sequences in a step take longer, drafts or none."""
    turns: Turns[Turn] = Turns()
    for arm, drafts, tokens in (("plain", 0, 1), ("b", 2, 2)):
        steps = [((size, size * drafts), float(size), size) for size in (4, 4, 2, 1)]
        kinds, seconds, of_one = zip(*steps, strict=True)
        turns.add(
            arm,
            Turn(
                began=0.0,
                seconds=sum(seconds),
                tokens=tokens * sum(of_one),
                step_seconds=list(seconds),
                step_kinds=list(kinds),
            ),
        )
    # By draft tokens alone, plain vLLM would always step as fast as with one sequence.
    assert turns.ratio("b") == pytest.approx(2.0)


def texts_of(arm_of: dict[str, list[list[int]]], full: bool = False) -> Turns[Turn]:
    """Turns with one prompt, of the texts that each arm puts out one after another."""
    turns: Turns[Turn] = Turns()
    for arm, texts in arm_of.items():
        for text in texts:
            turns.add(arm, Turn(texts=[text], full=full))
    return turns


@pytest.mark.parametrize("other", [[1, 2], [1, 2, 3, 4], [1, 2, 4], []])
def test_texts_that_end_by_themselves_are_compared_whole(other: list[int]) -> None:
    turns = texts_of({"plain": [[1, 2, 3]], "b": [other], "c": [[1, 2, 3]]})
    assert [turns.same_texts(arm) for arm in ("plain", "b", "c")] == [1, 0, 1]


@pytest.mark.parametrize(
    ("other", "same"), [([1, 2], 1), ([1, 2, 3, 4], 1), ([1, 3], 0), ([], 0)]
)
def test_texts_of_full_batches_are_compared_as_far_as_both_go(
    other: list[int], same: int
) -> None:
    assert texts_of({"plain": [[1, 2, 3]], "b": [other]}, True).same_texts("b") == same


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_text_is_the_same_only_if_it_is_in_every_turn(place: int) -> None:
    texts = [[1, 2, 3]] * 3
    others = [[1, 2, 9] if i == place else text for i, text in enumerate(texts)]
    turns = texts_of({"plain": texts, "b": others})
    assert turns.same_texts("b") == 0
    for arm in ("plain", "b"):
        turns.add(arm, Turn(texts=[[4], [5]], group=1))
    assert turns.same_texts("b") == 2


@pytest.mark.parametrize("other", [[1, 2, 3, 4], [1, 2]])
def test_a_text_that_differs_where_only_texts_count_is_not_the_same(
    other: list[int],
) -> None:
    """Chunks beside rounds: their texts end by themselves, and their times are others'."""
    turns = texts_of({"plain": [[1, 2]], "b": [[1, 2, 3]], "c": [[1, 2, 3]]}, full=True)
    for arm, text in (("plain", [1, 2, 3]), ("b", other), ("c", [1, 2, 3])):
        turns.add(arm, Turn(seconds=9.0, tokens=9, texts=[text]), only_texts=True)
    assert [turns.same_texts(arm) for arm in ("plain", "b", "c")] == [1, 0, 1]
    assert turns.only([0]).same_texts("b") == 0
    assert len(turns.of("b")) == 1 and turns.tokens_per_s("b") == 0.0


def test_turns_without_steps_are_compared_whole() -> None:
    """A trace's."""
    turns = turns_of(("plain", 10.0), ("b", 12.0))
    assert turns.ratio("b") == pytest.approx(1.2)


def test_a_turn_is_placed_by_when_half_of_it_is_over() -> None:
    turns = turns_of(("plain", 10.0), ("b", 10.0))
    assert [turns.when(turns.of(arm)[0]) for arm in ("plain", "b")] == [1.0, 3.0]


def test_no_group_of_prompts_counts_more_for_having_had_more_turns() -> None:
    turns: Turns[Turn] = Turns()
    for place, (group, speed) in enumerate([(0, 10), (1, 40), (0, 12), (0, 90)]):
        turns.add("a", turn(speed, place, group))
    assert turns.tokens_per_s("a") == (12 + 40) / 2
