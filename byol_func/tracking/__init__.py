"""Sends a run to an experiment tracker while it trains."""
