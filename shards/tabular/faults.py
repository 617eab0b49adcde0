"""The two things that a reader of tables says: a record cannot be used, and a message for the user.

Both reach people as shards.datasets.reader.UnusableRecord and DatasetWarning.
"""


class UnusableRecord(ValueError):
    """A record, row or study cannot be used; the message is a general phrase without particulars of the patient."""


class DatasetWarning(UserWarning):
    """A message from a reader to its user; the build returns it with the result."""
