"""Where the time of a step goes on a GPU: waits, launches, kernels, races.

`python benchmarks/gpu/profile_step.py FOLDER` writes waits.txt (every synchronisation of one step),
profile.txt (busy share, launches and the 20 longest kernels of plain, published and exact steps of
a ViT-S), and sanitizer.txt (compute-sanitizer's racecheck and memcheck on one small launch of each
kernel).
"""

import argparse
import subprocess
import sys
import time
import warnings
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks" / "common"))
WARM_UP = 6
BATCHES = (64, 256)
SANITIZER_SECONDS = 60


def arms(batch):
    """label -> a call that takes one step of a ViT-S under bf16 autocast."""
    from bench_step import in_precision
    from gpu_models import make_gpu_task
    from step_arms import Ours, Plain, Published

    task = make_gpu_task("vit_s", batch, torch.device("cuda"))
    steps = {
        "plain": Plain(task),
        "published": Published(task),
        "exact, reference": Ours(task, backend="reference"),
        "exact, triton": Ours(task, backend="triton"),
    }
    return {label: in_precision(arm.step, "bf16") for label, arm in steps.items()}


def waits(call):
    """The synchronisations of one step, a line each."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "\n".join(f"{w.filename}:{w.lineno}: {w.message}" for w in caught) or "no wait"


def profile(label, call):
    """Busy share, launches and the longest kernels of one step."""
    for _ in range(WARM_UP):
        call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as record:
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    kernels = [e for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(e.device_time for e in kernels) / 1e6
    share = f"GPU busy {busy / seconds:.0%}"
    head = f"{label}: {1e3 * seconds:.2f} ms, {len(kernels)} launches, {share}"
    table = record.key_averages().table(sort_by="self_device_time_total", row_limit=20)
    return f"{head}\n{table}\n"


def launch_small():
    """Launch every kernel once, on sizes that no tile divides."""
    from mts_fast import (
        linear_cross_entropy,
        ops,
        use_backend,
        virtual_update,
        weighted_cross_entropy,
    )

    device = torch.device("cuda")

    def draw(*shape, grad=False):
        return torch.randn(*shape, device=device, requires_grad=grad)

    labels = torch.arange(33, device=device) % 101
    with use_backend("triton"):
        p = torch.full((33,), 1 / 33, device=device)
        loss, _, _ = weighted_cross_entropy(draw(33, 101, grad=True), labels, p, statistics=True)
        loss.backward()
        hidden, weight, bias = draw(33, 47, grad=True), draw(101, 47, grad=True), draw(101)
        linear_cross_entropy(hidden, weight, labels, bias).sum().backward()
        ops.hypergradient_dot(draw(5, 7, 47), draw(101, 47), draw(5, 7, 101), draw(101))
        ops.sample_dot(draw(5, 331), draw(5, 331))
        ops.layer_norm_sample_gradients(draw(5, 35, 47), draw(5, 35, 47))
        ops.group_norm_sample_gradients(draw(5, 6, 331), draw(5, 6, 331), 2)
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            leaves = [draw(33, 47, grad=True), draw(101, grad=True)]
            gradients = [draw(33, 47), draw(101)]
            virtual_update(kind(leaves, lr=0.1), gradients, along=gradients)
    torch.cuda.synchronize()


def sanitizer(tool):
    """compute-sanitizer over one small launch of each kernel."""
    command = ["compute-sanitizer", "--tool", tool, sys.executable, __file__, "--small"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{tool}: {error}\n"
    return f"{tool}: exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-2000:]}\n"


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/gpu"))
    parser.add_argument("--small", action="store_true", help="launch every kernel once, and end")
    arguments = parser.parse_args()
    folder = arguments.folder
    if not torch.cuda.is_available():
        raise SystemExit("profile_step: a CUDA device is needed, got none; see make gpu")
    if arguments.small:
        launch_small()
        return
    folder.mkdir(parents=True, exist_ok=True)
    calls = arms(BATCHES[0])
    (folder / "waits.txt").write_text(
        "\n\n".join(f"{label}\n{waits(call)}" for label, call in calls.items())
    )
    with (folder / "profile.txt").open("w") as file:
        for batch in BATCHES:
            for label, call in arms(batch).items():
                file.write(profile(f"{label}, B = {batch}", call))
                file.flush()
    (folder / "sanitizer.txt").write_text("".join(map(sanitizer, ("racecheck", "memcheck"))))


if __name__ == "__main__":
    main()
