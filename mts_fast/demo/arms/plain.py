"""Arms without weights of single samples, and the upper references that know the truth."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import nn

from mts_fast.demo.arms.seed_run import Options, Outcome, SeedRun
from mts_fast.demo.training import build_classifier, build_optimizer


def everything_alike(run: SeedRun, options: Options) -> Outcome:
    """One loss over the pool."""
    return Outcome(run.alike(options) if options else run.everything)


def everything_and_validation(run: SeedRun, options: Options) -> Outcome:
    """A clean share, the rest of the pool alike."""
    return Outcome(run.mixed(torch.ones(len(run.scenario.pool)), options))


def real_and_validation(run: SeedRun, options: Options) -> Outcome:
    """Real data and validation data, a share each."""
    return Outcome(run.real_and_clean(options))


def validation_alone(run: SeedRun, options: Options) -> Outcome:
    """The validation data only."""
    return Outcome(run.clean_alone(options))


def retrain_last_layer(run: SeedRun, model: nn.Module, options: Options) -> nn.Module:
    """The last linear layer trained anew on the clean data, all others fixed."""
    model = copy.deepcopy(model).requires_grad_(False)
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    torch.manual_seed(run.seed)
    last.reset_parameters()
    last.requires_grad_(True)
    return run.clean_alone(options, model)


def last_layer_on_validation(run: SeedRun, options: Options) -> Outcome:
    """Deep feature reweighting (Kirichenko, Izmailov, Wilson 2023)."""
    return Outcome(retrain_last_layer(run, run.everything, options))


def oracle(run: SeedRun, options: Options) -> Outcome:
    """The samples that help, known by their kind, and a clean share."""
    weights = run.scenario.is_helpful.float()
    return Outcome(run.mixed(weights, options), weights)


def group_dro(run: SeedRun, options: Options) -> Outcome:
    """Group distributionally robust optimization (Sagawa et al. 2020) with the true groups.

    Batches hold as much of each group; the weight of a group grows exponentially with its loss.
    """
    scenario, settings = run.scenario, run.with_options(options)
    assert scenario.groups is not None and scenario.val_groups is not None
    both = scenario.pool + scenario.clean
    groups = torch.cat([scenario.groups, scenario.val_groups])
    count = int(groups.max()) + 1
    q = torch.full((count,), 1 / count)
    torch.manual_seed(run.seed)
    model = build_classifier(settings.data)
    optimizer, schedule = build_optimizer(model.parameters(), settings)
    generator = torch.Generator().manual_seed(run.seed)
    # groups are drawn alike, as in the paper's experiments
    share = 1 / groups.bincount(minlength=count).clamp(min=1)[groups]
    for _ in range(settings.steps):
        indices = torch.multinomial(share, settings.batch_size, True, generator=generator)
        losses = F.cross_entropy(
            model(both.images[indices]), both.labels[indices], reduction="none"
        )
        sums = torch.zeros(count).index_add(0, groups[indices], losses)
        means = sums / groups[indices].bincount(minlength=count).clamp(min=1)
        q = q * (options.get("group_lr", 0.01) * means.detach()).exp()
        q = q / q.sum()
        optimizer.zero_grad()
        (q * means).sum().backward()
        optimizer.step()
        schedule.step()
    return Outcome(model.eval())
