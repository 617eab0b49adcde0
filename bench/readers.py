"""The readers of other projects, each as its own documentation says. Runs in their environment, not in ours.

    <python of .venv-peers> bench/readers.py webdataset '{"do": "raw", "where": "/shards"}' /tmp/answer.json

bench/peers.py makes that environment and calls this file by its path, so nothing of radhpc is imported here. The answer
is written as JSON. What can be done:

    convert   the tars of `tars` to the peer's own format in `where`, or an index beside them
    raw       a shuffled epoch in this process, without workers: the bytes of every JPEG and its JSON, read
    views     the same as the peer gives it, where that is a view of a mapped file that nobody has read
    workers   the same decoded, by two worker processes of the peer's own loader
    threads   the same decoded, by two threads: the peer's own where it has any, else around its raw stream
    list      which samples came, and what was raised: for damaged files
    cache     the same of several datasets through one cache folder
    describe  what the peer reads and how its documentation has it stop and go on
    lives     several ranks that read, stop after some steps and go on, perhaps as another number of ranks

Seconds are those of one whole epoch, from asking for the iterator to the last sample, after a warm-up.
"""

import collections
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

BATCH = 32  # samples that a worker process hands over at once
BUFFER = 1000  # of those that shuffle in a buffer
SEED = 7
THREADS = 2
LIFE = 120  # seconds that ranks may take before they count as hung

Raw = tuple[bytes, bytes]  # JPEG, JSON


def decode(raw: Any) -> Any:
    """The decoder of everyone here, the one that radhpc uses: gray pixels instead of the JPEG."""
    import imagecodecs

    return imagecodecs.jpeg8_decode(raw[0]), bytes(raw[1])


def same(raw: Any) -> Any:
    return raw


def threaded(raw: Iterable[Raw], work: Callable[[Raw], Any]) -> Iterator[Any]:
    """What a user puts around a stream to decode in threads, in the order of the stream."""
    with ThreadPoolExecutor(THREADS) as pool:
        waiting: collections.deque[Any] = collections.deque()
        for one in raw:
            waiting.append(pool.submit(work, one))
            if len(waiting) > 16 * THREADS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Reader:
    """What is asked of a peer; `where` is what `convert` wrote."""

    format = ""  # what it reads
    resume = ""  # how its documentation says to stop and go on; empty where it says nothing of it
    caches = ""  # how it keeps remote shards in a local folder

    def convert(self, tars: Path, where: Path, per_shard: int) -> None:
        raise NotImplementedError

    def epoch(self, where: str, workers: int, work: Callable[[Raw], Any]) -> Iterator[Any]:
        """One shuffled epoch; workers 0 is this process."""
        raise NotImplementedError

    def threads(self, where: str) -> Iterator[Any]:
        """The same, decoded by two threads of this process."""
        return threaded(self.epoch(where, 0, same), decode)

    def views(self, where: str) -> Iterator[Any]:
        """The raw epoch again, for peers whose samples are views of mapped files."""
        return iter(())

    def cached(self, urls: list[str], cache: str) -> Iterator[Raw]:
        raise NotImplementedError

    def open(self, life: "Life") -> tuple[Iterable[Any], Callable[[], Any]]:
        """(batches as lists of raw samples from where the states say, what gives the state now)."""
        raise NotImplementedError


class Life(types.SimpleNamespace):
    """What one rank is told of one life of a run."""

    where: list[str]
    weights: list[float]
    world: int
    rank: int
    batch: int  # samples of this rank and step
    workers: int
    steps: int | None  # to read, or to the end of the epoch
    states: list[Any] | None  # of all ranks when the life before ended


def tars_of(where: str) -> list[str]:
    return sorted(str(path) for path in Path(where).glob("*.tar"))


