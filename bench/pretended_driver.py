"""A CUDA driver that is not there: Triton compiles its kernels for a chip for real, and launches them into nothing.

Tensors stay on the CPU, and outputs hold whatever was in memory. It shows what a launch costs the host, whether a kernel
compiles as it is called, and how often it is compiled anew; never what a kernel computes.
"""

import contextlib

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import yojo_kernels
from yojo_kernels import launch, segments, tuning

PROCESSORS = 132  # of an H100 or H200


class _Utils:
    """What Triton asks of the driver about binaries and devices."""

    def load_binary(self, name, kernel, shared, device):
        return 1, 2, 128, 0, 1024  # module, function, registers, spilled bytes, threads of a program

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": PROCESSORS, "warpSize": 32, "max_num_regs": 65536}


class _Launcher:
    launches = 0

    def __init__(self, source, metadata):
        self.launch_cooperative_grid = False

    def __call__(self, *arguments, **options):
        _Launcher.launches += 1


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, chip):
        self.chip = chip
        self.utils = _Utils()

    @staticmethod
    def is_active():
        return True

    def get_current_target(self):
        return GPUTarget("cuda", self.chip, 32)

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_device_capability(self, device):
        return divmod(self.chip, 10)

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name):
        return name

    def get_benchmarker(self):
        return None


def launches():
    """How many kernels have been launched into nothing so far."""
    return _Launcher.launches


@contextlib.contextmanager
def pretended(chip=90):
    """Within it, kernels take CPU tensors as if they lay on a GPU of this compute capability, and impl="auto" picks them.

    Not under TRITON_INTERPRET=1, where kernels are not compiled.
    """
    if launch.INTERPRETED:
        raise RuntimeError("kernels are interpreted (TRITON_INTERPRET=1) and cannot be launched: unset it")
    before = tuning.GPU, tuning.capability, tuning.processors, segments.TAKES_CPUS, yojo_kernels._can_look_at
    active = driver._active  # None where none has been asked for
    tuning.GPU = "cpu"
    tuning.capability = lambda device: divmod(chip, 10)
    tuning.processors = lambda device: PROCESSORS
    segments.TAKES_CPUS = False
    yojo_kernels._can_look_at = lambda tensor: False
    driver.set_active(_Driver(chip))
    try:
        yield
    finally:
        tuning.GPU, tuning.capability, tuning.processors, segments.TAKES_CPUS, yojo_kernels._can_look_at = before
        driver.set_active(active)
