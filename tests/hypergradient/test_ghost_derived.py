"""Ghost where layers get what parameters and constants were made into, and any function of both."""

import gc

import pytest
import torch
from ghost_engines import EXACT, assert_exact, batch_of, engine_of, step_on, trainable, true_norms
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from mts_fast import reference
from mts_fast.hypergradient.ghost import Unsupported
from mts_fast.hypergradient.ghost.sample_norms import gradient_norms

SIZE, STEPS, WIDTH = 6, 7, 8


class Sequence(nn.Module):
    """[B, T, W] inputs, one part under test, a mean over positions and a head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def part(self, x):
        raise NotImplementedError

    def forward(self, x):
        return self.head(self.part(self.body(x).tanh()).tanh().mean(1))


class OffsetNorm(Sequence):
    """(1 + w) times a normalised input (Gemma)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH))

    def part(self, x):
        return x * x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt() * (1 + self.weight)


class RelativeBias(Sequence):
    """A table indexed by distances, added to attention scores (T5)."""

    def __init__(self, *, fused=False):
        super().__init__()
        self.table, self.fused = nn.Embedding(5, 2), fused

    def part(self, x):
        steps = torch.arange(x.shape[1])
        distance = (steps[:, None] - steps[None]).clamp(-2, 2) + 2
        bias = self.table(distance).permute(2, 0, 1)[None]
        q = x.unflatten(-1, (2, -1)).transpose(1, 2)
        if self.fused:
            return (
                F.scaled_dot_product_attention(q, q, q, attn_mask=bias).transpose(1, 2).flatten(2)
            )
        scores = q @ q.transpose(-1, -2)
        scores += bias
        return (scores.softmax(-1) @ q).transpose(1, 2).flatten(2)


class IndexedTable(Sequence):
    """A parameter indexed by a buffer, permuted and sliced (Swin)."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, WIDTH))
        self.register_buffer("index", torch.randint(11, (STEPS, STEPS)))

    def part(self, x):
        return torch.einsum(
            "tsw,bsw->btw", 0.3 * self.table[self.index.view(-1)].view(STEPS, STEPS, -1), x
        )


class StateSpace(Sequence):
    """-exp(A), a scan in plain operations (Mamba)."""

    def __init__(self):
        super().__init__()
        self.log_a, self.d = nn.Parameter(torch.randn(WIDTH, 3)), nn.Parameter(torch.randn(WIDTH))
        self.project = nn.Linear(WIDTH, 6)

    def part(self, x):
        b, c = self.project(x).chunk(2, -1)
        decay = torch.exp(F.softplus(x)[..., None] * -torch.exp(self.log_a))
        state, outputs = x.new_zeros(len(x), WIDTH, 3), []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + x[:, t, :, None] * b[:, t, None]
            outputs.append((state * c[:, t, None]).sum(-1))
        return torch.stack(outputs, 1) + x * self.d


class Stacked(Sequence):
    """Weights concatenated to one, and one made of two (merged LoRA)."""

    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Parameter(torch.randn(5, WIDTH)), nn.Parameter(torch.randn(3, WIDTH))
        self.a, self.b = nn.Parameter(torch.randn(WIDTH, 2)), nn.Parameter(torch.randn(2, WIDTH))

    def part(self, x):
        x = F.linear(x, torch.cat([self.q, self.k]) / 3)
        return F.linear(x, self.body.weight + self.a @ self.b / 3)


class Tokens(Sequence):
    """Class tokens, prompts and positions, joined in three ways."""

    def __init__(self):
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.prompt = nn.Parameter(torch.randn(2, WIDTH))
        self.position = nn.Parameter(torch.randn(STEPS + 5, WIDTH))

    def part(self, x):
        prompts = self.prompt.repeat(len(x), 1, 1)
        many = self.prompt.unsqueeze(0).expand(len(x), -1, -1) * 2
        return torch.cat([self.cls.expand(len(x), -1, -1), prompts, many, x], 1) + self.position


class Elementwise(Sequence):
    """Scales, temperatures, gates; from the left, the right and the inside."""

    def __init__(self):
        super().__init__()
        self.scale, self.gate = (
            nn.Parameter(torch.randn(WIDTH)),
            nn.Parameter(torch.randn(STEPS, 1)),
        )
        self.temperature, self.slope = (
            nn.Parameter(torch.tensor(0.7)),
            nn.Parameter(torch.rand(WIDTH)),
        )

    def part(self, x):
        x = self.scale * x - self.gate
        x = (self.gate - x) / self.temperature.exp()
        x = torch.sub(x, self.scale, alpha=0.3) + self.temperature
        x = torch.lerp(x, x.flip(-1), self.slope.sigmoid())
        x = F.prelu(x.transpose(1, 2), self.slope).transpose(1, 2)
        x = torch.where(x > 0, x, self.scale)
        x.mul_(2.0)
        x += self.slope
        return x


class Products(Sequence):
    """Parameters on the left of a product, in batched ones, and in sums of them."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(STEPS, STEPS) / 3)
        self.heads = nn.Parameter(torch.randn(2, 4, 4) / 2)
        self.start = nn.Parameter(torch.randn(1, STEPS, WIDTH))

    def part(self, x):
        x = torch.matmul(self.mix, x)
        heads = x.unflatten(-1, (2, 4))
        x = torch.einsum("bthi,hij->bthj", heads, self.heads).flatten(2)
        x = torch.einsum("hij,bthi->bthj", self.heads, x.unflatten(-1, (2, 4))).flatten(2)
        eye = torch.eye(WIDTH, dtype=x.dtype).expand(len(x), -1, -1)
        return torch.baddbmm(self.start.expand(len(x), -1, -1), x, eye) + self.mix.sum()


