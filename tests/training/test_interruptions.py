"""A step is complete or undone, whatever interrupts it and wherever."""

import io
import os
import random
import signal
import threading
import time

import pytest
import torch
from interruptions import RUNS, After, Interrupted, RaisingAt, begun, differences, whole_state

# the whole suite interrupts at every operator and at 500 moments per run, the core suite at some
ALL = os.environ.get("MTS_FAST_TEST_ALL") == "1"
STRIDE = 1 if ALL else 23
MOMENTS = 500 if ALL else 12


def operators(run):
    """How many operators a step dispatches."""
    counter = RaisingAt()
    with counter:
        run.step(**run.arguments(2))
    return counter.count


def interrupted_at(run, before, *numbers):
    """Whether the step was interrupted. A step that ended before these operators (ghost's checks
    are not made in every call) is undone."""
    try:
        with RaisingAt(*numbers):
            run.step(**run.arguments(2))
    except Interrupted:
        return True
    restart(run, before)
    return False


@pytest.mark.parametrize("name", RUNS)
def test_exception_at_every_operator(name):
    """In the forwards, the selector's step, the optimizer and its copy: everything is undone."""
    total = operators(begun(name, atomic=True))
    run = begun(name, atomic=True)
    before = whole_state(run)
    offset = random.Random(name).randrange(STRIDE)
    for n in [*range(1 + offset, total + 1, STRIDE), total]:
        assert interrupted_at(run, before, n) or n > 0.8 * total
        assert not differences(before, whole_state(run)), f"operator {n} of {total}"
    # the run then continues as one that was never interrupted
    other = begun(name, atomic=True)
    run.step(**run.arguments(2))
    after = whole_state(run)
    torch.set_rng_state(before["torch"])
    other.step(**other.arguments(2))
    assert not differences(after, whole_state(other))


