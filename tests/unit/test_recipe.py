"""A recipe sets what the command line does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vllm_propd.cli.options import with_settings
from vllm_propd.training.settings import TrainSettings

RECIPE = "num_layers: 1\ndraft_tokens: 8192\n"


def chosen(folder: Path, recipe: str, options: list[str]) -> TrainSettings:
    """The settings that a command gets from a recipe and options."""
    found: list[TrainSettings] = []
    app = typer.Typer()

    @app.command()
    @with_settings(TrainSettings)
    def command(settings: TrainSettings) -> None:
        found.append(settings)

    file = folder / "recipe.yaml"
    file.write_text(recipe)
    done = CliRunner().invoke(app, ["--recipe", str(file), *options])
    assert done.exit_code == 0, done.output
    (settings,) = found
    return settings


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], (1, 8192, 4)),
        (["--num-layers", "3"], (3, 8192, 4)),
        (["--num-layers", "2"], (2, 8192, 4)),  # given, although it is the default
        (["--num-heads", "2", "--draft-tokens", "16384"], (1, 16384, 2)),
    ],
)
def test_options_that_are_given_win(
    tmp_path: Path, options: list[str], expected: tuple[int, int, int]
) -> None:
    settings = chosen(tmp_path, RECIPE, options)
    assert (settings.num_layers, settings.draft_tokens, settings.num_heads) == expected


@pytest.mark.parametrize(
    ("recipe", "options", "expected"),
    [
        ("minutes: 30", ["--steps", "9"], (None, 9)),
        ("steps: 30", ["--minutes", "9"], (9.0, None)),
        ("steps: 30", ["--num-heads", "2"], (None, 30)),
    ],
)
def test_an_option_wins_over_what_excludes_it(
    tmp_path: Path, recipe: str, options: list[str], expected: tuple[float, int]
) -> None:
    settings = chosen(tmp_path, recipe, options)
    assert (settings.minutes, settings.steps) == expected
