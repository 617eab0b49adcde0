"""Where and when a job runs: submitting, requeueing, sweeping and watching on SLURM clusters. Imports no torch."""
