"""A card that does nothing, for the host's side of a launch: Triton's own driver and launcher in front of a `libcuda` whose
calls return at once.

    with idle_card() as card:
        kernels.layer_norm(torch.empty(2048, 768), ...)     # compiled for capability 9.0, launched, never run
    card.launches

Tensors live on the CPU and say that they are on cuda:0, so that torch's part costs what it costs; a result is what its memory
held. The card changes what every tensor of the process says of itself: use it in a process of its own, without
TRITON_INTERPRET. Needs a C compiler and Python.h, as Triton does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks.static.aot import CHIPS
from benchmarks.static.counting import swapped

_CAPABILITY = 90
# What Triton's driver links or looks up. Handles count up, so that binaries differ; attributes are large enough for any kernel.
_SOURCE = """
#include <stdint.h>
#define DOES_NOTHING(name) int name() { return 0; }
int launches = 0;
void *launched = 0;
static intptr_t handles = 0;
int cuLaunchKernelEx(const void *config, void *function) { launches++; launched = function; return 0; }
int cuModuleLoadData(void **module) { *module = (void *)++handles; return 0; }
int cuModuleGetFunction(void **function, void *module) { *function = module; return 0; }
int cuCtxGetCurrent(void **context) { *context = &launches; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuDeviceGet(int *device) { *device = 0; return 0; }
int cuDeviceGetAttribute(int *value) { *value = 232448; return 0; }
int cuFuncGetAttribute(int *value, int attribute) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) { *value = pointer; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "the idle card has no errors"; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
DOES_NOTHING(cuCtxGetLimit) DOES_NOTHING(cuCtxSetCurrent) DOES_NOTHING(cuCtxSetLimit) DOES_NOTHING(cuDevicePrimaryCtxRetain)
DOES_NOTHING(cuFuncSetAttribute) DOES_NOTHING(cuFuncSetCacheConfig) DOES_NOTHING(cuModuleUnload) DOES_NOTHING(cuInit)
DOES_NOTHING(cuStreamIsCapturing) DOES_NOTHING(cuOccupancyMaxActiveClusters) DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cuTensorMapEncodeIm2col) DOES_NOTHING(cuLaunchKernel)
"""


class Card:
    """How many kernels were launched on it, and the handle of the newest, which names its binary."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._launches = ctypes.c_int.in_dll(library, "launches")
        self._launched = ctypes.c_void_p.in_dll(library, "launched")

    @property
    def launches(self) -> int:
        return self._launches.value

    @property
    def launched(self) -> int:
        return self._launched.value or 0


@functools.cache
def _library() -> tuple[ctypes.CDLL, str]:
    """The library under the name by which Triton's modules look for it, and the folder to link them in."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "libcuda.so.1"
    flags = ("-shared", "-fPIC", "-w", "-std=gnu17", "-Wl,-soname,libcuda.so.1", "-x", "c", "-", "-o", str(path))
    subprocess.run([sysconfig.get_config_var("CC").split()[0], *flags], input=_SOURCE, text=True, check=True)
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    library.folder = folder  # lives as long as the process
    return library, folder.name


@contextlib.contextmanager
def idle_card() -> Iterator[Card]:
    """Launches on CPU tensors go to a card that does nothing.

    Raises:
        RuntimeError: kernels are interpreted.
    """
    import triton
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime.driver import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("interpreted kernels are not launched: start a process without TRITON_INTERPRET")
    library, folder = _library()
    chip, (major, minor) = CHIPS[_CAPABILITY], divmod(_CAPABILITY, 10)
    properties = SimpleNamespace(
        multi_processor_count=chip.sms, major=major, minor=minor, shared_memory_per_block_optin=chip.block_shared
    )
    asked = {  # what launchers and Triton ask torch, at the price of a call each
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (major, minor),
        "current_device": lambda: 0,
        "is_current_stream_capturing": lambda: False,
    }
    with contextlib.ExitStack() as stack:
        for name, value in asked.items():
            stack.enter_context(swapped(torch.cuda, name, lambda _, value=value: value))
        stack.enter_context(swapped(triton.knobs.nvidia, "libcuda_path", lambda _: folder))
        idle = CudaDriver()
        idle.get_current_stream = lambda device: 0
        stack.enter_context(swapped(driver, "_active", lambda _: idle))
        torch.Tensor.is_cuda, torch.Tensor.device = True, torch.device("cuda", 0)
        stack.callback(lambda: [delattr(torch.Tensor, name) for name in ("is_cuda", "device")])  # the base class has them
        yield Card(library)
