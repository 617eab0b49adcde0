"""The context of a run and its builders, the loop, asynchronous checkpoints, compilation, profiling, stragglers."""
