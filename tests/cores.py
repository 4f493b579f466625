"""A core for each test process, where some run side by side (`pytest -n`).

Imported before torch and numba, which count cores: engines of small models wait for Python
more than for arithmetic.
"""

import os

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(worker.removeprefix("gw")) % len(cores)]
    os.sched_setaffinity(0, {core})
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
