"""Explain an out-of-memory error: predicted memory, available memory, and which settings to change.

Stands between worker.py, which catches the error, and planning/forecast.py, which predicts in a process of its own:
this one has no memory left, and other ranks wait for it.
"""

import json
import os
import subprocess
import sys

import torch

from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe
from radhpc.core.run_folder import RunFolder

FORECAST_SECONDS = 120  # that the prediction may take


def explain_out_of_memory(run: RunFolder, rank: int, world: int) -> UserError:
    """Return the one line for the user."""
    recipe = run.recipe()
    memory = ""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
        memory = f": it has {total:.1f} GB, {torch.cuda.max_memory_reserved() / 1e9:.1f} were taken"
    stages = _forecast(run, world)
    predicted = ", ".join(f"{gigabytes:.3g} GB in stage '{name}'" for name, gigabytes in stages)
    plan = f"; 'radhpc plan' predicts {predicted}, and what CUDA itself takes" if stages else ""
    return UserError(f"rank {rank}'s GPU is out of memory{memory}{plan}; {_advice(recipe, world)}")


def _advice(recipe: Recipe, world: int) -> str:
    """Return what can still be changed, the cheapest change first."""
    micro = max(min(stage.micro_batch or stage.batch, -(-stage.batch // world)) for stage in recipe.stages)
    changes = {
        "precision: bf16, or fp16 on a GPU without it": recipe.precision == "fp32",
        "model.checkpoint_activations: true": not recipe.model.checkpoint_activations,
        f"stages.N.micro_batch below {micro}": micro > 1,
        "model.quantise: nf4": recipe.model.quantise is None and any(stage.lora for stage in recipe.stages),
        "replicate: false": recipe.replicate,
        "zero.stage: 3": recipe.engine == "deepspeed" and recipe.zero.stage == 2,
        "zero.offload: true": recipe.engine == "deepspeed" and not recipe.zero.offload,
        "optimizer.kind: adamw_8bit": any(stage.optimizer.kind.startswith("adamw") and "8bit" not in
                                          stage.optimizer.kind for stage in recipe.stages),
        "more ranks": True,
    }  # fmt: skip
    return "change, in this order: " + ", ".join(change for change, possible in changes.items() if possible)


def _forecast(run: RunFolder, world: int) -> list[tuple[str, float]]:
    """Return the predicted gigabytes by stage; none where they cannot be predicted in time."""
    single = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "radhpc.planning", str(run.path), str(world)],
            env={**single, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=FORECAST_SECONDS, check=True,
        )  # fmt: skip
        return [(name, gigabytes) for name, gigabytes in json.loads(done.stdout.splitlines()[-1])]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []
