"""Evaluation protocols and health measures."""
