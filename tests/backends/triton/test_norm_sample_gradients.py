"""norm_sample_gradients in Triton: dtypes, layouts, tiles, and inside the ghost engine."""

import pytest
import torch
from comparison import assert_bitwise, error_ratio, relative
from torch import nn

from mts_fast import reference, use_backend
from mts_fast.backends.triton.launch import recorded_launches
from mts_fast.hypergradient.ghost import Ghost
from mts_fast.hypergradient.objective import LabelledBatch, Objective
from mts_fast.ops import group_norm_sample_gradients, layer_norm_sample_gradients

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# B, T, C: one row; several rows a tile, several tiles a chunk and chunks, each partly filled; a row
# in one tile
ROWS = ((2, 1, 3), (2, 75, 20), (2, 34, 300), (2, 3, 1500))
# B, C, S, groups: in registers; in tiles of one channel and of several; an instance norm; short
GROUPED = ((2, 6, 20, 2), (1, 3, 5000, 1), (1, 60, 300, 2), (2, 3, 20, 3), (2, 6, 1, 2))


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def draw(device, dtype, *shape):
    g = torch.Generator().manual_seed(sum(shape))
    x, b = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in "xb")
    return (3 + 2 * x).to(device, dtype), b.to(device, dtype)


def assert_as_exact(op, x, b, *options):
    """At most twice the reference's error, in float32 at least; bitwise the same twice."""
    ours, again = op(x, b, *options), op(x, b, *options)
    with use_backend("reference"):
        rivals, truths = op(x, b, *options), op(x.double(), b.double(), *options)
    for result, same, rival, truth in zip(ours, again, rivals, truths, strict=True):
        assert result.dtype == torch.promote_types(x.dtype, torch.float32)
        if x.dtype == torch.float64:
            assert relative(result, truth) < 1e-13  # observed 2e-15
        else:
            assert error_ratio(result, rival, truth, torch.float32) <= 2  # observed 1.1
        assert_bitwise(result, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ROWS)
def test_layer_norm(shape, dtype, device):
    assert_as_exact(layer_norm_sample_gradients, *draw(device, dtype, *shape))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GROUPED)
def test_group_norm(case, dtype, device):
    *shape, groups = case
    assert_as_exact(group_norm_sample_gradients, *draw(device, dtype, *shape), groups)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("centered", [True, False])
def test_options_of_the_layer_norm(centered, bias, device):
    x, b = draw(device, torch.float64, 2, 34, 20)
    options = {"eps": 0.5, "centered": centered, "bias": bias}
    weight, of_bias = layer_norm_sample_gradients(x, b, **options)
    with use_backend("reference"):
        truth = layer_norm_sample_gradients(x, b, **options)
    assert relative(weight, truth[0]) < 1e-13
    assert (of_bias is None) == (truth[1] is None) == (not bias)


# blocks of several channels, the last partly filled; several blocks of positions
@pytest.mark.parametrize("shape", [(2, 70, 20), (1, 3, 3000)])
def test_statistics_that_are_passed(shape, device):
    x, b = draw(device, torch.float32, *shape)
    moments = {"mean": x.mean((0, 2)), "variance": x.var((0, 2))}
    ours = group_norm_sample_gradients(x, b, 1, **moments)
    with use_backend("reference"):
        rivals = group_norm_sample_gradients(x, b, 1, **moments)
        moments = {name: t.double() for name, t in moments.items()}
        truths = group_norm_sample_gradients(x.double(), b.double(), 1, **moments)
    for result, rival, truth in zip(ours, rivals, truths, strict=True):
        assert error_ratio(result, rival, truth, torch.float32) <= 2  # observed 0.9


def test_rows_without_variance_and_eps(device):
    """1 / sqrt(0) of the rows that fill a tile up must not reach the sums."""
    x, b = draw(device, torch.float32, 2, 5, 20)
    for sums in layer_norm_sample_gradients(x, b, eps=0.0):
        assert sums.isfinite().all()


VIEWS = {
    "channels_first": lambda t: t.mT.contiguous().mT,
    "samples_inside": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda t: torch.stack([t, -t], 3)[..., 0],
    "one_vector_for_all": lambda t: t[:1, :1].expand(t.shape),
}


@pytest.mark.parametrize("view", VIEWS)
def test_layouts(view, device):
    x, b = draw(device, torch.float64, 3, 34, 20)
    view = VIEWS[view]
    group_norm = lambda x, b: group_norm_sample_gradients(x, b, 2)  # noqa: E731
    for op in (layer_norm_sample_gradients, group_norm):
        for pair in ((view(x), b), (x, view(b)), (view(x), view(b))):
            ours = op(*pair)
            with use_backend("reference"):
                truths = op(*pair)
            for result, truth in zip(ours, truths, strict=True):
                assert relative(result, truth) < 1e-13  # observed 2e-15


