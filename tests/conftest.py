"""Set-up for every test: one thread (the tensors are tiny), and a fixed hypothesis profile: a failure repeats."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "kernelbank", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("kernelbank")
