"""Writes the card of a dataset, `card.md`: what was built, from what and how, and what it contains.

    text = render_card(manifest, summary, [{"study": "0f3c...", "reason": "missing image file"}], ["no patient column"])

It also lists what was left out and what was changed. Studies are named by their salted hashes. The same input gives
the same bytes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from radhpc.core.manifest import Manifest
from radhpc.core.sample import CHEXPERT, SPLITS
from shards.summary import LONGEST, SIDE, TEXTS, SplitSummary, Summary, percentile

CARD = "card.md"
SHOWN = 30  # labels of a vocabulary, views and languages
HASHES = 6  # in a line


def render_card(
    manifest: Manifest, summary: Summary, skipped: Sequence[Mapping[str, str]], notes: Sequence[str]
) -> str:
    """Render the card as Markdown.

    `skipped` holds, for each study left out, its salted hash as "study" (empty where it has none) and a general
    "reason"; `notes` holds the messages of the reader and the build. Neither may hold a raw name or a path.
    """
    parts = [
        f"# {_plain(manifest.dataset)}",
        "**For research only. Not for clinical use:** nothing here was checked for the care of a patient.",
        _opening(manifest, summary),
        *_section("Splits", _splits(manifest, summary)),
        *_section("How it was built", _settings(manifest)),
        *_section("Texts", _texts(summary)),
        *_section("Labels", *_labels(summary)),
        *_section("Images", _images(summary)),
        *_section("What was scrubbed", _scrubbed(summary)),
        *_section("What was left out", *_left_out(manifest, skipped)),
        *_section("Notes", "\n".join(f"- {_plain(note)}" for note in notes)),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(manifest: Manifest, summary: Summary) -> str:
    images = summary.total.images
    return (
        f"{_count(manifest.samples, 'sample')} of {_count(sum(manifest.patients.values()), 'patient')} with "
        f"{_count(images, 'image')} in {_count(len(manifest.shards), 'shard')}, "
        f"{_size(sum(shard.size for shard in manifest.shards))}. "
        "Each sample is a study: its images, its report or question, and its labels. Patients and studies are named by "
        "salted hashes, and no patient is in two splits."
    )


def _splits(manifest: Manifest, summary: Summary) -> str:
    rows = [
        (split, manifest.splits.get(split, 0), manifest.patients.get(split, 0), summary.splits[split].images)
        for split in SPLITS
    ]
    total = ("**all**", *(sum(row[n] for row in rows) for n in (1, 2, 3)))  # type: ignore[misc]
    return _table(("split", "samples", "patients", "images"), [*rows, total])


def _settings(manifest: Manifest) -> str:
    """Tabulate the build's recipe, without keys that only programs need, and without paths."""
    recipe = manifest.build
    versions = recipe.get("versions", {})
    known = {
        "reader": recipe.get("reader"),
        "options": ", ".join(f"{key}={_no_path(value)}" for key, value in sorted(recipe.get("options", {}).items())),
        "longest side of an image": f"{recipe['longest_side']} pixels" if "longest_side" in recipe else None,
        "image format": recipe.get("image_format"),
        "JPEG quality": recipe.get("quality") if recipe.get("image_format", "jpeg") == "jpeg" else None,
        "black and white at percentiles": _joined(recipe.get("percentiles", ())),
        "share of train, validate, test": _joined(recipe.get("ratios", ())),
        "near-duplicates across splits": {"drop": "left out", "report": "kept"}.get(recipe.get("duplicates", "")),
        "kept apart from": ", ".join(hash[:16] for hash in recipe.get("apart_from", ())),
        "samples in a shard, at most": recipe.get("shard_samples"),
        "texts in languages without rules": ", ".join(recipe.get("unscrubbed", ())),
        "checksums of the archive": _checksums(manifest),
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
        "build": manifest.build_hash[:16],
    }
    rows = [(name, _plain(value)) for name, value in known.items() if value not in (None, "")]
    return _table(("", "value"), rows, numbers=False)


