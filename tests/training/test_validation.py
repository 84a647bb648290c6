"""Row 5 with other losses, weights and groups of the validation samples, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from comparison import relative
from torch import nn

import mts_fast

CLASSES = 3
GROUPS = torch.tensor([0, 0, 0, 7, 7, 2, 2, 2, 2])
WEIGHTS = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 0.5, 1.0, 1.0, 1.0], dtype=torch.float64)


def margin(z, y):
    """A loss unrelated to the training loss."""
    return F.multi_margin_loss(z, y, reduction="none")


def mean(losses, weights):
    return (weights * losses).sum() / weights.sum()


def groups_of(losses, weights):
    return [mean(losses[g == GROUPS], weights[g == GROUPS]) for g in GROUPS.unique()]


OBJECTIVES = {
    "mean": mean,
    "group_balanced": lambda lo, w: torch.stack(groups_of(lo, w)).mean(),
    "worst_group": lambda lo, w: torch.stack(groups_of(lo, w)).max(),
}


@pytest.mark.parametrize("micro_batch", [None, 4])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("own_loss", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_dots_are_those_of_the_objective(name, own_loss, weighted, micro_batch, device):
    g = torch.Generator().manual_seed(0)
    x, vx = (torch.randn(n, 4, generator=g, dtype=torch.float64).to(device) for n in (12, 9))
    y, vy = (torch.randint(CLASSES, (n,), generator=g).to(device) for n in (12, 9))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, CLASSES)).double().to(device)
    selector = mts_fast.Selector(0, CLASSES).double().to(device)
    weights = WEIGHTS.to(device) if weighted else torch.ones(9, dtype=torch.float64, device=device)

    theta = dict(model.named_parameters())
    z = selector(torch.zeros(12, 0).double().to(device), y, torch.zeros(12).bool().to(device))
    p = (z.sigmoid() / z.sigmoid().sum()).detach().requires_grad_()
    losses = F.cross_entropy(model(x), y, reduction="none")
    grads = torch.autograd.grad((p * losses).sum(), list(theta.values()), create_graph=True)
    ahead = {n: t - 0.1 * d for (n, t), d in zip(theta.items(), grads, strict=True)}
    z = torch.func.functional_call(model, ahead, vx)
    val = (margin if own_loss else lambda a, b: F.cross_entropy(a, b, reduction="none"))(z, vy)
    loss = OBJECTIVES[name](val, weights)
    expected = -torch.autograd.grad(loss, p)[0]

    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        selector,
        torch.optim.AdamW(selector.parameters()),
        online_features=False,
        val_loss=margin if own_loss else None,
        val_objective=name,
        micro_batch=micro_batch,
    )
    result = step(
        x,
        y,
        val_inputs=vx,
        val_labels=vy,
        val_weights=weights if weighted else None,
        val_groups=GROUPS.to(device),
    )
    assert relative(result.dots, expected) < 1e-12  # observed 1e-15
    assert relative(result.val_loss, loss.detach()) < 1e-12
