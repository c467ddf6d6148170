"""Memory of a device that several processes of one machine map: CUDA's IPC, by libcuda's own functions.

In the interpreter, where tensors lie in the CPU's memory, a sealed memfd takes its place.
A handle is HANDLE bytes, that the owner sends to whom it trusts with the memory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilium.errors import WireError
from consilium.gpu.jit import INTERPRETED
from consilium.shared_memory import SharedMemory

HANDLE = 64  # bytes, as CUDA's
LAZY_PEER_ACCESS = 1
BLOCK = 2**21  # bytes: smaller pieces lie beside others of this process, which would be shared with them
_DESCRIPTOR = struct.Struct("<8sII")  # of a memfd: magic, process, descriptor
_MAGIC = b"memfd\0\0\0"


class DeviceMemory:
    """Bytes uint8 [size] on a device; ``close`` ends the use of them here, and needs nobody to read them any more."""

    def __init__(self, tensor: Tensor, handle: bytes, release: Callable[[], None]) -> None:
        self.tensor, self.handle, self._release = tensor, handle, release

    @classmethod
    def allocate(cls, size: int, device: torch.device) -> DeviceMemory:
        """New memory of zeros, which is this process's: it must outlive every use by others. Raises WireError."""
        return _allocate_cuda(size, device) if device.type == "cuda" else _allocate_memfd(size)

    @classmethod
    def open(cls, handle: bytes, size: int, device: torch.device) -> DeviceMemory:
        """Another process's, of at least ``size`` bytes, as ``device`` reaches it. Raises WireError."""
        return _open_cuda(handle, size, device) if device.type == "cuda" else _open_memfd(handle, size)

    def close(self) -> None:
        """Unmap, or free; once."""
        release, self._release = self._release, lambda: None
        release()


def device_uuid(device: torch.device) -> str:
    """What two processes that use the same GPU both call it; of the interpreter's, what no GPU is called."""
    if device.type == "cuda":
        return f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return "interpreter" if INTERPRETED else ""


# -- CUDA --------------------------------------------------------------------------------------------------------------


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * HANDLE),)


def tensor_at(address: int, size: int, device: torch.device) -> Tensor:
    """Bytes uint8 [size] that others keep, as memory of ``device``, which only has to reach them.

    Left to itself torch calls them their owner's: then all that is done with another GPU's memory is done in that GPU's
    streams, where it has no order with ours and cannot be part of a graph.
    """
    tensor = torch.empty(0, dtype=torch.uint8, device=device)
    storage = torch._C._construct_storage_from_data_pointer(address, tensor.device, size)
    return tensor.set_(storage)


def _allocate_cuda(size: int, device: torch.device) -> DeviceMemory:
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context that libcuda's functions use
        address, handle = ctypes.c_uint64(), _Handle()
        _call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(-(-size // BLOCK) * BLOCK))
        try:
            _call("cuIpcGetMemHandle", ctypes.byref(handle), address)
        except WireError:
            _call("cuMemFree_v2", address)
            raise
        tensor = tensor_at(address.value, size, device).zero_()
    torch.cuda.synchronize(device)
    return DeviceMemory(tensor, bytes(handle.bytes), lambda: _within(device, "cuMemFree_v2", address))


def _open_cuda(handle: bytes, size: int, device: torch.device) -> DeviceMemory:
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        address, found = ctypes.c_uint64(), ctypes.c_size_t()
        given = _Handle((ctypes.c_ubyte * HANDLE).from_buffer_copy(handle))
        _call("cuIpcOpenMemHandle_v2", ctypes.byref(address), given, ctypes.c_uint(LAZY_PEER_ACCESS))
        memory = DeviceMemory(torch.empty(0), handle, lambda: _within(device, "cuIpcCloseMemHandle", address))
        try:
            _call("cuMemGetAddressRange_v2", None, ctypes.byref(found), address)
            if found.value < size:
                raise WireError(f"the device memory has {found.value} bytes where {size} are needed")
            memory.tensor = tensor_at(address.value, size, device)
        except (WireError, RuntimeError):
            memory.close()
            raise
    return memory


def _within(device: torch.device, name: str, *arguments: Any) -> None:
    """Without waiting for the whole device: another thread may be recording a graph, which that would spoil."""
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()
        _call(name, *arguments)


def _call(name: str, *arguments: Any) -> None:
    """Raises WireError with CUDA's own words."""
    library = ctypes.CDLL("libcuda.so.1")
    status = getattr(library, name)(*arguments)
    if status:
        said = ctypes.c_char_p()
        library.cuGetErrorString(status, ctypes.byref(said))
        raise WireError(f"{name}: {(said.value or b'unknown error').decode()} ({status})")


# -- the interpreter ---------------------------------------------------------------------------------------------------


def _allocate_memfd(size: int) -> DeviceMemory:
    memory, descriptor = SharedMemory.create(_pages(size))
    handle = _DESCRIPTOR.pack(_MAGIC, os.getpid(), descriptor).ljust(HANDLE, b"\0")
    return DeviceMemory(_bytes(memory), handle, lambda: os.close(descriptor))


def _open_memfd(handle: bytes, size: int) -> DeviceMemory:
    magic, process, number = _DESCRIPTOR.unpack_from(handle)
    if magic != _MAGIC or not INTERPRETED:
        raise WireError("the handle is not one of the interpreter's memory")
    try:
        descriptor = os.open(Path("/proc") / str(process) / "fd" / str(number), os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise WireError(f"the gateway's memory cannot be opened: {error.strerror}") from None
    try:
        memory = SharedMemory.attach(descriptor)
    finally:
        os.close(descriptor)
    if memory.size < size:
        raise WireError(f"the memory has {memory.size} bytes where {size} are needed")
    return DeviceMemory(_bytes(memory), handle, lambda: None)


def _bytes(memory: SharedMemory) -> Tensor:
    return torch.from_numpy(memory.array((memory.size,), "u1", 0))


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
