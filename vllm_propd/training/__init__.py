"""Training heads on a frozen target. No vLLM here."""
