"""What others have said: contexts, counts, salts, and what they are worth."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_propd.core.drafting.candidates import Candidates
from vllm_propd.core.drafting.growth import grow_from
from vllm_propd.core.sources.contexts import ALWAYS, MOSTLY, ORDERS, SEEN_ONCE, SELDOM
from vllm_propd.core.sources.lookup import REACH
from vllm_propd.core.sources.successors import (
    AT_ROOT,
    BESIDE,
    BINS,
    RANKS,
    UNKNOWN,
    Successors,
)
from vllm_propd.core.sources.suffix_memory import (
    AFTER_ROOT,
    ASTRAY,
    FIRST,
    GOING_ON,
    Recalled,
    SuffixMemory,
)
from vllm_propd.core.tree import Float32s, Ints

VOCABULARY = 50
NOTHING = np.full((1, REACH), -1, np.int64)
NO_WORTH = np.full((1, REACH), -np.inf, np.float32)


def say(
    memory: SuffixMemory,
    text: list[int],
    name: str = "one",
    prompt: int = 0,
    salt: int = 0,
    start: int = 0,
    teaches: bool = True,
    suggested: Ints = NOTHING,
) -> None:
    """A request has said this, from ``start`` on in one step."""
    row, ends = np.zeros(1, np.int64), np.array([len(text)])
    memory.see(
        [name], np.array([text], np.int32), row, np.array([prompt]), ends,
        np.array([start]), np.array([salt]), np.array([teaches]), suggested,
    )  # fmt: skip


def ask(memory: SuffixMemory, text: list[int], salt: int = 0) -> Recalled:
    row, ends = np.zeros(1, np.int64), np.array([len(text)])
    return memory.of(np.array([text], np.int32), row, ends, np.array([salt]))


def goes_on(
    memory: SuffixMemory,
    text: list[int],
    salt: int = 0,
    own: Ints = NOTHING,
    worth: Float32s = NO_WORTH,
) -> list[int]:
    """How the text goes on, as far as anyone knows."""
    path, value = memory.suggest(ask(memory, text, salt), own, worth)
    known = path[0] >= 0
    assert (np.isfinite(value[0]) == known).all()
    assert not known[np.argmin(known) :].any() or known.all(), "a path has no holes"
    return path[0][known].tolist()


def own_path(tokens: list[int], probability: float) -> tuple[Ints, Float32s]:
    path, worth = NOTHING.copy(), NO_WORTH.copy()
    path[0, : len(tokens)], worth[0, : len(tokens)] = tokens, np.log(probability)
    return path, worth


def test_a_text_goes_on_as_anothers_did() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [1, 2, 3, 4, 5, 6])
    assert goes_on(memory, [9, 2, 3]) == [4, 5, 6]
    assert goes_on(memory, [9, 9, 3]) == [], "one token is no context"
    assert goes_on(memory, [3]) == []


def test_the_longest_context_speaks() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [1, 2, 3, 10], "one")
    for name in ("two", "three"):
        say(memory, [7, 2, 3, 20], name)
    assert goes_on(memory, [1, 2, 3]) == [10]
    assert goes_on(memory, [7, 2, 3]) == [20]
    assert goes_on(memory, [8, 2, 3]) == [20], "what came more often"


def test_salts_never_meet() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [1, 2, 3, 4], salt=17)
    assert goes_on(memory, [1, 2, 3], salt=17) == [4]
    for other in (0, -17, 16):
        assert goes_on(memory, [1, 2, 3], salt=other) == []


def test_prompts_are_read_and_not_kept() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [1, 2, 3, 4, 5], prompt=3)
    assert goes_on(memory, [1, 2]) == [], "that 3 comes next is the prompt's word"
    assert goes_on(memory, [2, 3]) == [4, 5]


def test_a_text_is_taken_note_of_once() -> None:
    both = SuffixMemory(VOCABULARY), SuffixMemory(VOCABULARY)
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    for end in range(4, len(text) + 1):
        say(both[0], text[:end], prompt=2)
    say(both[0], text[:6], prompt=2)  # preempted: it is shorter for a while
    say(both[1], text, prompt=2)
    marks, tokens, often, _ = ask(both[0], text).table
    for mine, whole in zip((marks, tokens, often), ask(both[1], text).table, strict=False):
        np.testing.assert_array_equal(mine, whole)
    both[0].end("one", text[2:])
    say(both[0], text, prompt=2)
    assert (ask(both[0], text).table[2] == ALWAYS).any(), "another of the same name"


def test_a_sessions_next_prompt_is_not_kept() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [1, 2, 3, 10, 11], prompt=3)
    say(memory, [1, 2, 3, 10, 40, 41, 42, 43, 20, 21], prompt=8)
    assert goes_on(memory, [40, 41]) == [], "that 42 comes next is the user's word"
    assert goes_on(memory, [42, 43]) == [20, 21]


@pytest.mark.parametrize("seen", [4, 12])
def test_last_words_are_kept(seen: int) -> None:
    """The worker drafts nothing for one that has ended, and does not see it again."""
    memory, text = SuffixMemory(VOCABULARY), [1, 2, *range(3, 15)]
    say(memory, text[:seen], prompt=2, salt=5)
    memory.end("one", text[2:])
    assert goes_on(memory, [*range(seen - 4, seen - 1)], salt=5)[-1] == 14
    assert goes_on(memory, [12, 13]) == [], "under its salt"
    memory.end("never seen", text)
    memory.end("one", text[2:])
    assert goes_on(memory, [12, 13]) == []


def test_tokens_that_the_target_does_not_know_are_not_drafted() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [1, 2, VOCABULARY + 3, 4])
    assert goes_on(memory, [1, 2]) == []
    assert goes_on(memory, [2, VOCABULARY + 3]) == [4]


def test_the_surer_of_two_is_followed() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    assert FIRST[1][0][SEEN_ONCE] == 0.30
    own, worth = own_path([20, 21], 0.35)
    assert goes_on(memory, text, own=own, worth=worth) == [20, 21]
    own, worth = own_path([20, 21], 0.25)
    assert goes_on(memory, text, own=own, worth=worth) == [9, 10, 11], "and not 21 then"
    own, worth = own_path([9, 20], 0.05)
    found, value = memory.suggest(ask(memory, text), own, worth)
    assert found[0, :3].tolist() == [9, 10, 11]
    assert np.exp(value[0, 0]) == pytest.approx(0.05), "where both agree, its own price"


def test_others_words_along_a_path() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [1, 2, 3, 4, 5])
    path = NOTHING.copy()
    path[0, :3] = [3, 4, 9]
    found = ask(memory, [1, 2]).best_along(path)[0].tolist()
    assert found == [3, 4, 5, -1] + [-1] * (REACH - 4)


def test_the_table_is_of_fixed_size_and_forgets_the_oldest() -> None:
    memory, rng = SuffixMemory(VOCABULARY, slots=1 << 10), np.random.default_rng(0)
    first = [1, 2, 3, 4]
    say(memory, first, "first")
    for name in range(40):
        say(memory, rng.integers(5, VOCABULARY, 100).tolist(), str(name))
    assert goes_on(memory, [1, 2, 3]) == []
    say(memory, first, "again")
    assert goes_on(memory, [1, 2, 3]) == [4]


@pytest.mark.parametrize(
    ("times", "often"),
    [
        ({7: 1}, SEEN_ONCE), ({7: 2}, ALWAYS), ({7: 2, 8: 1}, MOSTLY),
        ({7: 1, 8: 1}, SELDOM), ({7: 2, 8: 1, 9: 1}, SELDOM),
        ({3: 1, 4: 1, 5: 1, 6: 1, 7: 9}, MOSTLY),
    ],
)  # fmt: skip
def test_how_often_a_token_has_come(times: dict[int, int], often: int) -> None:
    memory = SuffixMemory(VOCABULARY)
    said = [token for token, count in times.items() for _ in range(count)]
    for name, token in enumerate(said):
        say(memory, [1, 2, token], str(name), prompt=2)
    _, tokens, found, _ = ask(memory, [1, 2]).table
    (slot,) = np.flatnonzero(tokens[:, 0] >= 0)
    assert tokens[slot, 0] == 7
    assert found[slot] == often


def test_contexts_are_worth_what_they_have_been() -> None:
    """A root's next token is 3 in three of four texts; the one after 3 always 4."""
    memory, rng = SuffixMemory(VOCABULARY), np.random.default_rng(1)
    for name in range(4000):
        said = [3, 4] if rng.random() < 0.75 else [5, 6]
        say(memory, [1, 2, *said], str(name), prompt=2, start=2)
    curves = np.exp(ask(memory, [1, 2]).table[3])
    two = ORDERS.index(2)
    assert curves[AFTER_ROOT, 0, two, MOSTLY] == pytest.approx(0.75, abs=0.03)
    three = ORDERS.index(3)
    assert curves[GOING_ON, 0, three, ALWAYS] > 0.99
    assert curves[ASTRAY, 0, three, ALWAYS] > 0.99


