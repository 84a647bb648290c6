"""Batches of pictures, and augmentation by sample and epoch."""

import numpy as np
import torch

from mts_fast.pipeline.pixels import augmented_batch, batch_of, standardized

RNG = np.random.default_rng(0)
CPU = torch.device("cpu")


PIXELS = RNG.integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
CHANGES = {"crop": 0.5, "jitter": 0.4, "flip": True}


def test_a_batch_is_standardised():
    batch = batch_of(PIXELS, torch.tensor([3, 0]), CPU)
    assert batch.shape == (2, 3, 12, 12) and batch.dtype == torch.float32
    red = torch.from_numpy(PIXELS[3, :, :, 0].astype(np.float32)) / 255
    assert torch.allclose(batch[0, 0], (red - 0.485) / 0.229, atol=1e-6)


def test_randomness_is_of_the_sample_and_the_epoch():
    one = augmented_batch(PIXELS, torch.tensor([0, 1, 2]), CPU, (3, 5), **CHANGES)
    other = augmented_batch(PIXELS, torch.tensor([2, 1]), CPU, (3, 5), **CHANGES)
    assert torch.allclose(one[1], other[1]) and torch.allclose(one[2], other[0])
    for seed in ((3, 6), (4, 5)):
        assert not torch.allclose(
            one, augmented_batch(PIXELS, torch.arange(3), CPU, seed, **CHANGES)
        )


def test_without_changes_it_is_the_plain_batch():
    indices = torch.arange(6)
    assert torch.equal(
        augmented_batch(PIXELS, indices, CPU, (0, 0)), batch_of(PIXELS, indices, CPU)
    )


def test_half_are_mirrored():
    many = np.repeat(PIXELS[:1], 400, 0)
    plain = batch_of(many, torch.arange(400), CPU)
    batch = augmented_batch(many, torch.arange(400), CPU, (0, 0), flip=True)
    same = (batch - plain).abs().amax((1, 2, 3)) < 1e-4
    mirrored = (batch - plain.flip(3)).abs().amax((1, 2, 3)) < 1e-4
    assert (same ^ mirrored).all() and 150 < int(mirrored.sum()) < 250


def test_a_crop_keeps_the_area_and_jitter_the_range():
    ramp = torch.linspace(0, 255, 64).round().to(torch.uint8)
    image = np.broadcast_to(ramp.numpy()[None, None, :, None], (200, 64, 64, 3)).copy()
    batch = augmented_batch(image, torch.arange(200), CPU, (1, 1), crop=0.25)
    deviation = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    values = batch * deviation + mean
    width = (values[:, 0, 0, -1] - values[:, 0, 0, 0]) * 64 / 63
    assert float(width.min()) > 0.4 and float(width.max()) < 1.02 and float(width.std()) > 0.1
    bright = augmented_batch(image, torch.arange(200), CPU, (1, 1), jitter=0.9)
    values = bright * deviation + mean
    assert float(values.min()) >= -1e-6 and float(values.max()) <= 1 + 1e-6
    assert torch.equal(
        standardized(torch.zeros(1, 3, 2, 2))[0, :, 0, 0], (-mean / deviation)[:, 0, 0]
    )
