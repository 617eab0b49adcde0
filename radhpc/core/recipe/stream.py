"""Define the section `stream`: the order of samples, and how they come to a rank."""

from pydantic import Field

from radhpc.core.recipe.section import Section


class CacheSettings(Section):
    """A folder of the node that keeps what came over the network, for all its ranks and for later runs."""

    folder: str = Field(description="on the node's own disk; $NAME and ~ are expanded on the node")
    gigabytes: float = Field(gt=0, description="that the folder may hold, shared with other jobs that use it")
    folders: bool = Field(False, description="also for shards in a folder behind a network file system")


class StreamSettings(Section):
    """The order of samples and the way they are read."""

    window: int | None = Field(
        64,
        ge=1,
        description="shards that are mixed at a time, so that a store is read in long runs; null: the whole dataset",
    )
    temperature: float | None = Field(
        None, gt=0, description="draw each dataset of `shards` as often as its number of samples ** (1 / temperature)"
    )
    threads: int = Field(2, ge=1, description="decoding threads per rank")
    prefetch: int = Field(4, ge=1, description="steps that are decoded ahead")
    prefetch_megabytes: int = Field(
        256, ge=16, description="per rank, that are read ahead and held before decoding, if the shards are not local"
    )
    requests: int = Field(64, ge=1, description="to a store at a time, from all ranks of a node together")
    cache: CacheSettings | None = None
    max_bad_samples: int = Field(0, ge=0, description="unreadable samples in the whole run, above which it stops")
    audit: bool = Field(True, description="append the key of every sample trained on to the run's ledger")
