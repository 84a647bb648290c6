"""Every engine gives the reference's d_i, on every kind of model that it says it serves."""

import copy

import pytest
import torch
from comparison import assert_bitwise, generators, relative, set_generators, snapshot
from models import make_case
from torch.nn.attention import SDPBackend, sdpa_kernel

import mts_fast
from mts_fast import reference
from mts_fast.hypergradient import ENGINES, EngineChoice, LabelledBatch, Objective
from mts_fast.hypergradient.finite_difference import FiniteDifference
from mts_fast.ops.virtual_update import optimizer_states, trainable_parameters

# these two must serve every model but the LSTM, which only the first can.
GENERAL = ("finite_difference", "forward_mode")
# float64, relative to the largest d_i; observed at most 3e-10 (truncation and rounding of a step
# of 1.2e-5) and 5e-16.
TOLERANCE = {"finite_difference": 3e-9}
EXACT = 1e-13

# plain layers; coupled samples; masks to be drawn again; attention with one label a position; one
# weight used twice; both forms of several inputs; a parameter that does not learn.
MODELS = (
    "mlp",
    "batchnorm_cnn",
    "dropout_mlp",
    "norm_and_dropout",
    "transformer",
    "tied",
    "dict_inputs",
    "tuple_inputs",
    "partly_frozen",
)


def random_direction(parameters, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).to(p) for p in parameters]


def true_dots(case, parameters, direction):
    """The reference's d_i; attention without fused kernels, which have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        losses = Objective(case.model).losses(LabelledBatch(case.inputs, case.labels))
        return reference.hypergradient_dots(losses, parameters, direction)


def engine_for(name, case, parameters):
    """The engine, or a skip with its own reasons where it is a specialist."""
    why = ENGINES[name](Objective(case.model), parameters).reasons()
    if why and name not in GENERAL:
        pytest.skip("; ".join(why))
    return ENGINES[name](Objective(case.model), parameters)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_dots_equal_reference(name, engine, device):
    case = make_case(name, device)
    named = case.named()
    direction = dict(zip(named, random_direction(named.values()), strict=True))
    engine_for(engine, case, list(named.values()))
    start = generators(device)
    computed = mts_fast.hypergradient_dots(
        case.model, case.inputs, case.labels, direction, engine=engine
    )
    set_generators(start)
    expected = true_dots(case, list(named.values()), list(direction.values()))
    assert relative(computed, expected) < TOLERANCE.get(engine, EXACT)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["batchnorm_cnn", "transformer"])  # statistics fixed; fused layers
def test_dots_in_eval_mode(name, engine, device):
    case = make_case(name, device)
    case.model.eval()
    named = case.named()
    direction = dict(zip(named, random_direction(named.values()), strict=True))
    engine_for(engine, case, list(named.values()))
    expected = true_dots(case, list(named.values()), list(direction.values()))
    computed = mts_fast.hypergradient_dots(
        case.model, case.inputs, case.labels, direction, engine=engine
    )
    assert relative(computed, expected) < TOLERANCE.get(engine, EXACT)


@pytest.mark.parametrize("engine", ENGINES)
def test_parameters_left_out_of_the_direction_count_nothing(engine, device):
    case = make_case("mlp", device)
    weight = case.named()["2.weight"]
    direction = random_direction([weight])
    expected = true_dots(case, [weight], direction)
    computed = mts_fast.hypergradient_dots(
        case.model, case.inputs, case.labels, {"2.weight": direction[0]}, engine=engine
    )
    assert relative(computed, expected) < TOLERANCE.get(engine, EXACT)


@pytest.mark.parametrize("engine", ENGINES)
def test_linearization_in_the_order_of_parameter_groups(engine, device):
    """Groups in another order than the model's; one forward, then losses, gradients and dots."""
    case = make_case("norm_and_dropout", device)
    first, *rest = case.named().values()
    groups = [{"params": rest[::-1]}, {"params": [first], "lr": 0.5}]
    parameters = trainable_parameters(torch.optim.SGD(groups, lr=0.1))
    direction = random_direction(parameters)
    built = engine_for(engine, case, parameters)
    start = snapshot(module=case.model, device=device)
    linearization = built.linearize(LabelledBatch(case.inputs, case.labels))
    after = snapshot(module=case.model, device=device)
    p = torch.linspace(0, 1, len(case.labels), dtype=torch.float64, device=device)
    gradients = [linearization.gradient(p), linearization.gradient(p)]
    computed = linearization.dots(direction)
    assert_bitwise(snapshot(module=case.model, device=device), after)

    case.model.load_state_dict(start["state"])
    set_generators(start["generators"])
    losses = Objective(case.model).losses(LabelledBatch(case.inputs, case.labels))
    assert torch.equal(linearization.losses, losses.detach())
    expected = torch.autograd.grad((p * losses).sum(), parameters, retain_graph=True)
    assert_bitwise(gradients, [list(expected)] * 2)
    dots = reference.hypergradient_dots(losses, parameters, direction)
    assert relative(computed, dots) < TOLERANCE.get(engine, EXACT)
    # exactly one forward's trace
    assert_bitwise(snapshot(module=case.model, device=device), after)