def raw_samples(tars: Path) -> Iterator[dict[str, bytes]]:
    """The samples of plain tars in their order, for conversions."""
    for name in tars_of(str(tars)):
        with tarfile.open(name) as tar:
            sample: dict[str, bytes] = {}
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                sample[member.name.rsplit(".", 1)[1]] = file.read()
                if len(sample) == 2:
                    yield sample
                    sample = {}


class WebDataset(Reader):
    format = "plain tars"
    caches = "cache_dir="

    def convert(self, tars: Path, where: Path, per_shard: int) -> None:
        where.mkdir(parents=True, exist_ok=True)
        for name in tars_of(str(tars)):
            (where / Path(name).name).symlink_to(name)

    def epoch(self, where: str, workers: int, work: Callable[[Raw], Any]) -> Iterator[Any]:
        import webdataset as wds

        pipeline = self._pipeline([where]).map(work)
        if not workers:
            yield from pipeline
            return
        batched = pipeline.batched(BATCH, collation_fn=list, partial=True)
        for batch in wds.WebLoader(batched, batch_size=None, num_workers=workers):
            yield from batch

    def _pipeline(self, where: list[str]) -> Any:
        import webdataset as wds

        urls = [name for folder in where for name in tars_of(folder)]
        shards = wds.WebDataset(
            urls, shardshuffle=len(urls), nodesplitter=wds.split_by_node, seed=SEED, empty_check=False
        )
        return shards.shuffle(BUFFER).to_tuple("0.jpg", "json")

    def cached(self, urls: list[str], cache: str) -> Iterator[Raw]:
        import webdataset as wds

        Path(cache).mkdir(exist_ok=True)
        yield from wds.WebDataset(urls, shardshuffle=False, cache_dir=cache).to_tuple("0.jpg", "json")

    def open(self, life: Life) -> tuple[Iterable[Any], Callable[[], Any]]:
        import webdataset as wds

        if len(life.where) == 1:
            mixed = self._pipeline(life.where)
        else:
            mixed = wds.DataPipeline(wds.RandomMix([self._pipeline([one]) for one in life.where], life.weights))
        batched = wds.DataPipeline(mixed, wds.batched(life.batch, collation_fn=list, partial=True))
        loader = wds.WebLoader(batched, batch_size=None, num_workers=life.workers)
        assert not any(hasattr(part, "state_dict") for part in (loader, batched, mixed))
        return loader, lambda: None


class LitData(Reader):
    format = "own chunks"
    resume = "StreamingDataLoader.state_dict"
    caches = "cache_dir="

    def convert(self, tars: Path, where: Path, per_shard: int) -> None:
        import litdata

        chunk = {"chunk_size": per_shard}  # samples, as many as in a tar
        litdata.optimize(
            same, list(raw_samples(tars)), output_dir=str(where), num_workers=1, start_method="fork", **chunk
        )

    def epoch(self, where: str, workers: int, work: Callable[[Raw], Any]) -> Iterator[Any]:
        import litdata

        # Its samples are views of a mapped file: copied, as otherwise nobody would have read them.
        dataset = litdata.StreamingDataset(
            where, shuffle=True, drop_last=False, seed=SEED, transform=_pair(work, bytes)
        )
        if not workers:
            yield from dataset
            return
        for batch in litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=same):
            yield from batch

    def views(self, where: str) -> Iterator[Any]:
        import litdata

        yield from litdata.StreamingDataset(where, shuffle=True, drop_last=False, seed=SEED, transform=_pair(same))

    def threads(self, where: str) -> Iterator[Any]:
        return threaded(self.views(where), decode)

    def cached(self, urls: list[str], cache: str) -> Iterator[Raw]:
        import litdata

        for url in urls:
            yield from litdata.StreamingDataset(f"local:{url}", cache_dir=cache, transform=_pair(same, bytes))

    def open(self, life: Life) -> tuple[Iterable[Any], Callable[[], Any]]:
        import litdata

        parts = [
            litdata.StreamingDataset(one, shuffle=True, drop_last=False, seed=SEED, transform=_pair(same, bytes))
            for one in life.where
        ]
        dataset: Any = parts[0]
        if len(parts) > 1:
            dataset = litdata.CombinedStreamingDataset(parts, seed=SEED, weights=life.weights, iterate_over_all=False)
        loader = litdata.StreamingDataLoader(dataset, batch_size=life.batch, num_workers=life.workers, collate_fn=same)
        if life.states:
            loader.load_state_dict(life.states[life.rank if life.rank < len(life.states) else 0])
        return loader, loader.state_dict


