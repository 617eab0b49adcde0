"""Report text: sections and de-identification."""
