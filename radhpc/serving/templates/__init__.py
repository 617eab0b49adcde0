"""Files that are written beside an export, as they are."""
