"""Per-sample and weighted cross-entropy against torch's own, one position at a time."""

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_gradients_equal, relative

from mts_fast.ops import cross_entropy, weighted_cross_entropy

IGNORED = -100
# no option; each of torch's three options alone; all together.
OPTIONS = {
    "plain": {},
    "class_weight": {"class_weight": torch.tensor([0.5, 0.0, 2.0, 1.0])},
    "smoothing": {"label_smoothing": 0.1},
    "other_ignored": {"ignore_index": 2},
    "all": {
        "class_weight": torch.tensor([0.5, 0.0, 2.0, 1.0]),
        "label_smoothing": 0.1,
        "ignore_index": 2,
    },
}
# float64 checks the formula; float32 is the dtype in use.
DTYPES = (torch.float64, torch.float32)


def batch(device, dtype, *shape):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(*shape, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, shape, generator=generator)
    return logits.to(device, dtype), labels.to(device)


def options_for(device, dtype, options):
    """The options on the device, under our names and under torch's."""
    moved = {
        k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in options.items()
    }
    torchs = dict(moved)
    if "class_weight" in torchs:
        torchs["weight"] = torchs.pop("class_weight")
    return moved, torchs


def positionwise(logits, labels, options):
    """Losses by an explicit loop: the mean over the positions of a sample that are not ignored."""
    losses = []
    for row, targets in zip(logits, labels, strict=True):
        terms = [
            F.cross_entropy(row[t], targets[t], reduction="none", **options)
            for t in range(len(targets))
            if targets[t] != options.get("ignore_index", IGNORED)
        ]
        losses.append(sum(terms) / max(len(terms), 1) if terms else row.sum() * 0)
    return torch.stack(losses)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_torch(options, dtype, device):
    ours, torchs = options_for(device, dtype, OPTIONS[options])
    logits, labels = batch(device, dtype, 9)
    labels[4] = OPTIONS[options].get("ignore_index", IGNORED)
    losses = cross_entropy(logits, labels, **ours)
    assert torch.equal(losses, F.cross_entropy(logits, labels, reduction="none", **torchs))
    assert losses[4] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_sequences_equal_a_loop_over_positions(options, dtype, device):
    ours, torchs = options_for(device, dtype, OPTIONS[options])
    logits, labels = batch(device, dtype, 5, 7)
    ignored = OPTIONS[options].get("ignore_index", IGNORED)
    labels[0, 3:] = ignored
    labels[1, ::2] = ignored
    labels[2] = ignored  # every position of this sample
    losses = cross_entropy(logits, labels, **ours)
    # means of at most 7 terms; observed 4e-16 and 1.1e-7.
    assert relative(losses, positionwise(logits, labels, torchs)) < 8 * torch.finfo(dtype).eps
    assert losses[2] == 0 and losses[3] > 0


@pytest.mark.parametrize("shape", [(9,), (5, 7)])  # one label a sample; sequences
@pytest.mark.parametrize("options", OPTIONS)
def test_weighted_loss_and_its_gradients(options, shape, device):
    ours, torchs = options_for(device, torch.float64, OPTIONS[options])
    logits, labels = batch(device, torch.float64, *shape)
    labels.view(-1)[3] = OPTIONS[options].get("ignore_index", IGNORED)
    logits.requires_grad_()
    p = torch.linspace(0, 1, shape[0], dtype=torch.float64, device=device, requires_grad=True)
    loss, losses = weighted_cross_entropy(logits, labels, p, **ours)
    if len(shape) == 1:
        truth = F.cross_entropy(logits, labels, reduction="none", **torchs)
    else:
        truth = positionwise(logits, labels, torchs)
    expected = sum(pi * li for pi, li in zip(p, truth, strict=True))
    # observed 3e-16 in all four
    assert relative(losses, truth) < 1e-14
    assert relative(loss, expected) < 1e-14
    gradients = torch.autograd.grad(loss, [logits, p])
    assert_gradients_equal(gradients, torch.autograd.grad(expected, [logits, p]), 1e-14)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])  # label types besides int64
