"""The training loop: what it learns, and how a killed run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from losses import losses_of
from tiny_targets import (
    VOCAB,
    one_thread,  # noqa: F401
    randomise,
    settings,
    target,
)

from vllm_propd.training import loop as training_loop
from vllm_propd.training import workers
from vllm_propd.training.data.batches import TokenData
from vllm_propd.training.history import History
from vllm_propd.training.loop import WARMUP_STEPS, Loop, learning_rate
from vllm_propd.training.model.checkpoint import FILE, SMOOTHING, Progress
from vllm_propd.training.model.trainee import Trainee
from vllm_propd.training.settings import TrainSettings

STEPS = 8
Then = Callable[[Progress], None]


class Killed(Exception):
    """Ends a training where a test wants it to end."""


def data() -> TokenData:
    """The whole vocabulary, over and over: each token tells what follows."""
    tokens = np.tile(np.random.default_rng(0).permutation(VOCAB), 60)
    return TokenData(tokens.astype(np.int32), np.array([], np.int64), [])


def train(
    folder: Path,
    resume: bool = False,
    then: Then = lambda progress: None,
    **options: Any,
) -> tuple[Loop, list[float]]:
    """A training with its losses, step by step; ``then`` is called after each step."""
    chosen = settings(**{"steps": STEPS} | options)
    heads = Trainee(target(), chosen)
    if resume:  # whatever the heads start as, the checkpoint's weights replace it
        randomise(heads)
    loop = Loop(heads, data(), chosen, folder, resume)
    history = History(folder, loop.progress.step)

    def on_step(progress: Progress, trained: Trainee) -> None:
        assert trained is heads
        history.add(progress)
        then(progress)

    loop.run(on_step)
    return loop, losses_of(folder)


def killed_at(folder: Path, step: int, saved: int, **options: Any) -> None:
    """A training that dies after ``step`` steps; its checkpoint is of ``saved`` ones."""

    def then(progress: Progress) -> None:
        if progress.step == saved + 1:
            shutil.copy(folder / FILE, folder / "older")
        if progress.step == step:
            raise Killed

    with pytest.raises(Killed):
        train(folder, then=then, save_every=1e-9, **options)
    (folder / "older").replace(folder / FILE)


@pytest.mark.parametrize("labels", ["kl", "hard"])
def test_the_loss_falls(tmp_path: Path, labels: str) -> None:
    options = {"steps": 60, "learning_rate": 1e-2}
    loop, losses = train(tmp_path, labels=labels, **options)
    assert loop.progress.step == len(losses) == 60
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    (one, losses), (again, same) = train(tmp_path), train(tmp_path)
    assert losses == same and len(losses) == STEPS
    torch.testing.assert_close(one.trainee.state(), again.trainee.state(), rtol=0, atol=0)
    assert train(tmp_path, seed=1)[1] != losses


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_changes_memory_only(tmp_path: Path, parts: int) -> None:
    _, whole = train(tmp_path)
    _, in_parts = train(tmp_path, accumulate=parts)
    assert in_parts == pytest.approx(whole, rel=1e-4)


def test_bfloat16_products_give_nearly_the_same_losses(tmp_path: Path) -> None:
    options = {"output_layer": "own", "early_rank": 8}
    _, full = train(tmp_path, **options)
    loop, mixed = train(tmp_path, **options, precision="bfloat16")
    assert mixed == pytest.approx(full, rel=0.02) and mixed != full
    assert {p.dtype for p in loop.parameters} == {torch.float32}


@pytest.mark.parametrize("step", [5, 6])
@pytest.mark.parametrize(
    "options", [{}, {"output_layer": "own", "early_rank": 4}, {"early_layers": ()}]
)
def test_a_killed_training_goes_on_as_if_nothing_had_been(
    tmp_path: Path, step: int, options: dict[str, Any]
) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole, losses = train(tmp_path / "whole", **options)
    killed_at(tmp_path / "killed", step, saved=3, **options)
    assert len(losses_of(tmp_path / "killed")) == step
    resumed, found = train(tmp_path / "killed", resume=True, **options)
    assert resumed.progress.step == len(found) == STEPS
    assert found == pytest.approx(losses, rel=1e-5)
    assert resumed.progress.loss == pytest.approx(whole.progress.loss, rel=1e-5)
    torch.testing.assert_close(resumed.trainee.state(), whole.trainee.state())


@pytest.mark.parametrize("saved", [True, False], ids=["beside a whole one", "alone"])
def test_a_half_written_checkpoint_does_no_harm(tmp_path: Path, saved: bool) -> None:
    _, losses = train(tmp_path)
    killed_at(tmp_path, 5, saved=3)
    partial = tmp_path / f"{FILE}.partial"
    partial.write_bytes((tmp_path / FILE).read_bytes()[:1000])
    if saved:
        loop, found = train(tmp_path, resume=True)
        assert found == pytest.approx(losses, rel=1e-5)
    else:
        (tmp_path / FILE).unlink()
        loop, found = train(tmp_path, resume=True)
        assert found[0] != losses[0]  # anew, from the heads' own start
    assert loop.progress.step == len(found) == STEPS
    assert not partial.exists()


def test_a_finished_training_has_no_step_left(tmp_path: Path) -> None:
    first, losses = train(tmp_path)
    again, found = train(tmp_path, resume=True)
    assert found == losses and again.progress == first.progress
    torch.testing.assert_close(again.trainee.state(), first.trainee.state())


def test_a_resumed_training_may_be_longer_than_planned(tmp_path: Path) -> None:
    _, losses = train(tmp_path)
    loop, found = train(tmp_path, resume=True, steps=STEPS + 3, save_every=5.0)
    assert loop.progress.step == len(found) == STEPS + 3
    assert found[:STEPS] == losses


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"learning_rate": 0.5}, "learning_rate 0.003 -> 0.5"),
        ({"num_heads": 2, "seed": 7}, "num_heads 3 -> 2, seed 0 -> 7"),
        ({"early_layers": (1,)}, r"early_layers \(1, 2\) -> \(1,\)"),
    ],
    ids=["rate", "heads and seed", "layers"],
)
def test_other_settings_than_the_checkpoints_are_named(
    tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    train(tmp_path, steps=1)
    with pytest.raises(ValueError, match=rf"--resume: .*other settings \({named}\)"):
        train(tmp_path, resume=True, **options)


def test_a_refused_resume_leaves_the_states(tmp_path: Path) -> None:
    first, _ = train(tmp_path, steps=2)
    every = np.arange(len(first.windows))
    known = ~first.kept.missing(every)
    assert known.sum() == 8
    with pytest.raises(ValueError, match="other settings"):
        train(tmp_path, resume=True, early_layers=(1,))
    again, _ = train(tmp_path, resume=True, steps=2)
    assert (~again.kept.missing(every) == known).all()


def test_states_of_other_text_or_windows_are_forgotten(tmp_path: Path) -> None:
    """Of as many tokens."""
    loop, _ = train(tmp_path, steps=1)
    same, every = data().tokens, np.arange(len(loop.windows))
    other = np.where(np.arange(len(same)), same, 1 + same)
    starts = np.maximum(loop.windows - 1, 0)
    for tokens, begins, known in ((same, [], 4), (other, [], 0), (same, starts, 0)):
        text = TokenData(tokens, np.array(begins, np.int64), [])
        again = Loop(loop.trainee, text, loop.settings, tmp_path, False)
        assert (~again.kept.missing(every)).sum() == known
        train(tmp_path, steps=1)


@pytest.mark.parametrize("rank", [0, 1])
def test_of_many_workers_the_first_one_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    progress, chosen = Progress(1, 1.0, 2.0, 2.0), settings()

    class Worker:
        """Calls back as the loop does: on the first worker."""

        def __init__(self, *args: Any) -> None:
            self.rank, self.progress = rank, Progress()

        def run(self, on_step: Any = None) -> None:
            if self.rank == 0:
                on_step(progress, None)

    monkeypatch.setattr(workers, "Loop", Worker)
    for name in ("load_data", "load_trainee"):
        monkeypatch.setattr(workers, name, lambda *args: None)
    job = {"settings": chosen.model_dump_json(), "folder": str(tmp_path)}
    workers._worker({**job, "data": "train", "model": "", "resume": False})
    assert len(losses_of(tmp_path)) == (1 if rank == 0 else 0)
    assert (tmp_path / "losses.jsonl").exists() == (rank == 0)


def test_many_workers_are_not_started_with_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker's error would be Ray's traceback."""
    pytest.importorskip("ray")
    monkeypatch.setattr("ray.is_initialized", pytest.fail)
    train(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"^--resume: .*other settings .seed 0 -> 7"):
        workers.train_on_ray("model", tmp_path, "train", settings(seed=7), 2, True)


