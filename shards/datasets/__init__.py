"""Readers of raw archives, one module each; shards/datasets/reader.py says what a reader is."""
