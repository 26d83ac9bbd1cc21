"""Sends the metrics and results of a run to an experiment tracker while it trains."""