def _pair(work: Callable[[Raw], Any], read: Callable[[Any], Any] = same) -> Callable[[Any], Any]:
    return functools.partial(_paired, work, read)


def _paired(work: Callable[[Raw], Any], read: Callable[[Any], Any], sample: dict[str, Any], *_: Any) -> Any:
    return work((read(sample["jpg"]), read(sample["json"])))


class Mds(Reader):
    format = "own shards"
    resume = "StreamingDataLoader.state_dict"
    caches = "remote=, local="

    def __init__(self) -> None:
        # What it imports and none of this uses: its text and vision datasets and types of transformers' batches. The
        # torchvision of the registry does not load beside torch for CPUs.
        for name in (
            "torchvision.datasets VisionDataset CIFAR10",
            "torchvision.transforms.functional to_tensor",
            "transformers.feature_extraction_utils BatchFeature",
            "transformers.tokenization_utils_base BatchEncoding",
            "transformers.models.auto.tokenization_auto AutoTokenizer",
        ):
            path, *attributes = name.split()
            for end in itertools.accumulate(path.split("."), "{}.{}".format):
                sys.modules.setdefault(end, types.ModuleType(end))
            for attribute in attributes:
                setattr(sys.modules[path], attribute, type(attribute, (), {}))

    def convert(self, tars: Path, where: Path, per_shard: int) -> None:
        from streaming import MDSWriter

        total = sum(os.path.getsize(name) for name in tars_of(str(tars)))
        shards = len(tars_of(str(tars)))
        with MDSWriter(
            out=str(where), columns={"jpg": "bytes", "json": "bytes"}, size_limit=total // shards, hashes=["xxh3_64"]
        ) as writer:
            for sample in raw_samples(tars):
                writer.write(sample)

    def _dataset(self, work: Callable[[Raw], Any], **options: Any) -> Any:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        class Pairs(StreamingDataset):  # type: ignore[misc]
            def __getitem__(self, at: Any) -> Any:
                return _paired(work, same, super().__getitem__(at))

        if "RANK" not in os.environ:
            clean_stale_shared_memory()
        return Pairs(shuffle=True, shuffle_algo="py1e", shuffle_seed=SEED, **options)

    def epoch(self, where: str, workers: int, work: Callable[[Raw], Any]) -> Iterator[Any]:
        from streaming import StreamingDataLoader

        dataset = self._dataset(work, local=where, batch_size=BATCH)
        if not workers:
            yield from dataset
            return
        for batch in StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=same):
            yield from batch

    def cached(self, urls: list[str], cache: str) -> Iterator[Raw]:
        for url in urls:
            yield from self._dataset(same, remote=url, local=cache, batch_size=1)

    def open(self, life: Life) -> tuple[Iterable[Any], Callable[[], Any]]:
        from streaming import Stream, StreamingDataLoader

        if len(life.where) == 1:
            dataset = self._dataset(same, local=life.where[0], batch_size=life.batch)
        else:
            streams = [
                Stream(local=one, proportion=weight) for one, weight in zip(life.where, life.weights, strict=True)
            ]
            dataset = self._dataset(same, streams=streams, batch_size=life.batch)
        loader = StreamingDataLoader(dataset, batch_size=life.batch, num_workers=life.workers, collate_fn=_columns)
        if life.states:
            loader.load_state_dict(life.states[0])
        return (list(zip(batch["jpg"], batch["json"], strict=True)) for batch in loader), loader.state_dict


