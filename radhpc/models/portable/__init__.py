"""The modules that are exported with weights: they do not import radhpc."""
