"""The command `watch`: a run's metrics as they come, and its report on this machine alone."""
