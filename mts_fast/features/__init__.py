"""Features that tell the selector which samples to trust."""

from mts_fast.features.columns import Columns
from mts_fast.features.distribution import distribution_features
from mts_fast.features.dynamics import training_dynamics
from mts_fast.features.embed import embed
from mts_fast.features.forgetting import ForgettingCounter
from mts_fast.features.online import OnlineStandardizer, online_features
from mts_fast.features.penultimate import PenultimateFeatures
from mts_fast.features.search import Approximate
from mts_fast.features.sources import open_embeddings, open_vector
from mts_fast.features.sweep import DistributionSweep
from mts_fast.features.table import PAPER_COLUMNS, FeatureTable

__all__ = [
    "PAPER_COLUMNS",
    "Approximate",
    "Columns",
    "DistributionSweep",
    "FeatureTable",
    "ForgettingCounter",
    "OnlineStandardizer",
    "PenultimateFeatures",
    "distribution_features",
    "embed",
    "online_features",
    "open_embeddings",
    "open_vector",
    "training_dynamics",
]
