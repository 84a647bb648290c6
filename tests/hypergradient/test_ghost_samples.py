"""Where samples lie, and that they are not mixed: what one forward cannot tell is not guessed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from mts_fast import reference
from mts_fast.hypergradient.ghost import Ghost, Unsupported
from mts_fast.hypergradient.ghost.sample_norms import gradient_norms
from mts_fast.hypergradient.objective import LabelledBatch, Objective
from mts_fast.hypergradient.refused import Refused

EXACT = 1e-9  # float64; observed 1e-15


def batch_of(size, *shape, classes=3):
    return LabelledBatch(torch.randn(size, *shape).double(), torch.arange(size) % classes)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def engine_of(model, memory="fast", loss=None):
    return Ghost(Objective(model, loss), trainable(model), memory=memory)


def assert_exact(engine, batch, seed=0):
    """Both gradients and the dots of one forward are double backward's, drawn from one seed."""
    direction = [torch.randn_like(p) for p in engine.parameters]
    weights = torch.rand(2, len(batch)).double()
    torch.manual_seed(seed)
    line = engine.linearize(batch)
    results = [line.gradient(weights[0]), line.dots(direction), line.gradient(weights[1])]
    torch.manual_seed(seed)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        losses = engine.objective.losses(batch)
    truth = reference.hypergradient_dots(losses, engine.parameters, direction)
    torch.testing.assert_close(results[1], truth, rtol=EXACT, atol=EXACT)
    for gradients, p in ((results[0], weights[0]), (results[2], weights[1])):
        true = torch.autograd.grad(
            losses, engine.parameters, p, retain_graph=True, allow_unused=True
        )
        for g, t in zip(gradients, true, strict=True):
            assert (g is None) == (t is None)
            if t is not None:
                torch.testing.assert_close(g, t, rtol=EXACT, atol=EXACT)


def step_on(model):
    with torch.no_grad():
        for p in trainable(model):
            p.add_(torch.randn_like(p), alpha=0.1)


class SequenceFirst(nn.Module):
    """A [T, B, D] encoder inside a model of [B, T, 5] inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x):
        return self.head(self.encoder(self.first(x.transpose(0, 1))).mean(0))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("first", [1, 2, 8])  # 1: every layout fits
def test_the_first_batch_decides_nothing_it_cannot_tell(first, memory):
    engine = engine_of(SequenceFirst().double(), memory)
    assert_exact(engine, batch_of(first, 16, 5))
    for _ in range(3):  # 16 positions are a multiple of 8 samples
        assert_exact(engine, batch_of(8, 16, 5))
    assert_exact(engine, batch_of(1, 16, 5))


@pytest.mark.parametrize("positions", [6, 12, 3])  # as many as samples; multiples; a divisor
def test_square_batches(positions):
    engine = engine_of(SequenceFirst().double())
    for _ in range(3):
        assert_exact(engine, batch_of(6, positions, 5))


@pytest.mark.parametrize("sequence_first", [False, True])
def test_identical_samples(sequence_first):
    x = torch.randn(1, 6, 5).double().expand(6, -1, -1).clone()
    batch = LabelledBatch(x, torch.zeros(6).long())
    model = SequenceFirst().double()
    if not sequence_first:
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Flatten(), nn.Linear(48, 3)).double()
    engine = engine_of(model)
    for _ in range(3):
        assert_exact(engine, batch)
    assert_exact(engine, batch_of(6, 6, 5))


class OwnPosition(nn.Module):
    """Sample i is classified by its position `where[i]`."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x, where):
        hidden = self.body(x.transpose(0, 1)).tanh()
        return self.head(hidden[where, torch.arange(x.shape[0])])


def test_a_batch_for_which_two_axes_are_right():
    """Gradients on the diagonal of [T, B] leave the axis open; the next batch does not."""
    engine = engine_of(OwnPosition().double())
    for where in (torch.arange(6), torch.randperm(6), torch.zeros(6).long()):
        for _ in range(2):
            batch = batch_of(6, 6, 5)
            assert_exact(engine, LabelledBatch([batch.inputs, where], batch.labels))


