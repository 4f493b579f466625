"""What is ProPD itself: trees, growth, acceptance, tree attention. No vLLM here."""
