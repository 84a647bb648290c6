"""Every outcome of a systematic draw, with its probability: all orders, all intervals of u."""

import itertools

import torch


def design(pi, k, strata=None):
    """(subsets [n, k] ascending, their probabilities [n]) of `systematic_sample(pi, k, strata)`."""
    count = len(pi)
    orders = torch.tensor(list(itertools.permutations(range(count))))  # [M!, M]
    if strata is not None:
        orders = orders[(strata[orders].diff(dim=1) >= 0).all(1)]
    ends = pi[orders].cumsum(1)
    edges = torch.cat(
        [ends - ends.floor(), torch.zeros(len(orders), 1), torch.ones(len(orders), 1)], 1
    )
    edges = edges.sort(dim=1).values
    lengths, middles = edges.diff(dim=1), (edges[:, 1:] + edges[:, :-1]) / 2
    points = middles.unsqueeze(2) + torch.arange(k)  # [M!, intervals, k]
    at = torch.searchsorted(ends, points.flatten(1), right=True).clamp(max=count - 1)
    members = orders.gather(1, at).view(len(orders), -1, k).sort(dim=2).values
    codes = (members * (count ** torch.arange(k))).sum(2).flatten()
    chances = (lengths / len(orders)).flatten().double()
    real = chances > 1e-13 / len(orders)  # edges that coincide up to rounding have nothing between
    unique, inverse = codes[real].unique(return_inverse=True)
    total = torch.zeros(len(unique), dtype=torch.float64).index_add_(0, inverse, chances[real])
    subsets = torch.stack([(unique // count**i) % count for i in range(k)], 1)
    return subsets, total
