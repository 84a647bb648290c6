"""Processes of the demo: one works through a whole task, and none outlives the main one."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, NoReturn, TypeVar

from mts_fast._check import fail
from mts_fast._process import postponed

# time between checks of the main process for tasks that have ended
POLL_SECONDS = 0.2
# signals that a terminal sends to all processes; the main one ends its workers
SENT_TO_ALL = (signal.SIGINT, signal.SIGHUP)

T = TypeVar("T")

# queue of a worker's reports
_messages: Any = None


def run_tasks(
    work: Callable[[T], Any],
    tasks: Sequence[T],
    report: Callable[[T, str], None],
    ended: Callable[[T, bool], None],
) -> list[Any]:
    """work(task) of every task in processes, one per core; the results in order.

    `report` gets the messages (task, text) that workers send by `tell`; `ended` gets a task, and
    whether it succeeded. The first task that fails, or an interrupt, ends all processes.

    Raises:
        RuntimeError: a process was killed.
        Exception: what `work` raised.
    """
    if not tasks:
        return []
    context = multiprocessing.get_context("spawn")
    with _blocked(SENT_TO_ALL):  # starts multiprocessing's resource tracker
        messages = context.Queue()
    count = min(len(tasks), os.cpu_count() or 1)
    before = {*multiprocessing.active_children()}
    with ProcessPoolExecutor(count, context, _start_worker, (messages,)) as pool:
        try:
            with _blocked(SENT_TO_ALL):
                futures = {pool.submit(work, task): task for task in tasks}
            workers = {*multiprocessing.active_children()} - before
            return _collect(futures, workers, messages, report, ended)
        except BaseException:
            with postponed():
                _kill({*multiprocessing.active_children()} - before)
            raise


def tell(*message: Any) -> None:
    """Send a message from a worker to `report`."""
    _messages.put(message)


def _collect(
    futures: dict[Future, T],
    workers: set[BaseProcess],
    messages: Any,
    report: Callable[[T, str], None],
    ended: Callable[[T, bool], None],
) -> list[Any]:
    running = dict(futures)
    while running:
        for future in [future for future in running if future.done()]:
            task = running.pop(future)
            error = future.exception()
            ended(task, error is None)
            if isinstance(error, BrokenProcessPool):
                _fail_for_killed_process()
            if error is not None:
                raise error
        # the pool does not watch a process that started while it was already waiting
        if not all(worker.is_alive() for worker in workers):
            for future in running:
                ended(running[future], False)
            _fail_for_killed_process()
        try:
            task, text = messages.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        if task in running.values():
            report(task, text)
    return [future.result() for future in futures]


def _fail_for_killed_process() -> NoReturn:
    expected = "alive until its work is done"
    hint = "it may have had too little memory: close other programs, run fewer --seeds"
    fail(RuntimeError, "demo", "every process", expected, "one that was killed", hint)


def _start_worker(messages: Any) -> None:
    """Start of a worker: sets the queue of reports, and ends the worker with the main process."""
    global _messages
    _messages = messages
    # the worker does not wait for its reports to be read
    messages.cancel_join_thread()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _blocked(signals: Sequence[int]) -> Iterator[None]:
    """Block these signals, also in processes that start inside; this one gets them afterwards."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _kill(processes: set[BaseProcess]) -> None:
    for process in processes:
        process.kill()
