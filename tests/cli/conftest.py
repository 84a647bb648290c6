"""The pool that tests of `mts-fast features` read from a file."""

import numpy as np
import pytest
from features_command import S, X, Y


@pytest.fixture
def pool(tmp_path):
    """Arguments that name one file in tmp_path with embeddings, labels and flags."""
    np.savez(tmp_path / "pool.npz", x=X.numpy(), y=Y.numpy(), s=S.numpy())
    file = str(tmp_path / "pool.npz")
    return [f"{file}:x", "--labels", f"{file}:y", "--is-synthetic", f"{file}:s"]
