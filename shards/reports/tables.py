"""Formats the results of the data verbs for people: results in, Rich's lines and tables out. Nothing is printed here.

for line in build_lines(build("phantom", None, "runs/phantom")):
    console.print(line)
"""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from radhpc.core.untrusted import printable
from shards.balance import BalanceResult
from shards.datasets import registry
from shards.settings import BuildResult
from shards.verify import VerificationReport

SHOWN = 20  # studies left out that are listed


def options_table(name: str) -> RenderableType:
    """Describe a reader: what it reads, and its options."""
    reader = registry.reader(name)
    table = Table("option", "default", "what it is", title=f"Options of {name}, as KEY=VALUE")
    for key, field in reader.OPTIONS.model_fields.items():
        table.add_row(key, "" if field.default is None else str(field.default), field.description or "")
    missing = f"--out is missing: radhpc build {name} --raw DIR --out URL [KEY=VALUE]..."
    return Group(Text(f"{(reader.__doc__ or '').strip()}\n"), table, Text(missing))


def build_lines(result: BuildResult) -> Iterator[Text]:
    """Yield the studies left out, the warnings, the scrubbed words, and the counts."""
    for skipped in result.skipped[:SHOWN]:
        yield _line(f"skipped {skipped['name']}: {skipped['reason']}")
    if len(result.skipped) > SHOWN:
        yield _line(f"... and {len(result.skipped) - SHOWN} more: {result.skipped_file}")
    for warning in result.warnings:
        yield Text.assemble(("warning", "yellow"), " ", _line(warning))
    if result.scrubbed:
        counts = ", ".join(f"{count} {rule}" for rule, count in sorted(result.scrubbed.items()))
        yield _line(f"scrubbed from texts: {counts}")
    outcome = "were built already" if result.reused else f"built in {result.seconds:.0f} s"
    yield _line(
        f"{result.samples} samples in {result.shards} shards {outcome}, {len(result.skipped)} skipped: {result.url}"
    )


def balance_line(result: BalanceResult) -> str:
    """Summarize a balanced subset."""
    return (
        f"balanced: {result.kept} of {result.kept + result.dropped} training samples from {result.clusters} clusters "
        f"and {result.noise} that are like no other: {result.url}"
    )


def verification_lines(report: VerificationReport) -> Iterator[Text]:
    """Yield every fault with its place, and the counts."""
    for fault in report.faults:
        where = "" if fault.offset is None else f" at {fault.offset}"
        yield _line(f"{fault.shard} {fault.member or ''}{where}: {fault.fault}")
    for warning in report.warnings:
        yield Text.assemble(("warning", "yellow"), " ", _line(warning))
    yield _line(f"{report.samples} samples in {report.shards} shards, {len(report.faults)} fault(s)")


def _line(words: str) -> Text:
    """Return a line without markup: names of files and words of others are in it, and nothing a terminal may obey."""
    return Text(printable(words, len(words)))
