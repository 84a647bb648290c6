"""The demo's scenarios hold what they say."""

import pytest
import torch

from mts_fast.demo.data import CLASSES, REAL, make_scenario
from mts_fast.demo.data.coloured import BIAS, PALETTE
from mts_fast.demo.data.images import LabelledImages
from mts_fast.demo.data.planted import KINDS
from mts_fast.demo.data.splits import random_of_classes


@pytest.fixture(scope="module")
def planted():
    return make_scenario("digits", 3)


@pytest.fixture(scope="module")
def coloured():
    return make_scenario("coloured-digits", 3)


@pytest.mark.parametrize("data", ["digits", "coloured-digits"])
def test_a_scenario_repeats_and_differs_by_seed(data, request):
    scenario = request.getfixturevalue("planted" if data == "digits" else "coloured")
    again, other = make_scenario(data, 3), make_scenario(data, 4)
    assert torch.equal(scenario.pool.images, again.pool.images)
    assert torch.equal(scenario.pool.labels, again.pool.labels)
    assert torch.equal(scenario.test.images, again.test.images)
    assert not torch.equal(scenario.pool.images, other.pool.images)


def rows(images):
    return {tuple(x.flatten().tolist()) for x in images}


def test_planted_failures(planted):
    counts = {k: int((planted.kind == i).sum()) for i, k in enumerate(KINDS)}
    assert counts == {k: round(share * 4000) for k, share in KINDS.items()}
    assert int((planted.kind == REAL).sum()) == len(planted.val) == 100
    assert planted.val.labels.bincount().tolist() == [10] * 10
    assert len(planted.test) == 1797 - 200
    # no test or validation image is among the real training images
    real = rows(planted.pool[~planted.is_synthetic].images)
    assert not real & rows([*planted.val.images, *planted.test.images])
    # a recipe for weights takes real and validation images as clean ones, and draws synthetic ones
    assert rows(planted.clean.images) == real | rows(planted.val.images)
    assert torch.equal(planted.candidates, planted.is_synthetic)
    assert int(planted.is_helpful.sum()) == 1400


def colour_of(images):
    """The palette's nearest colour in the corner, where digits have no ink."""
    corner = images[:, :, 0, 0]
    return (corner[:, None] - 0.5 * PALETTE).abs().sum(2).argmin(1)


def test_the_colour_mostly_tells_the_class(coloured):
    pool, kinds = coloured.pool, coloured.kinds
    agrees = colour_of(pool.images) == pool.labels
    real = coloured.kind == REAL
    assert abs(agrees[real].float().mean() - BIAS) < 0.04 and int(real.sum()) == 200
    shares = [agrees[coloured.kind == i].float().mean() for i in range(len(kinds))]
    assert kinds == ("colour of its class", "random colour", "wrong label")
    assert shares[0] > 0.97 and shares[1] < 0.2 and shares[2] > 0.97
    for images in (coloured.test, coloured.val):
        assert (colour_of(images.images) == images.labels).float().mean() < 0.3
    assert coloured.val.labels.bincount().tolist() == [3] * CLASSES
    # groups: the class, and whether the colour is its own
    agree = (coloured.groups >= CLASSES) == agrees
    assert agree.float().mean() > 0.98 and torch.equal(coloured.groups % CLASSES, pool.labels)
    assert torch.equal(coloured.is_helpful, coloured.kind == 1) and coloured.candidates.all()


def test_changes_of_a_coloured_scenario():
    changed = {"val_per_class": 7, "shares": (0.1, 0.8, 0.1)}
    scenario = make_scenario("coloured-digits", 3, changes=changed)
    assert scenario.val.labels.bincount().tolist() == [7] * CLASSES
    assert [int((scenario.kind == i).sum()) for i in range(3)] == [400, 3200, 400]


@pytest.mark.parametrize("count", [0, 10_000])
def test_every_class_needs_validation_images(count):
    with pytest.raises(ValueError, match=r"val_per_class must be from 1, .*, got "):
        make_scenario("coloured-digits", 3, changes={"val_per_class": count})


def test_a_class_without_images_is_named():
    images = LabelledImages(torch.rand(2, 1, 4, 4), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="images must be of every class, got none of class 1"):
        random_of_classes(images, torch.tensor([0, 1]), torch.Generator())
