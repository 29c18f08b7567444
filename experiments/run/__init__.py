"""Train: the checks before a run, the dry run with its estimate of memory, and the run itself."""
