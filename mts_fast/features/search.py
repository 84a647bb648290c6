"""How the neighbours of distribution features are searched: exactly, or approximately."""

from __future__ import annotations

from dataclasses import dataclass

from mts_fast._check import check_int, check_number, check_positive_int, describe, fail
from mts_fast.features.columns import Note
from mts_fast.features.pool_checks import OP

# a pool or a class of fewer samples is compared exactly: about where both searches took equal time
# on one core, 256 numbers a sample (docs/scaling.md)
EXACT_BELOW = 100_000
# on the columns of an approximate search that was exact, the pool being small
EXACT_NOTE: Note = {"search": "exact", "recall": 1.0}


@dataclass(frozen=True)
class Approximate:
    """Options of an approximate search: inverted lists of product-quantised rows (IVF-PQ) on faiss.

    The cosines of what is found are exact; what is missed is measured on a sample of the pool
    against exact search, and reported.

    Args:
        recall: to be reached on a sample of queries, in (0, 1]; fewer probes than needed for it are
            not used. What was reached is reported, and warned about where it is less.
        queries: samples in that sample; half of them choose the probes, the other half is what is
            reported.
        nlist: inverted lists of the pool; default 2 sqrt(N). Of a class its share.
        nprobe: lists that are looked through for each sample; default the fewest that reach
            `recall`.
        candidates: for each neighbour, how many are ranked by their exact cosines; default the
            fewest of 4, 8, 16, 32 and 64 that reach `recall`.
        exact_below: a class of fewer samples is compared exactly, and a pool, too.
        seed: of the sample and of the clustering. No generator of the caller's is used.

    Raises:
        TypeError, ValueError: numbers out of range.

    Example:
        >>> from mts_fast.features import Approximate
        >>> Approximate(recall=0.99).queries
        1000
    """

    recall: float = 0.95
    queries: int = 1000
    nlist: int | None = None
    nprobe: int | None = None
    candidates: int | None = None
    exact_below: int = EXACT_BELOW
    seed: int = 0

    def __post_init__(self) -> None:
        op = "Approximate"
        check_number(op, "recall", self.recall, above=0, at_most=1)
        check_int(op, "queries", self.queries, low=2, hint="half of them choose the probes")
        for name in ("nlist", "nprobe", "candidates"):
            if getattr(self, name) is not None:
                check_positive_int(op, name, getattr(self, name))
        check_int(op, "exact_below", self.exact_below, low=0)
        check_int(op, "seed", self.seed, low=0)


def search_options(search: object) -> Approximate | None:
    """The options of an approximate search; None for an exact one.

    Raises:
        TypeError, ValueError: neither "exact", "approximate" nor an Approximate.
    """
    if isinstance(search, Approximate):
        return search
    expected, hint = "'exact', 'approximate' or an Approximate(...)", "spell it as one of these"
    if not isinstance(search, str):
        fail(TypeError, OP, "search", expected, describe(search), hint)
    if search not in ("exact", "approximate"):
        fail(ValueError, OP, "search", expected, repr(search), hint)
    return Approximate() if search == "approximate" else None
