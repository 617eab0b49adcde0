"""Reports on a dataset for people: its card, its contact sheet, and the tables of the data commands."""