class Branch(nn.Module):
    """Synthetic samples take another branch, with the sequence first."""

    def __init__(self):
        super().__init__()
        self.real, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.first = nn.Linear(5, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)

    def forward(self, x, synthetic):
        other = self.encoder(self.first(x.transpose(0, 1))).mean(0)
        return self.head(torch.where(synthetic[:, None], other, self.real(x).mean(1)))


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_batches_that_are_sorted_by_source(memory):
    """The first batches have no sample for the branch, then some at the end, then one."""
    engine = engine_of(Branch().double(), memory)
    for synthetic in (0, 0, 0, 16, 8, 1, 32, 0):
        batch, flags = batch_of(32, 64, 5), torch.arange(32) >= 32 - synthetic
        assert_exact(engine, LabelledBatch([batch.inputs, flags], batch.labels))


def mix_by_index(h):
    return 0.7 * h + 0.3 * h[torch.randperm(len(h))]


def mix_by_slices(h):
    k = 1 + int(torch.randint(len(h) - 1, ()))
    return 0.7 * h + 0.3 * torch.cat([h[k:], h[:k]])


def mix_by_matrix(h):
    return 0.7 * h + 0.3 * torch.eye(len(h)).double()[torch.randperm(len(h))] @ h


# ways to mix hidden features in half of the forwards: by control flow or by a factor of 0
MIXTURES = {
    "index": lambda h, u: mix_by_index(h) if u < 0.5 else h,
    "where": lambda h, u: torch.where(u < 0.5, mix_by_index(h), h),
    "factor": lambda h, u: h + (u < 0.5) * (h.flip(0) - h) * 0.3,
    "slices": lambda h, u: mix_by_slices(h) if u < 0.5 else h,
    "roll": lambda h, u: 0.7 * h + 0.3 * h.roll(int(u < 0.5), 0),
    "matrix": lambda h, u: mix_by_matrix(h) if u < 0.5 else h,
    "mean": lambda h, u: h + (u < 0.5) * h.mean(0),
    "index_select": lambda h, u: h.index_select(
        0, torch.randperm(len(h)) if u < 0.5 else torch.arange(len(h))
    ),
    "in_place": lambda h, u: h.clone().index_copy_(0, torch.tensor([0]), h[int(u < 0.5)][None]),
    "transposed": lambda h, u: h + 0.1 * h.mT if u < 0.5 else h,  # as many features as samples
}


class Mixup(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.body, self.mix, self.head = nn.Linear(5, 8), mix, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.mix(self.body(x).tanh(), torch.rand(())))


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("name", MIXTURES)
def test_mixing_that_depends_on_a_draw_is_refused_in_every_call(name, memory):
    model = Mixup(MIXTURES[name]).double()
    engine, refused = engine_of(model, memory), []
    for seed in range(30):
        torch.manual_seed(seed)
        mixed = bool(torch.rand(()) < 0.5)
        try:
            assert_exact(engine, batch_of(8, 5), seed)
        except Unsupported as error:
            assert "samples are mixed" in str(error)
            refused.append(mixed)
            assert mixed
        else:
            assert not mixed
        step_on(model)
    assert 5 < len(refused) < 25


