"""Hold what every other room stands on: errors, files, run folder, protocol, recipe, sample, manifest, log."""
