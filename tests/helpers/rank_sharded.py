"""What ranks of a pool run with models under fully_shard."""

import copy
import gc

import torch
import torch.distributed as dist
from counted import SentBytes
from rank_jobs import CLASSES, OPTIMIZERS, WIDTH, options_of_a_step
from rank_settings import sharded_arguments
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import mts_fast


class Blocks(nn.Module):
    """Blocks that are sharded one by one, and a norm, a class token and a head of the root."""

    def __init__(self, hidden=14, blocks=2):
        super().__init__()
        self.first = nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(10, hidden), nn.GELU(), nn.Linear(hidden, 10))
            for _ in range(blocks)
        )
        self.norm, self.head = nn.LayerNorm(10), nn.Linear(10, CLASSES)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


def sharded(model, group, options):
    what = options.get("refused")
    more = {"mesh": DeviceMesh.from_group(group, "cpu")}
    if options.get("half"):
        more["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if what == "offload":
        more["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if what == "partly":
        more["ignored_params"] = {model.first.weight}
    for block in model.blocks:
        fully_shard(block, **more)
    return fully_shard(model, **more, **options.get("shard", {}))


def sharded_step(group, options):
    """A step of `Blocks`, sharded where there is a group."""
    torch.manual_seed(0)
    model = (Blocks(256, 12) if options.get("large") else Blocks()).to(
        options.get("dtype", torch.float64)
    )
    if group is not None:
        model = sharded(model, group, options)
    torch.manual_seed(1)
    online = options.get("online", True)
    selector = mts_fast.Selector(2 + 4 * online, CLASSES, hidden=(8,)).double()
    return mts_fast.MTSStep(
        model,
        OPTIMIZERS[options.get("optimizer", "sgd")](model.parameters()),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=0.05),
        online_features=online,
        process_group="auto" if group is not None else None,
        **options_of_a_step(options),
    )


def arguments(step, call, sizes, rank):
    """A call's arguments in the model's dtype."""
    dtype = next(step.model.parameters()).dtype
    made = sharded_arguments(call, sizes, rank)
    if step.val_objective != "mean":
        made["val_groups"] = made["val_labels"]
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}


def train_sharded(group, options, sizes, calls=10):
    """What is left after some calls, and the results of all."""
    rank = 0 if group is None else dist.get_rank(group)
    step = sharded_step(group, options)
    results = []
    each = options.get("accumulate", 1)
    for call in range(calls):
        result = step(**arguments(step, call, sizes, rank))
        if (call + 1) % each:
            assert result is None
            continue
        results.append([result.dots, result.normalized_weights, result.loss, result.val_loss])
    parameters = {
        n: p.full_tensor() if hasattr(p, "full_tensor") else p
        for n, p in step.model.named_parameters()
    }
    state = step.state_dict()
    return {k: v.detach().clone() for k, v in parameters.items()}, state["selector"], results


def engine_of(group, options):
    """The engine that serves two calls."""
    step = sharded_step(group, options)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    engines = {step(**arguments(step, c, (6,) * size, rank)).engine for c in range(2)}
    return engines.pop()


def resume_sharded(group):
    """The selector after six calls, straight and from a state saved after three."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    ends = []
    for resumes in (False, True):
        step = sharded_step(group, {"optimizer": "adamw"})
        if not resumes:
            for call in range(3):
                step(**arguments(step, call, (6,) * size, rank))
            state = copy.deepcopy(step.state_dict())
        else:
            step.load_state_dict(state)
        for call in range(3, 6):
            step(**arguments(step, call, (6,) * size, rank))
        whole = [p.full_tensor().detach() for p in step.model.parameters()]
        ends.append((whole, step.state_dict()["selector"], step.steps))
    return ends


def undone(group):
    """Whether a call that raises on all ranks leaves parameters and state as they were."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = sharded_step(group, {"optimizer": "adamw"})
    step(**arguments(step, 0, (6,) * size, rank))
    before = copy.deepcopy(step.state_dict())
    bad = arguments(step, 1, (6,) * size, rank)
    if rank == 1:
        bad["features"] = bad["features"] * torch.nan
    text = ""
    try:
        step(**bad)
    except Exception as error:
        text = str(error)
    step(**arguments(step, 1, (6,) * size, rank))
    other = sharded_step(group, {"optimizer": "adamw"})
    other.load_state_dict(before)
    other(**arguments(other, 1, (6,) * size, rank))
    pairs = zip(step.model.parameters(), other.model.parameters(), strict=True)
    return text, all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)


def refusal(group, options):
    """The text of the error of what is refused."""
    what = options.get("refused")
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    sizes = (6,) * size
    try:
        if what in ("double_backward", "forward_mode"):
            options = options | {"engine": what}
        if what == "muon":
            options = options | {"optimizer": "muon"}
        if what == "uneven":
            options, sizes = options | {"micro_batch": 2}, (2, 6)
        if what == "empty":
            sizes = (0, 6)
        if what == "scaler":
            options = options | {"scaler": torch.amp.GradScaler("cpu")}
        if what == "compute":
            options = options | {"compute": 2}
        step = sharded_step(group, options)
        step(**arguments(step, 0, sizes, rank))
    except Exception as error:
        return str(error)
    return "no error"


def sent_bytes(group, options):
    """What a rank sends in a step, and in one of plain training, by kind."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    step = sharded_step(group, {"online": False, "large": True} | options)
    for call in range(4):
        step(**arguments(step, call, (6,) * size, rank))
    with SentBytes() as ours:
        step(**arguments(step, 4, (6,) * size, rank))
    rows = arguments(step, 5, (6,) * size, rank)
    with SentBytes() as plain:
        nn.functional.cross_entropy(step.model(rows["inputs"]), rows["labels"]).backward()
    return dict(ours.bytes), dict(plain.bytes)


def alive():
    """Memory of the tensors that exist here: address -> bytes; without a compiler's stand-ins."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, nn.Parameter, DTensor)]
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    local = [t for t in local if t.layout is torch.strided and t.device.type == "cpu"]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}


def sharded_bytes(group):
    """Of all tensors that are alive when v is known: parameters, state, theta' and v."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    before = alive()  # of other jobs
    step = sharded_step(group, {"online": False, "large": True})
    calls = [arguments(step, c, (8 // size,) * size, rank) for c in range(3)]
    step(**calls[0])
    seen = {}

    def count(module, args, output):
        if not module.training:  # the validation forward at theta'
            seen["bytes"] = sum(n for place, n in alive().items() if place not in before)

    step.model.register_forward_hook(count)
    step(**calls[1])
    return seen["bytes"]


def bytes_of_one(group):
    """The same of one process, which is one of the ranks."""
    return sharded_bytes(None)
