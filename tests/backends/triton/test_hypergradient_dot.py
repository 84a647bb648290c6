"""hypergradient_dot and sample_dot in Triton: layouts, dtypes, and inside the ghost engine."""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, error_ratio, relative
from roofline import step_cost
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mts_fast import reference, use_backend
from mts_fast.backends.triton.eligibility import interpreted
from mts_fast.backends.triton.launch import recorded_launches
from mts_fast.hypergradient.ghost import Ghost
from mts_fast.hypergradient.objective import LabelledBatch, Objective
from mts_fast.ops import hypergradient_dot, sample_dot

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# B, T, K, N: one position, smaller than a tile in all dimensions; several tiles in every dimension,
# the last of them partly filled
SIZES = ((3, 1, 5, 7), (3, 70, 80, 140))


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def problem(device, dtype, size, positions, inputs, outputs):
    g = torch.Generator().manual_seed(inputs)

    def draw(*sizes):
        return torch.randn(*sizes, generator=g, dtype=torch.float64).to(device, dtype)

    a, b = draw(size, positions, inputs), draw(size, positions, outputs)
    return a, draw(outputs, inputs), b, draw(outputs)


def to_float64(tensors):
    return [t if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_as_exact_as_replay_and_dot(bias, sizes, dtype, device):
    a, v, b, u = problem(device, dtype, *sizes)
    u = u if bias else None
    dots = hypergradient_dot(a, v, b, u)
    rival = reference.hypergradient_dot(a, v, b, u)
    truth = reference.hypergradient_dot(*to_float64([a, v, b, u]))
    assert dots.dtype == torch.promote_types(dtype, torch.float32)
    if dtype == torch.float64:
        assert relative(dots, truth) < 1e-13  # observed 5e-15
    else:  # observed 0.9 (16 bits: 1e-4, since the replay is not rounded)
        assert error_ratio(dots, rival, truth, torch.float32) <= 2


VIEWS = {
    # a 1 x 1 convolution: positions are contiguous, channels far apart
    "channels_first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "positions_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every_second_position": lambda t: torch.stack([t, -t], 2)[:, :, 0],
    "every_second_channel": lambda t: torch.stack([t, -t], 3)[..., 0],
    "part_of_the_positions": lambda t: torch.cat([t, -t], 1)[:, : t.shape[1]],
    "one_vector_for_all": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", ["a", "b", "both"])
def test_layouts(which, view, device):
    a, v, b, u = problem(device, torch.float64, 3, 34, 20, 33)
    if which != "b":
        a = VIEWS[view](a)
    if which != "a":
        b = VIEWS[view](b)
    dots = hypergradient_dot(a, v.T.contiguous().T, b, torch.stack([u, u], 1)[:, 0])
    truth = reference.hypergradient_dot(a, v, b, u)
    assert relative(dots, truth) < 1e-13  # observed 4e-15
    assert_bitwise(dots, hypergradient_dot(a, v, b, u))  # and bitwise the same twice


@pytest.mark.parametrize("operand", [torch.float32, torch.bfloat16])
def test_operands_are_cast_on_the_way(operand, device):
    """Under autocast a may be the float32 output of a norm, and v is float32 like its weight."""
    a, v, b, u = problem(device, torch.float32, 3, 34, 20, 33)
    b = b.bfloat16()
    dots = hypergradient_dot(a.to(operand), v, b, u)
    rounded = [t.bfloat16().double() for t in (a, v, b)]
    truth = reference.hypergradient_dot(*rounded, u.double())
    assert dots.dtype == torch.float32
    # triton's interpreter does not round the operands to bfloat16: observed 1.4e-3 there
    assert relative(dots, truth) < (2**-8 if interpreted() else 2e-6)


def test_every_entry_is_written(device, poisoned):
    a, v, b, u = problem(device, torch.float32, *SIZES[1])
    assert not hypergradient_dot(a, v, b, u).isnan().any()
    assert not hypergradient_dot(a.transpose(1, 2), v[:, :70], a.transpose(1, 2) @ v[:, :70].T)[
        0
    ].isnan()
    assert not sample_dot(a, a).isnan().any()


def test_offsets_that_do_not_reach(device, monkeypatch):
    """Rows further apart than int32 counts are copied first."""
    from mts_fast.backends.triton.kernels import hypergradient_dot as module

    a, v, b, _ = problem(device, torch.float64, 3, 4, 5, 7)
    a = VIEWS["channels_first"](a)
    seen = []
    run = module.hypergradient_dot
    monkeypatch.setattr(module, "hypergradient_dot", lambda a, *r: seen.append(a) or run(a, *r))
    truth = reference.hypergradient_dot(a, v, b)
    assert module.offsets_fit_int32(a, v, b)
    assert relative(hypergradient_dot(a, v, b), truth) < 1e-13
    monkeypatch.setattr(module, "LARGEST_OFFSET", 100)
    assert not module.offsets_fit_int32(a, v, b)
    assert relative(hypergradient_dot(a, v, b), truth) < 1e-13
    assert [t.is_contiguous() for t in seen] == [False, True]


def test_rows_of_one_position_each():
    """h[:, -1] of long sequences: the samples are far apart."""
    from mts_fast.backends.triton.kernels.hypergradient_dot import offsets_fit_int32

    far = 2**26  # 32 rows of a float32 tile are within int32, 64 are not
    row = lambda n, width, stride: torch.empty_strided(  # noqa: E731
        (n, 1, width), (stride, 1, 1), device="meta"
    )
    v = torch.zeros(5, 4)
    near, distant = row(64, 4, 1000), row(64, 4, far)
    assert offsets_fit_int32(near, v, row(64, 5, 1000))
    assert not offsets_fit_int32(distant, v, row(64, 5, 1000))
    assert not offsets_fit_int32(near, v, row(64, 5, far))


@pytest.mark.parametrize("dtype", DTYPES)
# one entry; part of one chunk; several chunks
@pytest.mark.parametrize("size", [1, 300, 20_000])
def test_sample_dot(size, dtype, device):
    g = torch.Generator().manual_seed(size)
    x, y = (torch.randn(3, size, generator=g, dtype=torch.float64).to(device, dtype) for _ in "xy")
    dots, truth = sample_dot(x, y), reference.sample_dot(x.double(), y.double())
    rival = reference.sample_dot(x, y)
    if dtype == torch.float64:
        assert relative(dots, truth) < 1e-13  # observed 2e-15
    else:
        assert error_ratio(dots, rival, truth, torch.float32) <= 2  # observed 0.6
    assert_bitwise(dots, sample_dot(x, y))


@pytest.mark.parametrize(
    ("view", "fused"),
    [
        (lambda t: t.contiguous(memory_format=torch.channels_last), True),
        (lambda t: t[1:], True),  # offset
        (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), False),  # samples inside
        (lambda t: torch.stack([t, t], -1)[..., 0], False),  # gaps
    ],
)
def test_sample_dot_serves_equal_layouts(view, fused, device):
    x, y = (view(torch.randn(4, 3, 5, 6, device=device)) for _ in "xy")
    with recorded_launches() as launches:
        sample_dot(x, y)
    assert len(launches) == fused
    truth = (x.double() * y.double()).flatten(1).sum(1)
    assert relative(sample_dot(x, y), truth) < 1e-6  # observed 1e-7
    other = y.contiguous() if fused and not y.is_contiguous() else y
    assert relative(sample_dot(x, other), truth) < 1e-6


class Convolutions(nn.Module):
    """Every kind of convolution and norm between two 1 x 1 ones, and a linear head."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.GroupNorm(2, 8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, 2, 1, bias=False),
            nn.Conv2d(8, 8, 1, stride=2),
            nn.Conv2d(8, 8, 1, groups=2),
            nn.Conv2d(8, 6, 1, bias=False),
        )
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Attention(nn.Module):
    """Packed attention (positions first inside torch), a linear layer of a slice of its weight."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3)
        self.mix = nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = x.transpose(0, 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + F.linear(x[..., :6], self.mix.weight[:, :6], self.mix.bias)
        return self.head(x.mean(0))


MODELS = {
    # model, shape, number of fused products and, by memory, of sample_dot. Fused: the two 1 x 1
    # convolutions of stride 1 without groups, and the head. sample_dot: the other replays, and that
    # of the norm unless every sample's gradients are stored
    "convolutions": (Convolutions, (3, 8, 8), 3, {"fast": 3, "low": 4}),
    "attention": (Attention, (4, 12), 4, {"fast": 0, "low": 0}),
}


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("name", MODELS)
def test_the_ghost_engine_takes_it(name, memory, device):
    make, shape, product_dots, sample_dots = MODELS[name]
    model = make().to(device).double()
    batch = LabelledBatch(
        torch.randn(6, *shape, device=device).double(), torch.arange(6, device=device) % 5
    )
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    engine = Ghost(Objective(model), parameters, memory=memory)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        losses = reference.cross_entropy(model(batch.inputs), batch.labels)
        truth = reference.hypergradient_dots(losses, parameters, direction)
    dots = engine.dots(batch, direction)
    assert relative(dots, truth) < 1e-10  # observed 1e-15
    with use_backend("reference"):
        assert relative(engine.dots(batch, direction), truth) < 1e-10
    linearization = engine.linearize(batch, gradients=1)
    linearization.gradient(torch.ones(6, device=device).double())
    with recorded_launches() as launches:
        linearization.dots(direction)
    names = [la.kernel.__name__.removesuffix("_kernel") for la in launches]
    assert names.count("hypergradient_dot") == product_dots
    assert names.count("sample_dot") == sample_dots[memory]


def test_bf16_dots_are_no_worse_than_replayed_ones(device):
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 5))
    model = model.to(device)
    batch = LabelledBatch(torch.randn(16, 24, device=device), torch.arange(16, device=device) % 5)
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    losses = reference.cross_entropy(model(batch.inputs), batch.labels)
    truth = reference.hypergradient_dots(losses, parameters, direction)
    gaps = {}
    for backend in ("triton", "reference"):
        engine = Ghost(Objective(model), parameters)
        with use_backend(backend), torch.autocast(device.type, torch.bfloat16):
            gaps[backend] = relative(engine.dots(batch, direction), truth)
    # observed 3.3e-3 and 3.6e-3: most of it is in a and b, which both share
    assert gaps["triton"] < 1.5 * gaps["reference"] < 0.02