def test_labels_of_other_integer_types(dtype, device):
    logits, labels = batch(device, torch.float32, 9)
    assert torch.equal(cross_entropy(logits, labels.to(dtype)), cross_entropy(logits, labels))


def test_extreme_logits_stay_finite(device):
    """Row 3 must not overflow at extreme logits, where the loss is their difference."""
    logits = torch.tensor([[1e4, -1e4, 0.0], [0.0, 0.0, 3e38]], device=device)
    losses = cross_entropy(logits, torch.tensor([1, 2], device=device))
    assert losses.tolist() == [2e4, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [4, 1000])  # torch's kernel; the C++ kernel, where it is built
def test_class_weights_of_another_dtype(classes, dtype):
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(9, classes, generator=g), torch.randint(classes, (9,), generator=g)
    weight = torch.rand(classes, generator=g).to(dtype)
    losses = cross_entropy(logits, labels, class_weight=weight)
    assert losses.dtype == torch.float32
    truth = F.cross_entropy(logits.double(), labels, weight=weight.double(), reduction="none")
    assert relative(losses, truth) < 1e-6  # observed 1e-7


SMOOTHING = "label_smoothing must be a finite number at least 0 and at most 1"
LOGITS, LABELS, P = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((LOGITS.long(), LABELS, P), {}, TypeError, "logits must be a floating"),
        ((LOGITS[0], LABELS, P), {}, ValueError, r"logits must be \[B, C\]"),
        ((LOGITS[:0], LABELS[:0], P[:0]), {}, ValueError, "logits must be non-empty"),
        ((LOGITS, LABELS.float(), P), {}, TypeError, "labels must be an integer"),
        ((LOGITS, LABELS[:2], P), {}, ValueError, r"labels must be of shape \(3,\)"),
        ((LOGITS, LABELS + 4, P), {}, ValueError, r"labels must be in \[0, 4\), .* 4 classes"),
        ((LOGITS, LABELS - 1, P), {}, ValueError, "labels must be in .* from -1 to -1"),
        ((LOGITS, LABELS, P.long()), {}, TypeError, "p must be a floating"),
        ((LOGITS, LABELS, P[:2]), {}, ValueError, "p must be of length 3"),
        ((LOGITS, LABELS, P), {"class_weight": P}, ValueError, "class_weight must be of length 4"),
        ((LOGITS, LABELS, P), {"class_weight": LABELS}, TypeError, "class_weight must be a float"),
        ((LOGITS, LABELS, P), {"label_smoothing": 1.5}, ValueError, SMOOTHING),
        ((LOGITS, LABELS, P), {"label_smoothing": torch.nan}, ValueError, SMOOTHING),
        ((LOGITS, LABELS, P), {"label_smoothing": "0.1"}, TypeError, SMOOTHING),
        ((LOGITS, LABELS, P), {"label_smoothing": None}, TypeError, SMOOTHING),
        ((LOGITS, LABELS, P), {"ignore_index": "x"}, TypeError, "ignore_index must be an int"),
        ((LOGITS, LABELS, P), {"ignore_index": 1.5}, TypeError, "ignore_index must be an int"),
        ((LOGITS, LABELS, P), {"ignore_index": None}, TypeError, "ignore_index must be an int"),
        ((LOGITS, LABELS, P), {"ignore_index": True}, TypeError, "ignore_index must be an int"),
        (
            (LOGITS, LABELS, P),
            {"ignore_index": 2**63},
            ValueError,
            "ignore_index must be an int of 64 bits",
        ),
        # -100 as an unsigned integer of 8 bits
        ((LOGITS, (LABELS + 156).byte(), P), {}, ValueError, r"labels must be in \[0, 4\), .* 156"),
    ],
)
def test_errors_name_the_argument(arguments, options, error, message):
    with pytest.raises(error, match=f"weighted_cross_entropy: {message}"):
        weighted_cross_entropy(*arguments, **options)
