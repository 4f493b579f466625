"""``vllm-propd demo``: plain vLLM beside ProPD, and a picture of a tree."""
