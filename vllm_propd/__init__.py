"""ProPD for vLLM: dynamic token trees from Medusa heads, verified losslessly."""
