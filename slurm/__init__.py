"""Decide where and when jobs run: submit, requeue, sweep and monitor on SLURM clusters. Imports no torch."""
