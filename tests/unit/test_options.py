"""Options of the command line: lists of numbers, and what is refused by name."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_propd.bench.settings import OF_CUT_TEXT, BenchSettings
from vllm_propd.cli import app
from vllm_propd.cli.measure import bench
from vllm_propd.cli.options import integers


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("1,4,16", (1, 4, 16)), ("4, 1,4,", (1, 4)), ("8", (8,))],
)
def test_lists_of_numbers_are_sorted(text: str, numbers: tuple[int, ...]) -> None:
    assert integers(text, "--sizes") == integers(text, "--sizes", or_none=True) == numbers


@pytest.mark.parametrize("text", ["0", "1,0", "-4", "", ",", "four", "1.5", "1 4"])
def test_what_is_no_list_of_numbers_is_refused_by_its_options_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"--sizes '{text}': whole numbers above 0"):
        integers(text, "--sizes")


def test_some_options_may_have_no_number() -> None:
    assert integers("", "--layers", or_none=True) == ()
    for text in ("0", "one"):
        with pytest.raises(ValueError, match=f"--layers '{text}': "):
            integers(text, "--layers", or_none=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "nowhere", "--batch-sizes", "0"],
        ["bench", "nowhere", "--batch-sizes", ""],
        ["bench", "nowhere", "--lengths", "0"],
        ["simulate", "nowhere", "--batch-sizes", "0"],
        ["tune", "nowhere", "--top-k", "0"],
        ["tune", "nowhere", "--keep-nodes", "some"],
        ["tune", "nowhere", "--layers", "0"],
    ],
    ids=" ".join,
)
def test_commands_refuse_numbers_that_nothing_can_be_done_with(
    arguments: list[str],
) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 1
    said = " ".join(done.output.split())
    assert f"Error: {arguments[-2]} '{arguments[-1]}': whole numbers above 0" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("bench nowhere --in-turn --chunks 0", "--in-turn (without rounds) and --chunks 0"),
        ("bench nowhere --rounds 0 --chunks 0", "--rounds 0 and --chunks 0: nothing is"),
        ("bench nowhere --lengths 8", "--lengths: no use without --workload; add that, or"),
        (
            "bench nowhere --trace-rate 2 --trace-requests 9",
            "--trace-requests, --trace-rate: no use without --workload",
        ),
        ("bench nowhere --chunks 0 --starts 2", "--starts: no use with --chunks 0; give"),
        ("bench nowhere --most-chunks 3", "--most-chunks 3 is below --chunks 6: give a"),
        (
            "train nowhere --out out --data d --distill-tokens 9 --own-share 0.5",
            "--distill-tokens, --own-share: no use without --self-distill; add that, or",
        ),
        (
            "train nowhere --out out --self-distill --own-share 1",
            "--own-share: no use without --data, where the model asks all; give --data, or",
        ),
        (
            "train nowhere --out out --self-distill --most-tokens 9",
            "--most-tokens: no use without --data and --held-out; give one of them, or",
        ),
        ("demo --model m --heads h --rounds 2", "--rounds: no use in a chat; give --model"),
        ("tune nowhere --out tuned.json", "--out tuned.json: give a file that ends in"),
        ("tune nowhere --out tuned", "--out tuned: give a file that ends in .yaml or .yml"),
    ],
)
def test_options_that_nothing_would_come_of_are_refused_at_once(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, arguments.split())
    assert done.exit_code == 1, done.output
    assert f"Error: {message}" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.parametrize("option", ["--rounds", "--prompts"])
def test_a_demo_shows_something(option: str, tmp_path: Path) -> None:
    nowhere = ["--model", str(tmp_path), "--out", str(tmp_path)]
    done = CliRunner().invoke(app, ["demo", *nowhere, option, "0"])
    assert done.exit_code == 2 and option in done.output


def test_what_the_command_takes_as_usual_is_usual_in_settings() -> None:
    """Else chats would name options that nobody has given."""
    usual, options = BenchSettings(), inspect.signature(bench).parameters
    for name in OF_CUT_TEXT:
        said = options[name].default
        assert getattr(usual, name) == (integers(said, "") if name == "lengths" else said)