@pytest.mark.parametrize("name", RUNS)
def test_exception_in_the_clean_up(name):
    """A second exception, while the first is being undone."""
    run = begun(name, atomic=True)
    total = operators(begun(name, atomic=True))
    before = whole_state(run)
    generator = random.Random(name)
    for second in range(1, 80, 3 if STRIDE > 1 else 1):
        first = generator.randrange(total // 2, total + 1)
        assert interrupted_at(run, before, first, first + second) or first > 0.8 * total
        assert not differences(before, whole_state(run)), f"operators {first}, +{second}"


def seconds_of_a_step(run):
    start = time.perf_counter()
    run.step(**run.arguments(2))
    return time.perf_counter() - start


@pytest.mark.parametrize("name", RUNS)
def test_exception_at_random_moments(name):
    """Between any two lines, as a debugger, a timeout or another thread may raise."""

    def interrupt():
        raise Interrupted

    generator = random.Random(name)
    length = seconds_of_a_step(begun(name, atomic=True))
    run = begun(name, atomic=True)
    undone = 0
    for _ in range(MOMENTS):
        before = whole_state(run)
        steps = run.step.steps
        try:
            with After(generator.uniform(1e-5, 1.2 * length), interrupt):
                run.step(**run.arguments(2))
        except Interrupted:
            if run.step.steps == steps:
                undone += 1
                assert not differences(before, whole_state(run))
        if run.step.steps > steps:
            after = whole_state(run)
            restart(run, before)
            run.step(**run.arguments(2))
            assert not differences(after, whole_state(run))
    assert undone > MOMENTS / 5


def restart(run, state):
    """Put a whole state back."""
    run.step.load_state_dict(
        {
            **run.step.state_dict(),
            **{k: state[k] for k in ("model", "optimizer", "selector", "selector_optimizer")},
            "selector_scheduler": state["scheduler"],
            "online": state["online"],
            "engines": state["engines"],
            "steps": state["steps"],
        }
    )
    torch.set_rng_state(state["torch"])
    parameters = [*run.model.parameters(), *run.selector.parameters()]
    for parameter, gradient in zip(parameters, state["gradients"], strict=True):
        parameter.grad = None if gradient is None else gradient.clone()


@pytest.mark.parametrize("name", RUNS)
def test_ctrl_c_is_held_until_the_step_is_complete(name):
    generator = random.Random(name)
    length = seconds_of_a_step(begun(name))
    run, other = begun(name), begun(name)
    torch.manual_seed(1)
    start = torch.get_rng_state()
    interrupted = 0
    for seed in range(MOMENTS):
        torch.set_rng_state(start)
        steps = run.step.steps
        try:
            with After(generator.uniform(1e-4, length), lambda: signal.raise_signal(signal.SIGINT)):
                run.step(**run.arguments(seed))
        except KeyboardInterrupt:
            interrupted += 1
        if run.step.steps == steps:  # the signal came before the call
            run.step(**run.arguments(seed))
        end = whole_state(run)
        torch.set_rng_state(start)
        other.step(**other.arguments(seed))
        assert not differences(end, whole_state(other))
        start = torch.get_rng_state()
    assert interrupted > MOMENTS / 5


def test_a_second_ctrl_c_undoes_the_step():
    run = begun("ghost")
    before = whole_state(run)
    calls = []

    def twice(*_):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    run.model.register_forward_hook(twice)
    with pytest.raises(KeyboardInterrupt):
        run.step(**run.arguments(2))
    assert len(calls) == 3 and not differences(before, whole_state(run))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_handler_off_the_main_thread():
    run = begun("ghost")
    seen = []
    run.model.register_forward_hook(lambda *_: seen.append(signal.getsignal(signal.SIGINT)))
    thread = threading.Thread(target=lambda: run.step(**run.arguments(2)))
    thread.start()
    thread.join()
    assert set(seen) == {signal.default_int_handler} and run.step.steps == 3


def nth_call_raises(n):
    """A hook that raises in its n-th call."""
    left = [n]

    def hook(*_):
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    return hook


SITES = {
    "forward of the model": lambda w, h: w.model.register_forward_hook(h),
    "forward of its first layer": lambda w, h: w.model[0].register_forward_pre_hook(h),
    "backward of the model": lambda w, h: w.model[-1].register_full_backward_hook(h),
    "forward of the selector": lambda w, h: w.selector.register_forward_hook(h),
    "backward of the selector": lambda w, h: w.selector.mlp.register_full_backward_hook(h),
    "before the selector's step": lambda w, h: w.selector_optimizer.register_step_pre_hook(h),
    "after the selector's step": lambda w, h: w.selector_optimizer.register_step_post_hook(h),
    "before the optimizer's step": lambda w, h: w.optimizer.register_step_pre_hook(h),
    "after the optimizer's step": lambda w, h: w.optimizer.register_step_post_hook(h),
}


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", RUNS)
def test_exception_at_every_call_site(name, site):
    failures = 0
    for n in range(1, 30):
        run = begun(name)
        before = whole_state(run)
        handle = SITES[site](run, nth_call_raises(n))
        try:
            run.step(**run.arguments(2))
        except Interrupted:
            failures += 1
            assert not differences(before, whole_state(run)), f"call {n}"
        else:
            break
        finally:
            handle.remove()
    # ghost reads output gradients without running the module's own backward hooks
    assert failures or site == "backward of the model"


def test_exception_of_the_loss_and_of_the_scheduler():
    calls = []

    def loss(output, labels):
        calls.append(1)
        if len(calls) == limit:
            raise Interrupted
        return torch.nn.functional.cross_entropy(output, labels, reduction="none")

    for limit in (5, 6):
        calls.clear()
        run = begun("adamw_scheduler", loss=loss)
        before = whole_state(run)
        calls[:] = [1] * (limit - 1)
        with pytest.raises(Interrupted):
            run.step(**run.arguments(2))
        assert not differences(before, whole_state(run))
    run = begun("adamw_scheduler")
    run.step.selector_scheduler.get_lr = nth_call_raises(1)
    before = whole_state(run)
    with pytest.raises(Interrupted):
        run.step(**run.arguments(2))
    assert not differences(before, whole_state(run))


def break_optimizer(run):
    """The optimizer's update raises after its first tensor."""
    first = run.optimizer.param_groups[0]["params"][0]

    def hook(*_):
        with torch.no_grad():
            first.add_(1.0)
        raise RuntimeError("out of memory")

    return run.optimizer.register_step_post_hook(hook)


def test_without_a_copy_a_torn_step_is_named_and_refused_until_a_load():
    run = begun("ghost", atomic=False)
    state = run.step.state_dict()
    saved = torch.load(_through_a_file(state))
    before = whole_state(run)
    handle = break_optimizer(run)
    with pytest.raises(RuntimeError, match=r"optimizer must be whole.*'1.weight'.*load a state"):
        run.step(**run.arguments(2))
    handle.remove()
    # everything but the optimizer's part was rolled back
    assert set(differences(before, whole_state(run))) == {"model", "optimizer"}
    with pytest.raises(RuntimeError, match="optimizer must be whole"):
        run.step(**run.arguments(2))
    run.step.load_state_dict(saved)
    run.step(**run.arguments(2))
    assert run.step.steps == 3


def test_without_a_copy_an_optimizer_that_moved_nothing_is_rolled_back():
    run = begun("ghost", atomic=False)
    before = whole_state(run)
    handle = run.optimizer.register_step_pre_hook(nth_call_raises(1))
    with pytest.raises(Interrupted):
        run.step(**run.arguments(2))
    assert not differences(before, whole_state(run))
    handle.remove()
    run.step(**run.arguments(2))


def test_with_a_copy_the_same_is_undone():
    run = begun("ghost", atomic=True)
    before = whole_state(run)
    break_optimizer(run)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.step(**run.arguments(2))
    assert not differences(before, whole_state(run))


def _through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_call_inside_a_call_of_the_same_step_is_refused():
    """A hook of the model or of the optimizer calls the step; the state stays as it was."""
    for owner in ("model", "optimizer"):
        run = begun("adamw_scheduler", atomic=True)
        before = whole_state(run)
        register = {
            "model": run.model.register_forward_hook,
            "optimizer": run.optimizer.register_step_post_hook,
        }[owner]
        handle = register(lambda *_, run=run: run.step(**run.arguments(3)) and None)
        with pytest.raises(RuntimeError, match="must be complete before the next one"):
            run.step(**run.arguments(2))
        assert not differences(before, whole_state(run))
        handle.remove()
        run.step(**run.arguments(2))
    other, run = begun("ghost"), begun("ghost")

    def step_of_another(*_):
        with torch.enable_grad():
            other.step(**other.arguments(2))

    handle = run.model.register_forward_hook(step_of_another)
    run.step(**run.arguments(2))
    handle.remove()
    assert other.step.steps > 2 and run.step.steps == 3
