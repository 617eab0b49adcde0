"""Write curves, events and pictures of a run for TensorBoard, without a step twice after a resume.

WandbCurves sends the curves to Weights & Biases, too, where a recipe asks for it.
"""

import math
import re
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from radhpc.core.errors import UserError, first_line
from radhpc.core.recipe import WandbSettings

_EVENTS = "events.out.tfevents."  # followed by the time, in ten digits, and who wrote it
RESTART = "restart"  # the name of the marks in by_stage/, beside those of stages


class WandbCurves:
    """The curves of one life for Weights & Biases, in files under RUN/wandb and, if online, on its server.

    The lives of a run are a group there. Steps that a life has written and the next one repeats stay
    in the first one's curve, as nothing that was sent can be taken back.
    """

    def __init__(self, settings: WandbSettings, run: Path, life: int) -> None:
        """Start the life's W&B run. Raises UserError where W&B refuses, for instance when online without a key."""
        import wandb

        try:
            self._run: Any = wandb.init(
                project=settings.project,
                mode=settings.mode,
                dir=str(run),
                group=run.name,
                name=f"{run.name}-life-{life}",
                settings=wandb.Settings(
                    # Curves alone: nothing of the machine, the code or what is printed.
                    console="off", disable_code=True, disable_git=True, save_code=False, silent=True,
                    x_disable_meta=True, x_disable_stats=True, x_disable_machine_info=True, x_save_requirements=False,
                    reinit="create_new", host="-",
                ),
            )  # fmt: skip
            # By a step of our own: W&B's must not go back, and a save that ends late reports an earlier one.
            self._run.define_metric("*", step_metric="step")
        except (wandb.Error, OSError) as error:
            raise UserError(f"board.wandb.mode {settings.mode}: {first_line(error)}") from error

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


class Board:
    """The event file of one life of a run. Without a folder, as on ranks other than 0, every call does nothing."""

    def __init__(self, folder: Path | None, resumed_at: int = 0, curves: WandbCurves | None = None) -> None:
        self._writer: Any = None
        self._curves = curves
        self._session_end: Any = None  # of a trial of a sweep
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            _in_order(folder)
            # Steps that an earlier life wrote after the restored one were lost with it, and are trained again:
            # purge_step makes TensorBoard drop it, so that no step appears twice.
            purge = resumed_at + 1 if any(folder.glob("events.out.*")) else None
            self._writer = SummaryWriter(str(folder), purge_step=purge, flush_secs=10)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        if self._curves is not None:
            self._curves.log(step, values)

    def text(self, step: int, name: str, value: str) -> None:
        if self._writer is not None:
            self._writer.add_text(name, value, step)

    def layout(self, stages: Sequence[str]) -> None:
        """Write the charts of the tab Custom Scalars: a line for each stage in one chart, with restarts marked."""
        if self._writer is not None:
            lines = [f"by_stage/{re.escape(name)}$" for name in (*stages, RESTART)]
            self._writer.add_custom_scalars(
                {
                    "The run": {
                        "loss by stage, restarts marked": ["Multiline", lines],
                        "gradient norm by group": ["Multiline", ["gradient_norm/.*"]],
                        "learning rate by group": ["Multiline", ["learning_rate/.*"]],
                        "loss by dataset": ["Multiline", ["loss_by_dataset/.*"]],
                        "loss by task": ["Multiline", ["loss_by_task/.*"]],
                    },
                    "Where the time goes": {
                        "seconds": ["Multiline", ["speed/step_seconds", "speed/data_wait_seconds"]],
                        "seconds of a save": ["Multiline", ["checkpoint/.*seconds"]],
                        "padding": ["Multiline", ["data/padding"]],
                        "10^12 operations a second, of a rank": ["Multiline", ["speed/teraflops_per_rank"]],
                    },
                    "Nodes": {
                        "memory, GB": ["Multiline", ["nodes_gigabytes/.*"]],
                        "own seconds of a step": ["Multiline", ["nodes_own_seconds/.*"]],
                        "data wait, seconds of a step": ["Multiline", ["nodes_data_wait_seconds/.*"]],
                        "megabytes from stores, a step": ["Multiline", ["nodes_megabytes/.*"]],
                        "hits of the cache, a step": ["Multiline", ["nodes_cache_hits/.*"]],
                    },
                    "Evaluation": {"scores": ["Multiline", ["evaluation/.*"]]},
                }
            )

    def event(self, step: int, event: str, details: str) -> None:
        """Show an event of the run, such as "resumed", under its name."""
        self.text(step, f"events/{event}", details)

    def picture(self, step: int, name: str, picture: npt.NDArray[np.uint8]) -> None:
        """Show a picture of shape (height, width, 3)."""
        if self._writer is not None:
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def curve(
        self, step: int, name: str, probabilities: npt.NDArray[np.float64], truth: npt.NDArray[np.float64]
    ) -> None:
        """Draw precision and recall at each threshold, if both classes occur; truth is 1, 0, or NaN for no case."""
        known = np.isfinite(truth)
        if self._writer is not None and 0 < truth[known].sum() < known.sum():
            self._writer.add_pr_curve(name, truth[known], probabilities[known], step)

    def hyperparameters(self, values: Mapping[str, bool | int | float | str | None], metric: str) -> None:
        """Write the parameters of a sweep's trial for TensorBoard's HParams; `metric`: the curve that ranks it."""
        if self._writer is not None:
            from torch.utils.tensorboard.summary import hparams

            known = {name: "null" if value is None else value for name, value in values.items()}
            experiment, session, self._session_end = hparams(known, {metric: 0.0})  # type: ignore[no-untyped-call]
            for summary in (experiment, session):
                self._writer.file_writer.add_summary(summary)

    def end_session(self) -> None:
        """Let HParams show the trial as done, finished or pruned."""
        if self._writer is not None and self._session_end is not None:
            self._writer.file_writer.add_summary(self._session_end)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._curves is not None:
            self._curves.close()


