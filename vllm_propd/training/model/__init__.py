"""Heads in training, their target and their checkpoints."""
