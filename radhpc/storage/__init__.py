"""Object stores, ranged reads, the node's cache of shards, and the folder or bucket where checkpoints lie."""
