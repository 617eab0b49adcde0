"""Hyperparameter sweeps: the definition, and the study that holds the trials."""