def test_a_refused_forward_leaves_nothing_behind():
    """No verdict, no draw: the forward that follows is checked as the first one."""
    engine, batch = engine_of(Mixup(MIXTURES["index"]).double()), batch_of(8, 5)
    torch.manual_seed(next(seed for seed in range(9) if first_draw(seed) < 0.5))
    before = torch.get_rng_state()
    with pytest.raises(Unsupported):
        engine.linearize(batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert not engine._histories
    assert_exact(engine, batch, next(seed for seed in range(9) if first_draw(seed) >= 0.5))


def first_draw(seed):
    torch.manual_seed(seed)
    return float(torch.rand(()))


class Gated(nn.Module):
    """The batch's mean behind a factor that starts at zero."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("gate", torch.zeros(()))

    def forward(self, x):
        h = self.body(x)
        return self.head(h + self.gate * h.mean(0))


def test_mixing_behind_a_zero_is_found_when_it_is_none():
    model = Gated().double()
    engine = engine_of(model)
    for _ in range(3):  # not a number of forwards at which a check is due
        model.gate.zero_()
        engine.linearize(batch_of(6, 5))
        model.gate.fill_(0.1)
        with pytest.raises(Unsupported, match="samples are mixed"):
            engine.linearize(batch_of(6, 5))


def test_routing_by_value_is_right_or_refused():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.expert, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            h = self.body(x).tanh().flatten(0, 1)
            y, chosen = h.clone(), x.flatten(0, 1)[:, 0] > 0
            y[chosen] = self.expert(h[chosen])
            return self.head(y.view(x.shape).mean(1))

    engine, served = engine_of(Routed().double()), 0
    for tokens in (32, 0, 8, 16, 16, 24, 32, 8):  # multiples of the 8 samples
        batch = batch_of(8, 4, 5)
        batch.inputs[..., 0] = -1
        batch.inputs.flatten(0, 1)[torch.randperm(32)[:tokens], 0] = 1
        try:
            assert_exact(engine, batch)
            served += 1
        except Unsupported as refused:
            assert "samples are mixed" in str(refused)
    assert served >= 2  # all tokens, or none, keep their order


class LowRank(nn.Module):
    """A frozen layer with a trainable product beside it that starts at zero."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 6).requires_grad_(False)
        self.down, self.up = nn.Linear(5, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.head, self.unused = nn.Linear(6, 3), nn.Linear(6, 3)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        x = x.transpose(0, 1)
        h = (self.body(x) + self.up(self.down(x))).tanh().mean(0)
        self.unused(h)
        return self.head(h)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_layers_without_a_gradient_at_first(memory):
    model = LowRank().double()
    engine = engine_of(model, memory)
    for number in range(6):  # zero for three forwards, as in a warm-up of the learning rate
        assert_exact(engine, batch_of(4, 8, 5))
        if number > 2:
            step_on(model)


def backward_passes(monkeypatch, run):
    calls, grad = [], torch.autograd.grad
    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
        run()
    return len(calls)


class Attention(nn.Module):
    """Attention by hand; each sample is classified by a position of its own."""

    def __init__(self):
        super().__init__()
        self.qkv, self.head = nn.Linear(5, 24), nn.Linear(8, 3)

    def forward(self, x):
        size, length, _ = x.shape
        q, k, v = (t.view(size, length, 2, 4).transpose(1, 2) for t in self.qkv(x).split(8, dim=2))
        h = ((q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2)
        h = F.normalize(h - h.mean(-1, keepdim=True), dim=-1)
        return self.head(h[torch.arange(size), torch.full((size,), length - 1)])


# models whose forwards draw, or move axes, without anything between samples
ORDINARY = {
    "plain": lambda: nn.Sequential(nn.Flatten(), nn.Linear(35, 8), nn.Linear(8, 3)),
    "dropout": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(35, 8), nn.Dropout(0.5), nn.Linear(8, 3)
    ),
    "convolution": lambda: nn.Sequential(
        nn.Conv1d(7, 8, 3), nn.GroupNorm(2, 8), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(8, 3)
    ),
    "encoder": SequenceFirst,
    "attention": Attention,
}


@pytest.mark.parametrize("name", ORDINARY)
def test_checks_become_rare(name, monkeypatch):
    engine = engine_of(ORDINARY[name]().double())
    passes = [
        backward_passes(monkeypatch, lambda: engine.linearize(batch_of(6, 7, 5))) for _ in range(16)
    ]
    checked = [number + 1 for number, n in enumerate(passes) if n]
    assert checked == [1, 2, 4, 8, 16]
    # two passes, and one more for layers that a first pass of input gradients does not reach
    assert max(passes) <= 4


def test_a_layer_that_is_never_reached_costs_no_check(monkeypatch):
    engine, batch = engine_of(LowRank().double()), batch_of(4, 7, 5)
    for _ in range(2):
        engine.linearize(batch)
    # whether its gradient is still 0
    assert backward_passes(monkeypatch, lambda: engine.linearize(batch)) <= 2


def test_losses_of_the_cpp_kernel_cost_no_check(monkeypatch):
    """From 1000 classes on the loss of the default is an operator of this library."""
    engine = engine_of(nn.Sequential(nn.Flatten(), nn.Linear(35, 1000)))
    batch = batch_of(6, 7, 5)
    batch = LabelledBatch(batch.inputs.float(), batch.labels)
    for _ in range(2):
        engine.linearize(batch)
    assert backward_passes(monkeypatch, lambda: engine.linearize(batch)) == 0


@torch.library.custom_op("mts_fast_tests::relu", mutates_args=())
def relu(x: torch.Tensor, reverse: bool) -> torch.Tensor:
    """Of torch's name, with the samples in another order where asked for."""
    return (x.flip(0) if reverse else x).clamp(min=0)


def relu_context(ctx, inputs, output):
    ctx.save_for_backward(output > 0)
    ctx.reverse = inputs[1]


def relu_backward(ctx, grad):
    grad = grad * ctx.saved_tensors[0]
    return grad.flip(0) if ctx.reverse else grad, None


relu.register_autograd(relu_backward, setup_context=relu_context)


class CustomOperator(nn.Module):
    """An operator of a user's own between two layers."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.reverse = nn.Linear(5, 8), nn.Linear(8, 3), False

    def forward(self, x):
        return self.head(torch.ops.mts_fast_tests.relu(self.body(x), self.reverse))


def test_a_custom_operator_is_not_taken_for_the_one_of_torch_with_its_name():
    model = CustomOperator().double()
    engine, batch = engine_of(model), batch_of(6, 5)
    for _ in range(4):
        engine.linearize(batch)
    model.reverse = True
    with pytest.raises(Unsupported, match=r"body.weight: .*mixe"):
        engine.linearize(batch)


def test_a_sample_with_a_nan_is_not_called_mixed():
    batch = batch_of(6, 5)
    batch.inputs[2] = torch.nan
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    engine = engine_of(model)
    dots = engine.linearize(batch).dots([torch.ones_like(p) for p in model.parameters()])
    assert torch.isfinite(dots).tolist() == [i != 2 for i in range(6)]
    assert_exact(engine, batch_of(6, 5))


class Checkpointed(nn.Module):
    """A checkpointed body behind a frozen layer, as Hugging Face's enable_input_require_grads."""

    def __init__(self, *, reentrant):
        super().__init__()
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.body, self.head, self.reentrant = nn.Linear(5, 8), nn.Linear(8, 3), reentrant

    def forward(self, x):
        h = self.frozen(x).requires_grad_()
        return self.head(checkpoint(self.body, h, use_reentrant=self.reentrant).tanh())


def test_reentrant_checkpoints_are_final():
    engine = engine_of(Checkpointed(reentrant=True).double())
    with pytest.raises(Refused, match=r"model must be .* re-entrant .*use_reentrant=False") as seen:
        engine.linearize(batch_of(6, 5))
    assert seen.value.final
    assert_exact(engine_of(Checkpointed(reentrant=False).double()), batch_of(6, 5))


def test_a_checkpoint_that_hides_no_parameter_but_stops_gradients_is_final():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(checkpoint(torch.tanh, self.first(x), use_reentrant=True))

    with pytest.raises(
        Refused, match=r"model must be differentiable by torch\.autograd\.grad"
    ) as seen:
        engine_of(Model().double()).linearize(batch_of(6, 5))
    assert seen.value.final


class Momentum(nn.Module):
    """Targets from the model's own weights under no_grad, there also checkpointed."""

    def __init__(self, *, checkpointed):
        super().__init__()
        self.body, self.head, self.checkpointed = nn.Linear(5, 8), nn.Linear(8, 3), checkpointed

    def forward(self, x):
        with torch.no_grad():
            target = self.body(x)
            if self.checkpointed:
                x = x.clone().requires_grad_()
                target = checkpoint(self.body, x, use_reentrant=True)
        return self.head(self.body(x) - target.tanh()) + F.linear(x, self.body.weight.detach()[:3])


def test_uses_without_gradient_are_served():
    assert_exact(engine_of(Momentum(checkpointed=False).double()), batch_of(6, 5))


def test_a_checkpoint_without_gradient_is_refused_but_not_final():
    with pytest.raises(Unsupported, match="used inside CheckpointFunction") as seen:
        engine_of(Momentum(checkpointed=True).double()).linearize(batch_of(6, 5))
    assert not seen.value.final


def test_a_function_with_its_own_backward_is_named():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        def backward(ctx, b):
            x, weight = ctx.saved_tensors
            return b @ weight, b.T @ x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.weight = nn.Linear(5, 5), nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return Product.apply(self.body(x), self.weight)

    with pytest.raises(Unsupported, match="weight is used inside Product") as seen:
        engine_of(Model().double()).linearize(batch_of(6, 5))
    assert not seen.value.final


def test_errors_of_the_models_own_forward_pass_through():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def forward(self, x):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine_of(Broken()).linearize(batch_of(6, 5))


def test_a_model_for_one_batch_size_is_served():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.layer(x).view(20, 2, 4).tanh().flatten(1))

    assert_exact(engine_of(Fixed().double()), batch_of(20, 5))


def test_sparse_inputs_are_a_reason():
    batch = LabelledBatch(torch.eye(5).double().to_sparse(), torch.arange(5) % 3)
    model = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 3)).double()
    with pytest.raises(Unsupported, match=r"0.weight: the input of its linear is not a dense"):
        engine_of(model).linearize(batch)


