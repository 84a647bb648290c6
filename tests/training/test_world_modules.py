"""The list of modules that a step keeps follows what is added, replaced and removed."""

import pytest
import torch
from torch import nn

from mts_fast._isolation import World


def nested():
    return nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)))


def tied(model):
    model[1][1] = model[0]


def emptied(model):
    model[1][0] = None


def exchanged(model):
    model[0], model[1] = model[1], model[0]


# what changes in the model between two calls
CHANGES = {
    "nothing": lambda model: None,
    "one added": lambda model: model.append(nn.BatchNorm1d(2)),
    "one added deep inside": lambda model: model[1].append(nn.Sequential(nn.Linear(2, 2))),
    "one replaced": lambda model: model.__setitem__(0, nn.Embedding(3, 2)),
    "one replaced deep inside": lambda model: model[1].__setitem__(0, nn.LayerNorm(2)),
    "one removed": lambda model: model.__delitem__(1),
    "one under a second name": tied,
    "a name without one": emptied,
    "two in the other order": exchanged,
    "a buffer added": lambda model: model[0].register_buffer("late", torch.ones(1)),
    "a parameter replaced": lambda model: setattr(model[0], "bias", nn.Parameter(torch.ones(2))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_list_follows(change):
    model = nested()
    world = World(model)
    CHANGES[change](model)
    for _ in range(2):
        world.refresh()
        for mine, truth in (
            (world.modules, model.modules()),
            (world.parameters(), model.parameters()),
            (world.buffers(), model.buffers()),
        ):
            assert set(map(id, mine)) == set(map(id, truth))
        assert world.modules == list(model.modules())


def test_options_of_tables_are_read_anew():
    """They are attributes, which change without another module."""
    table = nn.Embedding(3, 2)
    world = World(nn.Sequential(table))
    assert world.written == [] and world.frequency_tables == []
    table.max_norm, table.scale_grad_by_freq = 1.0, True
    world.refresh()
    assert world.written[0] is table.weight and world.frequency_tables == [table]
    table.scale_grad_by_freq = False
    world.refresh()
    assert world.frequency_tables == []
