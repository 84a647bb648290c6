"""Ranks of one machine that time their steps in turns: plain data parallelism, and MTSStep."""

import copy
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from step_models import BUILD, CLASSES
from torch.nn.parallel import DistributedDataParallel

import mts_fast

LOCAL_BATCH, VALIDATION = 32, 4
WARM_UP, ROUNDS = 8, 7  # calls 9 to 15 check nothing
TIME_OUT = timedelta(seconds=300)


class Arms:
    """One model's steps; `model` is a name of `BUILD` that takes images."""

    def __init__(self, name, group):
        rank = 0 if group is None else dist.get_rank(group)
        torch.manual_seed(0)
        model = BUILD[name]()
        torch.manual_seed(1 + rank)
        self.inputs = torch.randn(LOCAL_BATCH, 3, 32, 32)
        self.labels = torch.randint(CLASSES, (LOCAL_BATCH,))
        self.val = torch.randn(VALIDATION, 3, 32, 32), torch.randint(CLASSES, (VALIDATION,))
        self.parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        self.calls = {"plain": self._plain(copy.deepcopy(model), group)}
        for schedule in ("exact", "reuse"):
            self.calls[schedule] = self._ours(copy.deepcopy(model), group, schedule)

    def _plain(self, model, group):
        if group is not None:
            model = DistributedDataParallel(model, process_group=group)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step():
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(self.inputs), self.labels).backward()
            optimizer.step()

        return step

    def _ours(self, model, group, schedule):
        torch.manual_seed(2)
        selector = mts_fast.Selector(4, CLASSES)
        step = mts_fast.MTSStep(
            model,
            torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9),
            selector,
            torch.optim.AdamW(selector.parameters()),
            schedule=schedule,
            process_group=group,
        )
        x, y = self.val
        return lambda: step(self.inputs, self.labels, val_inputs=x, val_labels=y)


def times(name, size):
    """Median seconds of every arm with that many ranks, and the bytes of all parameters."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        queue = context.SimpleQueue()
        processes = [
            context.Process(target=_measure, args=(rank, size, name, f"{folder}/store", queue))
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        result = queue.get()
        for process in processes:
            process.join()
        return result


def _measure(rank, size, name, store, queue):
    os.environ["MTS_FAST_VERDICTS"] = "off"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=TIME_OUT
    )
    group = dist.group.WORLD if size > 1 else None
    arms = Arms(name, group)
    for call in arms.calls.values():
        for _ in range(WARM_UP):
            call()
    seconds = {label: [] for label in arms.calls}
    for _ in range(ROUNDS):
        for label, call in arms.calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            dist.barrier()
            seconds[label].append(time.perf_counter() - start)
    if rank == 0:
        queue.put(({k: statistics.median(v) for k, v in seconds.items()}, arms.parameters))
    dist.destroy_process_group()
