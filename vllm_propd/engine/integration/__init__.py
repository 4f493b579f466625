"""How ProPD enters vLLM: config, executor, scheduler, what is refused."""
