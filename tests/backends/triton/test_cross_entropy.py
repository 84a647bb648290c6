"""cross_entropy in Triton against torch in float64: every dtype, width, option and derivative.

Without a GPU the kernels run in triton's interpreter.
"""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, assert_gradients_equal, error_ratio, relative

from mts_fast import reference, use_backend
from mts_fast.backends.registry import resolve
from mts_fast.backends.triton.eligibility import interpreted
from mts_fast.backends.triton.launch import recorded_launches
from mts_fast.ops import cross_entropy, weighted_cross_entropy
from mts_fast.reference import Target

IGNORED = -100
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# one class; two; no power of two, several rows a tile; ImageNet, with rows aligned to 8; one more
# than a block holds, so that rows are read in tiles, the last one of a single class
CLASSES = (1, 2, 10, 1000, 8193)
# every option alone, and together
OPTIONS = {
    "plain": {},
    "class_weight": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "ignored": {"ignore_index": 1},
    "all": {"class_weight": True, "label_smoothing": 0.1, "ignore_index": 1},
}


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def batch(device, dtype, shape, classes, scale=3.0):
    g = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(*shape, classes, generator=g, dtype=torch.float64)
    labels = torch.randint(classes, shape, generator=g)
    labels.view(-1)[1] = IGNORED
    return logits.to(device, dtype), labels.to(device)


def options_on(options, device, dtype, classes):
    options = dict(options)
    if options.pop("class_weight", False):
        g = torch.Generator().manual_seed(1)
        options["class_weight"] = torch.rand(classes, generator=g).to(device, dtype)
    return options


def losses_and_gradients(function, logits, labels, p, options):
    x, p = logits.clone().requires_grad_(), p.clone().requires_grad_()
    loss, losses = function(x, labels, p, **options)[:2]
    return loss.detach(), losses.detach(), *torch.autograd.grad(loss, [x, p])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4])  # all equal; usual; far apart
def test_as_exact_as_torch(scale, classes, dtype, device):
    logits, labels = batch(device, dtype, (5,), classes, scale)
    p = torch.linspace(0, 1, 5, device=device)
    result = losses_and_gradients(weighted_cross_entropy, logits, labels, p, {})
    plain = reference.weighted_cross_entropy
    rival = losses_and_gradients(plain, logits, labels, p, {})
    truth = losses_and_gradients(plain, logits.double(), labels, p.double(), {})
    for mine, other, exact, allowed in zip(result, rival, truth, (2, 2, 3, 3), strict=True):
        # twice torch's error, gradients three times; observed 1.4 and 1.3
        assert mine.dtype == other.dtype
        assert error_ratio(mine, other, exact, dtype) <= allowed
    assert result[1][1] == 0 and (result[2][1] == 0).all()


@pytest.mark.parametrize("shape", [(5,), (3, 2)])  # one label a sample; sequences
@pytest.mark.parametrize("classes", [4, 4097])  # whole rows; tiles (of float64)
@pytest.mark.parametrize("options", OPTIONS)
def test_options_and_sequences(options, classes, shape, device):
    dtype = torch.float64
    options = options_on(OPTIONS[options], device, dtype, classes)
    logits, labels = batch(device, dtype, shape, classes)
    labels.view(-1)[2] = options.get("ignore_index", IGNORED)
    labels.view(-1)[1] = options.get("ignore_index", IGNORED)
    if len(shape) == 2:
        labels[-1] = options.get("ignore_index", IGNORED)  # every position of this sample
    p = torch.linspace(0.1, 1, shape[0], device=device, dtype=dtype)
    result = losses_and_gradients(weighted_cross_entropy, logits, labels, p, options)
    truth = losses_and_gradients(reference.weighted_cross_entropy, logits, labels, p, options)
    assert_gradients_equal(result, truth, 1e-13)  # observed 2e-14
    # the same without p: losses first, their gradient in a second pass
    x = logits.clone().requires_grad_()
    losses = cross_entropy(x, labels, **options)
    assert relative(losses.detach(), truth[1]) < 1e-13
    assert relative(torch.autograd.grad(losses, x, p)[0], truth[2]) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "classes"), [((6,), 10), ((2, 3), 8193), ((2, 3), 1)])
def test_statistics_come_from_the_same_pass(shape, classes, dtype, device):
    logits, labels = batch(device, dtype, shape, classes)
    logits.view(-1, classes)[0] = 1.0  # a tie: the lowest class is predicted
    labels.view(-1)[0] = 0
    logits.view(-1, classes)[2] = 1.0
    labels.view(-1)[2] = classes - 1
    logits.view(-1, classes)[3, labels.view(-1)[3]] = 60.0  # a sure sample: 1 - p_y must not cancel
    p = torch.ones(shape[0], device=device)
    loss, losses, statistics = weighted_cross_entropy(logits, labels, p, statistics=True)
    truth = reference.sample_statistics(logits.double(), labels)
    for name, mine, exact in zip(statistics._fields, statistics, truth, strict=True):
        assert mine.dtype == torch.promote_types(dtype, torch.float32)
        # the largest entries are of order 1 to 9; observed 4e-16 and 2e-7
        assert relative(mine, exact) < 16 * torch.finfo(mine.dtype).eps, name
    # with statistics the tiles of a row are smaller: sums are in another order
    torch.testing.assert_close((loss, losses), weighted_cross_entropy(logits, labels, p))


