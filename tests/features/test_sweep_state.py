"""DistributionSweep's state: saved, loaded, and refused after an interrupted unit."""

import pytest
from comparison import assert_bitwise
from pools import many, zero_vectors

from mts_fast.features import DistributionSweep, all_pairs, distribution_features

X, Y, S = many()


def test_state_of_a_sweep_is_its_own():
    """Loading copies, and a state of other sizes changes nothing."""
    x, y, s = zero_vectors()
    sweep = DistributionSweep(x, y, s, chunk=10)
    units = sweep.run()
    next(units)
    state = sweep.state_dict()
    copy = {name: value.clone() for name, value in state.items()}
    other = DistributionSweep(x, y, s, chunk=10)
    other.load_state_dict(state)
    for _ in other.run():
        pass
    assert_bitwise(state, copy)
    assert sweep.done == 1
    with pytest.raises(RuntimeError, match=r"exhausted first, got 1 of 12 units"):
        sweep.columns()
    with pytest.raises(ValueError, match=r"state\['lists/similarity'\] must be .*; start afresh"):
        DistributionSweep(x, y, s, chunk=10, neighbors=2).load_state_dict(state)


def test_unit_cut_short(monkeypatch):
    """Its samples would be counted twice: no state is given, and a whole one can be loaded."""
    sweep = DistributionSweep(X, Y, S, chunk=50)
    units = sweep.run()
    state = [sweep.state_dict() for _ in zip(range(4), units, strict=False)][-1]
    whole = all_pairs.neighbor_statistics_

    def broken(*arguments):
        whole(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(all_pairs, "neighbor_statistics_", broken)
        with pytest.raises(KeyboardInterrupt):
            next(units)
    with pytest.raises(RuntimeError, match="a unit was cut short after 4; load the last state"):
        sweep.state_dict()
    sweep.load_state_dict(state)
    assert list(sweep.run()) == list(range(5, 13))
    assert_bitwise(sweep.columns(), distribution_features(X, Y, S, chunk=50))
