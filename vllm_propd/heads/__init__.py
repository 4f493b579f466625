"""Medusa heads and early heads: modules and checkpoints. No vLLM here."""
