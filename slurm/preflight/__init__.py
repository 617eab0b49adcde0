"""Check before anything is queued: doctor, the probe job and the plan."""
