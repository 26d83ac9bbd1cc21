"""BYOL as pure functions on PyTorch: a port of DeepMind's JAX/Haiku implementation."""
