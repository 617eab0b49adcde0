"""Finds the files of an archive: one file for each official split, and the folders of the images."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from radhpc.core.errors import UserError
from radhpc.core.sample import SPLITS, Split
from shards.datasets.reader import DatasetWarning
from shards.tabular import table


def split_files(
    raw: Path | None, names: Mapping[Split, Sequence[str]], dataset: str, inner: Sequence[str] = ()
) -> tuple[Path, dict[Split, Path]]:
    """Return the archive's folder, and the file of each split: the first of its `names`, plain or gzipped.

    The folder is `raw`, or one of `inner` in it, as zip files unpack. Warns of a split without a file. Raises
    UserError where no split has one.
    """
    if raw is None:
        raise UserError(f"--raw is missing: the folder of {dataset}")
    if raw.is_file() and raw.suffix != ".parquet":
        raise UserError(f"--raw {raw}: a file; expected the folder of {dataset}")
    for folder in (raw, *(raw / name for name in inner)):
        files = {split: path for split in SPLITS if (path := table.find_one(folder, names.get(split, ())))}
        if files:
            break
    else:
        refuse_parquet(raw, dataset, [name for split in SPLITS for name in names.get(split, ())])
        raise UserError(
            f"--raw {raw}: no {dataset} there; looked for {', '.join(n for own in names.values() for n in own)}"
        )
    for split in SPLITS:
        if split in names and split not in files:
            warnings.warn(
                f"{folder.name}: split '{split}' stays empty, for want of {' or '.join(names[split])}",
                DatasetWarning,
                stacklevel=2,
            )
    return folder, files


def image_folder(folder: Path, names: Sequence[str], content: str) -> Path:
    """Return the first of `names` that is a folder. Raises UserError that lists the names."""
    for name in names:
        if (folder / name).is_dir():
            return folder / name
    packed = next((f"{name}.zip" for name in names if (folder / f"{name}.zip").is_file()), None)
    hint = f"; unpack {packed}" if packed else ""
    raise UserError(f"{folder}: no folder of {content}; looked for {', '.join(names)}{hint}")


def refuse_parquet(raw: Path, dataset: str, names: Iterable[str]) -> None:
    """Raise UserError where there are Parquet files instead of the archive, as in copies on model hubs."""
    copies = [raw] if raw.suffix == ".parquet" else [*raw.glob("*.parquet"), *raw.glob("data/*.parquet")]
    if copies:
        raise UserError(
            f"{min(copies)}: Parquet copies of {dataset} cannot be read; expected the original release, "
            f"with {', '.join(names)}"
        )
