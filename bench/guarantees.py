"""What is promised of the samples, tried on our stream and on other projects' readers: the table of docs/stream.md.

    python -m bench.guarantees [--json] [--quick] [--readers radhpc,litdata] [--data DIR]

Prints the table as Markdown. Each cell says what was seen in this run: how many samples came and what was said, not
what a page promises. --quick tries ours and webdataset alone, which need no environment of their own, and of the latter
fewer runs.

Damage: one shard of 1,000 samples is cut or has one bit changed, after it was written and indexed. Formats of their own
are damaged at the places that correspond: between two samples, in the sizes before a sample, in its bytes.
Runs: 960 samples in 24 shards, global batches of 24, stopped after 15 of the 40 steps. A state is saved and given to
the next processes as the reader's documentation says. Missing and repeated are counted against the same run without a
stop; where that is an epoch, it is each sample once.
"""

import http.server
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bench import corpus, peers, report
from radhpc.core.errors import UserError, first_line
from radhpc.core.recipe import Stage, StreamSettings
from radhpc.data.source import RawSample, Source
from radhpc.data.stream import Stream, StreamSpec

OURS = "radhpc"
LIMIT = 400  # seconds of one experiment
SIDES = 64, 96  # pixels: small images, as nothing is timed here
DAMAGED, STEPS, BATCH = 1000, 40, 24
STOP = 15  # steps before the stop
HALF, EARLY = DAMAGED // 2, 100  # samples at which a shard is cut, and at which it is changed
WEIGHTS = (0.7, 0.3)
SEED = 7


class Life(NamedTuple):
    """How many ranks, workers of each (decoding threads of ours), and steps or the rest of the run."""

    world: int
    workers: int
    steps: int | None


# The rest of a run with another number of ranks, another number of workers, and so on. 5 ranks do not divide a batch of
# 24: ours deals 5, 5, 5, 5 and 4, peers have no such steps and take 25.
RUNS: dict[str, tuple[tuple[Life, ...], bool]] = {
    "a whole epoch on 4 ranks": ((Life(4, 1, None),), False),
    "stopped, resumed on 4 ranks": ((Life(4, 1, STOP), Life(4, 1, None)), False),
    "4 ranks, then 3": ((Life(4, 1, STOP), Life(3, 1, None)), False),
    "4 ranks, then 8": ((Life(4, 1, STOP), Life(8, 1, None)), False),
    "4 ranks, then 5 (24 is no multiple of 5)": ((Life(4, 1, STOP), Life(5, 1, None)), False),
    "1 worker per rank, then 2": ((Life(4, 1, STOP), Life(4, 2, None)), False),
    "a mixture 0.7 : 0.3, resumed on 4 ranks": ((Life(4, 1, STOP), Life(4, 1, STOP)), True),
    "a mixture 0.7 : 0.3, 4 ranks, then 8": ((Life(4, 1, STOP), Life(8, 1, STOP)), True),
}
QUICK = ("4 ranks, then 3",)  # of a peer


@dataclass(frozen=True)
class Data:
    """What the experiments read."""

    damaged: Path  # one shard of DAMAGED samples
    epoch: Path  # STEPS * BATCH samples in shards of 40
    second: Path  # half as many, for mixtures
    twins: tuple[Path, Path]  # different samples in shards of the same name


