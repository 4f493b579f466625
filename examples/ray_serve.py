"""Serves a model with ProPD on Ray Serve: replicas behind one OpenAI endpoint.

    python examples/ray_serve.py MODEL --replicas 2 --port 8000

It needs `pip install "vllm-propd[ray]"`, and runs until it is interrupted. With --address
it joins a cluster, on all hosts of which vllm-propd is installed.
"""

import argparse
import os

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo/model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--name", default="target", help="as requests name the model")
    parser.add_argument("--address", help="of a Ray cluster; else Ray starts here")
    given = parser.parse_args()

    if given.address:
        ray.init(address=given.address)
    else:
        # A replica holds one of Ray's CPUs: its router needs some beside.
        ray.init(num_cpus=(os.cpu_count() or 1) + 2 * given.replicas)
    on_cpu = not ray.cluster_resources().get("GPU")
    cores = max(1, (os.cpu_count() or 1) // given.replicas)
    app = build_openai_app(
        {
            "llm_configs": [
                LLMConfig(
                    model_loading_config={
                        "model_id": given.name,
                        "model_source": os.path.abspath(given.model)
                        if os.path.exists(given.model)
                        else given.model,
                    },
                    engine_kwargs={
                        "speculative_config": "propd",
                        "dtype": "float32" if on_cpu else "auto",
                        "distributed_executor_backend": "uni",
                    },
                    deployment_config={"num_replicas": given.replicas},
                    # Ray asks for a GPU for each of an engine's workers otherwise.
                    placement_group_config={"bundles": [{"CPU": 1}]} if on_cpu else None,
                    # Replicas of a host without GPUs share its cores.
                    runtime_env={
                        "env_vars": {
                            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                            "OMP_NUM_THREADS": str(cores),
                        }
                    }
                    if on_cpu
                    else {},
                )
            ]
        }
    )
    serve.start(http_options={"port": given.port})
    serve.run(app, blocking=True)


if __name__ == "__main__":
    main()
