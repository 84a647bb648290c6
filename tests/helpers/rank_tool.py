"""What ranks of a pool run of the command, and the classifiers that it trains there."""

import io
from contextlib import redirect_stderr, redirect_stdout

import torch
import torch.distributed as dist
from torch import nn

from mts_fast.cli import features as features_verb
from mts_fast.cli.main import main
from mts_fast.distributed.sweep import SharedSweep
from mts_fast.features import DistributionSweep
from mts_fast.pipeline import fit, inputs, learn, pool, team

# so few that a small pool has chunks for several ranks
EVALUATION_BATCH = 5


class Net(nn.Module):
    """Of pictures, without statistics of a batch; computed in float64."""

    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
        )
        self.head = nn.Linear(32, num_classes)
        self.double()

    def forward(self, x):
        return self.head(self.body(x.double()))


def net(num_classes):
    return Net(num_classes)


def random_net(num_classes):
    """Another one on every rank: no seed makes it the same."""
    model = Net(num_classes)
    generator = torch.Generator()
    generator.seed()
    with torch.no_grad():
        model.head.bias.copy_(torch.randn(num_classes, generator=generator))
    return model


def command(group, words):
    """(exit status, stdout, stderr) of the command; all ranks run it where there are some."""
    before = [module.EVALUATION_BATCH for module in (inputs, pool, learn)]
    out, err = io.StringIO(), io.StringIO()
    try:
        for module in (inputs, pool, learn):
            module.EVALUATION_BATCH = EVALUATION_BATCH
        with redirect_stdout(out), redirect_stderr(err):
            status = main(words)
    finally:
        for module, size in zip((inputs, pool, learn), before, strict=True):
            module.EVALUATION_BATCH = size
    return status, out.getvalue(), err.getvalue()


def interrupted_features(group, words, units, stopping):
    """The verb `features`, a signal coming after some units on rank `stopping` alone."""
    kind = DistributionSweep if group is None else SharedSweep
    whole = kind.run
    here = group is None or dist.get_rank(group) == stopping

    def run(self):
        for done in whole(self):
            if here and done >= units:
                signals.append(15)
            yield done

    signals = []
    postponed = features_verb.postponed

    class Postponed:
        """The verb's own context, whose list the sweep adds to."""

        def __enter__(self):
            self.inner = postponed()
            self.inner.__enter__()
            return signals

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

    kind.run, features_verb.postponed = run, Postponed
    try:
        return command(group, words)
    finally:
        kind.run, features_verb.postponed = whole, postponed


def counted_units(group, words):
    """The verb `features`, and how many units were done."""
    kind = DistributionSweep if group is None else SharedSweep
    whole, seen = kind.run, []

    def run(self):
        for done in whole(self):
            seen.append(done)
            yield done

    kind.run = run
    try:
        return command(group, words)[0], seen[:1]
    finally:
        kind.run = whole


def exchanges(group):
    """What a team gives each of its processes, and the errors of one that all are told."""
    here = team.team_of("test")

    def text_of(call):
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "no error"

    def failing():
        if here.index == 2:
            raise OSError("not here")

    model = nn.BatchNorm1d(2)
    with torch.no_grad():
        model.running_mean.fill_(here.index)
    here.copy_buffers(model)
    order = []
    result = here.in_turn(lambda: order.append(here.index) or here.index)
    return {
        "led": here.led(lambda: {"rank": here.index, "tensor": torch.arange(3)}),
        "part": here.part(torch.arange(6)).tolist(),
        "sizes": here.sizes(6),
        "total": here.total(here.index + 0.5),
        "mapped": here.mapped("x", torch.arange(11), 2, lambda i: [i * 10, i.double()]),
        "few": here.mapped("y", torch.arange(3), 2, lambda i: [i * 10]),
        "mean": model.running_mean.tolist(),
        "in turn": (result, order),
        "led error": text_of(lambda: here.led(lambda: 1 / 0)),
        "error": text_of(lambda: here.together(failing)),
        "seed": here.seed(7),
    }


def command_until_the_third_checkpoint(group, words):
    """The command, stopped by an error after a checkpoint of its third stage with some."""
    whole, saved = fit.save_checkpoint, []

    def save(*arguments):
        path = whole(*arguments)
        saved.append(path)
        if len(saved) == 3:
            raise OSError("test: it must stop, got a checkpoint; go on")
        return path

    fit.save_checkpoint = save
    try:
        return command(group, words)
    finally:
        fit.save_checkpoint = whole


def other_file(group, words, name, other, rank):
    """The command, one rank being given another file."""
    if dist.get_rank(group) == rank:
        words = [word.replace(f"{name}.safetensors", f"{other}.safetensors") for word in words]
    return command(group, words)