def _columns(rows: list[Raw]) -> dict[str, list[bytes]]:
    """A batch as a dictionary of columns: what the loader of MDS counts samples by, for its state."""
    return {"jpg": [jpg for jpg, _ in rows], "json": [described for _, described in rows]}


class Energon(Reader):
    format = "plain tars, its index beside them"
    resume = "save_state_rank, restore_state_global"

    def convert(self, tars: Path, where: Path, per_shard: int) -> None:
        where.mkdir(parents=True, exist_ok=True)
        for name in tars_of(str(tars)):
            shutil.copyfile(name, where / Path(name).name)
        command = [str(Path(sys.executable).with_name("energon")), "prepare", str(where), "--non-interactive"]
        command += ["--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "1", "--no-progress"]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def _loader(self, where: list[str], weights: list[float], batch: int, config: Any, work: Any, lasting: bool) -> Any:
        from megatron.energon import (
            Cooker,
            DefaultTaskEncoder,
            Sample,
            basic_sample_keys,
            edataclass,
            get_loader,
            get_savable_loader,
            get_train_dataset,
            stateless,
        )

        @edataclass
        class Pair(Sample):  # type: ignore[misc]
            value: Any

        @stateless
        def cook(sample: dict[str, Any]) -> Pair:
            return Pair(**basic_sample_keys(sample), value=work((sample["0.jpg"], sample["json"])))

        class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
            decoder = None
            cookers = [Cooker(cook)]

            @stateless
            def batch(self, samples: list[Pair]) -> list[Any]:
                return [sample.value for sample in samples]

            @stateless
            def encode_batch(self, batch: list[Any]) -> list[Any]:
                return batch

        path: Path = Path(where[0])
        if len(where) > 1:
            path = Path(tempfile.mkdtemp(prefix="radhpc-energon-")) / "blend.yaml"
            blended = [{"weight": weight, "path": one} for one, weight in zip(where, weights, strict=True)]
            path.write_text(json.dumps({
                "__module__": "megatron.energon", "__class__": "MetadatasetV2", "splits": {"train": {"blend": blended}}
            }))  # fmt: skip
        dataset = get_train_dataset(
            path,
            worker_config=config,
            batch_size=batch,
            shuffle_buffer_size=BUFFER if lasting else 100,
            max_samples_per_sequence=100,
            repeat=len(where) > 1,
            task_encoder=Encoder(),
        )
        if lasting:
            return get_loader(dataset, watchdog_timeout_seconds=None)
        return get_savable_loader(
            dataset, watchdog_timeout_seconds=None, checkpoint_every_sec=0, checkpoint_every_min_n_samples=1
        )

    def epoch(self, where: str, workers: int, work: Callable[[Raw], Any]) -> Iterator[Any]:
        from megatron.energon import WorkerConfig

        config = WorkerConfig(rank=0, world_size=1, num_workers=workers)
        for batch in self._loader([where], [1.0], BATCH, config, work, lasting=True):
            yield from batch

    def open(self, life: Life) -> tuple[Iterable[Any], Callable[[], Any]]:
        from megatron.energon import WorkerConfig

        config = WorkerConfig(rank=life.rank, world_size=life.world, num_workers=life.workers)
        loader = self._loader(life.where, life.weights, life.batch, config, same, lasting=False)
        if life.states:
            loader.restore_state_global(life.states)
        return loader, loader.save_state_rank


class Members:
    """A random-access source over the members of plain tars, as users of grain write it, which has none."""

    def __init__(self, where: str) -> None:
        self._tars = tars_of(where)
        self._files: dict[int, int] = {}
        self._found: list[tuple[int, list[tuple[int, int]]]] = []
        for number, name in enumerate(self._tars):
            with tarfile.open(name) as tar:
                members = {member.name: (member.offset_data, member.size) for member in tar}
            for key in sorted({name.split(".")[0] for name in members}):
                self._found.append((number, [members[f"{key}.0.jpg"], members[f"{key}.json"]]))

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, at: Any) -> Raw:
        number, places = self._found[at]
        if number not in self._files:
            self._files[number] = os.open(self._tars[number], os.O_RDONLY)
        jpg, described = (os.pread(self._files[number], length, offset) for offset, length in places)
        return jpg, described

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": {}}


