"""The parts of a stage, the loop, asynchronous checkpoints, compilation, profiling, stragglers."""
