"""Conversion from and to official checkpoints, and export to other libraries."""
