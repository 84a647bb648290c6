"""Pools of embeddings with classes and sources, most of them awkward."""

import torch


def pool(n, dimension, classes, *, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dimension, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(classes, (n,), generator=g)
    return x, labels, torch.rand(n, generator=g) < 0.5


def one_class():
    return pool(23, 5, 1)


def lonely_sample():
    x, y, s = pool(23, 5, 2)
    y[:] = 0
    y[11] = 3  # classes 1 and 2 are empty
    return x, y, s


def no_real_sample():
    x, y, s = pool(24, 5, 2)
    s[y == 1] = True
    return x, y, s


def signs():
    """Entries of 1/2 and -1/2: cosines are exact in any order of summation, and many tie."""
    x, y, s = pool(40, 4, 3)
    return x.sign() / 2, y, s


def duplicates():
    """Every vector three times, with different labels; exact, as rounding would break the ties."""
    x, y, s = signs()
    return x[:12].repeat(3, 1), y[:36], s[:36]


def zero_vectors():
    x, y, s = pool(23, 5, 2)
    x[::4] = 0
    return x, y, s


def one_dimension():
    """All cosines are 1 or -1."""
    return pool(23, 1, 2)


def many():
    return pool(131, 16, 7)


POOLS = (
    one_class,
    lonely_sample,
    no_real_sample,
    duplicates,
    signs,
    zero_vectors,
    one_dimension,
    many,
)
