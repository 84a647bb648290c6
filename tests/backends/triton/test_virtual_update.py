"""virtual_update and kappa v in Triton against the reference in float64.

Without a GPU the kernels run in triton's interpreter.
"""

import dataclasses

import pytest
import torch
from comparison import assert_bitwise, relative, snapshot

from mts_fast import reference, use_backend
from mts_fast.backends.registry import resolve
from mts_fast.backends.triton.eligibility import interpreted
from mts_fast.backends.triton.launch import recorded_launches
from mts_fast.ops import virtual_update
from mts_fast.ops.virtual_update import optimizer_states, trainable_parameters
from mts_fast.reference import AdamState, SGDState

SGD, Adam, AdamW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW
MOMENTUM = {"lr": 0.1, "momentum": 0.9}
# every term of an update alone, then the terms that meet in one line of the formula
OPTIMIZERS = {
    "sgd": (SGD, {"lr": 0.1}),
    "sgd_decay": (SGD, {"lr": 0.1, "weight_decay": 0.05}),
    "sgd_maximize": (SGD, {"lr": 0.1, "maximize": True}),
    "momentum": (SGD, MOMENTUM),
    "dampening": (SGD, MOMENTUM | {"dampening": 0.3, "weight_decay": 0.05}),
    "nesterov": (SGD, MOMENTUM | {"nesterov": True}),
    "sgd_all": (SGD, MOMENTUM | {"nesterov": True, "weight_decay": 0.05, "maximize": True}),
    "adam": (Adam, {"lr": 0.01}),
    "adam_decay": (Adam, {"lr": 0.01, "weight_decay": 0.05, "betas": (0.8, 0.9)}),
    "adam_maximize": (Adam, {"lr": 0.01, "weight_decay": 0.05, "maximize": True}),
    "adam_large_eps": (Adam, {"lr": 0.01, "eps": 0.5}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.05}),
    "adamw_maximize": (AdamW, {"lr": 0.01, "weight_decay": 0.05, "maximize": True}),
}
BOTH = ("sgd_all", "adamw")  # one of each family, with most of its terms
STEPS_TAKEN = (0, 2)  # before any state, and with one
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# no dimension; a matrix; one more than a block of 2048
SHAPES = ((), (3, 5), (2049,))


@pytest.fixture(autouse=True)
def triton():
    with use_backend("triton"):
        yield


def draw(shapes, device, dtype, seed):
    """Entries of at least 0.25, whose squares float16 can hold."""
    g = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    return [(t + t.sign() / 4).to(device, dtype) for t in drawn]


