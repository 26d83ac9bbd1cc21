"""BYOL as pure functions on PyTorch: a port of DeepMind's JAX/Haiku implementation."""

import os

# By default the threads of an OpenMP program spin where they wait for each other. Two programs on the same
# cores then take ten times as long each, since the spinning threads of one hold the cores that the other needs.
# OpenMP reads this when PyTorch is loaded, so it has no effect on a program that imported torch before.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
