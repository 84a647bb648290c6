"""global_norm and perturb in Triton against the reference in float64.

Without a GPU the kernels run in triton's interpreter.
"""

import pytest
import torch
from comparison import assert_bitwise, relative
from models import make_case

from mts_fast import reference, use_backend
from mts_fast.backends.registry import resolve
from mts_fast.backends.triton.launch import recorded_launches
from mts_fast.hypergradient import LabelledBatch, Objective
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.ops.perturb import global_norm, perturb

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# no entry; no dimension; a matrix; one below a block of 2048, a block; a chunk of 8192, one more
SHAPES = ((0,), (), (3, 5), (2047,), (2048,), (8192,), (8193,))


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def draw(device, dtype, seed, shapes=SHAPES):
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    return [t.to(device, dtype) for t in drawn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm(dtype, device):
    tensors = draw(device, dtype, 0)
    truth = torch.cat([t.double().flatten() for t in tensors]).norm()
    norm, rival = global_norm(tensors), reference.global_norm(tensors)
    assert norm.dtype == dtype and norm.shape == ()
    # twice torch's error and half an ulp; observed at most half of that and 1.3 of torch's
    assert relative(norm, truth) <= 2 * relative(rival, truth) + torch.finfo(dtype).eps / 2
    assert_bitwise(global_norm(tensors), norm)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float64])  # of another model's norm
def test_perturb(scale_dtype, dtype, device, monkeypatch):
    parameters, direction = draw(device, dtype, 0), draw(device, dtype, 1)
    held = [t.clone() for t in (*parameters, *direction)]
    scale = torch.tensor(-0.3, dtype=scale_dtype, device=device)
    empty_like = torch.empty_like
    with monkeypatch.context() as patch:
        poisoned = lambda *a, **k: empty_like(*a, **k).fill_(torch.nan)  # noqa: E731
        patch.setattr(torch, "empty_like", poisoned)
        perturbed = perturb(parameters, direction, scale)
    rival = reference.perturb(parameters, direction, scale)
    for p, v, mine, other in zip(parameters, direction, perturbed, rival, strict=True):
        assert mine.dtype == dtype and mine.shape == p.shape
        if p.numel():
            truth = p.double() + scale.double() * v.double()
            # half an ulp is the rounding of the result; observed at most 0.6 ulp
            allowed = 2 * relative(other, truth) + torch.finfo(dtype).eps / 2
            assert relative(mine, truth) <= allowed
    assert_bitwise(perturb(parameters, direction, scale), perturbed)
    assert_bitwise([*parameters, *direction], held)


def test_one_launch_for_all_that_share_dtypes(device):
    parameters = draw(device, torch.float32, 0) + draw(device, torch.bfloat16, 1)
    direction = [p.clone() for p in parameters]
    direction[-1] = direction[-1].float()
    with recorded_launches() as launches:
        global_norm(parameters)
        perturb(parameters, direction, torch.ones((), device=device))
    # two dtypes; the same, and bfloat16 with a float32 direction
    assert [la.kernel.__name__ for la in launches] == ["square_sum_kernel"] * 2 + [
        "perturb_kernel"
    ] * 3
    truth = reference.global_norm([p.double() for p in parameters])
    assert relative(global_norm(parameters), truth) < 1e-7  # observed 4e-8
    scale = torch.full((), 0.5, device=device)
    perturbed = perturb(parameters, direction, scale)
    for mine, p, v in zip(perturbed, parameters, direction, strict=True):
        # a whole ulp: the interpreter truncates to bfloat16, where a GPU rounds
        torch.testing.assert_close(
            mine.double(), p.double() + 0.5 * v.double(), rtol=torch.finfo(p.dtype).eps, atol=0
        )


VIEWS = {
    "unaligned": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.mT.contiguous().mT,
    "gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["parameter", "direction", "both"])
def test_views(which, view, device):
    p, v = draw(device, torch.float64, 0, shapes=((3, 50), (3, 50)))
    p = VIEWS[view](p) if which != "direction" else p
    v = VIEWS[view](v) if which != "parameter" else v
    scale = torch.tensor(0.3, dtype=torch.float64, device=device)
    (perturbed,) = perturb([p], [v], scale)
    assert relative(perturbed, p + 0.3 * v) < 1e-15  # observed 0
    assert relative(global_norm([p, v]), torch.stack([p, v]).norm()) < 1e-15  # observed 2e-16


def test_norm_of_nothing_and_of_zeros(device):
    assert global_norm([torch.ones(0, device=device)]) == 0.0
    assert global_norm([torch.zeros(5, device=device), torch.zeros((), device=device)]) == 0.0


@pytest.mark.parametrize("norm", ["nan", "inf"])
def test_norm_of_broken_tensors(norm, device):
    broken = torch.tensor([1.0, float(norm)], device=device)
    assert_bitwise(global_norm([broken]), reference.global_norm([broken]))


def test_finite_difference_engine(device):
    case = make_case("mlp", device)
    parameters = [p for p in case.model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator).to(p) for p in parameters]
    dots = {}
    for backend in ("reference", "triton"):
        with use_backend(backend):
            engine = FiniteDifference(Objective(case.model), parameters)
            dots[backend] = engine.dots(LabelledBatch(case.inputs, case.labels), direction)
    assert relative(dots["triton"], dots["reference"]) < 1e-9  # observed 5e-11


ONE, META = torch.ones(3), torch.ones(3, device="meta")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], [], ONE[0]), ValueError, "parameters must be at least one tensor, got none"),
        (([ONE], [], ONE[0]), ValueError, r"direction must be one per parameter \(1\), got 0"),
        (([ONE], [ONE[:2]], ONE[0]), ValueError, r"direction must be of shape \(3,\), got \(2,\)"),
        (([ONE], [META], ONE[0]), ValueError, r"direction\[0\] must be on cpu like parameters, g"),
        (([ONE, META], [ONE, ONE], ONE[0]), ValueError, r"parameters\[1\] must be on cpu like pa"),
        (([ONE.long()], [ONE], ONE[0]), TypeError, r"parameters\[0\] must be a floating-point"),
        (([ONE], [ONE], META[0]), ValueError, "scale must be on cpu like parameters"),
        (([ONE], [ONE], ONE), ValueError, "scale must be 0-dimensional"),
    ],
)
def test_refused_arguments(arguments, error, message):
    with pytest.raises(error, match=f"perturb: {message}"):
        perturb(*arguments)


def test_refused_norms():
    with pytest.raises(ValueError, match="global_norm: tensors must be at least one"):
        global_norm([])
    with pytest.raises(ValueError, match=r"global_norm: tensors\[1\] must be on cpu like tensors"):
        global_norm([ONE, META])


def test_auto_does_not_take_it(device):
    with use_backend("auto"):
        for op in ("global_norm", "perturb"):
            assert "triton" not in resolve(op, [torch.ones(2, device=device)]).__module__