def make(place: Path) -> Data:
    steps = STEPS * BATCH
    return Data(
        corpus.make(place / "damaged", DAMAGED, DAMAGED, SIDES, seed=1),
        corpus.make(place / "epoch", steps, 40, SIDES, seed=2),
        corpus.make(place / "second", steps // 2, 40, SIDES, seed=3, name="second"),
        (
            corpus.make(place / "twins" / "first", 60, 60, SIDES, seed=4, name="first"),
            corpus.make(place / "twins" / "second", 60, 60, SIDES, seed=5, name="second"),
        ),
    )


# ---- damage ----------------------------------------------------------------------------------------------------------

DAMAGES = {
    "shard cut between two samples": "between",
    "shard cut inside a header": "header",
    "shard cut inside an image": "image",
    "one bit of a header changed": "header bit",
    "one bit of an image changed": "image bit",
}


class Spots(NamedTuple):
    """Offsets in a file: where sample HALF begins, its head and its image; head and image of sample EARLY."""

    between: int
    header: int
    image: int
    header_bit: int
    image_bit: int


def damage(folder: Path, kind: str) -> None:
    """Do to the one data file of a folder what `kind` says. It stays as old as it was, as on a failing disk."""
    (path,) = (path for path in folder.rglob("*") if path.suffix in (".tar", ".mds", ".bin"))
    before = path.stat()
    spots = _tar_spots(folder, path) if path.suffix == ".tar" else _table_spots(path)
    at = getattr(spots, kind.replace(" ", "_"))
    if kind.endswith("bit"):
        with path.open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
    else:
        os.truncate(path, at)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _tar_spots(folder: Path, path: Path) -> Spots:
    import tarfile

    with tarfile.open(path) as tar:
        members = [(member.offset, member.offset_data, member.size) for member in tar]
    (head, _, _), (_, image, length) = members[2 * HALF : 2 * HALF + 2]
    (early, _, _), (_, changed, size) = members[2 * EARLY : 2 * EARLY + 2]
    return Spots(head, head + 100, image + length // 2, early + 124 + 9, changed + size // 2)


def _table_spots(path: Path) -> Spots:
    """MDS and litdata begin with the number of samples and the offsets of all of them, 32 bits each."""
    data = path.read_bytes()
    (count,) = struct.unpack_from("<I", data)
    offsets = struct.unpack_from(f"<{count + 1}I", data, 4)
    assert count == DAMAGED
    half, end, early, after = offsets[HALF], offsets[HALF + 1], offsets[EARLY], offsets[EARLY + 1]
    return Spots(half, half + 2, (half + end) // 2, early + 1, (early + after) // 2)


def truth(tars: Path) -> dict[str, int]:
    """The crc32 of every sample's JPEG, by its study."""
    source = Source((str(tars),), "train")
    return {_study(raw): zlib.crc32(dict(raw.members)["0.jpg"]) for raw in source.read_raw(_all(source))}


def _all(source: Source) -> Any:
    import numpy as np

    return np.arange(len(source))


def _study(raw: RawSample) -> str:
    return str(json.loads(bytes(dict(raw.members)["json"]))["study"])


# ---- ours ------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A sample of ours as it was read, with what the stream asks of a row."""

    key: str
    study: str
    crc: int
    supervised: int = 1
    length: int = 1


class Keys:
    """What training does with a sample, less the decoding."""

    def read(self, raw: RawSample) -> Row:
        return Row(raw.key, _study(raw), zlib.crc32(dict(raw.members)["0.jpg"]))

    def empty(self) -> Row:
        return Row("", "", 0, 0, 0)

    def batch(self, rows: Any) -> list[Row]:
        return [row for row in rows if row.key]


def _ours(
    source: Source, life: Life, cursor: int, steps: int | None, options: Mapping[str, Any], rank: int
) -> Iterator[tuple[list[Row], list[tuple[str, str]]]]:
    """The steps of one rank: rows, and what was quarantined."""
    length = {"epochs": 1} if source.weights is None else {"steps": 2 * STOP}
    optimizer = {"learning_rate": 1.0}
    stage = Stage.model_validate({"name": "bench", "batch": BATCH, "train": (".*",), "optimizer": optimizer} | length)
    recipe = StreamSettings.model_validate({"threads": life.workers, **options})
    stream = Stream(source, Keys(), StreamSpec(stage, 0, recipe, SEED, rank, life.world, cursor))
    try:
        for number, step in enumerate(stream):
            if number == steps:
                break
            yield [row for batch in step.micro_batches for row in batch], step.bad
    finally:
        stream.close()


def ours_listed(folder: Path) -> dict[str, Any]:
    """What the job does: sizes are compared before the first step, each sample is checked when it is read."""
    found: list[list[Any]] = []
    said: list[str] = []
    source = Source((str(folder),), "train")
    try:
        source.check_sizes()
    except UserError as error:
        return {"samples": [], "refused": str(error)}
    for rows, bad in _ours(source, Life(1, 2, None), 0, None, {}, 0):
        found += [[row.study, row.crc] for row in rows]
        said += [f"{key}: {fault}" for key, fault in bad]
    return {"samples": found, "raised": "", "said": said}


def ours_lives(folders: list[Path], weights: tuple[float, ...], lives: tuple[Life, ...]) -> dict[str, Any]:
    read = []
    cursor = 0
    for life in lives:
        ranks = []
        for rank in range(life.world):
            shards = dict(zip(map(str, folders), weights, strict=True)) if len(folders) > 1 else (str(folders[0]),)
            steps = _ours(Source(shards, "train"), life, cursor, life.steps, {}, rank)
            ranks.append([[row.study for row in rows] for rows, _ in steps])
        read.append(ranks)
        cursor += BATCH * (life.steps or 0)
    return {"read": read, "raised": ""}


def ours_cached(urls: list[list[str]], cache: Path) -> list[dict[str, Any]]:
    datasets = []
    for (url,) in urls:
        options = {"cache": {"folder": str(cache), "gigabytes": 0.1}}
        source = Source((url,), "train")
        rows = [row for some, _ in _ours(source, Life(1, 2, None), 0, None, options, 0) for row in some]
        datasets.append({"samples": [[row.study, row.crc] for row in rows], "raised": ""})
    return datasets


# ---- the experiments -------------------------------------------------------------------------------------------------

Cells = dict[str, str]

NOTES = """
Each cell is what one run did; default settings, the newest release of each in bench/requirements-peers.txt. Damage: one
shard of 1,000 samples. Runs: 960 samples, 40 steps of 24, stopped after 15. radhpc compares the sizes of all shards
with its manifest before the first step, and quarantines a sample by name. webdataset has no state to save. grain has no
source for tars: it reads through a random-access source in plain Python, which lists the members with tarfile. mds
and litdata are damaged in their own files; mds writes hashes, but does not check them unless told. mds takes the folder
named `local` for that dataset's own. With 5 ranks the others take 25 samples a step, radhpc still 24."""


class Trial:
    """All experiments with one reader; `ask` has a peer do something."""

    def __init__(self, name: str, data: Data, place: Path, interpreter: Path | None, runs: tuple[str, ...]) -> None:
        self.name, self.data, self.place = name, data, place / name
        self._runs = runs
        self._interpreter = interpreter
        self.place.mkdir(parents=True, exist_ok=True)

    def run(self) -> Cells:
        cells = {"reads": self._format()}
        cells |= self._damages()
        for name, (lives, mixed) in RUNS.items():
            cells[name] = self._run(lives, mixed) if name in self._runs else "not tried"
        return cells | {"two datasets with shards of the same name, one cache folder": self._twins()}

    def _ask(self, do: str, **request: Any) -> peers.Called:
        return peers.call(self.name, {"do": do} | request, LIMIT, self._interpreter)

    def converted(self, tars: Path, per_shard: int) -> Path:
        """The data in the format that this reader reads."""
        if self.name == OURS:
            return tars
        where = self.place / tars.name
        if tars in self.data.twins:
            where = self.place / "twins" / tars.name
        if not where.exists():
            called = self._ask("convert", tars=str(tars), where=str(where), per_shard=per_shard)
            if called.answer is None:
                raise UserError(f"{self.name}: {called.said[-2000:].strip()}")
        return where

    def _format(self) -> str:
        if self.name == OURS:
            return "plain tars, a manifest beside them"
        tars = self.data.damaged
        where = self.converted(tars, DAMAGED)
        answer = self._ask("describe").answer
        assert answer is not None
        same = [(path.name, (where / path.name).read_bytes() == path.read_bytes())
                for path in tars.glob("*.tar") if (where / path.name).exists()]  # fmt: skip
        held = "" if same and all(equal for _, equal in same) else ": a converted copy"
        return f"{answer['format']}{held}"

    def _damages(self) -> Cells:
        whole = self.converted(self.data.damaged, DAMAGED)
        wanted = truth(self.data.damaged)
        usual = self._listed(whole)
        assert sorted(usual["samples"]) == sorted(map(list, wanted.items())), f"{self.name}: the undamaged shard"
        cells = {}
        for title, kind in DAMAGES.items():
            broken = self.place / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(whole, broken)
            damage(broken, kind)
            cells[title] = _damage_cell(self._listed(broken), wanted, usual["said"])
        shutil.rmtree(broken)
        return cells

    def _listed(self, where: Path) -> dict[str, Any]:
        if self.name == OURS:
            return ours_listed(where)
        called = self._ask("list", where=str(where))
        if called.answer is None:
            raised = f"hung for {LIMIT} s" if called.hung else "the process died"
            return {"samples": [], "raised": raised, "said": called.said.splitlines()}
        return called.answer | {"said": called.said.splitlines()}

    def _run(self, lives: tuple[Life, ...], mixed: bool) -> str:
        folders = [self.data.epoch, self.data.second] if mixed else [self.data.epoch]
        where = [self.converted(folder, 40) for folder in folders]
        weights = WEIGHTS if mixed else (1.0,)
        wanted = Counter(truth(self.data.epoch).keys())
        if mixed:  # the same number of steps without a stop
            whole, raised = self._lived(where, weights, (lives[0]._replace(steps=2 * STOP),))
            if raised:
                return f"no such feature: {_short(raised)}"
            wanted = Counter(whole)
        came, raised = self._lived(where, weights, lives)
        if raised:
            return f"refuses: {_short(raised)}"
        missing, repeated = (wanted - Counter(came)).total(), (Counter(came) - wanted).total()
        cell = "exact" if missing == repeated == 0 else f"{missing} missing, {repeated} repeated"
        if len(lives) > 1 and self.name != OURS and not self._resume():
            cell += ": no state, it starts anew"
        return cell

    def _resume(self) -> str:
        answer = self._ask("describe").answer
        assert answer is not None
        return str(answer["resume"])

    def _lived(self, where: list[Path], weights: tuple[float, ...], lives: tuple[Life, ...]) -> tuple[list[str], str]:
        if self.name == OURS:
            answer = ours_lives(where, weights, lives)
        else:
            told = [
                {"world": life.world, "workers": life.workers, "steps": life.steps, "batch": -(-BATCH // life.world)}
                for life in lives
            ]
            called = self._ask("lives", where=[str(one) for one in where], weights=weights, lives=told)
            if called.answer is None:
                return [], f"hung for {LIMIT} s" if called.hung else "the process died"
            answer = called.answer
        came = [name for life in answer["read"] for rank in life for batch in rank for name in batch]
        return came, answer["raised"]

    def _twins(self) -> str:
        own = [set(truth(folder)) for folder in self.data.twins]
        where = [self.converted(folder, 60) for folder in self.data.twins]
        cache = self.place / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        with served(where[0].parent) as port:
            web = [f"http://127.0.0.1:{port}/{folder.name}" for folder in where]
            if self.name == OURS:
                datasets = ours_cached([[url] for url in web], cache)
            else:
                urls = [[f"{url}/train-000000.tar"] for url in web] if self.name == "webdataset" else None
                urls = urls or [[str(folder)] for folder in where]
                called = self._ask("cache", urls=urls, cache=str(cache))
                if called.answer is None:
                    return "hung" if called.hung else f"fails: {_short(called.said)}"
                if "datasets" not in called.answer:
                    return "no cache of its own for shards"
                datasets = called.answer["datasets"]
        if raised := next((one["raised"] for one in datasets if one["raised"]), ""):
            return f"refuses: {_short(raised)}"
        seen = [name for name, _ in datasets[1]["samples"]]
        right, wrong = sum(name in own[1] for name in seen), sum(name in own[0] for name in seen)
        return f"{right} of {len(own[1])} right" + (f", {wrong} of the other dataset, silent" if wrong else "")


def _damage_cell(found: dict[str, Any], wanted: dict[str, int], usual: list[str]) -> str:
    """How many samples came, how many of them are not what was written, and what was said that is not said usually."""
    if "refused" in found:
        return f"refused before the first sample: {_short(found['refused'])}"
    came = dict(found["samples"])
    wrong = sum(wanted.get(name) != crc for name, crc in came.items())
    parts = [f"{len(came)} of {len(wanted)}"]
    if wrong:
        parts.append(f"{wrong} of them wrong")
    if repeated := len(found["samples"]) - len(came):
        parts.append(f"{repeated} repeated")
    known = {_plain(line) for line in usual}
    new = [line for line in found["said"] if _plain(line) not in known and line.strip()]
    if found["raised"]:
        parts.append(f"then {_short(found['raised'])}")
    elif new:
        parts.append(f"says: {_short(new[-1])}")
    elif len(came) == len(wanted) and not wrong:
        parts.append("nothing lost")
    else:
        parts.append("silent")
    return ", ".join(parts)


def _plain(line: str) -> str:
    return re.sub(r"\d+|/\S+", "#", line)


def _short(text: str) -> str:
    """One line without paths, short enough for a table."""
    line = re.sub(r"(\w+://)?/[\w./-]*/", "", first_line(Exception(text.strip().rstrip(":") or "nothing")))
    line = line.replace("|", "/")
    return line if len(line) <= 90 else f"{line[:87]}..."


@contextmanager
def served(folder: Path) -> Iterator[int]:
    """The folder behind a plain web server on loopback that knows ranges; gives its port."""

    class Files(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            whole = len(data)
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked:
                start = int(asked[1])
                data = data[start : int(asked[2]) + 1 if asked[2] else None]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{whole}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()


def table(columns: Mapping[str, Cells]) -> str:
    """Markdown: a row for each experiment, a column for each reader."""
    names = list(columns)
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    lines += [f"| {row} | {' | '.join(columns[name][row] for name in names)} |" for row in columns[names[0]]]
    return "\n".join(lines)


def main() -> None:
    parser = report.parser("guarantees", __doc__, "ours and webdataset alone")
    parser.add_argument("--readers", help=f"some of {','.join((OURS, *peers.PEERS))}, by commas (all)")
    parser.add_argument("--data", type=Path, help="keep the samples and their conversions in this folder")
    arguments = parser.parse_args()
    allowed = (OURS, *peers.PEERS)
    names = (OURS, "webdataset") if arguments.quick else tuple((arguments.readers or ",".join(allowed)).split(","))
    if unknown := [name for name in names if name not in allowed]:
        parser.error(f"--readers: {unknown[0]}: allowed are {', '.join(allowed)}")
    with ExitStack() as stack:
        place = arguments.data or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="radhpc-bench-")))
        columns = compare(place, names, arguments.quick)
    text = f"{table(columns)}\n{NOTES}"
    print(text, file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps({"ratios": {}, "figures": columns, "machine": report.machine()}))


def compare(place: Path, names: tuple[str, ...], quick: bool) -> dict[str, Cells]:
    interpreter = Path(sys.executable) if quick else (peers.python() if set(names) != {OURS} else None)
    data = make(place)
    columns = {}
    for name in names:
        print(f"trying {name}", file=sys.stderr, flush=True)
        runs = QUICK if quick and name != OURS else tuple(RUNS)
        columns[name] = Trial(name, data, place, interpreter, runs).run()
    return columns


if __name__ == "__main__":
    report.run(main)
