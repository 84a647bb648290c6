"""MTSTrainer equals a plain loop, steps the optimizer once a batch, resumes bit for bit."""

import copy

import pytest
import torch
from comparison import assert_bitwise
from plain_loop import Steps, plain_loop

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from hf_trainer import HINTS, small_trainer

import mts_fast

# two batches of an epoch, the second one smaller: both are seen in five steps
RUN = {"max_steps": 5, "per_device_train_batch_size": 500, "logging_steps": 1}
RUN |= {"learning_rate": 1e-2, "report_to": "none", "disable_tqdm": True}
# fewer than the 60 rows of val, so that each step draws its own
VAL_BATCH = 40


def make_trainer(folder, **arguments):
    """The trainer of the example, on rows with two offline features, beside 4 online ones."""
    trainer = small_trainer(output_dir=str(folder), **RUN, **arguments)
    generator = torch.Generator().manual_seed(7)
    for part in trainer.train_dataset.datasets:
        for row in part.rows:
            row["features"] = torch.randn(2, generator=generator)
    selector = mts_fast.Selector(num_features=6, num_classes=2)
    optimizer = torch.optim.AdamW(selector.parameters(), lr=3e-3)
    trainer.parts |= {"selector": selector, "selector_optimizer": optimizer}
    trainer.val_batch_size = VAL_BATCH
    return trainer


def without_dropout(model):
    """The plain loop draws nothing in between, the Trainer's loader does."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_training_equals_a_plain_loop(tmp_path, bf16):
    options = {"save_strategy": "no", "max_grad_norm": 0.1, "weight_decay": 0.1}
    trainer = make_trainer(tmp_path, bf16=bf16, **options)
    without_dropout(trainer.model)
    model, selector = copy.deepcopy(trainer.model), copy.deepcopy(trainer.parts["selector"])
    batches, vals, collate = [], [], trainer.data_collator

    def recording(rows):
        batch = collate(rows)
        (batches if "is_synthetic" in batch else vals).append(dict(batch))
        return batch

    trainer.data_collator = recording
    trainer.create_optimizer()
    steps = Steps(trainer.mts.optimizer)
    trainer.train()
    assert steps.count == trainer.mts.steps == trainer.state.global_step == RUN["max_steps"]

    # the order of the groups is that in which the norm for clipping is summed
    vectors = {n for n, _ in model.named_parameters() if n.endswith("bias") or "LayerNorm" in n}
    groups = [
        {"params": [p for n, p in model.named_parameters() if n not in vectors]},
        {"params": [p for n, p in model.named_parameters() if n in vectors], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, RUN["learning_rate"], weight_decay=0.1, fused=True)
    count = RUN["max_steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (count - k) / count)
    parts = (model, optimizer, selector, torch.optim.AdamW(selector.parameters(), lr=3e-3))
    calls = [
        {
            "inputs": {"input_ids": batch["input_ids"]},
            "labels": batch["labels"],
            "is_synthetic": batch["is_synthetic"],
            "features": batch["features"],
            "val_inputs": {"input_ids": val["input_ids"]},
            "val_labels": val["labels"],
        }
        for batch, val in zip(batches[: len(vals)], vals, strict=True)
    ]
    losses, _ = plain_loop(
        parts, calls, bf16=bf16, max_grad_norm=0.1, after_step=lambda _: schedule.step()
    )
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logged] == losses
    assert all("mts_val_loss" in e and "mts_effective_batch_size" in e for e in logged)
    assert_bitwise(trainer.model.state_dict(), model.state_dict())
    assert_bitwise(trainer.parts["selector"].state_dict(), selector.state_dict())
    assert len({tuple(val["labels"].tolist()) for val in vals}) > 1


@pytest.mark.parametrize("at", [2, 3], ids=["between epochs", "within an epoch"])
def test_a_resumed_run_is_bit_identical(tmp_path, at):
    whole = make_trainer(tmp_path / "whole", save_steps=at)
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{at}"
    resumed = make_trainer(tmp_path / "resumed", save_steps=at)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert_bitwise(resumed.mts.state_dict(), whole.mts.state_dict())
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == RUN["max_steps"]
    saved = torch.load(checkpoint / "mts.pt")
    assert "model" not in saved and "optimizer" not in saved


def test_evaluation_is_the_trainers(tmp_path):
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.train()
    evaluated = trainer.evaluate(trainer.val)["eval_loss"]
    trainer.model.eval()
    with torch.no_grad():
        loss = float(trainer.model(**trainer.data_collator(trainer.val)).loss)
    # the Trainer's mean over batches of 8, this one over all 60: equal in float32 to 1e-7
    assert evaluated == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},
        {"remove_unused_columns": True},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_would_be_wrong_is_refused(tmp_path, option):
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"MTSTrainer: {name} must be .*, got {value}; ") as error:
        make_trainer(tmp_path, **option)
    assert HINTS[name][1] in str(error.value)