class StandardizedConvolution(nn.Module):
    """Weights standardised by batch norm, as a function of the weights alone (BiT)."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(WIDTH, 6, 3), nn.Linear(6, 3)

    def forward(self, x):
        weight = self.conv.weight
        weight = F.batch_norm(weight.reshape(1, 6, -1), None, None, training=True).view_as(weight)
        return self.head(F.conv1d(x.transpose(1, 2), weight, self.conv.bias).tanh().mean(2))


class Rounding(torch.autograd.Function):
    """Rounds; its gradient passes straight through."""

    @staticmethod
    def forward(ctx, weight):
        return (weight * 4).round() / 4

    @staticmethod
    def backward(ctx, b):
        return b


class StraightThrough(Sequence):
    """Quantised weights: autograd's gradient is not the derivative."""

    def part(self, x):
        return F.linear(x, Rounding.apply(self.body.weight), Rounding.apply(self.body.bias))


class Recycled(Sequence):
    """A derived tensor that is changed in place, used, and changed again."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def part(self, x):
        weight = self.weight.clone()
        weight[0] = self.weight[1] * 2
        weight *= 0.5
        padded = torch.zeros(WIDTH, WIDTH, dtype=x.dtype)
        padded[:4] = self.weight[:4].tanh()
        return F.linear(x, weight) + F.linear(x, padded)


def parametrized(wrap):
    model = nn.Sequential(
        wrap(nn.Linear(WIDTH, WIDTH)), nn.Tanh(), nn.Flatten(), wrap(nn.Linear(STEPS * WIDTH, 3))
    )
    return model.double()


def spectral(module):
    return parametrizations.spectral_norm(module).eval()


MODELS = {
    "offset_norm": OffsetNorm,
    "relative_bias": RelativeBias,
    "relative_bias_fused": lambda: RelativeBias(fused=True),
    "indexed_table": IndexedTable,
    "state_space": StateSpace,
    "stacked": Stacked,
    "tokens": Tokens,
    "elementwise": Elementwise,
    "products": Products,
    "standardized_convolution": StandardizedConvolution,
    "recycled": Recycled,
    "weight_norm": lambda: parametrized(parametrizations.weight_norm),
    "weight_norm_by_hook": lambda: parametrized(nn.utils.weight_norm),
    "spectral_norm": lambda: parametrized(spectral),
    "spectral_norm_moving": lambda: parametrized(parametrizations.spectral_norm),
    "orthogonal": lambda: parametrized(parametrizations.orthogonal),
    "straight_through": StraightThrough,
}


def build(name):
    torch.manual_seed(1)
    return MODELS[name]().double()


@pytest.mark.parametrize("size", [SIZE, STEPS, 1])
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("name", MODELS)
def test_dots_and_gradients_are_exact(name, memory, size):
    """Also where there are as many samples as positions; call after call, checked or not."""
    model = build(name)
    engine = engine_of(model, memory)
    for call in range(3):
        if name == "spectral_norm_moving":  # a forward moves its vectors: here, so does the oracle
            model.eval()
        assert_exact(engine, batch_of(size, STEPS, WIDTH), seed=call)
        step_on(model)
    assert not engine.left


@pytest.mark.parametrize("name", MODELS)
def test_gradient_norms_are_exact(name):
    model, batch = build(name).eval(), batch_of(SIZE, STEPS, WIDTH)
    engine = engine_of(model)
    truth = true_norms(engine, batch)
    torch.testing.assert_close(gradient_norms(engine, batch), truth, rtol=EXACT, atol=EXACT)


def test_dots_follow_autograd_where_its_gradient_is_no_derivative():
    """The rounded weights do not move with a small change; the dots do."""
    model, batch = build("straight_through"), batch_of(SIZE, STEPS, WIDTH)
    parameters = trainable(model)
    direction = [torch.randn_like(p) for p in parameters]
    losses = engine_of(model).objective.losses(batch)
    dots = engine_of(model).dots(batch, direction)
    truth = reference.hypergradient_dots(losses, parameters, direction)
    torch.testing.assert_close(dots, truth, rtol=EXACT, atol=EXACT)
    assert float(dots.abs().min()) > 0


class ChangedBySamples(Sequence):
    """Activations are added into a tensor made of parameters."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(STEPS, WIDTH))

    def part(self, x):
        total = self.shift * 1.0
        for one in x:
            total += one / len(x)
        return x + total


