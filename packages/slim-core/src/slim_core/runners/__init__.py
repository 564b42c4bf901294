"""The plan of a run, the choice of a runner, and the run itself."""
