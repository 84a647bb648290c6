"""cross_entropy in C++: float32 losses and every kind of derivative against torch."""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_bitwise, error_ratio

from mts_fast import reference, use_backend
from mts_fast.backends.cpp.cross_entropy import FEWEST_CLASSES
from mts_fast.backends.cpp.extension import extension
from mts_fast.backends.registry import kernel_for
from mts_fast.ops import cross_entropy, weighted_cross_entropy

pytestmark = pytest.mark.skipif(not extension().available, reason=extension().reason)
IGNORED = -100


@pytest.fixture(autouse=True)
def kernel():
    with use_backend("cpp"):
        yield


def batch(rows, classes, scale=3.0):
    g = torch.Generator().manual_seed(classes)
    logits = scale * torch.randn(rows, classes, generator=g)
    labels = torch.randint(classes, (rows,), generator=g)
    labels[rows // 2] = IGNORED
    return logits, labels


# one class; below, at and above the 32 partial sums and the blocks of 2048; a vocabulary
@pytest.mark.parametrize("classes", [1, 2, 31, 32, 33, 2047, 2049, 50_257])
@pytest.mark.parametrize("scale", [0.0, 3.0, 1e4])  # all equal; usual; far apart
def test_as_exact_as_torch(classes, scale):
    logits, labels = batch(9, classes, scale)
    p = torch.linspace(0, 1, 9)

    def run(function, logits):
        logits = logits.clone().requires_grad_()
        losses = function(logits, labels)
        (losses * p.to(losses)).sum().backward()
        return losses.detach().double(), logits.grad.double()

    result = run(cross_entropy, logits)
    torchs = lambda x, y: F.cross_entropy(x, y, reduction="none")  # noqa: E731
    rival, truth = run(torchs, logits), run(torchs, logits.double())
    for mine, other, exact in zip(result, rival, truth, strict=True):
        # losses twice, gradients three times torch's own error; observed 1.5 and 1.9
        assert error_ratio(mine, other, exact, torch.float32) <= (2 if mine.ndim == 1 else 3)
    assert result[0][4] == 0 and (result[1][4] == 0).all()


def test_infinities_and_nan():
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [[0.0, -inf, 1.0], [0.0, -inf, 1.0], [-inf, -inf, -inf], [inf, 0.0, 0.0], [nan, 0.0, 0.0]]
    )
    logits = torch.cat([logits, torch.full((5, 40), -200.0)], dim=1).requires_grad_()
    labels = torch.tensor([0, 1, 0, 1, 1])
    losses = cross_entropy(logits, labels)
    expected = reference.cross_entropy(logits, labels)
    gradients = [torch.autograd.grad(x[:1].sum(), logits)[0] for x in (losses, expected)]
    torch.testing.assert_close(losses[[0, 1]], expected[[0, 1]])
    torch.testing.assert_close(gradients[0][:2], gradients[1][:2])
    assert gradients[0][0, 1] == 0  # the gradient of a masked class is exactly 0
    assert losses[2] == expected[2] == inf
    # +inf and NaN have no softmax
    assert losses[3:].isnan().all() and expected[3:].isnan().all()


def test_sequences_and_class_weights():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 50, generator=g)
    labels = torch.randint(50, (4, 6), generator=g)
    labels[1, 2:], labels[2] = 7, 7
    weight = torch.rand(50, generator=g)
    p = torch.rand(4, generator=g)
    for options in (
        {"ignore_index": 7},
        {"class_weight": weight},
        {"class_weight": weight, "label_smoothing": 0.1, "ignore_index": 7},
    ):
        x, y = (logits.clone().requires_grad_() for _ in range(2))
        result = weighted_cross_entropy(x, labels, p, **options)
        expected = reference.weighted_cross_entropy(y, labels, p, **options)
        for mine, other in zip(result, expected, strict=True):
            torch.testing.assert_close(mine, other)
        result[0].backward()
        expected[0].backward()
        torch.testing.assert_close(x.grad, y.grad)


def test_views_and_frozen_logits():
    logits, labels = batch(9, 40)
    stacked = torch.stack([logits, -logits], 2)
    assert_bitwise(cross_entropy(stacked[..., 0], labels), cross_entropy(logits, labels))
    assert not cross_entropy(logits, labels).requires_grad


def test_second_derivatives():
    logits, labels = batch(5, 7)
    products = []
    for function in (cross_entropy, reference.cross_entropy):
        x = logits.clone().requires_grad_()
        u = torch.linspace(0.5, 1, 5).requires_grad_()
        (slope,) = torch.autograd.grad((u * function(x, labels)).sum(), x, create_graph=True)
        products.append(torch.autograd.grad(slope.square().sum(), (x, u)))
    for mine, other in zip(*products, strict=True):
        torch.testing.assert_close(mine, other)


def test_forward_mode_takes_the_reference():
    logits, labels = batch(5, 7)
    tangent = torch.randn_like(logits)
    result = torch.func.jvp(lambda x: cross_entropy(x, labels), (logits,), (tangent,))
    expected = torch.func.jvp(lambda x: reference.cross_entropy(x, labels), (logits,), (tangent,))
    assert_bitwise(result, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(logits, tangent)
        losses = torch.autograd.forward_ad.unpack_dual(cross_entropy(dual, labels))
    assert torch.equal(losses.tangent, expected[1])


def test_torch_compile_fuses_for_itself():
    logits, labels = batch(5, 7)
    compiled = torch.compile(cross_entropy, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, labels), reference.cross_entropy(logits, labels))


def test_schemas_and_labels_out_of_range():
    logits, labels = batch(5, 7)
    arguments = (logits, labels, IGNORED)
    torch.library.opcheck(torch.ops.mts_fast.cross_entropy.default, arguments)
    _, maximum, log_sum = torch.ops.mts_fast.cross_entropy(*arguments)
    backward = (logits, labels, maximum, log_sum, torch.ones(5), IGNORED)
    torch.library.opcheck(torch.ops.mts_fast.cross_entropy_backward.default, backward)
    with pytest.raises(
        RuntimeError, match=r"labels must be in \[0, 7\), but row 3 has one outside"
    ):
        torch.ops.mts_fast.cross_entropy(
            logits, labels.index_fill(0, torch.tensor([3]), 7), IGNORED
        )


def test_auto_takes_it_from_a_thousand_classes_on():
    few, many = torch.ones(1, FEWEST_CLASSES - 1), torch.ones(1, FEWEST_CLASSES)
    with use_backend("auto"):
        assert kernel_for("cross_entropy", [few]) is None
        assert kernel_for("cross_entropy", [many.double()]) is None
        assert kernel_for("cross_entropy", [many]) is not None
    with pytest.raises(RuntimeError, match=r"kernel takes float32, not torch\.float64"):
        cross_entropy(many.double(), torch.zeros(1).long())