def test_losses_without_gradient_are_a_reason():
    model = nn.Linear(5, 3).double()
    with torch.no_grad(), pytest.raises(Unsupported, match="depend on no parameter"):
        engine_of(model).linearize(batch_of(6, 5))


def test_a_backward_that_fails_is_a_reason():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, b):
            raise NotImplementedError("no derivative")

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.head(Fails.apply(self.first(x)))

    with pytest.raises(Unsupported, match="NotImplementedError: no derivative") as seen:
        engine_of(Model().double()).linearize(batch_of(6, 5))
    assert not seen.value.final


def test_gradient_norms_along_the_right_axis():
    model = SequenceFirst().double()
    engine = engine_of(model)
    for size in (1, 8, 8):
        batch = batch_of(size, 16, 5)
        losses = engine.objective.losses(batch)
        truth = torch.stack(
            [
                torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(loss, engine.parameters, retain_graph=True)
                    ]
                ).norm()
                for loss in losses
            ]
        )
        torch.testing.assert_close(gradient_norms(engine, batch), truth, rtol=EXACT, atol=EXACT)


class Shuffled(torch.autograd.Function):
    """Mixing where no function call between layers shows it."""

    @staticmethod
    def forward(ctx, x, order):
        ctx.order = order
        return 0.5 * x + 0.5 * x[order]

    @staticmethod
    def backward(ctx, b):
        return 0.5 * b + 0.5 * torch.zeros_like(b).index_copy(0, ctx.order, b), None


def test_mixing_inside_an_autograd_function():
    def mix(h, u):
        return Shuffled.apply(h, torch.randperm(8) if u < 0.5 else torch.arange(8))

    engine = engine_of(Mixup(mix).double())
    for seed in range(20):
        if first_draw(seed) < 0.5:
            with pytest.raises(Unsupported, match="samples are mixed"):
                engine.linearize(_seeded(seed))
        else:
            assert_exact(engine, batch_of(8, 5), seed)


def _seeded(seed):
    batch = batch_of(8, 5)
    torch.manual_seed(seed)
    return batch
