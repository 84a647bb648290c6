"""The hypothesis strategy for worlds: mostly what people train, with odd things among it.

Whatever is drawn is a world that plain torch can run. Options that the two goals of the search
depend on (nine in ten computed, six in ten by ghost) have their weights here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from worlds.models import SEQUENCES
from worlds.shares import (
    ESTIMATORS,
    LAYERS,
    MIXING,
    ODD,
    RECURRENT,
    TRAINED,
)
from worlds.world import STEPS, Options, World

Draw = Callable[[Any], Any]


def weighted(draw: Draw, weights: dict[Any, int]) -> Any:
    """One of the keys."""
    return draw(st.sampled_from([key for key, n in weights.items() for _ in range(n)]))


def chance(draw: Draw, percent: int) -> bool:
    """True that often; shrinks to False."""
    return draw(st.integers(0, 99)) >= 100 - percent


@st.composite
def worlds(draw: Draw) -> World:
    """Any world."""
    source = weighted(draw, {"vector": 30, "sequence": 24, "tokens": 25, "image": 18, "signal": 10})
    precision = weighted(
        draw,
        {
            "float32": 52,
            "float64": 22,
            "autocast bfloat16": 10,
            "bfloat16": 8,
            "autocast float16": 6,
        },
    )
    sequence = source in SEQUENCES
    time_first = sequence and chance(draw, 25)
    # ghost serves what people train; to it come worlds that it has to hand on, and other engines
    character = weighted(draw, {"plain": 53, "odd": 36, "engine": 11})
    layers = _layers(draw, source, precision, character)
    kinds = {layer["kind"] for layer in layers}
    head, loss = _head(draw, source, time_first, character)
    events = _events(draw, layers, head)
    coupled = loss == "contrastive" or bool(kinds & MIXING) or _live_batch_norm(layers)
    optimizer = _optimizer(draw, layers, head)
    step = _step(draw, kinds, coupled, precision, character)
    batches = _batches(draw, source, loss, kinds, len(events))
    if _live_batch_norm(layers):
        batches, step = _without_single_samples(batches, step)
    if head["embedding"].get("sparse"):
        step["max_grad_norm"] = None
    if time_first and head["pool"] == "none":
        step["online_features"] = False
    return World(
        seed=draw(st.integers(0, 9999)),
        source=source,
        time_first=time_first,
        layers=layers,
        head=head,
        loss=loss,
        optimizer=optimizer,
        selector=_selector(draw),
        batches=batches,
        precision=precision,
        step=step,
        events=events,
    )


def _live_batch_norm(layers: list[Options]) -> bool:
    return any(o["kind"] == "batch_norm" and not o.get("frozen_statistics") for o in layers)


def _layers(draw: Draw, source: str, precision: str, character: str) -> list[Options]:
    weights = LAYERS[source] | (ODD[source] if character == "odd" else {})
    if precision not in ("float32", "float64"):
        # torch's own spectral_norm writes its vectors with out=, which 16 bits do not take
        weights.pop("spectral_norm", None)
        # and the sign of a weight near 0 turns on one rounding
        weights.pop("ternary", None)
    if precision.startswith("autocast"):
        # nor has this CPU an LSTM of 16 bits
        weights.pop("lstm", None)
    kinds = [
        weighted(draw, weights) for _ in range(draw(st.integers(2 if character == "odd" else 1, 5)))
    ]
    if source != "tokens" and chance(draw, 9):
        kinds.insert(0, "writes_input")
    layers = [_layer(draw, kind, source) for kind in kinds]
    if not any(o["kind"] in TRAINED and not o.get("frozen") for o in layers):
        layers.insert(0, {"kind": "conv" if source in ("image", "signal") else "linear"})
    if layers[0]["kind"] != "writes_input":
        layers = [o for o in layers if o["kind"] != "writes_input"]
    if character == "plain":
        for o in layers:
            if o["kind"] == "batch_norm":
                o["frozen_statistics"] = True
    # the mean of normalised channels is rounding noise, until something bends it
    layers = [
        x
        for o in layers
        for x in (
            [o, {"kind": "activation", "function": "silu"}] if o["kind"] == "instance_norm" else [o]
        )
    ]
    for k, o in enumerate(layers):
        above = any(x["kind"] in TRAINED and not x.get("frozen") for x in layers[:k])
        if o.get("reentrant") and not above:
            o["reentrant"] = False
    return _one_stride(layers)


def _one_stride(layers: list[Options]) -> list[Options]:
    """Images of 5 x 5 stand one stride of 2."""
    strides = [o for o in layers if o.get("stride", 1) > 1]
    for o in strides[1:]:
        o["stride"] = 1
    return layers


def _layer(draw: Draw, kind: str, source: str) -> Options:
    o: Options = {"kind": kind}
    if kind == "linear":
        o["bias"] = not chance(draw, 20)
    elif kind == "activation":
        o["function"] = weighted(draw, {"gelu": 1, "tanh": 1, "silu": 1, "relu": 1})
    elif kind == "batch_norm":
        # statistics that are frozen, as in fine-tuning, let samples be independent
        o["frozen_statistics"] = chance(draw, 40)
        o["cumulative"] = chance(draw, 40)
    elif kind == "instance_norm":
        o["tracked"] = chance(draw, 60)
    elif kind == "running_centre":
        o["reassigned"] = chance(draw, 50)
    elif kind == "checkpoint":
        o["reentrant"] = chance(draw, 20)
    elif kind == "conv":
        o["stride"] = weighted(draw, {1: 1, 2: 1 if source == "image" else 0})
        o["groups"] = weighted(draw, {1: 3, 2: 1})
        o["padding_mode"] = weighted(draw, {"zeros": 4, "circular": 3, "reflect": 3})
    elif kind == "attention":
        o["dropout"] = weighted(draw, {0.0: 1, 0.2: 1})
        o["weights"] = chance(draw, 45)
    elif kind == "encoder":
        o["dropout"] = weighted(draw, {0.0: 1, 0.2: 1})
        o["norm_first"] = chance(draw, 50)
    elif kind in RECURRENT:
        o["packed"] = chance(draw, 75)
        o["bidirectional"] = chance(draw, 60)
    elif kind == "positions":
        o["by_index"] = chance(draw, 50)
    if kind in TRAINED and chance(draw, 10):
        o["frozen"] = True
    return o


def _head(draw: Draw, source: str, time_first: bool, character: str) -> tuple[Options, str]:
    head: Options = {"pool": "mean", "kind": "linear", "embedding": {}}
    head["output"] = weighted(draw, {"tensor": 8, "dict": 1, "object": 1})
    if source == "tokens":
        choices: list[Options] = [
            {},
            {"padding_idx": 0},
            {"max_norm": 1.0},
            {"sparse": True},
            {"scale_grad_by_freq": True},
        ]
        at = weighted(draw, {0: 6, 1: 6, 2: 6, 3: 6, 4: 10})
        head["embedding"] = choices[at]
    losses = {
        "cross_entropy": 50,
        "smoothed": 6,
        "focal": 6,
        "running": 5,
        "running_reassigned": 4,
        "squares": 5,
        "multi_label": 5,
        "contrastive": 14 if character == "odd" else 0,
    }
    loss = weighted(draw, losses)
    if source in SEQUENCES:
        if chance(draw, 35):
            loss = "tokens"
            head["pool"] = "none"
            plain = not head["embedding"].get("sparse")
            if source == "tokens" and plain and chance(draw, 85):
                head["kind"] = "tied"
        else:
            head["pool"] = weighted(draw, {"mean": 3, "last": 1, "first": 1})
    return head, loss


def _events(draw: Draw, layers: list[Options], head: Options) -> list[str]:
    calls = draw(st.integers(2, 4))
    family = weighted(
        draw,
        {"none": 70, "learning_rate": 6, "freeze": 8, "unfreeze": 5, "add_group": 6, "eval": 11},
    )
    # with a tied head, all that is trained is frozen
    reentrant = any(o.get("reentrant") for o in layers)
    if family == "freeze" and (reentrant or head["kind"] == "tied"):
        family = "none"
    if family == "add_group" and (head["kind"] == "tied" or layers[0].get("frozen")):
        family = "none"
    events = ["none"] * calls
    if family == "unfreeze":
        for o in layers[:1]:
            if o["kind"] in TRAINED and not any(x.get("reentrant") for x in layers):
                o["frozen"] = True
    events[draw(st.integers(1, calls - 1))] = family
    if family in ("freeze", "eval") and events[-1] == "none":
        events[-1] = {"freeze": "unfreeze", "eval": "train"}[family]
    return events


def _optimizer(draw: Draw, layers: list[Options], head: Options) -> Options:
    kind = weighted(
        draw,
        {"SGD": 46, "AdamW": 22, "Adam": 18, "RMSprop": 10, "NAdam": 6, "RAdam": 6},
    )
    o: Options = {"kind": kind, "lr": 0.01, "weight_decay": weighted(draw, {0.0: 2, 0.05: 1})}
    sparse = head["embedding"].get("sparse")
    if sparse:
        kind = o["kind"] = "SGD"
        o["weight_decay"] = 0.0
    if kind == "SGD":
        o["lr"] = 0.1
        o["momentum"] = 0.0 if sparse else weighted(draw, {0.0: 1, 0.9: 2})
        o["nesterov"] = bool(o["momentum"]) and chance(draw, 30)
        o["dampening"] = 0.3 if o["momentum"] and not o["nesterov"] and chance(draw, 30) else 0.0
    elif kind == "RMSprop":
        o["centered"] = chance(draw, 50)
        o["momentum"] = weighted(draw, {0.0: 2, 0.9: 1})
    elif kind in ("Adam", "AdamW"):
        o["amsgrad"] = chance(draw, 12)
        o["betas"] = list(weighted(draw, {(0.9, 0.999): 3, (0.8, 0.95): 1}))
        o["eps"] = weighted(draw, {1e-8: 3, 1e-4: 1})
    if kind in ("SGD", "Adam", "AdamW"):
        o["maximize"] = chance(draw, 6)
    o["groups"] = weighted(draw, {1: 3, 2: 1})
    o["lr_tensor"] = chance(draw, 8)
    o["without_frozen"] = chance(draw, 30)
    return o


def _selector(draw: Draw) -> Options:
    kind = weighted(draw, {"AdamW": 5, "SGD": 2, "Adam": 1})
    optimizer: Options = {"kind": kind, "lr": 0.02, "weight_decay": 0.01}
    if kind == "SGD":
        optimizer |= {"momentum": 0.9, "nesterov": False, "dampening": 0.0}
    else:
        optimizer |= {"betas": [0.9, 0.999], "eps": 1e-8, "amsgrad": False}
    return {"own": chance(draw, 25), "optimizer": optimizer, "scheduler": chance(draw, 12)}


def _step(draw: Draw, kinds: set[str], coupled: bool, precision: str, character: str) -> Options:
    if character == "engine":
        engines = {"forward_mode": 4, "double_backward": 4, "finite_difference": 10}
    else:
        engines = {"auto": 88, "ghost": 12 if character == "plain" else 0}
        engines |= {"double_backward": 4, "forward_mode": 4} if character == "odd" else {}
    if coupled:
        engines.pop("ghost", None)
    if kinds & ESTIMATORS:
        # they differentiate the forward, which is not what a plain step descends there
        engines.pop("forward_mode", None)
        engines.pop("finite_difference", None)
    elif precision not in ("float32", "float64"):
        engines.pop("finite_difference", None)
    if kinds & RECURRENT:
        engines.pop("forward_mode", None)
    online = chance(draw, 45)
    return {
        "engine": weighted(draw, engines),
        "schedule": weighted(draw, {"exact": 4, "reuse": 1}),
        "memory": weighted(draw, {"fast": 6, "low": 1}),
        "micro_batch": weighted(draw, {None: 8, 2: 1, 3: 1}),
        "backend": weighted(draw, {"auto": 4, "reference": 1}),
        "class_weight": [0.5, 1.0, 2.0] if chance(draw, 14) else None,
        "hypergradient_lr": weighted(draw, {None: 9, 0.3: 1}),
        "validation_mode": weighted(draw, {"eval": 7, "train": 1}),
        "online_features": online,
        "online_k": weighted(draw, {3: 3, 1: 1}) if online else 3,
        "online_momentum": weighted(draw, {None: 4, 0.9: 1}) if online else None,
        "selector_every": weighted(draw, {1: 7, 2: 1}),
        "warmup_steps": weighted(draw, {0: 8, 1: 1}),
        "max_grad_norm": weighted(draw, {None: 7, 0.05: 1}),
    }


def _batches(draw: Draw, source: str, loss: str, kinds: set[str], calls: int) -> Options:
    size = weighted(draw, {6: 5, 4: 2, STEPS: 2, 10: 2})
    sizes = [size] * calls
    first = weighted(draw, {"same": 8, "one": 1, "other": 2})
    if first != "same":
        sizes[0] = 1 if first == "one" else size + 2
    form = weighted(draw, {"tensor": 6, "tuple": 1, "dict": 1})
    if "branch" in kinds and form == "tensor":
        form = "tuple"
    return {
        "sizes": sizes,
        "validation": weighted(draw, {4: 2, 5: 1}),
        "order": weighted(draw, {"shuffled": 4, "real_first": 2, "synthetic_first": 1}),
        "duplicates": chance(draw, 12),
        "form": form,
        "features": not chance(draw, 15),
        "classes": chance(draw, 10),
        "selector_batch": weighted(draw, {0: 7, 5: 1}),
        "ignored_sample": loss == "tokens" and chance(draw, 40),
    }


def _without_single_samples(batches: Options, step: Options) -> tuple[Options, Options]:
    """BatchNorm in train mode takes no batch of one, whole or the rest of micro-batches."""
    sizes = [max(size, 4) for size in batches["sizes"]]
    m = step["micro_batch"]
    others = [batches["validation"], batches["selector_batch"] or 4]
    if m is not None and any(size % m == 1 for size in [*sizes, *others]):
        step = {**step, "micro_batch": None}
    return {**batches, "sizes": sizes}, step
