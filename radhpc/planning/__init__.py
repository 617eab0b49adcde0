"""Memory and time, forecast before anything is queued."""
