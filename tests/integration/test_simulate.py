"""Predictions from one recording agree with real engines."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import HEADS_ALONE, MODEL, engine, greedy, metric, prompts_of, run
from prices import Always, Line, ask_always, sizing_of
from typer.testing import CliRunner

from vllm_propd.bench.simulate import Costs, drafter_of
from vllm_propd.cli import app
from vllm_propd.config import parse_config
from vllm_propd.core.sizing.planner import Planner
from vllm_propd.core.sizing.pruning_recall import PruningRecall
from vllm_propd.core.sizing.step_cost import StepCost
from vllm_propd.simulation.answers import Answer
from vllm_propd.simulation.drafted_replay import replay_drafted
from vllm_propd.simulation.planned_replay import replay_planned
from vllm_propd.simulation.recordings import answers_of, texts_of
from vllm_propd.simulation.replay import RecordedText, replay

PROMPTS = prompts_of([90 + 3 * i for i in range(16)], seed=71)
SETTINGS: dict[str, tuple[int, dict[str, Any]]] = {
    "chain": (4, {"tree": "chain"}),
    "small": (6, {}),
    "whole": (48, {}),
    "top_k": (48, {"pruning": "top_k", "top_k": 8, "early_layer": 2}),
    "path_probability": (
        48, {"pruning": "path_probability", "keep_nodes": 7, "early_layer": 2},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def recorded() -> tuple[list[RecordedText], list[Answer]]:
    everything = {"pruning": "path_probability", "keep_nodes": 255, "early_layer": 2}
    with engine(48, propd=everything) as llm:
        llm.collective_rpc("start_recording", args=(1 << 30, False))
        run(llm, PROMPTS, greedy(72, ignore_eos=True))
        assert metric(llm, "spec_decode_num_accepted_tokens") == 0
        answers = answers_of(llm.collective_rpc("recorded_answers")[0])
        return texts_of(llm.collective_rpc("take_recording")[0]), answers


@pytest.fixture
def recording(recorded: tuple[list[RecordedText], list[Answer]]) -> list[RecordedText]:
    return recorded[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_replay_accepts_what_an_engine_accepts(
    recording: list[RecordedText], setting: str
) -> None:
    nodes, keys = SETTINGS[setting]
    with engine(nodes, propd=keys) as llm:
        run(llm, PROMPTS, greedy(72, ignore_eos=True))
        drafts = metric(llm, "spec_decode_num_drafts")
        measured = 1 + metric(llm, "spec_decode_num_accepted_tokens") / drafts
        kept = metric(llm, "propd_kept_nodes") / drafts
    found = replay(recording, parse_config({"num_speculative_tokens": nodes, **keys}))
    assert found.tokens_per_step == pytest.approx(measured, rel=0.05)
    assert found.kept == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("pruning", ["off", "auto"])
def test_a_planned_replay_accepts_what_an_engine_accepts(
    recording: list[RecordedText], pruning: str
) -> None:
    step, draft = Line(0.02, 5e-4, below=0.02), Line(1e-3)
    keys = {**HEADS_ALONE, "pruning": pruning}
    with engine(48, propd={**keys}, max_num_seqs=4) as llm:
        sizing = sizing_of(llm)
        sizing.planner.step, sizing.draft = step, draft
        ask_always(sizing)
        run(llm, PROMPTS, greedy(72, ignore_eos=True))  # learn
        llm.collective_rpc("start_sizing_records")
        run(llm, PROMPTS, greedy(72, ignore_eos=True))
        records = llm.collective_rpc("take_sizing_records")[0]
    decoding = [r for r in records if r["tokens"] == r["nodes"] + r["sequences"]]
    steps, nodes, kept, emitted = (
        sum(record[name] for record in decoding)
        for name in ("sequences", "nodes", "kept", "emitted")
    )
    config = parse_config({"num_speculative_tokens": 48, **keys})
    planner = Planner(step, PruningRecall() if pruning == "auto" else None)
    always = Always()
    for _ in range(2):  # learn, likewise
        found = replay_planned(recording, config, planner, draft, 4, always)
    assert found.tokens_per_step == pytest.approx(emitted / steps, rel=0.05)
    assert found.kept == pytest.approx(kept / steps, rel=0.2)
    assert (kept < 0.9 * nodes) == (pruning == "auto")
    assert (found.kept < 0.9 * found.drafted) == (pruning == "auto")


@pytest.mark.parametrize(
    "keys",
    [{}, {"heads": False}, {"lookup": "shared"}, {"recycling": False}],
    ids=["all", "without heads", "shared", "without recycling"],
)
def test_an_engine_without_a_model_accepts_what_an_engine_accepts(
    recorded: tuple[list[RecordedText], list[Answer]], keys: dict[str, Any]
) -> None:
    step, draft = Line(0.02, 5e-4), Line(1e-3)

    def priced(sizing: Any) -> Any:
        for planner in (sizing.planner, sizing.planner_without):
            planner.step = step
        sizing.draft = sizing.looking_up = draft
        ask_always(sizing)
        return sizing

    keys = {"sizing": "dynamic", **({} if "heads" in keys else {"pruning": "off"}), **keys}
    with engine(48, propd=keys, max_num_seqs=1) as llm:
        priced(sizing_of(llm))
        llm.collective_rpc("start_sizing_records")
        # Heads were not asked for what would have come last.
        run(llm, PROMPTS[:8], greedy(70, ignore_eos=True))
        records = llm.collective_rpc("take_sizing_records")[0]
    # Each first token comes with its prompt; what a last step has put out beyond the
    # text's end is no token.
    count = 8
    steps = sum(record["sequences"] for record in records) - count
    nodes, emitted = sum(record["nodes"] for record in records), 69 * count
    config = parse_config({"num_speculative_tokens": 48, **keys})
    table = StepCost(np.array([1, 256]), step.estimate(np.array([1, 256])))
    costs = Costs(table, StepCost(np.array([1, 64]), np.full(2, draft.base)))
    drafter, promised = drafter_of(config, MODEL, MODEL / "propd")
    found = replay_drafted(
        recorded[1][:8],
        drafter,
        lambda clock: priced(costs.sizing(config, promised)(clock)),
        step,
        draft,
        batch_size=1,
    )
    assert emitted / steps > 2.0
    assert found.tokens_per_step == pytest.approx(emitted / steps, rel=0.01)
    assert found.drafted == pytest.approx(nodes / steps, rel=0.04)


@pytest.mark.alone
def test_the_command_predicts_every_arm() -> None:
    pruned = "propd:sizing=fixed,num_speculative_tokens=16,pruning=top_k,top_k=5"
    arms = f"chain {pruned} propd:num_speculative_tokens=16"
    options = ["--arms", arms, "--nodes", "16", "--num-prompts", "4"]
    options += ["--max-tokens", "16", "--batch-sizes", "1,4", "--dtype", "float32"]
    done = CliRunner().invoke(app, ["simulate", str(MODEL), *options])
    assert done.exit_code == 0, done.output
    assert done.output.count("chain") == 2
    assert done.output.count("propd:num") == 2


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("plain", "only ProPD's own arms can be simulated"),
        ("propd:pruning=top_k", "a recording knows pruning 'auto' and 'off' only"),
    ],
)
def test_what_cannot_be_simulated_is_refused(arms: str, message: str) -> None:
    done = CliRunner().invoke(app, ["simulate", str(MODEL), "--arms", arms])
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
