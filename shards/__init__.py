"""Raw archives -> tar shards with a manifest: once, on CPUs, without torch."""