def test_error_norm_of_a_sure_sample_keeps_its_digits(device):
    logits = torch.tensor([[30.0, 0.0, 1.0]], device=device)
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    statistics = weighted_cross_entropy(logits, labels, labels + 1.0, statistics=True)[2]
    truth = reference.sample_statistics(logits.double(), labels).error_norm
    # the norm is 4e-13; softmax - onehot in float32 would be 0. exp(-30) has an error of 2e-6
    assert relative(statistics.error_norm, truth) < 1e-5


VIEWS = {
    "classes_first": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every_second_class": lambda x: torch.stack([x, -x], -1)[..., 0],
    "shifted": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],  # as for next-token losses
    "offset": lambda x: torch.cat([x[:1], x])[1:],
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_in_place(view, device):
    logits, labels = batch(device, torch.float32, (3, 4), 10)
    strided = VIEWS[view](logits)
    assert torch.equal(strided, logits) and strided.data_ptr() != logits.data_ptr()
    p = torch.linspace(0.1, 1, 3, device=device)
    assert_bitwise(
        losses_and_gradients(weighted_cross_entropy, strided, labels, p, {}),
        losses_and_gradients(weighted_cross_entropy, logits, labels, p, {}),
    )


def test_expanded_logits_and_labels(device):
    logits, labels = (t[:1] for t in batch(device, torch.float32, (2, 1), 10))
    losses = cross_entropy(logits.expand(3, 4, 10), labels.expand(3, 4))
    assert torch.equal(losses, cross_entropy(logits, labels).expand(3))
    x = logits.clone().requires_grad_()
    cross_entropy(x.expand(3, 4, 10), labels.expand(3, 4)).sum().backward()
    slope = logits.double().softmax(-1) - F.one_hot(labels, 10)
    assert relative(x.grad, 3 * slope) < 1e-6  # observed 2e-7


@pytest.mark.parametrize("classes", [10, 8193])  # whole rows; tiles
def test_every_entry_is_written(classes, device, poisoned):
    from mts_fast.backends.triton.kernels import cross_entropy as module

    logits, labels = batch(device, torch.float32, (3,), classes)
    weight = torch.ones(3, device=device)
    out = module.cross_entropy(logits, Target(labels), weight, True)
    back = module.cross_entropy_backward(logits, Target(labels), out.maximum, out.total, weight)
    assert not any(t.isnan().any() for t in (*out, back))
    assert_bitwise(back, out.gradient)


def test_all_labels_ignored(device):
    logits, labels = batch(device, torch.float32, (3, 4), 10)
    labels[:] = IGNORED
    p = torch.ones(3, device=device)
    loss, losses, d_logits, d_p = losses_and_gradients(
        weighted_cross_entropy, logits, labels, p, {}
    )
    assert loss == 0 and not losses.any() and not d_logits.any() and not d_p.any()
    assert not any(t.any() for t in weighted_cross_entropy(logits, labels, p, statistics=True)[2])


def test_infinities(device):
    """Masked classes of -inf are as in torch; +inf and NaN have no softmax."""
    inf, nan = torch.inf, torch.nan
    rows = [[0.0, -inf, 1.0], [0.0, -inf, 1.0], [-inf, -inf, 2.0], [inf, 0.0, 0.0], [nan, 0, 0]]
    logits = torch.tensor(rows, device=device)
    labels = torch.tensor([0, 1, 2, 1, 1], device=device)
    p = torch.ones(5, device=device)
    result = losses_and_gradients(weighted_cross_entropy, logits, labels, p, {})
    truth = losses_and_gradients(reference.weighted_cross_entropy, logits, labels, p, {})
    torch.testing.assert_close(result[1], truth[1], equal_nan=True)
    torch.testing.assert_close(result[2][:3], truth[2][:3], equal_nan=True)
    assert result[1][1] == inf and result[2][0, 1] == 0
    statistics = weighted_cross_entropy(logits[:3], labels[:3], p[:3], statistics=True)[2]
    truth = reference.sample_statistics(logits[:3], labels[:3])
    for mine, exact in zip(statistics, truth, strict=True):
        torch.testing.assert_close(mine, exact)


