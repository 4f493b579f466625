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
