"""``vllm-propd batch``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_propd.cli.options import errors, quiet_engines
from vllm_propd.config import METHOD


def batch(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the target.")],
    prompts: Annotated[
        list[Path],
        typer.Argument(
            help="JSON lines, Parquet, or folders of them: rows with `messages` (or "
            "another shape of a chat), `prompt` or `text`, or OpenAI's batch format."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder of the answers; a killed job goes on there.")
    ],
    format: Annotated[
        str, typer.Option(help="Of the answers: jsonl or parquet.")
    ] = "jsonl",
    engines: Annotated[int, typer.Option(min=1, help="Number of engines.")] = 1,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="Of each engine.")] = 1,
    speculative_config: Annotated[
        str, typer.Option(help="As vLLM's; none: plain vLLM.")
    ] = METHOD,
    engine_kwargs: Annotated[
        str, typer.Option(help="Further arguments of vLLM's engines, as JSON.")
    ] = "{}",
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0: greedy. Rows' own win. Default: vLLM's.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Of an answer. Default: what the model's length leaves."),
    ] = None,
    sampling: Annotated[
        str, typer.Option(help="Further sampling fields of all rows, as JSON.")
    ] = "{}",
    rows_at_once: Annotated[
        int,
        typer.Option(min=1, help="Rows of a block, which is answered and written whole."),
    ] = 32,
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster. Default: one on this machine.")
    ] = None,
) -> None:
    """Answer all prompts of some files with one engine or many, on Ray Data."""
    quiet_engines()
    with errors():
        from vllm_propd.batch.run import run_batch, save
        from vllm_propd.batch.settings import BatchJob

        fields = _table("--sampling", sampling)
        if temperature is not None:
            fields["temperature"] = temperature
        if max_tokens is not None:
            fields["max_tokens"] = max_tokens
        job = BatchJob(
            model=model,
            prompts=prompts,
            out=out,
            format=format,
            engines=engines,
            tensor_parallel_size=tensor_parallel_size,
            speculative_config=_speculative(speculative_config),
            engine_kwargs=_table("--engine-kwargs", engine_kwargs),
            sampling=fields,
            rows_at_once=rows_at_once,
            address=address,
        )
        _show(save(run_batch(job), out), out)


def _speculative(text: str) -> str | dict[str, Any] | None:
    if text in ("none", ""):
        return None
    return text if text == METHOD else _table("--speculative-config", text)


def _table(option: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option} '{text}': it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"{option} '{text}': it is not a JSON object, as '{{\"top_p\": 0.9}}' is"
        )
    return found


def _show(told: dict[str, Any], out: Path) -> None:
    table = Table("rows", "errors", "new", "tokens", "tokens/s", "acceptance length")
    length = told["acceptance_length"]
    table.add_row(
        f"{told['rows']:,}",
        f"{told['errors']:,}",
        f"{told['new_rows']:,}",
        f"{told['tokens']:,}",
        f"{told['tokens'] / told['seconds']:,.1f}"
        if told["new_rows"] == told["rows"]
        else "-",
        "-" if length is None else f"{length:.2f}",
    )
    console = Console()
    console.print(table)
    console.print(f"{out / 'rows'}, {out / 'summary.json'}")
