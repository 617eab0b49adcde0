"""How a build runs: scheduling, worker processes, the shard writer, output folder and assembly."""