def _in_order(folder: Path) -> None:
    """Let the files of earlier lives come before the next one, as TensorBoard reads a run's files by name.

    Their names begin with the time. Where a clock was set back, or two lives began within a second, the names are
    replaced by numbers in the same order; otherwise they stay, because a reader may have a file open.
    """
    names = sorted(path.name for path in folder.glob(f"{_EVENTS}*"))
    if names and names[-1] >= f"{_EVENTS}{int(time.time()):010d}":
        for number, name in enumerate(names):
            (folder / name).rename(folder / f"{_EVENTS}{number:010d}.{name.split('.', 4)[-1]}")


def study_panel(images: Sequence[Image.Image], texts: dict[str, str], height: int = 320) -> npt.NDArray[np.uint8]:
    """Draw a study: its views side by side, and titled texts next to them. Returns (height, width, 3) in 0..255."""
    font, bold = ImageFont.load_default(20), ImageFont.load_default(21)  # to be read where TensorBoard shrinks it
    views = [image.convert("RGB").resize((round(image.width * height / image.height), height)) for image in images]
    lines = [
        (line, font) if n else (title, bold)
        for title, text in texts.items()
        for n, line in enumerate([title, *textwrap.wrap(text or "(nothing)", 44), ""])
    ]
    width = sum(view.width + 8 for view in views)
    canvas = Image.new("RGB", (width + 460, max(height, 26 * len(lines) + 12)), "white")
    x = 0
    for view in views:
        canvas.paste(view, (x, 0))
        x += view.width + 8
    draw = ImageDraw.Draw(canvas)
    for n, (line, face) in enumerate(lines):
        draw.text((width + 6, 6 + 26 * n), line, fill="black" if face is font else "#1a4f8a", font=face)
    return np.asarray(canvas)


def side_by_side(groups: dict[str, Sequence[Image.Image]], height: int = 512) -> Image.Image:
    """Draw groups of pictures side by side under their titles, all of one height in pixels.

    Pixels of enlarged pictures stay visible as squares: they show how coarsely the model sees.
    """
    font, gap, top = ImageFont.load_default(16), 8, 26

    def drawn(image: Image.Image) -> Image.Image:
        size = max(1, round(image.width * height / image.height)), height
        return image.convert("RGB").resize(size, Image.Resampling.NEAREST if image.height < height else None)

    rows = {title: [drawn(image) for image in images] for title, images in groups.items()}
    widths = {
        title: max(sum(image.width + gap for image in images), math.ceil(font.getlength(title)) + gap)
        for title, images in rows.items()
    }
    canvas = Image.new("RGB", (sum(widths.values()) + 4 * gap * (len(rows) - 1), height + top), "white")
    draw, left = ImageDraw.Draw(canvas), 0
    for title, images in rows.items():
        draw.text((left, 3), title, fill="#1a4f8a", font=font)
        for n, image in enumerate(images):
            canvas.paste(image, (left + sum(before.width + gap for before in images[:n]), top))
        left += widths[title] + 4 * gap
    return canvas
