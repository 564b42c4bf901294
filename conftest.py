"""Test workers share the cores, so each computes on one thread."""

import torch

torch.set_num_threads(1)
