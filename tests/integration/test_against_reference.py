"""Real engines draft, prune and accept as the reference in ``examples/``, step by step.

No two nodes of these trees are nearly as probable as each other: scores differ by 2e-4 at
least, and those of both sides by 1e-5; so heads compute in float32 here.
"""

from typing import Any

import pytest
from conftest import MODEL, engine, greedy, prompts_of, run
from reference_decode import Reference

TOKENS, NODES = 48, 16
PROMPTS = prompts_of([60, 7, 150], seed=23)
RULES: dict[str, dict[str, Any]] = {
    "unpruned": {"node_values": "head_probability", "pruning": "off"},
    "top_k": {"pruning": "top_k", "top_k": 5, "early_layer": 1},
    "chain": {"tree": "chain"},
}


def reference_steps(rule: dict[str, Any]) -> tuple[list[list[int]], list[Any]]:
    """Texts, and of each step what a recording holds, too."""
    ranks = 1 if rule.get("tree") == "chain" else 10
    top_k = rule.get("top_k", 0)
    reference = Reference(MODEL, MODEL / "propd", NODES, ranks, top_k, dynamic=False)
    texts, found = [], []
    for prompt in PROMPTS:
        text, steps = reference.decode(prompt["prompt_token_ids"], TOKENS)
        texts.append(text)
        known = 1
        for tree, kept, path in steps:
            if known + 1 < TOKENS:  # the engine drafts nothing for a text's last token
                nodes = tree[1:]
                found.append(
                    {
                        "root": tree[0].token,
                        "token": [node.token for node in nodes],
                        "parent": [node.parent for node in nodes],
                        "depth": [node.depth for node in nodes],
                        "score": [node.log_prob for node in nodes],
                        "kept": kept[1:],
                        "accepted": path[1:],
                    }
                )
            known += len(path)
    return texts, found


def engine_steps(rule: dict[str, Any]) -> tuple[list[list[int]], list[Any]]:
    """The same of an engine that has one prompt after another."""
    with engine(NODES, propd=rule) as llm:
        llm.collective_rpc("start_recording", args=(10_000,))
        texts = [list(run(llm, [p], greedy(TOKENS))[0].token_ids) for p in PROMPTS]
        recording = llm.collective_rpc("take_recording")[0]
    trees = [tree for step in recording for tree in step]
    for tree in trees:
        for column in ("token", "parent", "depth", "score"):
            del tree[column][tree["verified"] :]  # what was nearly drafted
    return texts, trees


@pytest.mark.usefixtures("heads_in_targets_dtype")
@pytest.mark.parametrize("name", RULES)
def test_every_step_is_the_references(name: str) -> None:
    expected_texts, expected = reference_steps(RULES[name])
    texts, found = engine_steps(RULES[name])
    assert texts == expected_texts
    assert len(found) == len(expected) > len(PROMPTS)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["score"] == pytest.approx(theirs.pop("score"), abs=1e-4)
        assert {column: ours[column] for column in theirs} == theirs
    kept, drafted = (sum(len(step[c]) for step in found) for c in ("kept", "token"))
    assert (kept < drafted) == (name == "top_k")
    assert any(len(step["accepted"]) > 1 for step in found)
