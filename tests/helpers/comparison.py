"""How tests compare: relative errors, and everything that must stay bitwise as it was."""

import copy

import torch


def relative(found, expected):
    """Largest error over the largest entry of the truth, in float64."""
    assert found.shape == expected.shape
    scale = expected.double().abs().max().clamp(min=1e-30)
    return ((found.double() - expected.double()).abs().max() / scale).item()


def errors(found, rival, truth, dtype):
    """Largest error over the plain one's, with half a place of the largest entry as a floor."""
    floor = torch.finfo(dtype).eps / 2 * truth.abs().max().clamp(min=1e-30)
    gap = (found.double() - truth).abs().max()
    return (gap / ((rival.double() - truth).abs().max() + floor)).item()


def generators(device):
    """States of the generators that a forward on this device may draw from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states):
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def snapshot(*, module=None, optimizer=None, device="cpu", gradients=False):
    """A deep copy of parameters, buffers, modes, optimizer state and generators."""
    taken = {"generators": generators(device)}
    if module is not None:
        taken["state"] = module.state_dict()
        taken["training"] = [m.training for m in module.modules()]
        if gradients:
            taken["gradients"] = [p.grad for p in module.parameters()]
    if optimizer is not None:
        taken["optimizer"] = optimizer.state_dict()
    return copy.deepcopy(taken)


def assert_bitwise(found, expected, path=""):
    """Equal structure, and every tensor equal in every bit (-0.0 is not 0.0, NaN equals itself)."""
    assert type(found) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape, path
        as_bytes = (
            t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (found, expected)
        )
        assert torch.equal(*as_bytes), path
    elif isinstance(expected, dict):
        assert list(found) == list(expected), path
        for key in expected:
            assert_bitwise(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_bitwise(*pair, f"{path}/{i}")
    else:
        assert found == expected, path
