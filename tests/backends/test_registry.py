"""Which backend runs, that all agree, and the reasons of a backend that cannot run."""

import importlib.metadata
import logging
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from comparison import assert_bitwise

from mts_fast import reference, use_backend
from mts_fast.backends import registry as registry_module
from mts_fast.backends.cpp import eligibility
from mts_fast.backends.cpp.extension import ExtensionStatus, extension
from mts_fast.backends.triton.eligibility import _too_old, triton_reasons
from mts_fast.ops import cross_entropy, current_backend, label_agreement, sample_dot

needs_cpp = pytest.mark.skipif(not extension().available, reason=extension().reason)


def pool(n=40, k=5, *, dtype=torch.float32, classes=3):
    g = torch.Generator().manual_seed(0)
    similarity = torch.rand(n, k, generator=g, dtype=dtype)
    neighbors = torch.randint(n, (n, k), generator=g)
    return similarity, neighbors, torch.randint(classes, (n,), generator=g)


def test_blocks_nest(monkeypatch):
    monkeypatch.delenv("MTS_FAST_BACKEND", raising=False)
    assert current_backend() == "auto"
    with use_backend("reference"):
        with use_backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "reference"
        with pytest.raises(ZeroDivisionError), use_backend("auto"):
            raise ZeroDivisionError
        assert current_backend() == "reference"
    assert current_backend() == "auto"


@pytest.fixture
def nothing_in_force(monkeypatch):
    """No backend is selected, neither by the environment nor by a call in a failed test."""
    monkeypatch.delenv("MTS_FAST_BACKEND", raising=False)
    before = registry_module._selected.get()
    registry_module._selected.set(None)
    yield
    registry_module._selected.set(before)


def test_a_call_of_its_own_holds_from_then_on(nothing_in_force):
    use_backend("reference")
    assert current_backend() == "reference"
    with use_backend("auto"):
        assert current_backend() == "auto"
    assert current_backend() == "reference"
    with pytest.raises(ValueError, match="use_backend: name must be one of"):
        use_backend("nonsense")
    assert current_backend() == "reference"


def test_a_block_that_was_made_before_is_undone_by_its_end(nothing_in_force):
    block = use_backend("reference")
    with block:
        assert current_backend() == "reference"
    assert current_backend() == "auto"
    with pytest.raises(RuntimeError, match=r"block must be entered once, .*'reference'\) for the"):
        block.__enter__()


def test_decorated_functions(nothing_in_force):
    """Also if they call themselves, and if they raise."""

    @use_backend("reference")
    def countdown(n):
        """Down to 0."""
        seen = [current_backend()]
        with use_backend("auto"):
            seen += countdown(n - 1) if n else []
            seen.append(current_backend())
        return [*seen, current_backend()]

    assert current_backend() == "auto" and countdown.__doc__ == "Down to 0."
    assert countdown(1) == ["reference", *["reference", "auto", "reference"], "auto", "reference"]
    with pytest.raises(TypeError):
        countdown("x")
    assert current_backend() == "auto"


def test_threads_have_their_own(nothing_in_force):
    use_backend("reference")
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(current_backend).result() == "auto"
        threads.submit(use_backend, "reference").result()
        assert threads.submit(current_backend).result() == "reference"


def test_environment_variable(monkeypatch):
    monkeypatch.setenv("MTS_FAST_BACKEND", "reference")
    assert current_backend() == "reference"
    with use_backend("auto"):  # the block takes precedence
        assert current_backend() == "auto"
    monkeypatch.setenv("MTS_FAST_BACKEND", "cuda")
    message = "environment variable MTS_FAST_BACKEND must be one of 'auto', 'reference', 'triton'"
    with pytest.raises(ValueError, match=message):
        label_agreement(*pool())


@pytest.mark.parametrize("name", ["cuda", "", None, "Reference"])  # unknown; empty; wrong case
def test_unknown_backend(name):
    with (
        pytest.raises(ValueError, match="use_backend: name must be one of 'auto'"),
        use_backend(name),
    ):
        pass


@pytest.fixture
def fresh_triton():
    """Empties the cache of triton_reasons before and after the test."""
    triton_reasons.cache_clear()
    yield
    triton_reasons.cache_clear()


