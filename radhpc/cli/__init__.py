"""The verbs of the command line: each a few calls into shards (data), slurm (where jobs run) and radhpc (what runs)."""