def _checksums(manifest: Manifest) -> str | None:
    if (checks := manifest.checksums) is None:
        return None
    return f"{checks.file}: {checks.checked:,} image files have theirs, {checks.unchecked:,} are not in it"


def _texts(summary: Summary) -> str:
    totals = summary.total
    rows = []
    for name in TEXTS:
        if counts := totals.words.get(name):
            low, middle, high, most = (percentile(counts, share) for share in (0.05, 0.5, 0.95, 1))
            longest = f"{LONGEST:,} or more" if most == LONGEST else most
            rows.append((name, sum(counts.values()), low, middle, high, longest))
    table = _table(("text", "samples", "5th percentile", "median", "95th percentile", "longest"), rows) if rows else ""
    languages = f"Languages: {_listing(totals.languages, totals.samples, 'sample')}."
    without = f"{_count(totals.without_report, 'sample')} without a report." if totals.without_report else ""
    return "\n\n".join(filter(None, ("Lengths in words:" if rows else "", table, f"{languages} {without}".strip())))


def _labels(summary: Summary) -> list[str]:
    """Tabulate each vocabulary: CheXpert's first and in its own order, the others' labels by frequency."""
    totals = summary.total
    blocks = []
    for vocabulary in sorted(totals.labels, key=lambda name: (name != "chexpert", name)):
        names = totals.labels[vocabulary]
        order = (
            [name for name in CHEXPERT if name in names]
            if vocabulary == "chexpert"
            else sorted(names, key=lambda name: (-names[name]["1"], name))
        )
        shown = order[: max(SHOWN, len(CHEXPERT))]
        samples = totals.samples
        rows = []
        for name in shown:
            present, absent, unsure = (names[name][value] for value in ("1", "0", "-1"))
            of_split = [_present(summary.splits[split], vocabulary, name) for split in SPLITS]
            unsaid = samples - present - absent - unsure
            rows.append((_plain(name), present, _share(present, samples), absent, unsure, unsaid, *of_split))
        header = ("label", "present", "share", "absent", "uncertain", "unsaid", *(f"present in {s}" for s in SPLITS))
        kept = [n for n in range(len(header)) if n in (0, 1, 2) or any(row[n] for row in rows)]
        table = _table([header[n] for n in kept], [[row[n] for n in kept] for row in rows])
        more = f"\n\nand {len(order) - len(shown):,} more names." if len(order) > len(shown) else ""
        blocks.append(f"**{_plain(vocabulary)}**, {_count(len(order), 'name')}\n\n{table}{more}")
    return blocks


def _present(part: SplitSummary, vocabulary: str, name: str) -> int:
    return part.labels.get(vocabulary, {}).get(name, {}).get("1", 0)


def _images(summary: Summary) -> str:
    totals = summary.total
    views = sorted(totals.views, key=lambda view: (-totals.views[view], view))
    rows: list[Sequence[Any]] = [
        (_plain(view), totals.views[view], *(summary.splits[split].views.get(view, 0) for split in SPLITS))
        for view in views[:SHOWN]
    ]
    if len(views) > SHOWN:
        rest = views[SHOWN:]
        counts = [sum(part.views.get(view, 0) for view in rest) for part in (totals, *summary.splits.values())]
        rows.append((f"{len(rest):,} others", *counts))
    sides = {f"{side - SIDE + 1:,} to {side:,} pixels": n for side, n in sorted(totals.sides.items())}
    bits = {f"{bits} bits": n for bits, n in sorted(totals.bits.items())}
    studies = {_count(images, "image"): n for images, n in sorted(totals.images_per_study.items())}
    return "\n\n".join(
        (
            _table(("view", "images", *SPLITS), rows),
            f"- longest side: {_listing(sides, totals.images, 'image', ranked=False)}\n"
            f"- before the build: {_listing(bits, totals.images, 'image', ranked=False)}\n"
            f"- in a sample: {_listing(studies, totals.samples, 'sample', ranked=False)}",
        )
    )


