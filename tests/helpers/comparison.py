"""How tests compare: relative errors, and everything that must stay bitwise as it was."""

import copy

import torch


def relative(result, expected):
    """Largest error over the largest entry of the truth, in float64."""
    assert result.shape == expected.shape
    scale = expected.double().abs().max().clamp(min=1e-30)
    return ((result.double() - expected.double()).abs().max() / scale).item()


def error_ratio(result, rival, truth, dtype):
    """Largest error over that of `rival`, to which half an ulp of the largest entry is added."""
    floor = torch.finfo(dtype).eps / 2 * truth.abs().max().clamp(min=1e-30)
    gap = (result.double() - truth).abs().max()
    return (gap / ((rival.double() - truth).abs().max() + floor)).item()


def assert_gradients_equal(gradients, expected, tolerance):
    """As many gradients (or losses) as expected, each of a relative error below the tolerance."""
    for i, (gradient, truth) in enumerate(zip(gradients, expected, strict=True)):
        assert relative(gradient, truth) < tolerance, f"gradient {i}"


def generators(device):
    """States of the random generators that a forward on this device may draw from."""
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
    state = {"generators": generators(device)}
    if module is not None:
        state["state"] = module.state_dict()
        state["training"] = [m.training for m in module.modules()]
        if gradients:
            state["gradients"] = [p.grad for p in module.parameters()]
    if optimizer is not None:
        state["optimizer"] = optimizer.state_dict()
    return copy.deepcopy(state)


def assert_bitwise(result, expected, path=""):
    """Equal structure, and every tensor equal in every bit (-0.0 is not 0.0, NaN equals itself)."""
    assert type(result) is type(expected), path
    if isinstance(expected, torch.Tensor):
        assert result.dtype == expected.dtype and result.shape == expected.shape, path
        as_bytes = (
            t.detach().cpu().contiguous().view(-1).view(torch.uint8) for t in (result, expected)
        )
        assert torch.equal(*as_bytes), path
    elif isinstance(expected, dict):
        assert list(result) == list(expected), path
        for key in expected:
            assert_bitwise(result[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(result) == len(expected), path
        for i, pair in enumerate(zip(result, expected, strict=True)):
            assert_bitwise(*pair, f"{path}/{i}")
    else:
        assert result == expected, path