def test_beside_its_own_word_a_context_has_another_price() -> None:
    memory, rng, own = SuffixMemory(VOCABULARY), np.random.default_rng(2), NOTHING.copy()
    own[0, :2] = [3, 9]
    for name in range(3000):
        token = int(rng.choice([3, 7], p=[0.8, 0.2]))
        say(memory, [1, 2, 7], f"other {name}", prompt=2, teaches=False)
        say(memory, [1, 2, token], str(name), prompt=2, start=2, suggested=own)
    curves = np.exp(ask(memory, [1, 2]).table[3])
    found = curves[AFTER_ROOT, 1, ORDERS.index(2), SELDOM]
    assert found == pytest.approx(0.2, abs=0.04)
    untaught = np.exp(ask(SuffixMemory(VOCABULARY), [1]).table[3])
    np.testing.assert_array_equal(curves[:, 0], untaught[:, 0])


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 30))
def test_it_says_what_a_dictionary_would_say(seed: int) -> None:
    """While there is room: the most frequent after the longest context that was seen."""
    rng = np.random.default_rng(seed)
    memory, seen = SuffixMemory(VOCABULARY, slots=1 << 14), dict[tuple[int, ...], Counter]()
    texts = [rng.integers(0, 3, rng.integers(3, 30)).tolist() for _ in range(6)]
    for name, text in enumerate(texts):
        say(memory, text, str(name))
        for end in range(len(text)):
            for order in ORDERS:
                if order <= end:
                    context = tuple(text[end - order : end])
                    seen.setdefault(context, Counter())[text[end]] += 1
    for text in texts:
        best = ask(memory, text).best_along(NOTHING)[0, 0]
        known = [
            seen[c] for o in ORDERS if (c := tuple(text[-o:])) in seen and o <= len(text)
        ]
        if not known:
            assert best == -1
        else:
            assert known[0][best] == max(known[0].values())


