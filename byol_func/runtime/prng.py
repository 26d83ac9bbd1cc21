"""Random numbers as functions of (seed, step): the counterpart of `jax.random.fold_in`."""

import hashlib

import torch


def fold_in(seed: int, *data: int | str) -> torch.Generator:
    """Returns a CPU generator that depends on the seed and every element of `data`, and on nothing else.

    Unlike a generator carried from step to step, it needs no checkpoint: the same (seed, data) give
    the same generator in every process and on every platform, in any order of calls. What is drawn from it
    is the same under one version of PyTorch, which promises nothing across versions: `randperm`, and with it
    the order of the images, is equal in 2.11 and 2.14; `trunc_normal_`, and with it the initial weights, is not.

    The CPU engine keeps the lower 32 bits of a seed, hence the hash: nearby (seed, data) must not
    end up in the same or in correlated streams.

    Args:
      seed: the experiment's random seed.
      *data: integers (a step, an epoch) and strings (what the numbers are for).

    Returns:
      A `torch.Generator` on the CPU.
    """
    key = repr((int(seed), *(d if isinstance(d, str) else int(d) for d in data)))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)