def test_triton_says_why_it_cannot_run(fresh_triton, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = r"backend 'triton' cannot run: no CUDA device was found \(TRITON_INTERPRET=1 .*use 'a"
    with pytest.raises(RuntimeError, match=message), use_backend("triton"):
        pass


def test_triton_under_another_package_name(fresh_triton, monkeypatch):
    """As torch's nightly builds install it: the version is then read from the module."""
    before = triton_reasons()
    triton_reasons.cache_clear()

    def unknown(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", unknown)
    assert triton_reasons() == before


@pytest.mark.parametrize(
    ("find_spec", "version", "reason"),
    [
        (lambda _: None, "3.9.0", "triton is not installed; pip install 'mts_fast[triton]'"),
        (lambda _: object(), "3.1.0", "triton 3.1.0 is older than 3.6; upgrade triton"),
    ],
)
def test_triton_missing_or_old(find_spec, version, reason, fresh_triton, monkeypatch, device):
    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    assert triton_reasons() == (reason,)
    monkeypatch.setenv("MTS_FAST_BACKEND", "triton")
    logits = torch.zeros(2, 3, device=device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(
        RuntimeError, match="cross_entropy: backend 'triton' cannot.*" + re.escape(reason)
    ):
        cross_entropy(logits, labels)


def test_triton_names_chips_that_are_too_old(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    device = torch.device("cuda", 7)
    _too_old.cache_clear()
    assert _too_old(device) == "its kernels need compute capability 8.0, cuda:7 has 7.5"
    _too_old.cache_clear()


def test_register_refuses_unknown_backends():
    with pytest.raises(ValueError, match="register: backend must be one of 'triton', 'cpp'"):
        registry_module.register("label_agreement", "fortran", lambda: None)


# K = 1; the paper's K = 5; sizes that no vector width divides; a pool of one sample.
SIZES = ((40, 1), (40, 5), (257, 7), (1, 3))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_cpp_equals_reference(n, k, dtype):
    arguments = pool(n, k, dtype=dtype)
    with use_backend("cpp"):
        plain, weighted = label_agreement(*arguments)
    truth = reference.label_agreement(arguments[0].double(), *arguments[1:])
    # counts over K: only the division rounds; sums of K <= 7 terms: observed 6e-8 of 1
    assert plain.dtype == weighted.dtype == dtype
    torch.testing.assert_close(plain.double(), truth[0], rtol=0, atol=torch.finfo(dtype).eps)
    torch.testing.assert_close(weighted.double(), truth[1], rtol=0, atol=4 * torch.finfo(dtype).eps)


def views(similarity, neighbors, labels):
    """The same values, transposed, strided and offset in their storage."""
    return (
        similarity.T.contiguous().T,
        torch.stack([neighbors, -neighbors], dim=2)[..., 0],
        torch.cat([labels[:3], labels])[3:],
    )


@needs_cpp
def test_cpp_takes_views():
    arguments = pool()
    strided = views(*arguments)
    assert not strided[0].is_contiguous() and not strided[1].is_contiguous()
    with use_backend("cpp"):
        assert_bitwise(label_agreement(*strided), label_agreement(*arguments))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])  # besides int64
def test_cpp_takes_other_integers(dtype):
    similarity, neighbors, labels = pool()
    with use_backend("cpp"):
        result = label_agreement(similarity, neighbors.to(dtype), labels.to(dtype))
        assert_bitwise(result, label_agreement(similarity, neighbors, labels))


@needs_cpp
@pytest.mark.parametrize("epsilon", [1e-8, 0.5])  # the default; one large enough to show
def test_epsilon_and_vanishing_similarities(epsilon):
    similarity, neighbors, labels = pool(dtype=torch.float64)
    similarity[3] = 0  # 0 / epsilon
    similarity[4] = -similarity[4]
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            plain, weighted = label_agreement(similarity, neighbors, labels, epsilon=epsilon)
        same = labels[neighbors] == labels[:, None]
        assert torch.equal(plain, same.double().mean(1))
        for i in range(len(labels)):
            terms = [s for s, hit in zip(similarity[i].tolist(), same[i], strict=True) if hit]
            expected = sum(terms) / (sum(similarity[i].tolist()) + epsilon)
            assert weighted[i].item() == pytest.approx(expected, rel=1e-13)
        assert weighted[3] == 0


@needs_cpp
# float32 and float64 kernels; a pool of one row
@pytest.mark.parametrize(
    "arguments", [pool(), pool(dtype=torch.float64), pool(1, 3), views(*pool())]
)
def test_opcheck(arguments):
    """torch's own checks of schema, fake kernel and dispatch."""
    extension()
    torch.library.opcheck(torch.ops.mts_fast.label_agreement, (*arguments, 1e-8))


def test_gradient_goes_through_the_reference():
    """The C++ kernel has no backward, so that `auto` runs the reference if a gradient is needed."""
    similarity, neighbors, labels = pool(dtype=torch.float64)
    similarity.requires_grad_()
    gradient = torch.autograd.grad(
        label_agreement(similarity, neighbors, labels)[1].sum(), similarity
    )
    truth = reference.label_agreement(similarity, neighbors, labels)[1].sum()
    assert_bitwise(gradient, torch.autograd.grad(truth, similarity))


@needs_cpp
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s: s.half(), "its kernel takes float32 or float64, not torch.float16"),
        (lambda s: s.requires_grad_(), "its kernel has no backward"),
        (
            lambda s: s.bfloat16().requires_grad_(),
            "its kernel takes float32 or float64, not torch.bfloat16; its kernel has no backward",
        ),
    ],
)
def test_cpp_gives_all_the_reasons_of_tensors_that_it_cannot_serve(change, reason):
    similarity, neighbors, labels = pool()
    similarity = change(similarity)
    message = f"label_agreement: backend 'cpp' cannot run: {reason}; use backend 'auto' or 'refer"
    with use_backend("cpp"), pytest.raises(RuntimeError, match=message):
        label_agreement(similarity, neighbors, labels)
    result = label_agreement(similarity, neighbors, labels)  # auto
    assert_bitwise(result, reference.label_agreement(similarity, neighbors, labels))


