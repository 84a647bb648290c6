"""SyncBatchNorm: refused by name on a CPU; by differences over ranks, with a stand-in for it."""

import pytest
import torch
from rank_synced import refused, train_synced
from torch import nn
from torch.nn.modules._functions import SyncBatchNorm

import mts_fast

REFUSED = {
    "cpu": "model must be free of SyncBatchNorm in train mode on a CPU, got one at '1'; torch runs",
    "empty": "labels must be given on every rank of a model with SyncBatchNorm in train mode",
    "uneven": "the number of micro-batches must be the same on every rank",
    "alone": "process_group must be that of the model's SyncBatchNorm",
    "selector": "selector must be free of SyncBatchNorm over ranks, got one at 'mlp.1'",
    "forward_mode": "1: SyncBatchNorm in train mode over several ranks has no forward-mode deriv",
    "double_backward": "1: SyncBatchNorm in train mode over several ranks has no second derivative",
    "compute": "compute must be None where the model has SyncBatchNorm in train mode, got 4",
    "eval": "no error",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_by_name(ranks, what):
    for text in ranks.results(refused, 2, what):
        assert REFUSED[what] in text, text


def test_statistics_of_all_ranks_are_those_of_one_process(ranks):
    """Parts of other sizes; engine "auto" goes on to differences."""
    several = ranks.results(train_synced, 2, {}, (7, 5))
    alone = train_synced(None, {"engine": "finite_difference"}, (12,))
    near = {"rtol": 1e-5, "atol": 1e-7}
    assert {rank[3] for rank in several} == {"finite_difference"}
    for rank in several:
        torch.testing.assert_close(rank[0], alone[0], **near)
        torch.testing.assert_close(rank[1], alone[1], **near)
    for of_all, of_one in zip(zip(*(r[2] for r in several), strict=True), alone[2], strict=True):
        torch.testing.assert_close(torch.cat(of_all), of_one, **near)


def test_torchs_function_has_no_forward_mode():
    """What its refusal rests on; should torch add one, forward_mode could serve."""
    assert SyncBatchNorm.jvp is torch.autograd.Function.jvp


def test_one_process_takes_it_as_torch_does():
    """Without torch.distributed it is BatchNorm, by any engine that serves BatchNorm."""
    ends = []
    for kind in (nn.BatchNorm1d, nn.SyncBatchNorm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), kind(6), nn.Tanh(), nn.Linear(6, 3)).double()
        selector = mts_fast.Selector(0, 3, hidden=(4,)).double()
        step = mts_fast.MTSStep(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
            selector,
            torch.optim.AdamW(selector.parameters(), lr=0.05),
            online_features=False,
        )
        x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
        results = [step(x, y, val_inputs=x[:5], val_labels=y[:5]) for _ in range(3)]
        ends.append((model.state_dict(), results[-1].dots, results[-1].engine))
    assert ends[0][2] == ends[1][2]
    torch.testing.assert_close(ends[1][:2], ends[0][:2], rtol=1e-12, atol=1e-14)