OPTIMIZERS = {
    "sgd_nesterov": lambda p: torch.optim.SGD(
        p, lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.01),
}


def selector_gradients_two_ways(optimizer, case, validation, z, direction_of):
    """dL_val/dz by rows 6 and 7, and by differentiating through the virtual update."""
    parameters = trainable_parameters(optimizer)
    states = list(optimizer_states(optimizer).values())
    names = list(case.named())
    losses = Objective(case.model).losses(LabelledBatch(case.inputs, case.labels))
    p = mts_fast.normalize_weights(z)
    g = torch.autograd.grad((p * losses).sum(), parameters, create_graph=True)
    theta = [
        reference.virtual_update(q, dq, s) for q, dq, s in zip(parameters, g, states, strict=True)
    ]
    output = torch.func.functional_call(
        case.model, dict(zip(names, theta, strict=True)), (validation[0],)
    )
    val_loss = reference.cross_entropy(output, validation[1]).mean()
    v = torch.autograd.grad(val_loss, theta, retain_graph=True)
    truth = reference.hypergradient_double_backward(val_loss, [z])[0]
    virtual = mts_fast.virtual_update(optimizer, [q.detach() for q in g])
    dots = direction_of(virtual.scale(v))
    return mts_fast.selector_gradient(dots, z.detach(), p.detach()), truth


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hypergradient_equals_double_backward(optimizer, engine, device):
    case, other = make_case("mlp", device), make_case("mlp", device)
    optimizer_used = OPTIMIZERS[optimizer](case.model.parameters())
    for _ in range(3):  # a history for the optimizer's state
        optimizer_used.zero_grad()
        Objective(case.model).losses(LabelledBatch(case.inputs, case.labels)).mean().backward()
        optimizer_used.step()
    z = torch.linspace(-1, 2, 6, dtype=torch.float64, device=device, requires_grad=True)
    validation = other.inputs.flip(0) + 0.3, other.labels

    def dots(direction):
        built = engine_for(engine, case, trainable_parameters(optimizer_used))
        return built.dots(LabelledBatch(case.inputs, case.labels), direction)

    computed, truth = selector_gradients_two_ways(optimizer_used, case, validation, z, dots)
    # observed 9e-11 with finite differences and 2e-16.
    assert relative(computed, truth) < TOLERANCE.get(engine, EXACT)


def test_lstm_needs_finite_differences(device):
    """Its weights optimizer_used in one flat list, which swapped-in parameters do not reach."""
    case = make_case("lstm", device)
    named = case.named()
    direction = dict(zip(named, random_direction(named.values()), strict=True))
    arguments = case.model, case.inputs, case.labels, direction
    # on a GPU cuDNN's LSTM has no second derivative
    with torch.backends.cudnn.flags(enabled=False):
        expected = true_dots(case, list(named.values()), list(direction.values()))
        computed = mts_fast.hypergradient_dots(*arguments, engine="finite_difference")
    assert relative(computed, expected) < TOLERANCE["finite_difference"]
    with pytest.raises(RuntimeError, match="lstm is a LSTM, whose weights cannot be swapped"):
        mts_fast.hypergradient_dots(*arguments, engine="forward_mode")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # rounding and truncation differ
