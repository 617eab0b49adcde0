"""Start ranks inside a container: the command line for Apptainer, and the options of srun for pyxis.

    apptainer exec --nv --pwd RUN --bind RUN:RUN,/data:/data /images/radhpc.sif python3        ranks, by srun
    srun --container-image=/images/radhpc.sqsh --container-mounts=RUN:RUN,/data:/data ...      likewise

Only ranks are inside. The batch script and slurm.requeue stay on the host, with the Python that radhpc was called
with (or the profile's `python`): there scontrol works without a bind of it, of SLURM's libraries, its configuration
and munge's socket, and a decision can be taken when a container cannot start any more. That Python needs no torch.

The run folder, the recipe's local shards, weights and tokenizer are seen inside under their own paths; the rest
is for `binds`. The image holds Python and the libraries; radhpc itself comes from the run's frozen code.
"""

import shlex
from pathlib import Path

from radhpc.core.errors import UserError
from radhpc.core.files import read_json
from radhpc.core.recipe import Recipe
from radhpc.core.run_folder import EVALUATION, RunFolder
from slurm.profile import Container, Profile

# For Python inside: the frozen code alone, neither the host's PYTHONPATH nor what `pip install --user` left at home.
_INSIDE = ("PYTHONSAFEPATH=1", "PYTHONNOUSERSITE=1")


def check(container: Container) -> None:
    """Raise UserError where an image is a path and no file is there."""
    image = container.apptainer or container.pyxis or ""
    if image.startswith("/") and not Path(image).is_file():
        key = "apptainer" if container.apptainer else "pyxis"
        raise UserError(f"container.{key}: {image}: no such file; jobs must see the image under this path")


def required_binds(run: RunFolder) -> list[str]:
    """Return the binds that every run needs: its folder, and what its recipe names on local paths."""
    inputs = _inputs(run.recipe()) + _of_evaluation(run) if run.recipe_path.exists() else []  # a probe has none
    folder = (run.evaluated_run or run).path  # an evaluation's job lies in the folder of the run, and writes there
    paths = {path for path in inputs if path.startswith("/") and not Path(path).is_relative_to(folder)}
    return [_bind(str(folder)), *(f"{_bind(path)}:ro" for path in sorted(paths))]


def python_command(profile: Profile, binds: list[str], folder: Path) -> str:
    """Return the shell words that start a rank's Python in the container; `folder`: the working directory inside."""
    container = profile.container
    assert container is not None
    if container.pyxis:
        return container.python
    words = [*shlex.split(container.command), "exec"]
    words += [f"--{container.gpus}"] if profile.gpus_per_node else []
    words += ["--pwd", str(folder), "--bind", ",".join([*binds, *map(_bind, container.binds)])]
    return shlex.join([*words, *container.options, container.apptainer or "", container.python])


def srun_options(profile: Profile, binds: list[str], folder: Path, code: Path) -> list[str]:
    """Return the options of srun, where pyxis takes all of its own."""
    container = profile.container
    if container is None or not container.pyxis:
        return []
    inside = (f"PYTHONPATH={code}", *_INSIDE)
    return [
        f"--container-image={container.pyxis}",
        f"--container-mounts={','.join([*binds, *map(_bind, container.binds)])}",
        f"--container-workdir={folder}",
        f"--export={','.join(['ALL', *inside])}",
        # else values that the image sets for itself would win
        f"--container-env={','.join(word.split('=')[0] for word in inside)}",
        *container.options,
    ]


def variables(container: Container | None, code: Path) -> dict[str, str]:
    """Return variables of the host that Apptainer, by either of its names, sets inside."""
    if container is None or not container.apptainer:
        return {}
    inside = [f"PYTHONPATH={code}", *_INSIDE]
    return dict(f"{prefix}_{word}".split("=", 1) for prefix in ("APPTAINERENV", "SINGULARITYENV") for word in inside)


def _inputs(recipe: Recipe) -> list[str]:
    shards = [url.split("#")[0] for stage in recipe.stages for url in recipe.shards_of(stage)]
    others = [*map(_with_blobs, recipe.model.folders.values()), recipe.model.tokenizer.folder]
    return shards + [path for path in others if path]


def _with_blobs(folder: str) -> str:
    """Return what to bind for a folder: a snapshot in a hub's cache is a folder of links to blobs two folders up."""
    path = Path(folder)
    return str(path.parent.parent) if path.parent.name == "snapshots" else folder


def _of_evaluation(run: RunFolder) -> list[str]:
    """Return the paths that an evaluation reads besides the run that it evaluates."""
    task = read_json(run.path / EVALUATION)
    if task is None:
        return []
    folders = [path for name, path in task["settings"]["scorers"].items() if name != "sha256" and path]
    return [*(url.split("#")[0] for url in task["shards"]), *folders, *([task["against"]] if task["against"] else [])]


def _bind(text: str) -> str:
    """Return PATH:INSIDE, as pyxis requires it and Apptainer allows it."""
    if "," in text:
        raise UserError(f"{text}: a container's binds cannot have a comma")
    return text if ":" in text else f"{text}:{text}"