def test_samples_added_into_a_derived_tensor_are_mixed():
    with pytest.raises(Unsupported, match=r"mixed|in place"):
        engine_of(ChangedBySamples().double()).linearize(batch_of(SIZE, STEPS, WIDTH))


class Hypernetwork(nn.Module):
    """The weight is made of the samples of the batch."""

    def __init__(self):
        super().__init__()
        self.make, self.head = nn.Linear(WIDTH, 5 * WIDTH), nn.Linear(5, 3)

    def forward(self, x):
        weight = self.make(x.mean((0, 1))).view(5, WIDTH)
        return self.head(F.linear(x.mean(1), weight).tanh())


def test_a_weight_made_of_the_batch_is_refused_by_name():
    with pytest.raises(Unsupported, match=r"make.weight: .*mixed.*engine='auto' takes one that"):
        engine_of(Hypernetwork().double()).linearize(batch_of(SIZE, STEPS, WIDTH))


def test_the_graph_of_the_parameters_is_released(monkeypatch):
    """Nothing of a step stays alive after its last request."""
    import gc
    import weakref

    engine = engine_of(build("offset_norm"))
    line = engine.linearize(batch_of(SIZE, STEPS, WIDTH))
    line.gradient(torch.ones(SIZE).double())
    line.dots([torch.ones_like(p) for p in engine.parameters])
    references = [weakref.ref(leaf) for leaf in line.derived.leaves]
    line.gradient(torch.ones(SIZE).double())
    del line
    gc.collect()
    assert references and all(reference() is None for reference in references)


def test_nothing_of_a_step_outlives_it():
    """Tangents and graphs of derived tensors are freed when the linearization is."""
    model = OffsetNorm().double()
    engine, batch = engine_of(model), batch_of(SIZE, STEPS, WIDTH)
    direction = [torch.randn_like(p) for p in trainable(model)]

    def tensors():
        gc.collect()
        return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())

    def call():
        line = engine.linearize(batch)
        line.gradient(torch.ones(SIZE).double())
        return line, line.dots(direction)

    call()
    before = tensors()
    line, d = call()
    held = tensors()
    del line, d
    assert tensors() == before < held
