"""What ten minutes on a GPU tell: ``python scripts/gpu_first_run`` (see ``__main__``)."""