def test_error_estimate_is_of_the_size_of_the_error(dtype, device):
    case = make_case("mlp", device, dtype)
    parameters = list(case.named().values())
    direction = random_direction(parameters)
    engine = FiniteDifference(Objective(case.model), parameters)
    expected = true_dots(case, parameters, direction)
    error = (engine.dots(LabelledBatch(case.inputs, case.labels), direction) - expected).abs()
    estimate = engine.error_estimate(LabelledBatch(case.inputs, case.labels), direction)
    # a single entry may agree by chance, the norms may not; observed 0.5 and 0.4.
    assert 0.1 < (estimate.norm() / error.norm()).item() < 10


@pytest.mark.parametrize("engine", ENGINES)
def test_zero_direction_gives_zeros(engine, device):
    case = make_case("norm_and_dropout", device, torch.float32)
    direction = {n: torch.zeros_like(p) for n, p in case.named().items()}
    engine_for(engine, case, list(case.named().values()))
    computed = mts_fast.hypergradient_dots(
        case.model, case.inputs, case.labels, direction, engine=engine
    )
    assert torch.equal(computed, torch.zeros_like(computed))


@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_does_not_run_on_stale_weights(engine, device):
    """Autocast keeps bf16 copies of the weights: an engine that moves them must not meet those."""
    case = make_case("mlp", device, torch.float32)
    named = case.named()
    losses = Objective(case.model).losses(LabelledBatch(case.inputs, case.labels))
    direction = torch.autograd.grad(losses[:3].sum(), list(named.values()))
    expected = true_dots(case, list(named.values()), direction)
    with torch.autocast(device.type, torch.bfloat16):
        linearization = engine_for(engine, case, list(named.values())).linearize(
            LabelledBatch(case.inputs, case.labels)
        )
        computed = linearization.dots(list(direction))
        again = Objective(case.model).losses(LabelledBatch(case.inputs, case.labels))
    # two losses of a forward in 8 bits, half a percent apart: observed 0.08 for finite
    # differences and 0.002 for the exact engine; stale weights give 1.
    assert (computed - expected).norm() / expected.norm() < (0.4 if engine in TOLERANCE else 0.05)
    # and the weights that were put back are met again, not the moved ones.
    assert torch.equal(again.detach(), linearization.losses)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_dots_leave_no_trace(name, engine, device):
    case = make_case(name, device)
    named = case.named()
    direction = dict(zip(named, random_direction(named.values()), strict=True))
    engine_for(engine, case, list(named.values()))
    arguments = copy.deepcopy((case.inputs, case.labels, direction))
    before = snapshot(module=case.model, device=device, gradients=True)
    mts_fast.hypergradient_dots(case.model, case.inputs, case.labels, direction, engine=engine)
    assert_bitwise(snapshot(module=case.model, device=device, gradients=True), before)
    assert_bitwise((case.inputs, case.labels, direction), arguments)


@pytest.mark.parametrize(
    ("engine", "call"),
    # in the first forward; and in the second of finite differences, at theta - e v
    [*((name, 1) for name in ENGINES), ("finite_difference", 2)],
)
def test_dots_leave_no_trace_when_the_forward_raises(engine, call, device):
    case = make_case("norm_and_dropout", device)
    named = case.named()
    direction = dict(zip(named, random_direction(named.values()), strict=True))
    engine_for(engine, case, list(named.values()))
    calls = iter(range(1, call + 1))

    def out_of_memory(*_):
        if next(calls) == call:
            raise MemoryError

    # after the BatchNorms have moved their statistics and the dropout has drawn
    case.model[-1].register_forward_hook(out_of_memory)
    before = snapshot(module=case.model, device=device, gradients=True)
    with pytest.raises(MemoryError):
        mts_fast.hypergradient_dots(case.model, case.inputs, case.labels, direction, engine=engine)
    assert_bitwise(snapshot(module=case.model, device=device, gradients=True), before)


