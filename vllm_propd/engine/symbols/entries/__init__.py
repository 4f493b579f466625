"""The ledger's entries, by what they are touched for."""
