"""From shards to batches: source, sampler, prefetch, tasks, collate, stream, retrieval and audit."""
