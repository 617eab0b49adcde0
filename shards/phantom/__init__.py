"""Drawn studies whose findings are known: the image and its report."""