def _scrubbed(summary: Summary) -> str:
    about = (
        "Rules replace by `___` what identifies a person in a text: dates with a day or a month, times of day, "
        "ages above 89, numbers of records, devices and telephones, hospitals, addresses, and names beside a title "
        "or a header. "
        "A name that stands alone is not found by a rule, and what is written into the pixels stays: "
        "look for it on the contact sheets."
    )
    if not summary.scrubbed:
        return f"{about}\n\nNothing was found."
    order = sorted(summary.scrubbed, key=lambda rule: (-summary.scrubbed[rule], rule))
    table = _table(("rule", "replaced"), [(_plain(rule), summary.scrubbed[rule]) for rule in order])
    return f"{about}\n\n{table}\n\nIn {_count(summary.scrubbed_samples, 'sample')}."


def _left_out(manifest: Manifest, skipped: Sequence[Mapping[str, str]]) -> list[str]:
    """List the reasons, the most frequent first, then the hashes, each once."""
    reasons = Counter(skip["reason"] for skip in skipped) or Counter(manifest.skipped)
    if not reasons:
        return ["Nothing."]
    order = sorted(reasons, key=lambda reason: (-reasons[reason], reason))
    blocks = [_table(("reason", "studies"), [(_plain(reason), reasons[reason]) for reason in order])]
    for reason in order:
        hashes = sorted({skip["study"] for skip in skipped if skip["reason"] == reason and skip.get("study")})
        lines = [" ".join(hashes[n : n + HASHES]) for n in range(0, len(hashes), HASHES)]
        if lines:
            blocks.append(f"{_plain(reason)}:\n\n```\n" + "\n".join(lines) + "\n```")
    return blocks


def _section(title: str, *blocks: str) -> list[str]:
    """Return the heading and the blocks below it, or nothing where these are empty."""
    filled = [block for block in blocks if block]
    return [f"## {title}", *filled] if filled else []


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]], numbers: bool = True) -> str:
    """Return a Markdown table, padded to read well as plain text; all columns but the first are right-aligned."""
    body = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    widths = [max(3, *(len(row[n]) for row in [list(header), *body])) for n in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        return (
            "| "
            + " | ".join(
                cell.rjust(width) if n and numbers else cell.ljust(width)
                for n, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            + " |"
        )

    rule = (
        "|"
        + "|".join("-" * (width + 1) + ":" if n and numbers else "-" * (width + 2) for n, width in enumerate(widths))
        + "|"
    )
    return "\n".join((line(header), rule, *map(line, body)))


def _listing(counts: Mapping[str, int], total: int, noun: str, ranked: bool = True) -> str:
    """Return "en: 90 samples (90.0%), es: 10 (10.0%)", the most frequent first, or in the order of `counts`."""
    names = sorted(counts, key=lambda name: (-counts[name], name)) if ranked else list(counts)
    texts = [
        f"{_plain(name)}: {f'{counts[name]:,}' if n else _count(counts[name], noun)} ({_share(counts[name], total)})"
        for n, name in enumerate(names[:SHOWN])
    ]
    more = f", and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(texts) + more


def _count(number: int, noun: str) -> str:
    plural = "studies" if noun == "study" else f"{noun}s"
    return f"{number:,} {noun if number == 1 else plural}"


def _size(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _share(number: int, total: int) -> str:
    return f"{100 * number / total:.1f}%" if total else "0.0%"


def _joined(values: Iterable[Any]) -> str:
    return ", ".join(map(str, values))


def _no_path(value: Any) -> str:
    """Return an option's value, but no path: it would tell where on a machine patients' data lie."""
    text = str(value)
    return "(a path)" if "/" in text or "\\" in text.replace("\\t", "") else text


_SHOWN_AS = (
    ("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("*", "\\*"), ("[", "\\["),
)  # fmt: skip


def _plain(value: Any) -> str:
    """Escape a text from the data for Markdown, on one line and within its cell."""
    text = " ".join(str(value).split())
    for mark, shown in _SHOWN_AS:
        text = text.replace(mark, shown)
    return text
