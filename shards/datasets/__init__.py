"""Readers of raw archives, one module each; shards/datasets/reader.py describes a reader."""
