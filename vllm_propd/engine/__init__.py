"""The thin side that knows vLLM; ``symbols.py`` lists all it touches."""