def test_time_spent_before_the_kill_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes on by a second whenever it is read: twice in each step."""
    clock = SimpleNamespace(monotonic=count().__next__)
    monkeypatch.setattr(training_loop, "time", clock)
    first, _ = train(tmp_path, steps=None, minutes=0.1)
    assert (first.progress.step, first.progress.seconds) == (4, 7.0)
    again, _ = train(tmp_path, steps=None, minutes=0.1, resume=True)
    assert again.progress == first.progress
    longer, losses = train(tmp_path, steps=None, minutes=0.2, resume=True)
    assert longer.progress.step == len(losses) == 7
    lines = (tmp_path / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["seconds"] for line in lines] == [1, 3, 5, 7, 8, 10, 12]


def test_the_last_loss_is_told_beside_the_smoothed_one() -> None:
    progress = Progress()
    for loss in (4.0, 2.0, 1.0):
        progress.add(loss, seconds=9.0)
    smoothed = SMOOTHING * (SMOOTHING * 4 + (1 - SMOOTHING) * 2) + (1 - SMOOTHING) * 1
    assert progress == Progress(3, 9.0, pytest.approx(smoothed), 1.0)


def test_history_drops_steps_after_the_checkpoint(tmp_path: Path) -> None:
    history = History(tmp_path, 0)
    for step in range(1, 6):
        history.add(Progress(step, step / 2, 0.0, 10.0 - step))
    (tmp_path / "losses.jsonl").open("a").write('{"step": 6, "lo')
    History(tmp_path, 3).add(Progress(4, 9.0, 0.0, 1.5))
    assert losses_of(tmp_path) == [9.0, 8.0, 7.0, 1.5]
    last = json.loads((tmp_path / "losses.jsonl").read_text().splitlines()[-1])
    assert last == {"step": 4, "loss": 1.5, "seconds": 9.0}
    History(tmp_path, 0)
    assert losses_of(tmp_path) == []


def test_steps_follow_the_schedule_with_clipped_gradients(tmp_path: Path) -> None:
    loop, _ = train(tmp_path)
    last = learning_rate(loop.settings, STEPS - 1, (STEPS - 1) / STEPS)
    assert [group["lr"] for group in loop.optimizer.param_groups] == [pytest.approx(last)]
    first, _ = train(tmp_path, steps=1)
    means = [first.optimizer.state[p]["exp_avg"].flatten() for p in first.parameters]
    assert torch.cat(means).norm() == pytest.approx(0.1, rel=1e-3)  # (1 - 0.9) of length 1


@pytest.mark.parametrize(
    ("step", "done", "share"),
    [
        (0, 0.0, 1 / WARMUP_STEPS),
        (WARMUP_STEPS - 1, 0.0, 1.0),
        (1000, 0.5, 0.51),
        (1000, 1.0, 0.02),
    ],
    ids=["start", "peak", "middle", "end"],
)
def test_the_learning_rate_warms_up_and_falls(step: int, done: float, share: float) -> None:
    chosen = settings(learning_rate=4e-3)
    assert learning_rate(chosen, step, done) == pytest.approx(4e-3 * share)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"steps": 5, "minutes": 1.0}, "two ways to say when to stop"),
        ({"batch_size": 6, "accumulate": 4}, "6 is not a multiple of --accumulate 4"),
        ({"early_layers": (2, 2)}, "distinct layers"),
        ({"early_layers": (0, 1)}, "counted from 1"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        TrainSettings(**options)


def test_ten_minutes_unless_told_otherwise() -> None:
    assert TrainSettings().seconds == 600
    assert TrainSettings(minutes=2).progress(10**6, 30.0) == 0.25
    assert TrainSettings(steps=40).progress(10, 10**6) == 0.25
