"""What everything else stands on: errors, files, run folder, recipe, sample, manifest, log. Imports no other room."""