def test_a_label_outside_gives_nan_for_its_sample_only(device):
    """On a GPU values are not checked: a wrong label must not change another sample's loss."""
    from mts_fast.backends.triton.kernels.cross_entropy import cross_entropy as run

    logits, labels = batch(device, torch.float32, (4,), 10)
    wrong = labels.clone()
    wrong[0], wrong[3] = 10, -1
    ones = torch.ones(4, device=device)
    out, right = (run(logits, Target(y), ones, True) for y in (wrong, labels))
    for mine, other in zip((out.losses, out.gradient), (right.losses, right.gradient), strict=True):
        assert mine[[0, 3]].isnan().all() and torch.equal(mine[1:3], other[1:3])
    assert out.statistics[:2, [0, 3]].isnan().all()


@pytest.mark.parametrize("factor", [1.0, 2.5])  # nothing to scale; a scaled loss
def test_backward_twice_and_both_outputs(factor, device):
    logits, labels = batch(device, torch.float64, (4,), 10)
    p = torch.rand(4, device=device, dtype=torch.float64)
    u = torch.rand(4, device=device, dtype=torch.float64)
    grads = []
    for function in (weighted_cross_entropy, reference.weighted_cross_entropy):
        x, q = logits.clone().requires_grad_(), p.clone().requires_grad_()
        loss, losses = function(x, labels, q)[:2]
        once = torch.autograd.grad(factor * loss, [x, q], retain_graph=True)
        again = torch.autograd.grad(factor * loss, [x, q], retain_graph=True)
        both = torch.autograd.grad(factor * loss + losses @ u, [x, q], retain_graph=True)
        alone = torch.autograd.grad(losses, x, u)
        grads.append([*once, *again, *both, *alone])
    assert_gradients_equal(*grads, 1e-14)  # observed 3e-16


def test_second_derivatives(device):
    logits, labels = batch(device, torch.float64, (5,), 7)
    products = []
    for function in (weighted_cross_entropy, reference.weighted_cross_entropy):
        x = logits.clone().requires_grad_()
        u = torch.linspace(0.5, 1, 5, device=device, dtype=torch.float64).requires_grad_()
        loss, losses = function(x, labels, u)[:2]
        for value in (loss, losses.square().sum()):
            (slope,) = torch.autograd.grad(value, x, create_graph=True)
            gradients = torch.autograd.grad(
                slope.square().sum(), (x, u), allow_unused=True, retain_graph=True
            )
            products += [g for g in gradients if g is not None]
    half = len(products) // 2
    assert_gradients_equal(products[:half], products[half:], 1e-13)  # observed 1e-15


def test_forward_mode_and_vmap_take_plain_pytorch(device):
    logits, labels = batch(device, torch.float64, (4,), 7)
    p, v = torch.ones(4, device=device).double(), torch.randn_like(logits)
    for function in (
        lambda x: weighted_cross_entropy(x, labels, p)[0],
        lambda x: cross_entropy(x, labels).sum(),
    ):
        _, tangent = torch.func.jvp(function, (logits,), (v,))
        slope = torch.func.grad(function)(logits)
        assert relative(tangent, (slope * v).sum()) < 1e-12 and tangent != 0


# p [B] in another dtype than that of the logits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.float64])
def test_cotangents_keep_the_digits_of_the_losses(logits_dtype, dtype, device):
    logits, labels = batch(device, logits_dtype, (3, 7), 10)
    p = torch.tensor([0.3, 0.5, 0.2], device=device, dtype=dtype)  # over 7 positions: 0.3/7
    x, y = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weighted_cross_entropy(x, labels, p)[0].backward()
    loss, losses = weighted_cross_entropy(x, labels, p)
    both = torch.autograd.grad(0.7 * loss + losses.sum(), x)[0]
    truth, losses = reference.weighted_cross_entropy(y, labels, p.double())
    expected = torch.autograd.grad(truth, y, retain_graph=True)[0]
    allowed = 8 * torch.finfo(logits_dtype).eps  # observed 1.2
    assert relative(x.grad, expected) < allowed
    assert relative(both, torch.autograd.grad(0.7 * truth + losses.sum(), y)[0]) < allowed


def test_a_loss_scale_saves_float16_gradients(device):
    """p times the slope is below float16's range; times the scale of a GradScaler it is not."""
    logits, labels = batch(device, torch.float16, (1024,), 10)
    p, scale = torch.full((1024,), 2.0**-14, device=device), 2.0**16
    gradients = []
    for function in (weighted_cross_entropy, reference.weighted_cross_entropy):
        x = logits.clone().requires_grad_()
        (scale * function(x, labels, p)[0]).backward()
        gradients.append(x.grad)
    truth = logits.double().softmax(-1) - F.one_hot(labels.clamp(min=0), 10)
    truth = (4 * truth).masked_fill((labels == IGNORED)[:, None], 0)
    mine, rival = (((g.double() - truth).abs() / truth.abs())[truth != 0] for g in gradients)
    assert mine.median() <= 2 * rival.median() < 4e-3  # observed 3e-4 and 6e-4
    assert ((gradients[0] == 0) & (truth.abs() > 1e-6)).sum() == 0


