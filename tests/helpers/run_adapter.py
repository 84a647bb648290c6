"""Run an example as `python run_adapter.py NAME RESULT`, alone or by a launcher: its losses."""

import importlib
import json
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
BATCH = 64  # of all processes


def accelerate_loop(_):
    example = importlib.import_module("accelerate_loop")
    run = example.make_run()
    return example.train(run, range(2)), run.accelerator.process_index


def hf_trainer(folder):
    """Without dropout, whose masks each process draws by itself."""
    size = BATCH // int(os.environ.get("WORLD_SIZE", "1"))
    options = {"max_steps": 6, "logging_steps": 1, "per_device_train_batch_size": size}
    options |= {"output_dir": folder, "report_to": "none", "disable_tqdm": True}
    example = importlib.import_module("hf_trainer")
    trainer = example.small_trainer(**options, learning_rate=1e-2, save_strategy="no")
    for module in trainer.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    results, step = [], trainer.training_step

    def training_step(*arguments, **options):
        loss = step(*arguments, **options)
        results.append(float(loss))
        return loss

    trainer.training_step = training_step
    trainer.train()
    return results, trainer.args.process_index


def lightning_module(folder):
    example = importlib.import_module("lightning_module")
    module, _ = example.fit(2, folder)
    norms = [float(p.detach().double().norm()) for p in module.parameters()]
    return norms, module.trainer.global_rank


def timm_loop(folder):
    example = importlib.import_module("timm_loop")
    if example.RANKS > 1:
        torch.distributed.init_process_group("gloo")
    return example.run(2, Path(folder) / "last.pth.tar")[1], example.RANK


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "examples"))
    name, result = sys.argv[1:]
    folder = Path(result).with_suffix("")
    folder.mkdir(exist_ok=True)
    losses, rank = globals()[name](str(folder))
    Path(f"{result}.{rank}").write_text(json.dumps(losses))
