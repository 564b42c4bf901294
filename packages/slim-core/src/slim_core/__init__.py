"""Streaming post-training quantization: recipes, checkpoints, algorithms, runners and savers of Slim."""

import os

# Between two parallel loops threads of OpenMP (GNU's, as torch has it) spin for a millisecond before they sleep. Where
# another process wants the cores, or a container is allowed fewer than it sees, a thread that is waited for does not
# get one meanwhile, and a run can take thirty times as long. Read when torch is loaded, so this comes first.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
