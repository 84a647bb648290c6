"""Trees for runs of the pipeline."""

import contextlib
import io

import pytest
from small_tree import make_tree, register_model, train


@pytest.fixture
def tree(tmp_path):
    """A folder for each role, and the model on the path."""
    register_model()
    return make_tree(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tree with a finished run; tests leave it as it is."""
    register_model()
    folder = make_tree(tmp_path_factory.mktemp("finished"))
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        assert train(folder) == 0
    return folder
