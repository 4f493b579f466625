"""`vllm-propd train`, from data to heads that serve."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import MODEL, Ties, engine, greedy, mixed_prompts, run
from losses import losses_of
from safetensors.torch import load_file
from transformers import AutoTokenizer, Mamba2Config
from typer.testing import CliRunner

from vllm_propd.cli import app
from vllm_propd.corpus import library_files, read_text
from vllm_propd.heads.calibration import load_calibration
from vllm_propd.heads.checkpoint import load_heads
from vllm_propd.training.data.batches import prepare
from vllm_propd.training.loop import Loop
from vllm_propd.training.model.target import load_trainee
from vllm_propd.training.run import WORK
from vllm_propd.training.settings import TrainSettings
from vllm_propd.training.text import INPUTS, QUESTIONS, Inputs, write_inputs
from vllm_propd.training.workers import train_on_ray

pytestmark = pytest.mark.alone

ROLES = "{% for m in messages %}# {{ m.role }}\n{{ m.content }}\n{% endfor %}"
NEWLINES = [
    token
    for text, token in AutoTokenizer.from_pretrained(MODEL).get_vocab().items()
    if text.startswith("\u010a")  # a line's end, in byte-level BPE
]

FILES = library_files("train")[100:180]
STEPS = 60

KILLED = f"""
import os, signal
from vllm_propd.cli import app
from vllm_propd.training import run

