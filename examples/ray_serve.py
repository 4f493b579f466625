"""Engines with ProPD behind one OpenAI endpoint, on Ray Serve.

python examples/ray_serve.py demo/model --replicas 2
"""

import json
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app

from vllm_propd.batch.hosts import shared_cores


def configuration(
    model: Path, replicas: int, engine: dict[str, Any], model_id: str = "target"
) -> LLMConfig:
    """Returns what Ray is told; vLLM's arguments are its `engine_kwargs`."""
    on_cpu = not ray.cluster_resources().get("GPU")
    environment, hardware = {}, {}
    if on_cpu:
        environment = shared_cores(replicas, engine.get("tensor_parallel_size", 1))
        hardware = {"accelerator_config": {"kind": "cpu"}}
    return LLMConfig(
        model_loading_config={"model_id": model_id, "model_source": str(model.resolve())},
        engine_kwargs={"speculative_config": "propd", **engine},
        deployment_config={"num_replicas": replicas},
        runtime_env={"env_vars": environment},
        log_engine_metrics=True,  # on Ray's metrics page, by replica
        **hardware,
    )


def main(
    model: Annotated[Path, typer.Argument(help="Folder of the target.")],
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 2,
    port: Annotated[int, typer.Option(help="Of the endpoint.")] = 8000,
    engine_kwargs: Annotated[str, typer.Option(help="More for vLLM, as JSON.")] = "{}",
    address: Annotated[str | None, typer.Option(help="Of a Ray cluster.")] = None,
) -> None:
    """Serve a model until interrupted."""
    ray.init(address=address)
    serve.start(http_options={"port": port})
    configured = configuration(model, replicas, json.loads(engine_kwargs))
    app = build_openai_app({"llm_configs": [configured]})
    serve.run(app, blocking=True)


if __name__ == "__main__":
    typer.run(main)
