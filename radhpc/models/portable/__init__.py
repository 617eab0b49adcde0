"""Modules that are copied beside exported weights: they need nothing of radhpc."""