def test_dtypes_may_differ(device):
    """Under autocast a norm makes float32 of bfloat16."""
    x, b = draw(device, torch.float32, 2, 34, 20)
    x = x.bfloat16()
    for op in (layer_norm_sample_gradients, lambda x, b: group_norm_sample_gradients(x, b, 2)):
        for result, truth in zip(op(x, b), op(x.double(), b.double()), strict=True):
            assert result.dtype == torch.float32
            assert relative(result, truth) < 1e-6  # observed 2e-7


def test_every_entry_is_written(device, poisoned):
    for shape in ROWS:
        x, b = draw(device, torch.float32, *shape)
        assert not any(t.isnan().any() for t in layer_norm_sample_gradients(x, b))
    for *shape, groups in GROUPED:
        x, b = draw(device, torch.float32, *shape)
        assert not any(t.isnan().any() for t in group_norm_sample_gradients(x, b, groups))


def test_what_the_kernels_do_not_take(device, monkeypatch):
    """Long rows and tensors without entries: the reference; rows far apart: a copy."""
    from mts_fast.backends.triton.kernels import norm_sample_gradients as module

    with recorded_launches() as launches:
        x = torch.ones(1, 1, 8193, device=device)
        layer_norm_sample_gradients(x, x)
        layer_norm_sample_gradients(x[:0], x[:0])
        group_norm_sample_gradients(x[:0], x[:0], 1)
    assert not launches
    x, b = draw(device, torch.float64, 2, 34, 20)
    expected = layer_norm_sample_gradients(x, b)
    monkeypatch.setattr(module, "LARGEST_OFFSET", 100)
    assert not module.offsets_fit_int32(x, b)
    strided = [VIEWS["samples_inside"](t) for t in (x, b)]
    assert_bitwise(layer_norm_sample_gradients(*strided), expected)


def test_opcheck(device):
    """torch's own checks of schema, fake kernels and dispatch."""
    x, b = draw(device, torch.float32, 2, 3, 5)
    moment = b[0, :, 0].abs()
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    check = lambda op, *x: torch.library.opcheck(op, x, test_utils=tests)  # noqa: E731
    layer, group = (
        getattr(torch.ops.mts_fast, f"{kind}_norm_sample_gradients_triton")
        for kind in ("layer", "group")
    )
    check(layer, x, b, 1e-5, True, True)
    check(layer, x.bfloat16(), b, 1e-5, False, False)
    check(group, x, b, 3, 1e-5, None, None)
    check(group, x, b.double(), 1, 1e-5, moment, moment)


class Norms(nn.Module):
    """Every norm that ghost takes, on maps and then on rows."""

    def __init__(self):
        super().__init__()
        self.maps = nn.Sequential(
            nn.Conv2d(3, 8, 1),
            nn.GroupNorm(2, 8, eps=0.1),
            nn.InstanceNorm2d(8, affine=True),
            nn.BatchNorm2d(8).eval(),
        )
        self.rows = nn.Sequential(nn.LayerNorm((4, 8)), nn.RMSNorm(8), nn.LayerNorm(8, bias=False))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        rows = self.maps(x).flatten(2).mT  # [B, 16, 8]
        return self.head(self.rows(rows.unflatten(1, (4, 4))).tanh().mean((1, 2)))


def test_the_ghost_engine_takes_it(device):
    model = Norms().to(device).double().eval()
    parameters = list(model.parameters())
    batch = LabelledBatch(
        torch.randn(6, 3, 4, 4, device=device).double(), torch.arange(6, device=device) % 5
    )
    direction = [torch.randn_like(p) for p in parameters]
    losses = reference.cross_entropy(model(batch.inputs), batch.labels)
    truth = reference.hypergradient_dots(losses, parameters, direction)
    engine = Ghost(Objective(model), parameters)
    linearization = engine.linearize(batch, gradients=1)
    with recorded_launches() as launches:
        linearization.gradient(torch.ones(6, device=device).double())
    names = [la.kernel.__name__.removesuffix("_sample_gradients_kernel") for la in launches]
    assert (names.count("layer_norm"), names.count("group_norm")) == (3, 3)
    assert relative(engine.dots(batch, direction), truth) < 1e-10  # observed 1e-15
