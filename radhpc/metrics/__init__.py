"""Measures of written reports: pure functions of texts and labels."""
