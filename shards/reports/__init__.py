"""What people read of a dataset: its card, and the tables of the data commands."""
