"""The ledger's entries, one module for each purpose for which ProPD touches vLLM."""
