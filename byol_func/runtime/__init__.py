"""Provides what JAX has built in and PyTorch lacks; nothing here is specific to BYOL."""