# arguments of the kernels that are activations and output gradients
ACTIVATIONS = {"hypergradient_dot_kernel": (0, 3), "sample_dot_kernel": (0, 1)}


def test_float16_is_read_in_16_bits(device):
    """Under float16 autocast the kernels take activations and output gradients as they are, and add
    in float32; nothing is copied to float32 for them."""
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GELU(), nn.Flatten(), nn.Linear(96, 5)).to(device)
    inputs = torch.randn(8, 2, 6, 6, device=device)
    batch = LabelledBatch(inputs, torch.arange(8, device=device) % 5)
    parameters = list(model.parameters())
    direction = [torch.randn_like(p) for p in parameters]
    losses = reference.cross_entropy(model(batch.inputs), batch.labels)
    truth = reference.hypergradient_dots(losses, parameters, direction)
    dots = []
    with torch.autocast(device.type, torch.float16):
        counted, launched = (
            Ghost(Objective(model), parameters).linearize(batch, gradients=1) for _ in range(2)
        )
        for linearization in (counted, launched):
            linearization.gradient(torch.ones(8, device=device))
        cost = step_cost(lambda: dots.append(counted.dots(direction)))
        with recorded_launches() as launches:
            launched.dots(direction)
    assert relative(dots[0], truth) < 5e-3  # observed 1e-3
    passed = {}
    for one in launches:
        name = one.kernel.__name__
        dtypes = {one.arguments[place].dtype for place in ACTIVATIONS[name]}
        passed[name] = dtypes, one.options["ACC"].name
    assert passed == dict.fromkeys(ACTIVATIONS, ({torch.float16}, "fp32"))
    # the inputs are copied to float16, and directions; activations, which are larger, are not
    copies = [o.bytes for o in cost.operators if o.name == "_to_copy"]
    assert max(copies) == inputs.numel() * (4 + 2) < 8 * 6 * 4 * 4 * (4 + 2)