def test_errors_name_the_argument(device):
    case = make_case("mlp", device)
    arguments = case.model, case.inputs, case.labels
    with pytest.raises(ValueError, match=r"direction must be of the model's parameters, got \['w"):
        mts_fast.hypergradient_dots(*arguments, {"w": torch.ones(1)})
    with pytest.raises(ValueError, match=r"direction\['0.bias'\] must be of shape \(8,\)"):
        mts_fast.hypergradient_dots(*arguments, {"0.bias": torch.ones(7)})
    with pytest.raises(ValueError, match="engine must be one of 'auto', 'ghost'"):
        mts_fast.hypergradient_dots(*arguments, case.named(), engine="magic")
    with pytest.raises(
        ValueError, match=r"hypergradient_dots: loss\(output, labels\) must be a tensor of shape"
    ):
        mts_fast.hypergradient_dots(
            *arguments, case.named(), loss=torch.nn.functional.cross_entropy
        )
    with pytest.raises(TypeError, match="the model's output must be logits"):
        mts_fast.hypergradient_dots(Tokens(), *arguments[1:], {"w": torch.ones(1)})
    with pytest.raises(ValueError, match="direction must be a non-empty mapping"):
        mts_fast.hypergradient_dots(*arguments, {})


class Tokens(torch.nn.Module):
    """Returns integers, as a generator would."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x.long()


def test_forward_mode_refuses_parameters_of_another_module(device):
    case = make_case("mlp", device)
    stranger = torch.nn.Parameter(torch.ones(1, device=device))
    with pytest.raises(RuntimeError, match="the optimizer holds parameters that are not the model"):
        EngineChoice(Objective(case.model), [*case.named().values(), stranger], "forward_mode")


class Tables(torch.nn.Module):
    """Tables whose gradient is divided by how often a row occurs; BatchNorm keeps ghost away."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(7, 6, scale_grad_by_freq=True, padding_idx=3)
        self.others = torch.nn.Embedding(7, 6, scale_grad_by_freq=True)
        self.norm, self.head = torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 7)
        self.head.weight = self.others.weight  # a use that is not divided

    def forward(self, tokens):
        h = self.words(tokens).mean(1) + self.others(input=tokens.T).mean(0)
        h = h + self.words(tokens[:, :1])[:, 0]  # other counts than above
        return self.head(self.norm(h).tanh())


TOKENS = torch.tensor([[1, 1, 0, 3], [2, 0, 2, 2], [5, 6, 1, 4], [1, 3, 3, 5]])
CLASSES = torch.tensor([1, 0, 3, 2])


@pytest.mark.parametrize("engine", [*GENERAL, "double_backward"])
@pytest.mark.parametrize("fresh", [False, True])
def test_gradients_divided_by_frequency(engine, fresh):
    """d_i is <v, autograd's gradient>, which no derivative is; `fresh`: dots without a gradient."""
    model = Tables().double()
    parameters = list(model.parameters())
    made = ENGINES[engine](Objective(model), parameters)
    direction = random_direction(parameters)
    direction[0][3] = 0  # the padding row
    batch = LabelledBatch(TOKENS, CLASSES)
    losses = made.objective.losses(batch)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    if fresh:
        computed = made.dots(batch, direction)
    else:
        linearization = made.linearize(batch)
        gradient = linearization.gradient(torch.ones(4).double())
        computed = linearization.dots(direction)
        for g, *parts in zip(gradient, *rows, strict=True):
            torch.testing.assert_close(g, sum(parts), rtol=EXACT, atol=EXACT)
    expected = torch.stack(
        [sum((v * g).sum() for v, g in zip(direction, row, strict=True)) for row in rows]
    )
    assert relative(computed, expected) < TOLERANCE.get(engine, EXACT)
    assert not any(m._forward_hooks for m in model.modules())


def test_bags_divided_by_frequency_are_refused():
    model = Tables()
    model.others = torch.nn.EmbeddingBag(7, 6, scale_grad_by_freq=True)
    with pytest.raises(RuntimeError, match=r"others: EmbeddingBag\(scale_grad_by_freq=True\)"):
        EngineChoice(Objective(model), list(model.parameters()), "finite_difference")


def test_check_engine_on_gradients_divided_by_frequency():
    check = mts_fast.check_engine(Tables(), TOKENS, CLASSES)
    assert check.ok and check.dots["ghost"] is None
    assert {n for n, e in check.dots.items() if e is not None} == {
        "forward_mode",
        "double_backward",
        "finite_difference",
    }
