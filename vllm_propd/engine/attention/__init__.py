"""Tree attention as backends of vLLM's."""
