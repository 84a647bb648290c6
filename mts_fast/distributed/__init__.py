"""Steps over the processes of a torch.distributed group: one step of their joined batch.

Every rank has rows of each batch. What rows 1 to 9 sum over samples is summed over ranks, as often
as the schedule needs it; what is one number per sample (features, dots) is gathered, so that the
selector works on the whole batch on every rank and needs no reduction of its own.
"""

from mts_fast.distributed.by_number import joined_columns
from mts_fast.distributed.features import distribution_features
from mts_fast.distributed.forgetting import ForgettingCounter
from mts_fast.distributed.ranks import Alone, Header, Opened, Ranks, Sums
from mts_fast.distributed.sampler import GlobalBatchSampler, IndexedDataset
from mts_fast.distributed.shard import Shard
from mts_fast.distributed.wrappers import check_ranks, check_wrappers, ranks_of, unwrapped

__all__ = [
    "Alone",
    "ForgettingCounter",
    "GlobalBatchSampler",
    "Header",
    "IndexedDataset",
    "Opened",
    "Ranks",
    "Shard",
    "Sums",
    "check_ranks",
    "check_wrappers",
    "distribution_features",
    "joined_columns",
    "ranks_of",
    "unwrapped",
]
