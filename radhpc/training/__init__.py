"""Train a run: its context and builders, the loop, asynchronous checkpoints, compilation, profiling, stragglers."""
