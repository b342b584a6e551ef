"""All that is said to an accelerator's driver: how much memory is free, copies that overlap with computing, retries.

Everything else only moves tensors to a `torch.device`. Only CUDA devices are known; without one every function here
does what is right on a CPU.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

_CGROUP = Path("/sys/fs/cgroup")
# What else says that memory ran out: the runtime, asked by another than torch's allocator of the device (page-locked
# memory; torch.AcceleratorError since 2.8); the driver, where that allocator maps an expandable segment (torch's
# C10_CUDA_DRIVER_CHECK); and cuBLAS, whose handle is not that allocator's: made in too little memory, it calls itself
# not initialised as often as it says why.
_OUT_OF_MEMORY = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",
)
_BROKEN_ALLOCATOR = re.compile(r"INTERNAL ASSERT FAILED at .*CUDACachingAllocator")
_KEEPS_PAGES, _M_MMAP_THRESHOLD, _M_MMAP_MAX = "MALLOC_MMAP_MAX_", -3, -4  # of glibc: malloc.h, mallopt(3)


class DeviceMemory(NamedTuple):
    """Bytes of a device that this process may still take, and of all that it may have."""

    free: int
    total: int


def choose_device(share: float | Literal["auto"] = "auto") -> torch.device:
    """The device to compute on: the first CUDA device that the process sees, else the CPU.

    share: how much of one GPU this process may have; 0 is none, and a fraction bounds its memory, so that what shares
    the card with it keeps its own.
    """
    if share == 0 or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    set_arithmetic()
    if share != "auto" and share < 1:
        torch.cuda.set_per_process_memory_fraction(float(share), device)
    return device


def set_arithmetic() -> None:
    """Tell torch, for this process, how an accelerator is to compute."""
    # What is computed in float32 needs its digits, but NVIDIA's containers switch TF32 on by an environment variable.
    torch.set_float32_matmul_precision("highest")
    # A product of a narrow dtype that is cut along its sum would round the parts' sums to that dtype too. Where it is
    # cut depends on the shapes: one candidate's answers would differ from those that it has among eight.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    # On Hopper torch prefers cuDNN's attention to its own, and cuDNN makes a plan for every exact shape: the trunk of
    # MMLU's 14,042 questions on an 8B model has 580 with 100 GB free.
    torch.backends.cuda.enable_cudnn_sdp(False)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if is_accelerator(device) else "cpu"


def is_accelerator(device: torch.device) -> bool:
    return device.type != "cpu"


def device_memory(device: torch.device) -> DeviceMemory:
    """What torch's allocator holds without using it counts as free."""
    free, total = torch.cuda.mem_get_info(device)
    used = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - used
    allowed = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return DeviceMemory(min(free, allowed - used), allowed)


def host_free() -> int:
    """Bytes of the machine's memory that can be taken without swapping, within the container's limit."""
    free = 0
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    try:
        limit = (_CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = int((_CGROUP / "memory.current").read_text(encoding="ascii"))
        held = dict(line.split() for line in (_CGROUP / "memory.stat").read_text(encoding="ascii").splitlines())
    except OSError:  # another kind of container, or none
        return free
    # What was read of files counts as the container's until the kernel needs it, the model's weights foremost; what is
    # in shared memory, as Ray's objects, has to stay and is not among it.
    used -= int(held.get("active_file", 0)) + int(held.get("inactive_file", 0))
    return free if limit == "max" else min(free, int(limit) - used)


def attempt(call: Callable[[], Any]) -> tuple[bool, Any]:
    """(True, what the call returns), or (False, None) where the device, or page-locked host memory, ran out.

    The error, whose traceback holds on to the call's tensors, is gone when this returns, and so is what the allocator
    kept in pieces of the wrong sizes.
    """
    try:
        return True, call()
    except torch.OutOfMemoryError:
        pass
    except RuntimeError as error:
        if not any(text in str(error) for text in _OUT_OF_MEMORY):
            raise
    release_cached()
    return False, None


def is_lost(error: BaseException) -> bool:
    """Whether an error says that this process can use its device no more: after an illegal access, an uncorrectable bit
    or a card that is gone every further call fails, until another process begins. Memory that ran out is no such error,
    but for an allocator that is broken by it."""
    text = str(error)
    if not isinstance(error, RuntimeError) or any(words in text for words in _OUT_OF_MEMORY):
        return False
    return text.startswith(("CUDA error:", "CUDA driver error:")) or _BROKEN_ALLOCATOR.search(text) is not None


def release_cached() -> None:
    """Give back what torch's allocators hold without using it, pinned host memory too."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        # Public since torch 2.13. Without it a scorer that is gone still has its states' memory.
        empty = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
        if empty is not None:
            empty()


def moved(tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """The tensor on a device in a dtype.

    A copy to an accelerator that widens does so before, on the CPU, and then moves the wider values: here what moves
    is what is narrower.
    """
    return (tensor.to(device) if dtype.itemsize > tensor.dtype.itemsize else tensor).to(device, dtype)


@contextmanager
def lean_heap() -> Iterator[None]:
    """Within, blocks of 32 MB and more are the kernel's again as soon as they are freed, and so is what was kept
    before: for work whose blocks are so large that memory is dearer than clearing pages.

    It changes something only where malloc is glibc's and was told to keep all pages (`pool`): there, a block of
    hundreds of megabytes is not even used again for one of the same size, since an aligned one needs a little more.
    """
    libc = ctypes.CDLL(None)
    if os.environ.get(_KEEPS_PAGES) != "0" or not hasattr(libc, "malloc_trim"):
        yield
        return
    libc.malloc_trim(0)
    libc.mallopt(_M_MMAP_THRESHOLD, 2**25)  # the most that glibc takes
    libc.mallopt(_M_MMAP_MAX, 65536)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.malloc_trim(0)


def host_buffer(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor in host memory that copies to and from `device` need not wait for."""
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=is_accelerator(device))


def streamed(source: Tensor, spans: Sequence[tuple[int, int]], device: torch.device) -> Iterator[Tensor]:
    """Rows [start, stop) of a pinned host tensor on the device, one span after the other.

    The next span is copied while the last one is computed with; what is given is overwritten two spans later, so no
    gradient may be taken through it.
    """
    if not is_accelerator(device) or not spans:
        yield from (source[start:stop] for start, stop in spans)
        return
    longest = max(stop - start for start, stop in spans)
    buffers = [source.new_empty((longest, *source.shape[1:]), device=device, pin_memory=False) for _ in range(2)]
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    copying.wait_stream(computing)  # the buffers' memory may still be in use by what had it before
    used: list[torch.cuda.Event | None] = [None, None]

    def copy(number: int) -> tuple[Tensor, torch.cuda.Event]:
        start, stop = spans[number]
        part = buffers[number % 2][: stop - start]
        with torch.cuda.stream(copying):
            if (event := used[number % 2]) is not None:
                copying.wait_event(event)
            part.copy_(source[start:stop], non_blocking=True)
            return part, copying.record_event()

    try:
        ahead = copy(0)
        for number in range(len(spans)):
            part, arrived = ahead
            if number + 1 < len(spans):
                # Its buffer was read for the last time before the span before this one was given.
                ahead = copy(number + 1)
            computing.wait_event(arrived)
            yield part
            used[number % 2] = computing.record_event()
    finally:
        # However the caller ended, no copy may write to the buffers after their memory is someone else's.
        computing.wait_stream(copying)
