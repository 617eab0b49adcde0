"""Execution of a build: scheduling, worker processes, the shard writer, output folder and assembly."""
