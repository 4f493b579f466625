"""The thin side that knows vLLM; ``symbols`` lists all it touches."""
