"""Comparisons with other libraries. `python -m parity` writes the ledger; run it from the root of a checkout."""
