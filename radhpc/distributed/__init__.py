"""Ranks, stop signals, grace period, watchdog, background work, and which rows a rank owns."""
