"""Recorded trees replayed with other settings; no engine uses it."""
