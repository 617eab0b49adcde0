"""The source of a build: a reader with its options, the listing of its studies, and the identity of the build.

source = open_source("padchest", {"grounded": "en"})
messages = source.list_studies(Path("/data/padchest"), work / "listing", settings)      # what the user should know
"""

import hashlib
import hmac
import importlib.metadata
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radhpc.core import formats
from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.storage.store import Store
from shards import raw_files, salt
from shards.datasets import reader as readers, registry
from shards.images.windowing import PERCENTILES
from shards.listing import Listing, SkippedStudy, write_listing
from shards.people import Pseudonyms, namespace
from shards.settings import BuildSettings
from shards.text import deidentification, names
from shards.text.languages import LANGUAGES

VERSIONED = ("numpy", "pillow", "pydicom", "imagecodecs")  # their versions may change the bytes
SHOWN = 3  # names in a message


@dataclass(frozen=True)
class DatasetSource:
    """A reader with its options, and the salt of its identifiers."""

    dataset: str  # the reader's name
    reader: readers.DatasetReader
    options: readers.ReaderOptions
    salt: bytes

    @property
    def name(self) -> str:
        """The name of the dataset in keys and tables."""
        return self.options.name or self.dataset

    @property
    def pseudonyms(self) -> Pseudonyms:
        """The hashes of its identifiers."""
        chosen = self.options.people
        return Pseudonyms(self.name, namespace(self.dataset, self.name, chosen), chosen is not None, self.salt)

    def duplicates(self, settings: BuildSettings) -> str:
        """Return the policy for studies with a near-duplicate in another split: "drop" or "report"."""
        return "report" if self.options.shares_images else settings.duplicates

    def archive(self, raw: Path | None) -> raw_files.Archive:
        """Return the archive that the user names: --raw, and the paths among the options."""
        named = [getattr(self.options, name) for name in type(self.options).model_fields]
        places = [place.resolve() for place in (raw, *named) if isinstance(place, Path)]
        roots = tuple(place if place.is_dir() else place.parent for place in places)
        return raw_files.Archive(roots, self.options.outside == "allow")

    def list_studies(self, raw: Path | None, path: Path, settings: BuildSettings) -> list[str]:
        """Read the metadata of the archive into a listing. Returns messages for the user. Raises UserError."""
        base = raw.resolve() if raw else None
        folder = base.parent if base and base.is_file() else base
        listed = names.read(settings.remove_names) if settings.remove_names else []
        with warnings.catch_warnings(record=True) as caught, raw_files.inside(self.archive(raw)):
            warnings.simplefilter("always", readers.DatasetWarning)
            studies = self.reader.read(base, self.options)
            write_listing(path, studies, self.pseudonyms, settings.ratios, settings.shard_samples, folder, listed)
        own = (warning for warning in caught if issubclass(warning.category, readers.DatasetWarning))
        messages = list(dict.fromkeys(str(warning.message) for warning in own))
        with Listing(path) as listing:
            if not listing.studies:
                raise UserError(f"{self.name}: no study found")
            check_budget(list(listing.skipped()), listing.studies, settings)
            messages += [*listing.warnings, *_check_languages(listing.without_rules, settings.unscrubbed)]
            messages += [
                f"split '{split}' would have been empty: it took the patient whose hash lies nearest; "
                "the splits of so small a set may change when it grows"
                for split in listing.filled
            ]
        return messages

    def recipe(self, settings: BuildSettings, listing: Listing) -> dict[str, Any]:
        """Return all that decides the bytes: equal recipes give equal shards.

        Paths decide nothing, as the listing's digest covers the content; hence options that are paths are left out.
        """
        special: dict[str, Any] = {"unscrubbed": sorted(listing.without_rules)} if listing.without_rules else {}
        if listing.names:
            listed = "\n".join(listing.names).encode()
            special["names"] = hmac.new(self.salt, listed, hashlib.sha256).hexdigest()[:16]
        options = self.options.model_dump(mode="json", exclude_none=True)
        return {
            "reader": self.dataset,
            "options": {
                name: value for name, value in options.items() if not isinstance(getattr(self.options, name), Path)
            },
            "longest_side": settings.longest_side,
            "quality": settings.quality,
            "image_format": settings.image_format,
            "duplicates": self.duplicates(settings),
            "apart_from": sorted(Manifest.load(Store(url)).hash for url in settings.apart_from),
            "percentiles": list(PERCENTILES),
            "ratios": list(settings.ratios),
            "shard_samples": settings.shard_samples,
            "source": listing.digest,
            **({"files": listing.files} if listing.files else {}),
            "rules": deidentification.rules_digest(),
            **special,
            "salt": hashlib.sha256(b"radhpc fingerprint" + self.salt).hexdigest()[:16],
            "versions": {package: importlib.metadata.version(package) for package in VERSIONED},
            "format": formats.SHARDS,
        }


def open_source(dataset: str, options: Mapping[str, str]) -> DatasetSource:
    """Find the reader and parse its options. Raises UserError."""
    reader = registry.reader(dataset)
    return DatasetSource(
        dataset, reader, readers.parse_options(dataset, reader.OPTIONS, options), salt.load(reader.SYNTHETIC)
    )


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """Return the identity of a build: a hash of its recipe."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()


def _check_languages(studies: Mapping[str, int], unscrubbed: bool) -> list[str]:
    """Return the message on texts in languages without rules. Raises UserError where nobody answers for them.

    `studies` are counts by language.
    """
    if not studies:
        return []
    listed = ", ".join(f"{count} in {language}" for language, count in sorted(studies.items()))
    if not unscrubbed:
        raise UserError(
            f"language: {listed}: the privacy gate has rules for {', '.join(LANGUAGES)} alone; "
            "--unscrubbed builds these studies all the same, and whoever gives it answers for the identifiers in them"
        )
    return [f"--unscrubbed: studies whose texts no rule of their language has looked at: {listed}"]


def check_budget(skipped: Sequence[SkippedStudy], studies: int, settings: BuildSettings) -> None:
    """Raise UserError where too many studies were left out, or all of them."""
    budget = settings.skip_budget(studies)
    if len(skipped) == studies:
        budget = 0
    else:
        skipped = [skip for skip in skipped if skip.fault]
    if len(skipped) <= budget:
        return
    shown = [skip.for_user() for skip in skipped[:SHOWN]]
    first = "; ".join(f"{skip['name']}: {skip['reason']}" for skip in shown)
    more = f"; and {len(skipped) - SHOWN} more" if len(skipped) > SHOWN else ""
    raise UserError(
        f"{len(skipped)} of {studies} studies cannot be used, and max_skipped allows {budget}: {first}{more}"
    )
