"""Heads that draft some tokens only, know the token before and the root, in a worker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MODEL, Ties, engine, greedy, metric, mixed_prompts, run, use
from made_heads import RANK, TOKENS, heads_in
from safetensors.torch import load_file

from vllm_propd.heads.checkpoint import AFTER, BEFORE, load_heads
from vllm_propd.heads.export import export_for_vllm
from vllm_propd.heads.transition import Transition


@pytest.fixture(
    scope="module", params=[(), ("transition",), ("root", "transition")], ids=str
)
def heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heads_in(tmp_path_factory.mktemp("heads"), *request.param)


def test_texts_are_plain_vllms(heads: Path, ties: Ties) -> None:
    prompts = mixed_prompts(8, seed=61)
    with engine() as llm:
        expected = run(llm, prompts, greedy(40, logprobs=2))
    with engine(16, propd={"model": str(heads)}) as llm:
        for sizing in ("fixed", "dynamic"):
            use(llm, 16, {"model": str(heads), "sizing": sizing})
            ties.check(expected, run(llm, prompts, greedy(40, logprobs=2)))


def test_vllms_own_medusa_loads_them_exported(tmp_path: Path) -> None:
    """Less root and transition term, for which it has no place."""
    heads = heads_in(tmp_path / "heads")
    output = load_file(MODEL / "model.safetensors")["model.embed_tokens.weight"]
    export_for_vllm(heads, output, tmp_path / "exported")
    medusa = {
        "method": "medusa",
        "model": str(tmp_path / "exported"),
        "num_speculative_tokens": 4,
    }
    with engine(speculative_config=medusa) as llm:
        run(llm, mixed_prompts(8, seed=61), greedy(40))
        assert metric(llm, "spec_decode_num_accepted_tokens") > 40


@pytest.mark.usefixtures("heads_in_targets_dtype")
def test_candidates_are_those_of_the_targets_own_rows(heads: Path) -> None:
    checkpoint = load_heads(heads)
    with engine(16, propd={"model": str(heads)}) as llm:
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        drafter = runner.drafter
        torch.manual_seed(1)
        hidden = torch.randn(5, runner.model_config.get_hidden_size())
        roots = np.array([0, 1, 3, 2046, 6])  # of these, 1 cannot be drafted
        found = drafter.candidates(hidden, roots)
        with torch.inference_mode():
            embedded = runner.model.embed_input_ids(torch.from_numpy(roots))
            states = drafter.heads(hidden, embedded).float()
            logits = runner.model.compute_logits(states.flatten(0, 1))
    some = logits.view(drafter.num_heads, 5, -1)[..., TOKENS].float()
    if checkpoint.transition_rank:
        term = Transition(len(TOKENS), RANK)
        term.before.data, term.after.data = (
            checkpoint.tensors[name] for name in (BEFORE, AFTER)
        )
        places = torch.tensor([0, len(TOKENS), 1, 682, 2])
        expected = term.couple(some, places, 10)
        tokens, said = TOKENS[expected.tokens].numpy(), expected.log_probs.numpy()
        assert (found.next_row == expected.next_row.numpy()).mean() > 0.99
    else:
        best = some.log_softmax(-1).topk(10)
        tokens = TOKENS[best.indices].transpose(0, 1).numpy()[:, :, None]
        said = best.values.transpose(0, 1).numpy()[:, :, None]
    assert found.tokens.shape == tokens.shape
    # Equal up to the order of sums.
    assert (found.tokens == tokens).mean() > 0.99
    np.testing.assert_allclose(found.log_probs, said, atol=1e-3)
