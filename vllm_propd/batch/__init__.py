"""Batch jobs on Ray Data: prompts in files, answers in files; no vLLM is imported here."""
