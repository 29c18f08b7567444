"""What a run's folder holds, which plots are made of it and how they are drawn, for `experiments.report`."""