def successors(memory: SuffixMemory, text: list[int], after: dict[int, int]) -> Successors:
    """The root's successor is right half of the time, the others' one in ten."""
    token = np.full((VOCABULARY, RANKS), UNKNOWN, np.int32)
    for before, best in after.items():
        token[before, 0] = best
    worth = np.full((1, 2 * BESIDE, BINS), np.log(0.1), np.float32)
    worth[:, [AT_ROOT, AT_ROOT + BESIDE]] = np.log(0.5)
    bins, roots = np.zeros(token.shape, np.uint8), np.array(text[-1:])
    return Successors(token, bins, worth, roots, ask(memory, text))


def test_every_branch_goes_on_as_others_did() -> None:
    """The target thinks of 7 after 2; after 2, 7 others have said 8, 9."""
    memory = SuffixMemory(VOCABULARY)
    say(memory, [2, 7, 8, 9])
    known = successors(memory, [1, 2], {2: 7, 7: 30})
    (tree,) = grow_from(Candidates.none(1), np.array([4]), None, known)
    assert tree.token.tolist() == [7, 8, 9, 30]
    assert tree.parent.tolist() == [0, 1, 2, 1]
    two, three = FIRST[0][ORDERS.index(2)], FIRST[0][ORDERS.index(3)]
    expected = np.cumprod([0.5, two[SEEN_ONCE], three[SEEN_ONCE]])
    np.testing.assert_allclose(np.exp(tree.score[:3]), expected, rtol=1e-5)
    assert tree.looked_up is not None
    assert not tree.looked_up.any()


def test_no_branch_goes_on_as_others_did_where_a_text_suggests_more() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [2, 7, 8, 9])
    known = successors(memory, [1, 2], {2: 30})
    (tree,) = grow_from(Candidates.none(1), np.array([9]), own_path([7, 40], 0.9), known)
    assert tree.token.tolist() == [7, 40, 30], "its own word was followed before"


def test_what_others_said_is_no_node_if_the_target_does_not_know_it() -> None:
    memory = SuffixMemory(VOCABULARY)
    say(memory, [2, 7, VOCABULARY, 9])
    known = successors(memory, [1, 2], {2: 7})
    (tree,) = grow_from(Candidates.none(1), np.array([9]), None, known)
    assert tree.token.tolist() == [7]
