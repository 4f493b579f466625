"""The reference in ``examples/`` gives plain greedy decoding's text with every option."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_decode import (
    Node,
    Reference,
    accepted_path,
    ancestors,
    best_size,
    keep_top_k,
)
from tiny_targets import HIDDEN, VOCAB, target
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from vllm_propd.corpus import held_out_snippets
from vllm_propd.heads.checkpoint import save_heads
from vllm_propd.heads.early import EarlyHead
from vllm_propd.heads.medusa import MedusaHeads

MODEL = Path(__file__).parents[2] / "demo" / "model"
TOKENS = 48
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"nodes": 0},
    "chain": {"ranks": 1},
    "tree": {},
    "wide": {"nodes": 60},
    "pruned": {"top_k": 5},
    "pruned to the root": {"top_k": 1},
    "dynamic": {"dynamic": True},
    "dynamic, pruned": {"dynamic": True, "top_k": 20},
}
# 0 - 1 - 3
#   \ 2   \ 4
TREE = [
    Node(7, -1, 0, 0.0),
    Node(1, 0, 1, -0.5),
    Node(2, 0, 1, -1.0),
    Node(3, 1, 2, -1.5),
    Node(1, 3, 3, -9.0),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Products this small lose more to waking threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(**options: Any) -> Reference:
    usual = {"nodes": 16, "ranks": 10, "top_k": 0, "dynamic": False}
    return Reference(MODEL, MODEL / "propd", **usual | options)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = ["class Stack:\n", *held_out_snippets(3, seed=17, min_chars=2000)]
    lengths = (40, 1, 90, 200)
    return [tokenizer(t)["input_ids"][:n] for t, n in zip(texts, lengths, strict=True)]


@pytest.fixture(scope="module")
def greedy(prompts: list[list[int]]) -> list[list[int]]:
    target = reference().target
    return [
        target.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_text_is_greedy_decodings(
    name: str, prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    drafting = reference(**OPTIONS[name])
    found = [drafting.decode(prompt, TOKENS) for prompt in prompts]
    assert [text for text, _ in found] == greedy
    steps = [step for _, some in found for step in some]
    pruned = [len(step.tree) - len(step.kept) for step in steps]
    assert any(pruned) == ("pruned" in name)
    longest = max(len(step.path) for step in steps)
    assert (longest > 1) == (name != "plain")


def test_it_ends_where_the_text_ends(
    prompts: list[list[int]], greedy: list[list[int]]
) -> None:
    """A token of the text is made the end: mid-tree, and the first one of all."""
    drafting = reference()
    for end in (greedy[0][20], greedy[0][0]):
        drafting.target.generation_config.eos_token_id = end
        text, _ = drafting.decode(prompts[0], TOKENS)
        assert text == greedy[0][: greedy[0].index(end) + 1]


def test_ancestors_are_seen() -> None:
    assert ancestors(TREE).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 0, 1, 0, 0],
        [1, 1, 0, 1, 0],
        [1, 1, 0, 1, 1],
    ]


def test_the_size_follows_what_steps_take() -> None:
    sizes = (0, 1, 2, 4, 8)
    assert best_size(TREE, dict.fromkeys(sizes, 1.0)) == 4
    assert best_size(TREE, {size: 1.0 + size for size in sizes}) == 0
    # Expected tokens 1, 1.61, 1.97, 2.20 (of four nodes, the last of which is hopeless).
    assert best_size(TREE, {size: 1.0 + 0.3 * size for size in sizes}) == 1


def test_a_pruned_node_takes_its_children_along() -> None:
    logits = torch.zeros(5, 8)
    logits[0, 2] = logits[1, 3] = logits[3, 1] = 1.0
    assert keep_top_k(TREE, logits, 1) == [0, 2]
    assert keep_top_k(TREE, logits, 2) == [0, 1, 2, 3, 4]


def test_the_walk_ends_where_no_child_agrees() -> None:
    assert accepted_path(TREE, {0: 1, 1: 3, 2: 5, 3: 6, 4: 6}) == [0, 1, 3]
    assert accepted_path(TREE, {0: 3}) == [0]


@pytest.mark.parametrize(
    "kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Gemma2Config]
)
def test_families(kind: type[PretrainedConfig], tmp_path: Path) -> None:
    """Untrained heads draft what the target would say next, which repeats itself."""
    plain = target(kind, sliding_window=None, head_dim=16, eos_token_id=None)
    plain.save_pretrained(tmp_path)
    medusa = MedusaHeads(3, 1, HIDDEN, bias=True).tensors()
    early = {f"early.1.{n}": t for n, t in EarlyHead(HIDDEN, 1e-6).state_dict().items()}
    save_heads(tmp_path / "propd", medusa, early, VOCAB, torch.float32)
    if kind is Gemma2Config:
        with pytest.raises(ValueError, match="target: llama, mistral, qwen2 or qwen3"):
            Reference(tmp_path, tmp_path / "propd", 16, 10, 0, False)
        return
    drafting = Reference(tmp_path, tmp_path / "propd", 16, 10, 3, False)
    prompt = [5, 9, 33]
    text, steps = drafting.decode(prompt, TOKENS)
    expected = plain.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=TOKENS
    )
    assert text == expected[0, len(prompt) :].tolist()
    assert any(len(step.kept) < len(step.tree) for step in steps)
