"""Hold the verbs of the command line: each makes a few calls into shards (data), slurm (where jobs run) and radhpc."""
