"""What a GPU that ran out of memory is told: what was foretold, what there is, and what to change.

Between worker.py, which catches the error, and forecast.py, which foretells in a process of its own: this one has no
memory left, and ranks that wait for it.
"""

import json
import os
import subprocess
import sys

import torch

from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe
from radhpc.core.run_folder import RunFolder

SECONDS = 120  # that foretelling may take


def out_of_memory(run: RunFolder, rank: int, world: int) -> UserError:
    """The one line for the user."""
    recipe = run.recipe()
    there = ""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory / 1e9
        there = f": it has {total:.1f} GB, {torch.cuda.max_memory_reserved() / 1e9:.1f} were taken"
    stages = _foretold(run, world)
    foretold = ", ".join(f"{gigabytes:.3g} GB in stage '{name}'" for name, gigabytes in stages)
    plan = f"; 'radhpc plan' foretells {foretold}, and what CUDA itself takes" if stages else ""
    return UserError(f"rank {rank}'s GPU is out of memory{there}{plan}; {_advice(recipe, world)}")


def _advice(recipe: Recipe, world: int) -> str:
    """What can still be changed, what costs least first."""
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


def _foretold(run: RunFolder, world: int) -> list[tuple[str, float]]:
    """By stage; none where it cannot be foretold in time."""
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "radhpc.planning", str(run.path), str(world)],
            env={**alone, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, timeout=SECONDS, check=True,
        )  # fmt: skip
        return [(name, gigabytes) for name, gigabytes in json.loads(done.stdout.splitlines()[-1])]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return []