@pytest.mark.skipif(not interpreted(), reason="untouched memory costs nothing only on a CPU")
def test_samples_further_apart_than_int32_counts(device):
    """As with [2, 8192, 262144] logits: the second sample begins at entry 2^31."""
    apart = 2**31
    memory = torch.empty(apart + 64, dtype=torch.float16)  # 4 GiB of which two pages are touched
    logits = memory.as_strided((2, 1, 64), (apart, 64, 1))
    rows = torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)).half()
    logits.copy_(rows)
    labels, p = torch.tensor([[3], [5]]), torch.ones(2)
    assert torch.equal(cross_entropy(logits, labels), cross_entropy(rows, labels))
    x = logits.requires_grad_()
    gradient = torch.autograd.grad(cross_entropy(x, labels).sum(), x)[0]
    y = rows.requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(cross_entropy(y, labels).sum(), y)[0])
    assert torch.equal(
        weighted_cross_entropy(logits.detach().bfloat16(), labels, p)[1],
        weighted_cross_entropy(rows.detach().bfloat16(), labels, p)[1],
    )


def test_the_logits_are_read_once(device):
    logits, labels = batch(device, torch.float32, (4,), 10)
    with recorded_launches() as launches:
        loss, _ = weighted_cross_entropy(logits.requires_grad_(), labels, torch.ones(4))
        loss.backward()
    assert [la.kernel.__name__ for la in launches] == ["cross_entropy_kernel", "scale_kernel"]
    assert launches[0].options["GRADIENT"] and launches[0].options["WHOLE"]


def test_twice_the_same(device):
    logits, labels = batch(device, torch.bfloat16, (3, 4), 1000)
    p = torch.rand(3, device=device)
    runs = [losses_and_gradients(weighted_cross_entropy, logits, labels, p, {}) for _ in range(2)]
    assert_bitwise(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_gives_float32_losses_as_torch_does(dtype, device):
    logits, labels = batch(device, dtype, (4,), 10)
    with torch.autocast(device.type, torch.bfloat16):
        losses = cross_entropy(logits, labels)
        expected = reference.cross_entropy(logits, labels)
    assert losses.dtype == expected.dtype
    torch.testing.assert_close(losses, expected)


def test_opcheck(device):
    """torch's own checks of schema, fake kernels and dispatch."""
    logits, labels = batch(device, torch.float32, (2, 2), 10)
    weight, rows = torch.rand(10, device=device), torch.rand(4, device=device)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
    check = lambda op, *a: torch.library.opcheck(op, a, test_utils=tests)  # noqa: E731
    ops = torch.ops.mts_fast
    check(ops.cross_entropy_triton, logits, labels, weight, 0.1, IGNORED, rows, True)
    check(ops.cross_entropy_triton, logits, *Target(labels), None, False)
    check(ops.cross_entropy_backward_triton, logits, *Target(labels), rows, rows + 1, rows)
    check(ops.scale_, logits.clone(), torch.tensor(2.0, device=device))


def test_torch_compile_keeps_the_kernels_whole(device):
    logits, labels = batch(device, torch.float32, (4,), 10)
    p = torch.rand(4, device=device)
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    def run(x):
        loss, _ = weighted_cross_entropy(x, labels, p)
        return loss + cross_entropy(x, labels).sum()

    x = logits.requires_grad_()
    compiled = torch.compile(run, backend=keep, fullgraph=True)  # a graph break would raise
    gradient = torch.autograd.grad(compiled(x), x)[0]
    assert relative(gradient, torch.autograd.grad(run(x), x)[0]) < 1e-6  # observed 0
    targets = [str(n.target) for g in graphs for m in g.modules() for n in m.graph.nodes]
    assert targets.count("mts_fast.cross_entropy_triton") == 2


@pytest.mark.skipif(not interpreted(), reason="what is registered for a GPU alone")
def test_devices_and_dtypes_that_it_does_not_serve(device, monkeypatch):
    logits, labels = batch(device, torch.float32, (4,), 10)
    message = "labels must be on cpu like logits, got a tensor on meta; move it with .to"
    with pytest.raises(ValueError, match=f"cross_entropy: {message}"):
        cross_entropy(logits, labels.to("meta"))
    with pytest.raises(TypeError, match="cross_entropy: logits must be a floating-point tensor"):
        cross_entropy(logits.to(torch.float8_e4m3fn), labels)
    with use_backend("auto"):  # no GPU has timed it
        assert "triton" not in resolve("weighted_cross_entropy", [logits]).__module__
