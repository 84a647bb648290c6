"""Features and training dynamics equal what the published implementation computed."""

import pytest
import torch
from golden_data import CNN, load_arrays, mlp

from mts_fast import features, ops, reference

TOLERANCE = 1e-6  # the distribution arrays are float32; observed 2e-7
DYNAMICS = ("training_dynamics_cnn_batchnorm", "training_dynamics_mlp_layernorm")


def distribution(implementation):
    a = load_arrays("distribution_features")
    args = a["embeddings"].double(), a["labels"], a["is_synthetic"].bool()
    return a, implementation(*args)


def in_small_blocks(*args):
    """Blocks that do not divide the pool of 186."""
    return features.distribution_features(*args, chunk=50)


@pytest.mark.parametrize(
    "implementation",
    [reference.distribution_features, features.distribution_features, in_small_blocks],
)
def test_distribution_features_equal_published(implementation):
    arrays, columns = distribution(implementation)
    assert len(columns) == 9
    for name, column in columns.items():
        torch.testing.assert_close(
            column, arrays[name].double(), rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("implementation", [reference.neighbor_statistics, ops.neighbor_statistics])
def test_five_nearest_neighbors_carry_the_published_classes(implementation):
    a = load_arrays("distribution_features")
    unit = torch.nn.functional.normalize(a["embeddings"].double(), dim=1)
    statistics = implementation(unit, a["labels"], a["is_synthetic"].bool(), k=3, neighbors=5)
    assert torch.equal(a["labels"][statistics.index].float(), a["knn5_classes"])


def golden_classifier(name):
    a = load_arrays(name)
    state = {k.removeprefix("model/"): v for k, v in a.items() if k.startswith("model/")}
    classes = len(state["fc.bias"])
    model = (CNN if "cnn" in name else mlp)(classes).double()
    model.load_state_dict(state)
    return a, model


@pytest.mark.parametrize("batch_size", [1, 7, 256])  # one by one, a remainder, all at once
@pytest.mark.parametrize("name", DYNAMICS)
def test_training_dynamics_equal_published(name, batch_size):
    a, model = golden_classifier(name)
    before = {n: b.clone() for n, b in model.named_buffers()}
    columns = features.training_dynamics(
        model.train(), a["inputs"], a["labels"], batch_size=batch_size
    )
    for column in ("loss", "gradient_norm", "error_norm"):
        torch.testing.assert_close(columns[column][:, 0], a[column], rtol=TOLERANCE, atol=0)
    assert model.training and all(torch.equal(before[n], b) for n, b in model.named_buffers())


@pytest.mark.parametrize("name", DYNAMICS)
def test_forgetting_equals_published(name):
    a = load_arrays(name)
    history = a["correct_history"].bool()
    counts, never = reference.forgetting(history)
    assert torch.equal(counts.double(), a["forgetting_counts"])
    assert never.nonzero().flatten().tolist() == a["never_correct"].tolist()
    counter = features.ForgettingCounter(history.shape[1])
    for epoch in history:
        for part in torch.randperm(len(epoch)).split(7):
            counter.update(part, epoch[part])
    assert torch.equal(counter.counts, counts)
    assert torch.equal(counter.never_correct, never)
