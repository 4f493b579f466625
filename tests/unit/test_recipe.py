"""A recipe sets what the command line does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vllm_propd.cli.options import with_settings
from vllm_propd.training.settings import TrainSettings

RECIPE = "num_layers: 1\ndraft_tokens: 8192\n"


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
    found: list[TrainSettings] = []
    app = typer.Typer()

    @app.command()
    @with_settings(TrainSettings)
    def command(settings: TrainSettings) -> None:
        found.append(settings)

    (tmp_path / "recipe.yaml").write_text(RECIPE)
    recipe = ["--recipe", str(tmp_path / "recipe.yaml")]
    done = CliRunner().invoke(app, [*recipe, *options])
    assert done.exit_code == 0, done.output
    (settings,) = found
    assert (settings.num_layers, settings.draft_tokens, settings.num_heads) == expected
