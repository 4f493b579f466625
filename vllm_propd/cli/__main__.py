"""``python -m vllm_propd.cli``: the command from a checkout."""

from vllm_propd.cli import app

if __name__ == "__main__":
    app()
