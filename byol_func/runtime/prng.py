"""Random numbers as functions of (seed, step): the counterpart of `jax.random.fold_in`."""

import hashlib

import torch


def fold_in(seed: int, *data: int | str) -> torch.Generator:
    """Returns a CPU generator that depends on the seed and every element of `data`, and on nothing else.

    Unlike a generator carried from step to step, it need not be saved in a checkpoint: the same (seed, data) give
    the same generator in every process and on every platform, in any order of calls.

    What is drawn from it with `rand` and `randperm` is the same under torch 2.11 and 2.14: the order of the images,
    the parts of a split and the augmentations (tests/runtime/test_prng.py holds the numbers). Initial weights are
    not, because PyTorch has changed `trunc_normal_`.

    The seed is a hash because the CPU engine keeps only the lower 32 bits of it, and nearby (seed, data) must not
    give the same or correlated streams.

    Args:
      seed: the experiment's random seed.
      *data: integers (such as a step or an epoch) and strings (such as the purpose of the numbers).

    Returns:
      A `torch.Generator` on the CPU.
    """
    key = repr((int(seed), *(d if isinstance(d, str) else int(d) for d in data)))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, 'little') >> 1)