REASON = "the C++ extension is not built: no compiler was found"


@pytest.fixture
def no_extension(monkeypatch):
    """As on a machine without a compiler."""
    absent = lambda: ExtensionStatus(False, REASON)  # noqa: E731
    monkeypatch.setattr(eligibility, "extension", absent)
    monkeypatch.setattr(registry_module, "extension", absent)
    monkeypatch.setattr(registry_module, "_announced", set())


def test_auto_falls_back_to_the_reference_and_says_so_once(no_extension, caplog):
    arguments = pool()
    with caplog.at_level(logging.INFO, "mts_fast"):
        for _ in range(3):
            assert_bitwise(label_agreement(*arguments), reference.label_agreement(*arguments))
    assert [r.getMessage() for r in caplog.records] == [
        "label_agreement runs on backend 'reference'"
    ]


def test_explicit_cpp_raises_with_the_reason(no_extension, monkeypatch):
    with (
        pytest.raises(RuntimeError, match=f"backend 'cpp' cannot run: {re.escape(REASON)}; use"),
        use_backend("cpp"),
    ):
        pass
    monkeypatch.setenv("MTS_FAST_BACKEND", "cpp")
    with pytest.raises(
        RuntimeError, match=f"label_agreement: backend 'cpp' .*: {re.escape(REASON)}"
    ):
        label_agreement(*pool())


def test_environment_that_cannot_run_is_never_ignored(no_extension, monkeypatch):
    """Ops without a C++ kernel raise, too, as `use_backend` would have done."""
    monkeypatch.setenv("MTS_FAST_BACKEND", "cpp")
    message = f"sample_dot: backend 'cpp' cannot run: {re.escape(REASON)}; unset MTS_FAST_BACKEND"
    with pytest.raises(RuntimeError, match=message):
        sample_dot(torch.ones(2, 3), torch.ones(2, 3))
    with use_backend("auto"):
        assert sample_dot(torch.ones(2, 3), torch.ones(2, 3)).tolist() == [3.0, 3.0]


def test_op_without_a_kernel_runs_the_reference_under_any_backend(monkeypatch):
    """So does an op whose kernel is for another kind of device."""
    monkeypatch.setattr(registry_module, "_implementations", {})
    monkeypatch.setattr(registry_module, "backend_reasons", lambda _: [])
    for op in ("nothing", "gpu only", "slower here"):
        registry_module.register(op, "reference", lambda: "reference")
    registry_module.register("gpu only", "cpp", lambda: "cpp", devices=("cuda",))
    registry_module.register("slower here", "cpp", lambda: "cpp", wins=lambda _: False)
    tensors = [torch.ones(2)]
    results = {}
    for backend in ("auto", "cpp"):
        monkeypatch.setenv("MTS_FAST_BACKEND", backend)
        results[backend] = [
            registry_module.resolve(op, tensors)() for op in ("nothing", "gpu only", "slower here")
        ]
    assert results["auto"] == ["reference"] * 3
    assert results["cpp"] == ["reference", "reference", "cpp"]


S, N, L = pool(6, 2)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_cpp)])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((S.long(), N, L), TypeError, "similarity must be a floating"),
        ((S[:, 0], N, L), ValueError, "similarity must be 2-dim"),
        ((S[:, :0], N[:, :0], L), ValueError, r"similarity must be \[N, K\] with K >= 1"),
        ((S, N.float(), L), TypeError, "neighbors must be an integer"),
        ((S, N[:, :1], L), ValueError, r"neighbors must be of similarity's shape \(6, 2\)"),
        ((S, N + 6, L), ValueError, r"neighbors must be in \[0, 6\)"),
        ((S, N - 6, L), ValueError, r"neighbors must be in \[0, 6\)"),
        ((S, N, L.float()), TypeError, "labels must be an integer"),
        ((S, N, L[:5]), ValueError, "labels must be of length 6"),
    ],
)
def test_errors_name_the_argument(arguments, error, message, backend):
    with use_backend(backend), pytest.raises(error, match=f"label_agreement: {message}"):
        label_agreement(*arguments)
