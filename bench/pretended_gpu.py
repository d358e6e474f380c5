"""A pytest plugin under which torch says that there is a GPU, so that what needs one can be collected without it."""

import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
