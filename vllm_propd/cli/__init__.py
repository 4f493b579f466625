"""The command ``vllm-propd``."""

from __future__ import annotations

import typer

from vllm_propd.cli.batch import batch
from vllm_propd.cli.measure import bench, simulate, tune
from vllm_propd.cli.show import demo, watch
from vllm_propd.cli.train import calibrate, train

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def main() -> None:
    """ProPD for vLLM: token trees from Medusa heads, verified losslessly."""


for command in (demo, train, calibrate, batch, bench, tune, simulate, watch):
    app.command()(command)
