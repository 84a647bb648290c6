"""
One script for one process or many
==================================

The same file under ``python`` and under ``torchrun --nproc-per-node=4 data_parallel.py``: every
rank runs its part of each batch and of the validation set, and the step is that of the joined
batch, so that the parameters are the same to rounding. ``DistributedDataParallel`` gives all ranks
the first one's parameters; the step reduces by itself. Checkpoints resume on any number of ranks.
"""

import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from _digits import classifier, noisy_digits
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import mts_fast
from mts_fast.distributed import GlobalBatchSampler, IndexedDataset

EPOCHS = int(os.environ.get("STEPS", "20"))
CHECKPOINT = os.environ.get("CHECKPOINT")  # a file to save to and, where it exists, to resume from


def train() -> tuple[torch.nn.Module, float, list[float]]:
    """The classifier after all epochs, its accuracy, and the validation loss of every step."""
    curve = []
    ranks, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    digits = noisy_digits()
    pool = IndexedDataset(TensorDataset(*digits.train))
    batches = GlobalBatchSampler(len(pool), batch_size=256, drop_last=True)
    torch.manual_seed(0)
    model, selector = classifier(), mts_fast.Selector(num_features=4, num_classes=10)
    if dist.is_initialized():
        model = DistributedDataParallel(model)
    step = mts_fast.MTSStep(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        selector,
        torch.optim.AdamW(selector.parameters(), lr=1e-2),
    )
    if CHECKPOINT and Path(CHECKPOINT).exists():
        state = torch.load(CHECKPOINT)
        step.load_state_dict(state["step"])
        batches.load_state_dict(state["batches"])
    val_inputs, val_labels = (part.tensor_split(ranks)[rank] for part in digits.validation)
    while batches.epochs_done < EPOCHS:
        for i, (images, labels) in DataLoader(pool, batch_sampler=batches):
            result = step(
                images,
                labels,
                is_synthetic=digits.is_synthetic[i],
                val_inputs=val_inputs,
                val_labels=val_labels,
            )
            curve.append(float(result.val_loss))
        if CHECKPOINT and rank == 0:
            torch.save({"step": step.state_dict(), "batches": batches.state_dict()}, CHECKPOINT)
    images, labels = digits.test
    accuracy = (model(images).argmax(1) == labels).float().mean().item()
    return model, accuracy, curve


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")  # with model and data on a GPU: "nccl"
    model, accuracy, curve = train()
    if int(os.environ.get("RANK", "0")) == 0:
        norm = torch.stack([p.detach().double().norm() for p in model.parameters()]).norm()
        print(f"accuracy {accuracy:.4f}, norm of the parameters {norm:.6f}")
        plt.plot(curve)
        plt.xlabel("step")
        plt.ylabel("validation loss at the virtual parameters")
        plt.show()
    if dist.is_initialized():
        dist.destroy_process_group()