def step_with(optimizer, gradients):
    for p, g in zip(trainable_parameters(optimizer), gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer.zero_grad()


def make(name, device, dtype=torch.float32, steps=2, shapes=SHAPES):
    """An optimizer after some real steps, and gradients and a direction for the next one."""
    cls, options = OPTIMIZERS[name]
    parameters = [torch.nn.Parameter(t) for t in draw(shapes, device, dtype, 0)]
    optimizer = cls(parameters, **options)
    for seed in range(steps):
        step_with(optimizer, draw(shapes, device, dtype, 10 + seed))
    return optimizer, draw(shapes, device, dtype, 1), draw(shapes, device, dtype, 2)


def to_float64(value):
    """A tensor, or all tensors of a state, in float64."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if dataclasses.is_dataclass(value):
        names = [f.name for f in dataclasses.fields(value)]
        return dataclasses.replace(value, **{n: to_float64(getattr(value, n)) for n in names})
    return value


def assert_as_exact(result, rival, truth, tolerance):
    """Over all entries of all tensors; `tolerance` is relative to the largest entry."""
    result, rival, truth = (
        torch.cat([t.double().flatten() for t in c]) for c in (result, rival, truth)
    )
    floor = tolerance * truth.abs().max()
    gap = (result - truth).abs().max()
    # observed at most 0.7 of this, in float64; 0.6 in float32
    assert gap <= 2 * (rival - truth).abs().max() + floor


def floor_of(dtype):
    """Half an ulp, the rounding of a result. The interpreter truncates to bfloat16: a whole ulp.
    The float64 truth has errors like the results compared with it: observed 1.5 ulp, of 4."""
    truncated = dtype == torch.bfloat16 and interpreted()
    return torch.finfo(dtype).eps * (4 if dtype == torch.float64 else 1 if truncated else 0.5)


def assert_as_exact_as_reference(optimizer, gradients, v, lr=None):
    update = virtual_update(optimizer, gradients, along=v, hypergradient_lr=lr)
    parameters, states = trainable_parameters(optimizer), optimizer_states(optimizer)
    rows = [(p.detach(), g, states[p], w) for p, g, w in zip(parameters, gradients, v, strict=True)]
    truths = [tuple(map(to_float64, row)) for row in rows]
    for dtype in {p.dtype for p in parameters}:
        at = [i for i, p in enumerate(parameters) if p.dtype == dtype]
        for tensors, plain in (
            (update.parameters, lambda p, g, s, w: reference.virtual_update(p, g, s)),
            (update.direction, lambda *row: reference.hypergradient_direction(*row, lr)),
        ):
            mine = [tensors[i] for i in at]
            assert all(t.dtype == dtype for t in mine)
            rival, truth = ([plain(*table[i]) for i in at] for table in (rows, truths))
            assert_as_exact(mine, rival, truth, floor_of(dtype))
    for p, *made in zip(parameters, update.parameters, update.direction, strict=True):
        assert all(t.shape == p.shape and t.stride() == p.stride() for t in made)
    return update


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_exact_as_the_reference(name, steps, dtype, device):
    optimizer, gradients, v = make(name, device, dtype, steps)
    before = snapshot(optimizer=optimizer, device=device)
    held = [t.detach().clone() for t in (*trainable_parameters(optimizer), *gradients, *v)]
    update = assert_as_exact_as_reference(optimizer, gradients, v)
    # writing to the results changes no tensor of the caller
    for tensor in (*update.parameters, *update.direction):
        tensor.zero_()
    assert_bitwise(snapshot(optimizer=optimizer, device=device), before)
    now = [t.detach() for t in (*trainable_parameters(optimizer), *gradients, *v)]
    assert_bitwise(now, held)


@pytest.mark.parametrize("lr", [None, 0.5])  # the optimizer's lr; another one, in kappa only
@pytest.mark.parametrize("name", BOTH)
def test_one_pass_equals_two(name, lr, device):
    optimizer, gradients, v = make(name, device)
    together = virtual_update(optimizer, gradients, along=v, hypergradient_lr=lr)
    alone = virtual_update(optimizer, gradients)
    assert alone.direction is None
    pairs = [
        *zip(together.parameters, alone.parameters, strict=True),
        *zip(together.direction, alone.scale(v, lr), strict=True),
    ]
    if interpreted():
        assert_bitwise([mine for mine, _ in pairs], [other for _, other in pairs])
    else:  # two compilations may fuse different multiplications and additions
        for mine, other in pairs:
            assert relative(mine, other) <= 4 * torch.finfo(mine.dtype).eps
    again = virtual_update(optimizer, gradients, along=v, hypergradient_lr=lr)
    assert_bitwise([again.parameters, again.direction], [together.parameters, together.direction])


# no entry; one; one below a block of 2048, a block, one more; a chunk of 8192, one more
SIZES = (0, 1, 2047, 2048, 2049, 8192, 8193)


@pytest.mark.parametrize("name", BOTH)
def test_every_entry_is_written(name, device, monkeypatch):
    empty_like = torch.empty_like
    poisoned = lambda *a, **k: empty_like(*a, **k).fill_(torch.nan)  # noqa: E731
    optimizer, gradients, v = make(name, device, shapes=[(n,) for n in SIZES], steps=1)
    monkeypatch.setattr(torch, "empty_like", poisoned)
    update = virtual_update(optimizer, gradients, along=v)
    monkeypatch.undo()
    with use_backend("reference"):
        truth = virtual_update(optimizer, gradients, along=v)
    for mine, exact in zip(
        (*update.parameters, *update.direction), (*truth.parameters, *truth.direction), strict=True
    ):
        # observed 0.6 of this, between two float32 results: entries of Adam's kappa v cancel
        torch.testing.assert_close(mine, exact, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("name", BOTH)
def test_one_launch_for_all_that_share_dtypes(name, device):
    """Groups with different options, tensors with and without state and of all sizes: together."""
    cls, options = OPTIMIZERS[name]
    shapes = [(5,), (0,), (8193,), (), (3, 4), (2,)]
    drawn = draw(shapes, device, torch.float32, 0)
    drawn[-2:] = [t.bfloat16() for t in drawn[-2:]]
    p = [torch.nn.Parameter(t) for t in drawn]
    other = {"lr": 0.3, "weight_decay": 0.2, "maximize": False}
    groups = [{"params": p[:3]}, {"params": p[3:]} | other]
    optimizer = cls(groups, **options)
    gradients = [t.clone() for t in drawn]
    gradients[-1] = gradients[-1].float()  # a gradient wider than its bfloat16 parameter
    p[0].grad, p[3].grad = drawn[0].clone(), drawn[3].clone()  # only these get a state
    optimizer.step()
    with recorded_launches() as launches:
        virtual_update(optimizer, gradients, along=gradients)
    # all float32, all bfloat16, bfloat16 with float32 gradients
    assert len(launches) == 3
    assert_as_exact_as_reference(optimizer, gradients, gradients)
    assert_as_exact_as_reference(optimizer, gradients, [t.float() for t in gradients])


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("which", ["parameter", "gradient", "direction"])
def test_unaligned_tensors(which, name, device):
    """Like flat views into one storage: the kernel reads them entry by entry."""
    optimizer, gradients, v = make(name, device, shapes=[(2049,)] * 2)
    expected = virtual_update(optimizer, gradients, along=v)
    shift = lambda t: torch.cat([t[:1], t])[1:]  # noqa: E731
    if which == "parameter":
        parameter = trainable_parameters(optimizer)[0]
        parameter.data = shift(parameter.data)
    else:
        tensors = gradients if which == "gradient" else v
        tensors[0] = shift(tensors[0])
    with recorded_launches() as launches:
        virtual_update(optimizer, gradients, along=v)
    assert [la.options["ALIGNED"] for la in launches] == [False, True]
    update = virtual_update(optimizer, gradients, along=v)
    assert_bitwise([update.parameters, update.direction], [expected.parameters, expected.direction])


LAST = torch.channels_last
# layouts of parameter and gradient, and whether the kernel serves them
LAYOUTS = {
    "channels_last": (lambda t: t.to(memory_format=LAST), lambda t: t.to(memory_format=LAST), True),
    "transposed": (lambda t: t.mT.contiguous().mT, lambda t: t.mT.contiguous().mT, True),
    "gradient_differs": (lambda t: t.to(memory_format=LAST), lambda t: t, False),
    "gradient_expanded": (lambda t: t, lambda t: t[:, :1].expand(t.shape), False),
    "gaps": (lambda t: torch.stack([t, t], -1)[..., 0],) * 2 + (False,),
}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, name, device, monkeypatch):
    from mts_fast.backends.triton.kernels import virtual_update as kernel

    lay_parameter, lay_gradient, served_by_kernel = LAYOUTS[layout]
    optimizer, gradients, v = make(name, device, steps=0, shapes=[(4, 3, 2, 3), (5,)])
    parameter = trainable_parameters(optimizer)[0]
    parameter.data = lay_parameter(parameter.data)
    step_with(optimizer, [t.clone(memory_format=torch.preserve_format) for t in gradients])
    # torch gives the state the layout of the parameter, but without gaps
    gradients[0], v[0] = lay_gradient(gradients[0]), lay_parameter(v[0])
    for name, held in optimizer.state[parameter].items():
        if torch.is_tensor(held) and held.ndim:
            optimizer.state[parameter][name] = lay_parameter(held)
    served = []
    whole = kernel.virtual_update
    monkeypatch.setattr(
        kernel, "virtual_update", lambda *a, **k: served.append(len(a[0])) or whole(*a, **k)
    )
    update = virtual_update(optimizer, gradients, along=v)
    assert served == [2 if served_by_kernel else 1]
    truth = virtual_update_by_reference(optimizer, gradients, v)
    for mine, exact in zip(
        (*update.parameters, *update.direction), (*truth.parameters, *truth.direction), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=2e-6, atol=1e-7)  # observed 0.1 of this
    if served_by_kernel:
        assert update.parameters[0].stride() == update.direction[0].stride() == parameter.stride()


def virtual_update_by_reference(optimizer, gradients, v):
    with use_backend("reference"):
        return virtual_update(optimizer, gradients, along=v)


# the two scalars that may be on the device; each combination makes a separate launch
@pytest.mark.parametrize("lr_tensor", [True, False])
@pytest.mark.parametrize("step_tensor", [True, False])
@pytest.mark.parametrize("hypergradient_lr", [None, 0.5])
def test_numbers_on_the_device(lr_tensor, step_tensor, hypergradient_lr, device):
    from mts_fast.backends.triton.kernels.virtual_update import virtual_update as kernel

    p, g, m, s, v = (draw([(5,)] * 2, device, torch.float64, seed) for seed in range(5))
    plain = [
        # the first step; one so late that float32 would lose beta2^step
        AdamState(0.1, (0.9, 0.9999), weight_decay=0.1, decoupled=True, step=0.0),
        AdamState(0.2, exp_avg=m[1], exp_avg_sq=s[1] ** 2, step=1234.0),
    ]
    tensor = list(plain)
    for i, state in enumerate(plain):
        if lr_tensor:
            lr = torch.tensor(state.lr, dtype=torch.float64, device=device)
            tensor[i] = dataclasses.replace(tensor[i], lr=lr)
        if step_tensor:  # of float32, as torch's fused and capturable steps are
            step = torch.tensor(state.step, device=device)
            tensor[i] = dataclasses.replace(tensor[i], step=step)
    results = [
        kernel(p, g, states, along=v, hypergradient_lr=hypergradient_lr)
        for states in (tensor, plain)
    ]
    for result, expected in zip(*results, strict=True):
        for mine, exact in zip(result, expected, strict=True):
            assert relative(mine, exact) < 1e-14  # observed 0
    for i, mine in enumerate(results[0][0]):
        assert relative(mine, reference.virtual_update(p[i], g[i], tensor[i])) < 1e-14


@pytest.mark.parametrize("name", BOTH)
def test_tensor_learning_rate(name, device):
    optimizer, gradients, v = make(name, device)
    expected = virtual_update(optimizer, gradients, along=v)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64, device=device)
    update = virtual_update(optimizer, gradients, along=v)
    assert_bitwise([update.parameters, update.direction], [expected.parameters, expected.direction])


# exactly 0; its square subnormal; far below eps; of the size of eps; usual
TINY = (0.0, 1e-20, 1e-13, 1e-8, 1.0)


@pytest.mark.parametrize("steps", STEPS_TAKEN)
@pytest.mark.parametrize("name", ["adam", "adam_maximize"])  # as it is; with its sign reversed
def test_gradients_around_eps(name, steps, device):
    for size in TINY:  # each alone: beside a usual gradient the small ones would be noise
        optimizer, _, v = make(name, device, steps=0, shapes=[(1,)])
        optimizer.param_groups[0]["weight_decay"] = 0.0
        gradients = [torch.tensor([size], device=device)]
        for _ in range(steps):
            step_with(optimizer, [g.clone() for g in gradients])
        (p,) = trainable_parameters(optimizer)
        truth = [to_float64(t) for t in (p.detach(), gradients[0], optimizer_states(optimizer)[p])]
        update = virtual_update(optimizer, gradients, along=v)
        torch.testing.assert_close(update.parameters[0].double(), reference.virtual_update(*truth))
        assert (update.direction[0] == 0.0) == (size == 0.0)
        assert update.direction.masked_entries == (size == 0.0)
        # were a subnormal square flushed to 0, its kappa would be 0, too
        expected = reference.hypergradient_direction(*truth, v[0].double())
        assert relative(update.direction[0], expected) <= 4e-6  # observed 8e-7, six roundings


def test_infinite_parameter_without_decay(device):
    """0 * inf is not to turn what torch leaves infinite into NaN."""
    p, g = torch.full((3,), torch.inf, device=device), torch.ones(3, device=device)
    for state in (SGDState(0.1), AdamState(0.1)):
        run = resolve("virtual_update", [p, g])
        assert torch.equal(run([p], [g], [state])[0], p)


def test_betas_as_tensors_on_the_host_are_read(device):
    optimizer, gradients, _ = make("adam", device, torch.float64, shapes=[(5,)])
    expected = virtual_update(optimizer, gradients).parameters[0]
    optimizer.param_groups[0]["betas"] = tuple(
        torch.tensor(b, dtype=torch.float64) for b in optimizer.param_groups[0]["betas"]
    )
    updated = virtual_update(optimizer, gradients).parameters[0]
    assert relative(updated, expected) < 1e-14  # observed 0


@pytest.mark.parametrize("option", ["betas", "eps", "weight_decay"])
def test_numbers_on_a_device_take_the_reference(option, device):
    """All but lr and the step count, which the kernel reads on the device."""
    optimizer, gradients, _ = make("adamw", device, torch.float64, shapes=[(5,)])
    (p,) = trainable_parameters(optimizer)
    state = optimizer_states(optimizer)[p]
    value = getattr(state, option)
    on_device = lambda x: torch.tensor(x, dtype=torch.float64, device=device)  # noqa: E731
    moved = tuple(map(on_device, value)) if option == "betas" else on_device(value)
    run = resolve("virtual_update", [p.detach(), *gradients])
    (expected,) = run([p.detach()], gradients, [state])
    with recorded_launches() as launches:
        (updated,) = run([p.detach()], gradients, [dataclasses.replace(state, **{option: moved})])
    assert relative(updated, expected) < 1e-14 and not launches  # observed 0


def test_parameters_of_a_group_that_count_in_different_places(device):
    """One that was just unfrozen has no state, and its count is a number on the host."""
    from mts_fast.backends.triton.kernels.virtual_update import virtual_update as kernel

    p, g, m, s = (draw([(5,)] * 3, device, torch.float32, seed) for seed in range(4))
    group = AdamState(0.1, (0.9, 0.99))
    counts = [torch.tensor(float(n), device=device) for n in (3, 7)]
    states = [
        group.live(exp_avg=m[0], exp_avg_sq=s[0] ** 2, step=counts[0]),
        group.live(step=0.0),
        group.live(exp_avg=m[2], exp_avg_sq=s[2] ** 2, step=counts[1]),
    ]
    for order in ((0, 1, 2), (1, 0, 2)):
        rows = [[column[i] for i in order] for column in (p, g, states)]
        updated, _, _ = kernel(*rows)
        for made, *row in zip(updated, *rows, strict=True):
            torch.testing.assert_close(made, reference.virtual_update(*row))
