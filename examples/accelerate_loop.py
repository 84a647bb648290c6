"""
A loop with accelerate
======================

What of accelerate works around a step of mts_fast: device placement, mixed precision in bfloat16
(float16 has not been run), prepared models, loaders and schedulers, ``save_state`` and
``load_state``, and several processes, which have run on CPUs: ``CHECKPOINT=FOLDER torchrun
--standalone --nproc-per-node=2 accelerate_loop.py``. The selector is not prepared: it is the same
on all processes, and the step holds its state. What does not work: ``accelerator.accumulate`` (take
``accumulate=`` of MTSStep) and ``accelerator.clip_grad_norm_`` (take ``max_grad_norm``).
``backward`` and ``optimizer.step`` are the step's. Checked with accelerate 1.15.
"""

import os
import tempfile
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from _digits import classifier, noisy_digits
from torch.utils.data import DataLoader, TensorDataset

import mts_fast

try:
    from accelerate import Accelerator, DataLoaderConfiguration
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler
except ImportError as error:
    raise SystemExit("this example needs accelerate: pip install 'mts_fast[examples]'") from error

EPOCHS = int(os.environ.get("STEPS", "10"))


@dataclass
class Run:
    """What a run is made of, prepared by an accelerator."""

    accelerator: Accelerator
    loader: DataLoader
    optimizer: AcceleratedOptimizer
    scheduler: AcceleratedScheduler
    step: mts_fast.MTSStep


def make_run(mixed_precision: str = "no", **options: object) -> Run:
    """A run at its start. `options` are those of MTSStep."""
    # a seedable sampler orders an epoch by its number, so that a resumed run meets the same batches
    accelerator = Accelerator(
        cpu=True,
        mixed_precision=mixed_precision,
        step_scheduler_with_optimizer=False,  # else a step on n processes counts n times
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )
    torch.manual_seed(0)
    digits = noisy_digits()
    model = classifier()
    selector = mts_fast.Selector(num_features=4, num_classes=10).to(accelerator.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.999)
    pool = TensorDataset(*digits.train, digits.is_synthetic)
    # of one process; a batch of all has 256 samples
    loader = DataLoader(pool, 256 // accelerator.num_processes, shuffle=True, drop_last=True)
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    # MTSStep takes torch's optimizer, not the wrapper: its update rule belongs to the class
    selector_optimizer = torch.optim.AdamW(selector.parameters(), lr=1e-3)
    parts = (model, optimizer.optimizer, selector, selector_optimizer)
    step = mts_fast.MTSStep(*parts, **options)
    # after it, `save_state` holds the selector, its optimizer, counters, running statistics, too
    accelerator.register_for_checkpointing(step)
    return Run(accelerator, loader, optimizer, scheduler, step)


def train(run: Run, epochs: range) -> list[float]:
    """The weighted training losses of the epochs."""
    digits = noisy_digits()
    processes = run.accelerator.num_processes, run.accelerator.process_index
    val_inputs, val_labels = (
        t.tensor_split(processes[0])[processes[1]].to(run.accelerator.device)
        for t in digits.validation
    )
    losses = []
    for epoch in epochs:
        run.loader.set_epoch(epoch)
        for inputs, labels, is_synthetic in run.loader:
            with run.accelerator.autocast():
                result = run.step(
                    inputs,
                    labels,
                    is_synthetic=is_synthetic,
                    val_inputs=val_inputs,
                    val_labels=val_labels,
                )
            run.scheduler.step()
            losses.append(float(result.loss))
    return losses


if __name__ == "__main__":
    folder = os.environ.get("CHECKPOINT") or tempfile.mkdtemp()  # the same one for all processes
    whole = make_run()
    first = train(whole, range(EPOCHS // 2))
    whole.accelerator.save_state(folder)
    second = train(whole, range(EPOCHS // 2, EPOCHS))

    resumed = make_run()
    resumed.accelerator.load_state(folder)
    assert train(resumed, range(EPOCHS // 2, EPOCHS)) == second, "a resumed run is the same"
    same = "resumed from half of them: the same losses, bit for bit"
    resumed.accelerator.print(f"{resumed.step.steps} steps, loss {second[-1]:.5f}; {same}")
    plt.plot(first + second)
    plt.xlabel("step")
    plt.ylabel("weighted training loss")
    plt.show()
