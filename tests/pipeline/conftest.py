"""Trees for runs of the pipeline."""

import contextlib
import io

import pytest
from small_runs import make_tree, train
from small_trees import install_small_model


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A folder for each role, and the model on the path."""
    install_small_model(monkeypatch)
    return make_tree(tmp_path)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tree with a finished run; tests leave it as it is."""
    folder = make_tree(tmp_path_factory.mktemp("finished"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_small_model(monkeypatch)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            assert train(folder) == 0
        yield folder
