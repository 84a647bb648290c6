"""The loop that every adapter must equal: MTSStep called by hand, batch by batch."""

from contextlib import nullcontext

import torch

import mts_fast


class Steps:
    """Counts the steps that an optimizer takes."""

    def __init__(self, optimizer):
        self.count = 0
        optimizer.register_step_post_hook(self._counted)

    def _counted(self, *_):
        self.count += 1


def plain_loop(parts, batches, *, bf16=False, after_step=lambda number: None, **options):
    """Losses of the steps on batches, each the arguments of a call; `parts` go to MTSStep."""
    step = mts_fast.MTSStep(*parts, **options)
    losses = []
    for number, batch in enumerate(batches):
        parts[0].train()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            losses.append(float(step(**batch).loss))
        after_step(number)
    return losses, step


def digit_batches(digits, orders, size):
    """Batches of the digits in the orders of the epochs, incomplete ones left out."""
    images, labels = digits.train
    for order in orders:
        for i in order.split(size):
            if len(i) == size:
                yield {
                    "inputs": images[i],
                    "labels": labels[i],
                    "is_synthetic": digits.is_synthetic[i],
                    "val_inputs": digits.validation[0],
                    "val_labels": digits.validation[1],
                }


def order_of_epoch(samples, seed):
    """The permutation that torch's samplers draw from a generator with this seed."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(seed))


def digit_parts():
    """Classifier, selector and optimizers of the examples on digits, from their seed."""
    from _digits import classifier

    torch.manual_seed(0)
    model, selector = classifier(), mts_fast.Selector(num_features=4, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, selector, torch.optim.AdamW(selector.parameters(), lr=1e-3)
