"""Tables of records, plain-data pickles, and an external sort for archives of any size."""
