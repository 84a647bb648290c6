"""Processes of one machine that form process groups over gloo, kept between tests."""

import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

# what takes long, beside a part of it that always runs
SLOW = pytest.mark.skipif(
    os.environ.get("MTS_FAST_TEST_ALL") != "1", reason="takes long; MTS_FAST_TEST_ALL=1 runs it"
)
TIME_OUT = 30  # seconds, of every exchange


class RankPool:
    """`run(f, size, *arguments)` calls f(group, *arguments) on the first `size` ranks.

    Functions are those of an importable module. A rank that raises gives the exception's text.
    """

    def __init__(self, size, time_out=TIME_OUT):
        folder = tempfile.mkdtemp()
        context = multiprocessing.get_context("spawn")
        self._pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, os.path.join(folder, "store"), there, time_out)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def run(self, function, size, *arguments):
        """Each rank's result; `Raised` where it raised; None where the process has gone."""
        for pipe in self._pipes[:size]:
            pipe.send((function.__module__, function.__name__, size, arguments))
        results = []
        for pipe in self._pipes[:size]:
            try:
                assert pipe.poll(4 * TIME_OUT), "a rank hangs"
                results.append(pipe.recv())
            except (EOFError, ConnectionError):
                results.append(None)
        return results

    def results(self, function, size, *arguments):
        """The same where every rank must succeed."""
        results = self.run(function, size, *arguments)
        for rank, result in enumerate(results):
            assert result is not None, f"rank {rank} has gone"
            assert not isinstance(result, Raised), f"rank {rank}:\n{result.trace}"
        return results

    def close(self):
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


class Raised:
    """An exception of a rank."""

    def __init__(self, error):
        self.kind, self.text = type(error).__name__, str(error)
        self.trace = traceback.format_exc()


def _serve(rank, size, store, pipe, time_out):
    os.environ["MTS_FAST_VERDICTS"] = "off"
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=time_out),
    )
    groups = {n: dist.new_group(list(range(n))) for n in range(2, size)}
    groups[size] = dist.group.WORLD
    while True:
        try:
            module, name, number, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            os._exit(0)  # without torch's orderly shutdown, which waits for ranks that have died
        try:
            __import__(module)
            result = getattr(sys.modules[module], name)(groups[number], *arguments)
        except Exception as error:
            result = Raised(error)
        pipe.send(result)