class Killed(run.History):
    def add(self, progress):
        super().add(progress)
        if progress.step > {STEPS // 3} and (self.path.parent / "checkpoint.pt").exists():
            os.kill(os.getpid(), signal.SIGKILL)

run.History = Killed
app()
"""
"""The command, killed in the middle of its training: from outside it could be too late."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty files of Python's library, one JSON row each."""
    path = tmp_path_factory.mktemp("data") / "code.jsonl"
    path.write_text("".join(json.dumps({"text": read_text(f)}) + "\n" for f in FILES))
    return path


def command(data: Path, out: Path, *more: str) -> list[str]:
    options = ["--data", str(data), "--out", str(out), "--steps", str(STEPS)]
    options += ["--length", "64", "--save-every", "0.2", "--seed", "3", *more]
    return [sys.executable, "-m", "vllm_propd.cli", "train", str(MODEL), *options]


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of one uninterrupted training."""
    out = tmp_path_factory.mktemp("trained")
    subprocess.run(command(data, out), check=True, capture_output=True)
    return out


def test_killed_training_goes_on_to_the_same_heads(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    arguments = command(data, tmp_path)[3:]
    with (tmp_path / "log").open("w") as log:
        call = [sys.executable, "-c", KILLED, *arguments]
        killed = subprocess.run(call, stdout=log, stderr=log)
    assert killed.returncode == -signal.SIGKILL, (tmp_path / "log").read_text()[-3000:]
    assert STEPS // 3 < len(losses_of(tmp_path / WORK)) < STEPS
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 1 and "--resume" in again.output
    subprocess.run(command(data, tmp_path, "--resume"), check=True, capture_output=True)
    for name in ("model.safetensors", "early_heads.safetensors"):
        whole, resumed = load_file(trained / name), load_file(tmp_path / name)
        assert whole.keys() == resumed.keys()
        for key, tensor in whole.items():
            torch.testing.assert_close(resumed[key], tensor, rtol=0.02, atol=0.002)


def test_trained_folder_is_complete_and_serves(trained: Path, ties: Ties) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names == {
        "calibration.json",
        "calibration.png",
        "config.json",
        "early_heads.safetensors",
        "model.safetensors",
        "vllm-medusa",
    }
    calibration = load_calibration(trained, num_heads=4)
    assert calibration is not None
    assert list(calibration.early_recall) == [1, 2, 3]
    prompts = mixed_prompts(8, seed=51)
    with engine() as llm:
        expected = run(llm, prompts, greedy(48, logprobs=2))
    for values in ("head_probability", "rank_accuracy"):
        propd = {"model": str(trained), "node_values": values}
        with engine(16, propd=propd) as llm:
            ties.check(expected, run(llm, prompts, greedy(48, logprobs=2)))


def speaking_in_lines(folder: Path) -> Path:
    """The demo's model with roles in its chats; what it says ends with the line."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("propd"))
    (folder / "chat_template.jinja").write_text(ROLES)
    path = folder / "generation_config.json"
    config = {**json.loads(path.read_text()), "eos_token_id": NEWLINES}
    path.write_text(json.dumps(config))
    return folder


def test_a_model_asks_itself_and_learns_from_its_answers(tmp_path: Path) -> None:
    model, out = speaking_in_lines(tmp_path / "model"), tmp_path / "heads"
    options = [
        "--self-distill",
        "--distill-tokens",
        "600",
        "--steps",
        "4",
        "--out",
        str(out),
    ]
    options += ["--length", "128", "--draft-tokens", "300", "--no-for-vllm"]
    command = [sys.executable, "-m", "vllm_propd.cli", "train", str(model), *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for text in ("own questions", "training text", "tokens/s"):
        assert text in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    checkpoint = load_heads(out)
    assert (checkpoint.output_size, checkpoint.transition_rank) == (300, 64)
    assert load_calibration(out, num_heads=4) is not None


def test_two_ray_workers_have_the_losses_of_one(data: Path, tmp_path: Path) -> None:
    # Exact: what is sampled beside a share's best tokens differs from share to share.
    settings = TrainSettings(steps=20, length=64, precision="float32", sampled_tokens=0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokens, _ = prepare([data], [], tokenizer, 2048, tmp_path, 300_000)
    alone: list[float] = []
    loop = Loop(load_trainee(str(MODEL), settings), tokens, settings, tmp_path, False)
    loop.run(lambda progress, trainee: alone.append(progress.last))
    (tmp_path / "checkpoint.pt").unlink()
    train_on_ray(str(MODEL), tmp_path, "train", settings, num_workers=2, resume=False)
    assert len(alone) == 20
    assert losses_of(tmp_path) == pytest.approx(alone, rel=1e-4)


def refused(*arguments: str) -> str:
    """The one error line of a command that must fail."""
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 1, result.output
    text = re.sub(r"\s+", " ", result.output)
    assert text.count("Error:") == 1
    return text[text.index("Error:") :]


def small_vocabulary(folder: Path) -> str:
    """The demo's tokenizer on a model that knows a quarter of its tokens."""
    shutil.copytree(MODEL, folder, ignore=shutil.ignore_patterns("propd"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 512}))
    return str(folder)


def test_files_that_are_no_trainings_are_left_alone(data: Path, tmp_path: Path) -> None:
    (mine := tmp_path / WORK / "mine.jsonl").parent.mkdir()
    mine.write_bytes(data.read_bytes())
    error = refused(str(MODEL), "--data", str(mine), "--out", str(tmp_path))
    assert "has files that are no training's" in error
    assert mine.read_bytes() == data.read_bytes()


def test_an_error_leaves_what_was_written_before(data: Path, tmp_path: Path) -> None:
    inputs, settings = Inputs(str(MODEL), [data]), TrainSettings(early_layers=(1,))
    work, wrong = tmp_path / "work", TrainSettings(early_layers=(99,))
    with pytest.raises(ValueError, match="the model has 6 layers"):
        write_inputs(inputs, wrong, work)
    assert not work.exists(), "nothing was written"
    work.mkdir()
    files = {INPUTS: inputs.dump(settings), QUESTIONS: "[[], []]", "states.done": ""}
    for name, text in files.items():
        (work / name).write_text(text)
    with pytest.raises(ValueError, match="the model has 6 layers"):
        write_inputs(inputs, wrong, work)
    assert {path.name: path.read_text() for path in work.iterdir()} == files


def test_bad_input_is_one_error_before_any_training(data: Path, tmp_path: Path) -> None:
    model, out = str(MODEL), str(tmp_path / "out")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "fields.jsonl").write_text('{"title": "x", "answer": "y"}\n' * 9)
    (tmp_path / "asks.jsonl").write_text('{"question": "x", "answer": "y"}\n' * 9)
    (tmp_path / "little.txt").write_text("def f():\n    return 1\n")
    (tmp_path / "file").write_text("x")
    (tmp_path / "wrong.yaml").write_text("num_heads: 3\ndepth: 2\n")
    mamba = Mamba2Config(architectures=["Mamba2ForCausalLM"], vocab_size=2048)
    mamba.save_pretrained(tmp_path / "mamba")
    small, good = small_vocabulary(tmp_path / "small"), str(data)
    cases = {
        (model, str(tmp_path / "nothing.txt"), out): "no such file",
        (model, str(tmp_path / "empty.txt"), out): "no data file",
        (model, str(tmp_path / "fields.jsonl"), out): "fields answer, title; needed is",
        (model, str(tmp_path / "asks.jsonl"), out): "with --self-distill",
        (model, str(tmp_path / "little.txt"), out): "--length 256 needs more",
        (small, good, out): "do not belong together",
        (model, good, str(tmp_path / "file" / "out")): "cannot be written",
        (str(tmp_path / "mamba"), good, out): "no pipeline-parallel support",
        (model, None, out): "no --data: give files",
        (model, None, out, "--self-distill"): "where a question begins",
        (model, good, out, "--recipe", str(tmp_path / "wrong.yaml")): "settings depth",
        (model, good, out, "--early-layers", "2,6"): "the model has 6 layers",
        (model, good, out, "--early-layers", "2,2"): "--early-layers",
        (model, good, out, "--minutes", "1", "--steps", "5"): "--minutes and --steps",
        (model, good, out, "--batch-size", "6", "--accumulate", "4"): "not a multiple",
        (model, good, out, "--labels", "soft"): "--labels",
        (model, good, out, "--num-workers", "3"): "not a multiple of --num-workers",
        (model, good, out, "--resume"): "no unfinished",
        ("org/name", good, "org/name/propd"): "is then the model instead of the hub's",
    }
    for (target, source, folder, *more), expected in cases.items():
        given = ["--data", source] if source else []
        error = refused(target, *given, "--out", folder, *more)
        assert expected in error
