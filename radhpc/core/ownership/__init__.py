"""Keep one owner to a folder at a time: commands by a lock, the lives of a run by a lease."""