class Grain(Reader):
    format = "a user's source over tars"
    resume = "ElasticIterator.get_state"

    def convert(self, tars: Path, where: Path, per_shard: int) -> None:
        WebDataset().convert(tars, where, per_shard)

    @functools.lru_cache(4)  # noqa: B019 - a user makes the source once, not each epoch
    def _source(self, where: str) -> Members:
        return Members(where)

    def _dataset(self, where: str, work: Callable[[Raw], Any]) -> Any:
        import grain

        return grain.MapDataset.source(self._source(where)).shuffle(SEED).map(work)

    def epoch(self, where: str, workers: int, work: Callable[[Raw], Any]) -> Iterator[Any]:
        import grain

        if not workers:
            yield from self._dataset(where, work).to_iter_dataset(grain.ReadOptions(0, 0))
            return
        batched = self._dataset(where, work).batch(BATCH, batch_fn=list)
        for batch in batched.to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)):
            yield from batch

    def threads(self, where: str) -> Iterator[Any]:
        import grain

        options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=16 * THREADS)
        yield from self._dataset(where, decode).to_iter_dataset(options)

    def open(self, life: Life) -> tuple[Iterable[Any], Callable[[], Any]]:
        import grain
        from grain.experimental import ElasticIterator

        parts = [self._dataset(one, same) for one in life.where]
        dataset = parts[0] if len(parts) == 1 else grain.MapDataset.mix(parts, life.weights)
        workers = grain.MultiprocessingOptions(num_workers=life.workers) if life.workers else None
        iterator = iter(
            ElasticIterator(
                dataset,
                global_batch_size=life.batch * life.world,
                shard_options=grain.sharding.ShardOptions(shard_index=life.rank, shard_count=life.world),
                multiprocessing_options=workers,
            )
        )
        if life.states:
            iterator.set_state(life.states[0])
        return (list(zip(*columns, strict=True)) for columns in iterator), iterator.get_state


PEERS: dict[str, type[Reader]] = {
    "webdataset": WebDataset,
    "litdata": LitData,
    "mds": Mds,
    "energon": Energon,
    "grain": Grain,
}


def measure(reader: Reader, do: str, where: str) -> dict[str, float]:
    """One epoch after a warm-up: samples, seconds, bytes of the JPEGs and JSONs or of the pixels and JSONs."""

    def started() -> Iterator[Any]:
        if do in ("threads", "views"):
            return iter(getattr(reader, do)(where))
        return reader.epoch(where, THREADS if do == "workers" else 0, same if do == "raw" else decode)

    warm = started()
    for _ in itertools.islice(warm, 200):
        pass
    if hasattr(warm, "close"):
        warm.close()
    samples = size = 0
    begun = 0.0
    for one, described in started():
        begun = begun or time.perf_counter()  # nobody's start counts
        samples += 1
        size += (len(one) if do in ("raw", "views") else one.nbytes) + len(described)
    return {"samples": samples, "seconds": time.perf_counter() - begun, "bytes": size}


def seen(samples: Iterable[Raw]) -> dict[str, Any]:
    """Which samples came, as [study, crc32 of the JPEG], and the exception that ended them."""
    found: list[list[Any]] = []
    raised = ""
    try:
        for jpg, described in samples:
            found.append([study(described), zlib.crc32(jpg)])
    except Exception as error:
        traceback.print_exc()
        raised = f"{type(error).__name__}: {error}"
    return {"samples": found, "raised": raised}


def study(described: bytes) -> str | None:
    try:
        return str(json.loads(bytes(described))["study"])
    except (ValueError, KeyError):
        return None


