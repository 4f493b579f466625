"""What commands have in common: options, and how errors are told."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.markup import escape

Target = Annotated[Path, typer.Argument(help="Folder of the target.")]
PromptText = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text, JSON rows (`text`, chats), Parquet, or folders of them, to cut prompts "
        "from. Default: Python's own library."
    ),
]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens per prompt.")]
PromptSeed = Annotated[int, typer.Option(help="Of the choice of prompts.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="bfloat16, float32, or auto: bfloat16, but float32 on CPUs without AVX-512, "
        "where vLLM has no kernels for bfloat16."
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(help="YAML file of the settings below; options given beside it win."),
]


def integers(text: str, option: str, or_none: bool = False) -> tuple[int, ...]:
    """Parses an option like ``1,4,16``: its integers in ascending order, each once.

    Args:
        text: what the user gave.
        option: its name, for errors.
        or_none: whether no number at all will do.

    Raises:
        ValueError: a part is no whole number above 0, or there is none.
    """
    try:
        found = tuple(sorted({int(part) for part in text.split(",") if part.strip()}))
    except ValueError:
        found = (0,)  # as bad as a number that is too small
    if any(number < 1 for number in found) or not (found or or_none):
        raise ValueError(
            f"{option} '{text}': whole numbers above 0 with commas between them"
        )
    return found


def dtype_of(text: str) -> str:
    """Returns the dtype that option ``--dtype`` stands for."""
    from vllm.platforms import current_platform

    from vllm_propd.fast_dtype import fast_dtype

    return fast_dtype(current_platform.device_type) if text == "auto" else text


def given(context: typer.Context, name: str) -> bool:
    """Whether a parameter was set on the command line."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def refuse_unused(
    context: typer.Context, names: Sequence[str], where: str, remedy: str
) -> None:
    """Refuses options that were given and that nothing would come of.

    Args:
        context: of the command.
        names: the options' parameters.
        where: why they have no effect, as in "without --workload".
        remedy: what would give them one.

    Raises:
        ValueError: one of them was given.
    """
    if found := [name for name in names if given(context, name)]:
        options = ", ".join("--" + name.replace("_", "-") for name in found)
        raise ValueError(f"{options}: no use {where}; {remedy}, or leave {options} out")


def quiet_engines() -> None:
    """Makes engines log errors only; to be called before vLLM is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


def allow_stopwatches() -> None:
    """Lets stopwatches go into the workers as functions, and makes engines log less."""
    quiet_engines()
    os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")


@contextmanager
def errors() -> Iterator[None]:
    """Turns what a user got wrong into one line of text, without a traceback."""
    try:
        yield
    except ValidationError as error:
        problems = []
        for item in error.errors():
            option = "--" + str(item["loc"][0]).replace("_", "-") if item["loc"] else ""
            problems.append(f"{option} {item['msg'].removeprefix('Value error, ')}".strip())
        raise _failure("; ".join(problems)) from error
    except (ValueError, OSError) as error:
        raise _failure(str(error)) from error


def _failure(message: str) -> typer.Exit:
    Console(stderr=True).print(f"[red]Error:[/red] {escape(message)}", highlight=False)
    return typer.Exit(1)


def _asked(field: FieldInfo) -> tuple[Any, Any]:
    """Returns an option's type and default, for a field of a class of settings.

    What only pydantic can check (choices, lists with commas) is asked for as text.
    """
    kind, default = field.annotation, field.default
    if get_origin(kind) is tuple:
        return str, ",".join(map(str, default))
    kinds = [one for one in get_args(kind) if one is not type(None)]
    if kinds and all(isinstance(one, str) for one in kinds):
        return str, default
    return kind, default


def _read_recipe(path: Path, cls: type[BaseModel]) -> dict[str, Any]:
    """Reads a recipe's settings.

    Raises:
        ValueError: it is not a table of settings; the message names what is wrong.
    """
    try:
        found = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"--recipe {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--recipe {path}: it is not a table of settings; see --help")
    if unknown := sorted(map(str, found.keys() - cls.model_fields.keys())):
        raise ValueError(f"--recipe {path}: unknown settings {', '.join(unknown)}")
    return found


def with_settings(cls: type[BaseModel]) -> Callable[[Callable[..., None]], Any]:
    """Makes an option of each field of a class of settings, which says all about it.

    A YAML file of them, option ``--recipe``, sets what the command line does not. A command
    that has a parameter ``context`` gets that, too.

    Args:
        cls: the class of the command's parameter ``settings``.
    """

    def decorated(command: Callable[..., None]) -> Any:
        signature = inspect.signature(command, eval_str=True)
        own = {"settings", "context"}
        rest = [one for one in signature.parameters.values() if one.name not in own]
        asked = []
        for name, field in cls.model_fields.items():
            kind, default = _asked(field)
            option: Any = Annotated[kind, typer.Option(help=field.description)]
            place = inspect.Parameter.KEYWORD_ONLY
            asked.append(inspect.Parameter(name, place, default=default, annotation=option))

        def call(context: typer.Context, **options: Any) -> None:
            with errors():
                values = {name: options.pop(name) for name in cls.model_fields}
                if (recipe := options.pop("recipe")) is not None:
                    exclusive: tuple[str, ...] = getattr(cls, "exclusive", ())
                    chosen = any(given(context, name) for name in exclusive)
                    for name, value in _read_recipe(recipe, cls).items():
                        if not (given(context, name) or (chosen and name in exclusive)):
                            values[name] = value
                if "context" in signature.parameters:
                    options["context"] = context
                command(**options, settings=cls.model_validate(values))

        place = inspect.Parameter.KEYWORD_ONLY
        rest.append(
            inspect.Parameter("recipe", place, default=None, annotation=RecipeOption)
        )
        rest.append(inspect.Parameter("context", place, annotation=typer.Context))
        parameters = [one.replace(kind=place) for one in rest]
        call.__name__, call.__doc__ = command.__name__, command.__doc__
        call.__signature__ = inspect.Signature([*parameters, *asked])  # type: ignore[attr-defined]
        call.__annotations__ = {one.name: one.annotation for one in (*parameters, *asked)}
        return call

    return decorated
