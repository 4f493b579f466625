"""ProPD for vLLM: dynamic token trees from Medusa heads, verified losslessly."""

__version__ = "0.1.0"