def lives(reader: Reader, request: dict[str, Any]) -> dict[str, Any]:
    """The lives of one run: for each of them, what its ranks read; and the first exception, which ends the run."""
    states: list[Any] | None = None
    read: list[list[list[Any]]] = []
    for life in request["lives"]:
        found, raised = _ranks(reader, request, life, states)
        read.append([samples for samples, _ in found])
        states = [state for _, state in found]
        if raised:
            return {"read": read, "raised": raised}
    return {"read": read, "raised": ""}


def _ranks(reader: Reader, request: dict[str, Any], life: dict[str, Any], states: Any) -> tuple[list[Any], str]:
    """Start all ranks of a life as processes, as torchrun would, and wait for them."""
    fork = multiprocessing.get_context("fork")
    found: list[Any] = [([], None)] * life["world"]
    raised = ""
    with tempfile.TemporaryDirectory(prefix="radhpc-ranks-") as folder:
        started = []
        for rank in range(life["world"]):
            mine, theirs = fork.Pipe(duplex=False)
            told = Life(**{name: request[name] for name in ("where", "weights")}, **life, rank=rank, states=states)
            process = fork.Process(target=_rank, args=(reader, told, folder, theirs))
            process.start()
            theirs.close()
            started.append((process, mine))
        deadline = time.monotonic() + LIFE
        for rank, (_, pipe) in enumerate(started):
            try:
                if pipe.poll(max(0.0, deadline - time.monotonic())):
                    found[rank], error = pipe.recv()
                else:
                    error = f"hung for {LIFE} s"
            except EOFError:
                error = "a rank died"
            raised = raised or error
        for process, _ in started:
            assert process.pid
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads a group of its own, with its workers
            process.join()
    return found, raised


def _rank(reader: Reader, life: Life, folder: str, pipe: Any) -> None:
    os.setpgid(0, 0)
    import torch

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(life.rank), "WORLD_SIZE": str(life.world), "LOCAL_RANK": str(life.rank),
        "LOCAL_WORLD_SIZE": str(life.world), "NODE_RANK": "0", "NNODES": "1",
    }  # fmt: skip
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/store", timeout=timedelta(seconds=60), rank=life.rank, world_size=life.world
    )
    read: list[Any] = []
    state, raised = None, ""
    try:
        batches, state_now = reader.open(life)
        for batch in itertools.islice(batches, life.steps):
            read.append([study(described) for _, described in batch])
        state = state_now() if life.steps else None
    except Exception as error:
        traceback.print_exc()
        raised = f"{type(error).__name__}: {error}"
    torch.distributed.barrier()  # nobody leaves while another still needs it
    pipe.send(((read, state), raised))
    pipe.close()
    time.sleep(LIFE)  # until the parent ends this group; leaving by ourselves would wait for the loader's threads


def _end_with_caller() -> None:
    """Wait until the process that asked has closed our standard input or has died, and end with it."""
    os.read(0, 1)  # not by sys.stdin, whose lock a fork would take along
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    if not sys.stdin.isatty():
        threading.Thread(target=_end_with_caller, daemon=True).start()
    peer, request, answer = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    reader = PEERS[peer]()
    do = request["do"]
    result: dict[str, Any] = {"format": reader.format, "resume": reader.resume, "caches": reader.caches}
    if do == "convert":
        begun = time.perf_counter()
        reader.convert(Path(request["tars"]), Path(request["where"]), request["per_shard"])
        result["seconds"] = time.perf_counter() - begun
    elif do == "list":
        result |= seen(reader.epoch(request["where"], 0, same))
    elif do == "cache" and reader.caches:
        result["datasets"] = [seen(reader.cached(urls, request["cache"])) for urls in request["urls"]]
    elif do == "lives":
        result |= lives(reader, request)
    elif do in ("raw", "views", "workers", "threads"):
        result |= measure(reader, do, request["where"])
    answer.write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(0)  # some leave threads behind that never end


if __name__ == "__main__":
    main()
