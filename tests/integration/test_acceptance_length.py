"""Accepted lengths: what an offline walk over the model's own text predicts.

The walk is teacher-forced: plain greedy text, the heads' candidates at each position,
and the next step starting after the accepted tokens and the bonus.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, engine, greedy, metric, prompts_of, run
from transformers import AutoModelForCausalLM
from vllm import LLM

from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.heads.export import export_for_vllm
from vllm_propd.heads.medusa import MedusaHeads

PROMPTS = prompts_of([64 + 16 * i for i in range(16)], seed=31)
NEW_TOKENS = 128


def tokens_per_step(llm: LLM) -> float:
    """Accepted drafts and the bonus, by step with drafts."""
    drafts = metric(llm, "spec_decode_num_drafts")
    return 1 + metric(llm, "spec_decode_num_accepted_tokens") / drafts


@torch.inference_mode()
def walk_chain(model: Path, prompt: list[int], text: list[int], wanted: int) -> list[int]:
    """Accepted drafts of each step of a chain, until ``wanted`` tokens are out."""
    target = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    heads = MedusaHeads.from_checkpoint(load_heads(model / "propd")).float()
    ids = torch.tensor([prompt + text])
    hidden = target.model(ids).last_hidden_state[0]
    # drafts[k, t]: what head k + 1 says of position t + 2 + k.
    drafts = target.lm_head(heads(hidden)).argmax(-1).tolist()
    at, out, accepted = len(prompt) - 1, 1, []
    while out < wanted:
        depth = 0
        while depth < len(drafts) and drafts[depth][at] == ids[0, at + 2 + depth]:
            depth += 1
        accepted.append(depth)
        at, out = at + depth + 1, out + depth + 1
    return accepted


@pytest.fixture(scope="module")
def predicted() -> list[int]:
    """Accepted drafts of each step of a chain, walked offline."""
    with engine(max_num_seqs=4) as llm:
        longer = run(llm, PROMPTS, greedy(NEW_TOKENS + 8, ignore_eos=True))
    return [
        depth
        for prompt, out in zip(PROMPTS, longer, strict=True)
        for depth in walk_chain(
            MODEL, prompt["prompt_token_ids"], list(out.token_ids), NEW_TOKENS
        )
    ]


def test_chain_accepts_what_the_offline_walk_predicts(predicted: list[int]) -> None:
    with engine(4, propd={"tree": "chain"}, max_num_seqs=4) as llm:
        run(llm, PROMPTS, greedy(NEW_TOKENS, ignore_eos=True))
        assert tokens_per_step(llm) == pytest.approx(1 + np.mean(predicted), rel=0.01)


def test_exported_heads_accept_as_much_in_vllms_own_medusa(
    predicted: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    export_for_vllm(MODEL / "propd", target.lm_head.weight, tmp_path)
    medusa = {"method": "medusa", "model": str(tmp_path), "num_speculative_tokens": 4}
    with engine(max_num_seqs=4, speculative_config=medusa) as llm:
        run(llm, PROMPTS, greedy(NEW_TOKENS, ignore_eos=True))
        drafts = metric(llm, "spec_decode_num_drafts")
        found = [m for m in llm.get_metrics() if m.name.endswith("accepted_tokens_per_pos")]
    accepted = np.array(found[0].values[:4]) / drafts
    expected = [np.mean(np.array(predicted) > position) for position in range(4)]
    with capsys.disabled():
        print(f"\nvLLM's medusa accepts by position: {accepted}, walked: {expected}")
    errors = 3 * np.sqrt(np.array(expected) * (1 - np.array(expected)) / drafts)
    assert np.all(np.abs(accepted - expected) <= errors)


def test_a_tree_is_worth_more_than_a_chain_of_the_same_heads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = {}
    for tree in ("chain", "best_first"):
        with engine(48, propd={"tree": tree}, max_num_seqs=1) as llm:
            run(llm, PROMPTS[::2], greedy(NEW_TOKENS))
            measured[tree] = tokens_per_step(llm)
    with capsys.disabled():
        print(f"\ntokens per step at batch 1: {measured}")
    assert measured["best_first"] >= 1.9
    assert measured["best_first"] >= 1.3 * measured["chain"]
