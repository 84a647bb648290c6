"""
The Trainer of Hugging Face
===========================

``MTSTrainer`` is a ``transformers.Trainer`` whose ``training_step`` is a step of mts_fast, in
float32 or with ``bf16=True``. The logged ``grad_norm`` is that of the clipped gradient;
``compute_loss`` is called in evaluation only. Checked with transformers 5.24. Several processes
have run on CPUs, by torchrun: ``OUT=FOLDER torchrun --nproc-per-node=2 hf_trainer.py``.
"""

import os
from dataclasses import dataclass
from tempfile import mkdtemp
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch.utils.data import ConcatDataset, Dataset

import mts_fast

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
except ImportError as error:
    raise SystemExit("this example needs transformers: pip install 'mts_fast[examples]'") from error

STEPS = int(os.environ.get("STEPS", "60"))
HINTS = {  # of TrainingArguments: the largest value that is allowed, and what to do
    "gradient_accumulation_steps": (1, "take a larger batch, with micro_batch in mts"),
    "n_gpu": (1, "start a process for each GPU by torchrun, or set CUDA_VISIBLE_DEVICES to one"),
    "fp16": (False, "take bf16=True, the Trainer would scale gradients once more"),
    "label_smoothing_factor": (0, "pass a loss with it in mts"),
    "remove_unused_columns": (False, "it would remove is_synthetic and features"),
}


@dataclass
class Rows(Dataset):
    """Rows of a dataset, dicts with "labels" and perhaps "features" [F], and is_synthetic."""

    rows: Any
    is_synthetic: bool

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {**self.rows[i], "is_synthetic": self.is_synthetic}


class Stepped(AcceleratedOptimizer):
    """The optimizer as the Trainer's loop sees it."""

    def step(self, closure=None):
        """Nothing: MTSStep has taken the step in `training_step`."""


class MTSTrainer(Trainer):
    """Trains on real and synthetic rows, a step reads val_batch_size of val (drawn by its number),
    or all; `mts` holds selector, selector_optimizer and options of MTSStep."""

    def __init__(self, model, args, *, real, synthetic, val, mts, val_batch_size=None, **trainer):
        for name, (most, hint) in HINTS.items():
            if (got := getattr(args, name)) > most:
                raise ValueError(f"MTSTrainer: {name} must be {most}, got {got}; {hint}")
        for name in {"model_init", "compute_loss_func"} & {*trainer}:
            raise TypeError(f"MTSTrainer: {name} must be left out; pass a model, a loss in mts")
        pool = ConcatDataset([Rows(real, False), Rows(synthetic, True)])
        super().__init__(model, args, train_dataset=pool, **trainer)
        self.val, self.val_batch_size, self.mts = val, val_batch_size or len(val), None
        self.parts = {"max_grad_norm": args.max_grad_norm or None, **mts}
        self.parts["selector"].to(args.device)

    def create_optimizer(self, model=None):
        """The Trainer's optimizer, whose steps are MTSStep's from here on."""
        optimizer = super().create_optimizer(model)
        if self.mts is None:
            self.mts = mts_fast.MTSStep(self.model, optimizer, **self.parts)
            self.optimizer = Stepped(optimizer, device_placement=False)
        return self.optimizer

    def training_step(self, model, inputs, num_items_in_batch=None):
        """One MTSStep in place of forward and backward; returns the weighted loss."""
        batch = dict(self._prepare_inputs(inputs))
        of_rows = {k: batch.pop(k) for k in ("is_synthetic", "features") if k in batch}
        generator = torch.Generator().manual_seed(self.args.seed + self.state.global_step)
        order = torch.randperm(len(self.val), generator=generator)[: self.val_batch_size]
        i = order[self.args.process_index :: self.args.world_size].tolist()
        val = dict(self._prepare_inputs(self.data_collator([self.val[k] for k in i])))
        model.train()
        with self.accelerator.autocast():
            self.result = self.mts(
                batch, batch.pop("labels"), val_labels=val.pop("labels"), val_inputs=val, **of_rows
            )
        return self.result.loss

    def log(self, logs, start_time=None):
        """Adds the validation loss and how concentrated the weights are."""
        if "loss" in logs:
            logs |= {f"mts_{k}": v for k, v in self.result.statistics.read().items()}
            if self.result.val_loss is not None:
                logs["mts_val_loss"] = float(self.result.val_loss)
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        state = self.mts.state_dict()
        del state["model"], state["optimizer"]  # they are in the Trainer's own files
        if self.args.should_save:
            torch.save(state, f"{output_dir}/mts.pt")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.mts.load_state_dict(self.mts.state_dict() | torch.load(f"{checkpoint}/mts.pt"))


def rows(count: int, wrong: float) -> list[dict[str, torch.Tensor]]:
    """Sentences of 10 words, three of four from their topic's 20; a share has a wrong label."""
    truth = torch.randint(2, (count,))
    topic = torch.where(torch.rand(count, 10) < 0.75, truth[:, None], 1 - truth[:, None])
    labels = torch.where(torch.rand(count) < wrong, 1 - truth, truth)
    pairs = zip(20 * topic + torch.randint(20, (count, 10)), labels, strict=True)
    return [{"input_ids": ids, "labels": label} for ids, label in pairs]


def small_trainer(**arguments: Any) -> MTSTrainer:
    """A small BERT with dropout, its data and its selector."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 10}
    config = BertConfig(vocab_size=40, num_hidden_layers=2, num_attention_heads=2, **sizes)
    selector = mts_fast.Selector(num_features=4, num_classes=2)
    mts = {"selector": selector, "selector_optimizer": torch.optim.AdamW(selector.parameters())}
    args = TrainingArguments(**{"remove_unused_columns": False, "use_cpu": True, **arguments})
    data = {"real": rows(100, 0.0), "synthetic": rows(700, 0.4), "val": rows(60, 0.0)}
    return MTSTrainer(BertForSequenceClassification(config), args, mts=mts, **data)


if __name__ == "__main__":
    run = {"max_steps": STEPS, "save_steps": STEPS // 2, "logging_steps": 1, "learning_rate": 3e-3}
    run |= {"output_dir": os.environ.get("OUT") or mkdtemp(), "per_device_train_batch_size": 64}
    whole, resumed = small_trainer(**run), small_trainer(**run)
    whole.train()
    resumed.train(resume_from_checkpoint=f"{run['output_dir']}/checkpoint-{STEPS // 2}")
    losses, again = ([h["loss"] for h in t.state.log_history[:-1]] for t in (whole, resumed))
    assert again == losses, "a resumed run has the same losses, bit for bit"
    print(f"{resumed.mts.steps} steps; resumed from half of them: the same losses")
    plt.plot(losses)
    plt.show()