def test_opcheck(device):
    """torch's own checks of schema, fake kernels and dispatch."""
    a, v, b, u = problem(device, torch.float32, 2, 3, 5, 7)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    check = lambda op, *x: torch.library.opcheck(op, x, test_utils=tests)  # noqa: E731
    check(torch.ops.mts_fast.hypergradient_dot, a, v, b, u)
    check(torch.ops.mts_fast.hypergradient_dot, a, v, b.bfloat16(), None)
    check(torch.ops.mts_fast.sample_dot, a, a.double())


A, V, B = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((A[0], V, B), ValueError, "a must be 3-dim"),
        ((A.long(), V, B), TypeError, "a must be a floating"),
        ((A, V[:, :3], B), ValueError, r"v must be \[N, 4\]"),
        ((A, V, B[:, :2]), ValueError, r"b must be of shape \(2, 3, 5\)"),
        ((A, V, B, V[:3, 0]), ValueError, "bias must be of length 5"),
        ((A, V.to("meta"), B), ValueError, "v must be on cpu like a"),
    ],
)
def test_errors_name_the_argument(arguments, error, message):
    with pytest.raises(error, match=f"hypergradient_dot: {message}"):
        hypergradient_dot(*arguments)


def test_sample_dot_of_no_samples(device):
    empty = torch.ones(0, 3, device=device)
    assert sample_dot(empty, empty).shape == (0,)


@pytest.mark.skipif(not interpreted(), reason="devices of the CPU alone")
def test_sample_dot_errors():
    with pytest.raises(ValueError, match=r"sample_dot: y must be of x's shape \(2, 3, 4\)"):
        sample_dot(A, A[:1])
    with pytest.raises(ValueError, match="sample_dot: y must be on cpu like x"):
        sample_dot(A, A.to("meta"))
    with pytest.raises(TypeError, match="sample_dot: x must be a floating"):
        sample_dot(A.long(), A)
