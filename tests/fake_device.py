"""A device that is not the CPU, on the CPU: finds where a tensor of one meets a tensor of the other.

Under `FakeDevice` every tensor that is made on, or moved to, `DEVICE` (a CUDA device by name) is an ordinary CPU tensor
whose storage is remembered. Values, dtypes and gradients are those of the CPU; what would raise on a GPU raises here:
operands on two devices, indices on another device than what they index, `numpy()` of a device tensor, saving one.
What would merely wait for the device - `item()`, `tolist()`, a truth value, an index that is a list - is counted in
`syncs`; values that a copy to the device would widen, which CUDA's does on the CPU before it moves them, in `widened`;
all that `to` moves there in `moved`.

Of memory it knows `free`, which `device_memory` is patched to give, and `fail_above`: a call that makes a tensor of
more values on the device raises torch.OutOfMemoryError, and so do the next `fail_next` that make one which `fail_when`
says is to fail.
"""

import contextlib

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_map

DEVICE = torch.device("cuda", 0)

_WAITS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero"}
_INDEXES = {"__getitem__", "__setitem__"}
_COPIES = {"copy_", "to", "cpu", "type", "set_"}  # between any two devices
# Of the tensor alone: nothing is computed.
_ASKS = {"size", "stride", "dim", "numel", "element_size", "is_floating_point", "data_ptr", "is_contiguous", "shape"}
_ASKS |= {"dtype", "ndim", "layout", "requires_grad", "is_inference", "untyped_storage", "storage_offset", "nbytes"}
_ASKS |= {"is_sparse", "is_quantized", "names", "is_leaf", "is_complex", "_version", "__hash__", "__len__"}


class MixedDevices(AssertionError):
    """Two devices in one call."""


class FakeDevice(TorchFunctionMode):
    """See the module. Used as a context, around all code that has the device."""

    def __init__(self, *, free=80 * 10**9, total=80 * 10**9):
        super().__init__()
        self.free, self.total = free, total
        self.fail_above, self.fail_next, self.fail_when = float("inf"), 0, lambda tensor: True
        self.syncs, self.calls, self.failures, self.largest, self.widened, self.moved = 0, 0, 0, 0, 0, 0
        self._storages = {}

    # -- which tensors are on it --------------------------------------------------------------------------------

    def on(self, tensor):
        """Whether a tensor is on the device."""
        with torch._C.DisableTorchFunction():
            tensor = _unwrapped(tensor)
            if tensor.device.type != "cpu":
                return False
            reference = self._storages.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def _take(self, found):
        def take(value):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                storage = _unwrapped(value).untyped_storage()
                if storage._cdata not in self._storages or self._storages[storage._cdata].expired():
                    self.largest = max(self.largest, value.numel())
                    # The reference keeps the address from being given to another storage.
                    self._storages[storage._cdata] = StorageWeakRef(storage)
            return value

        with torch._C.DisableTorchFunction():
            return tree_map(take, found)

    def _fresh(self, found):
        """Tensors with storages of their own, so that what is tagged is not what it was copied from."""
        with torch._C.DisableTorchFunction():
            return tree_map(lambda value: value.clone() if isinstance(value, torch.Tensor) else value, found)

    # -- calls --------------------------------------------------------------------------------------------------

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", str(func))
        if name == "__get__":
            name = getattr(func.__self__, "__name__", "")
            if name == "device":
                return DEVICE if self.on(args[0]) else func(*args, **kwargs)
            if name in ("is_cuda", "is_cpu"):
                return self.on(args[0]) == (name == "is_cuda")
        if name in _ASKS or func is torch.device:
            return func(*args, **kwargs)
        self.calls += 1
        leaves = [*_leaves(args), *_leaves(kwargs)]
        tensors = [value for value in leaves if isinstance(value, torch.Tensor) and value.device.type != "meta"]
        here = [tensor for tensor in tensors if self.on(tensor)]
        target, given = self._target(name, leaves)
        if given:
            args, kwargs = tree_map(lambda v: torch.device("cpu") if _is_device(v) else v, (args, kwargs))
            kwargs.pop("pin_memory", None)
        if name == "numpy" and here and not (kwargs.get("force") or (len(args) > 1 and args[1])):
            raise TypeError("can't convert a device tensor to numpy")
        if here and (name in _WAITS or (name in _INDEXES and _moves_an_index(args[1]))):
            self.syncs += 1
        if here and name not in _COPIES and name != "numpy":
            self._check(func, name, here, tensors)
        found = func(*args, **kwargs)
        if name == "cpu" or (name == "to" and given and target is not None and target.type == "cpu"):
            return self._fresh(found) if here else found
        if given and target == DEVICE:
            if name == "to" and not here:
                self.moved += found.numel()
                self.widened += found.numel() * (found.dtype.itemsize > args[0].dtype.itemsize)
            self._allocate(found)
            return self._take(self._fresh(found) if not here and tensors else found)
        if here and not (name in ("copy_", "__setitem__") and not self.on(args[0])):
            self._allocate(found)
            return self._take(found)
        return found

    def _target(self, name, leaves):
        """(device asked for, whether one was): of `.to(…)`, `torch.empty(…, device=…)` and their like."""
        asked = [value for value in leaves if _is_device(value)]
        if name in ("cuda",):
            return DEVICE, True
        return (_device(asked[0]), True) if asked else (None, False)

    def _check(self, func, name, here, tensors):
        away = [tensor for tensor in tensors if not self.on(tensor)]
        if name == "__setitem__":  # x[a:b] = y copies between devices, an index of one does not
            own, indices, value = tensors[0], tensors[1:-1], tensors[-1]
            same = all(self.on(index) == self.on(own) for index in indices)
            away = away if not same or (indices and value.dim() and self.on(value) != self.on(own)) else []
        elif name not in ("__getitem__", "index_select", "gather", "take_along_dim"):
            # A CPU scalar may be an operand anywhere, but not an index.
            away = [tensor for tensor in away if tensor.dim() > 0]
        if away:
            raise MixedDevices(
                f"{resolve_name(func) or name}: {[tuple(t.shape) for t in here]} on the device with "
                f"{[tuple(t.shape) for t in away]} on the CPU"
            )

    def _allocate(self, found):
        made = [value for value in _leaves(found) if isinstance(value, torch.Tensor)]
        with torch._C.DisableTorchFunction():
            unlucky = self.fail_next > 0 and any(self.fail_when(tensor) for tensor in made)
        if unlucky or any(tensor.numel() > self.fail_above for tensor in made):
            self.fail_next -= unlucky
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory, for the test")


def _leaves(value):
    """What lists, tuples and dictionaries hold, however deep; pytree's, which knows of all else, takes far longer."""
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in _leaves(part)]
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in _leaves(part)]
    return [value]


def _unwrapped(tensor):
    """Below `vmap` and `grad`, the tensor that has the values."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def _moves_an_index(index):
    """Whether torch makes a tensor of an index and moves it: of a list, or an array, alone or beside slices."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | range) or type(part).__module__ == "numpy" for part in parts)


def _is_device(value):
    if isinstance(value, torch.device):
        return value.type in ("cuda", "cpu")
    return isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")


def _device(value):
    device = torch.device(value)
    return DEVICE if device.type == "cuda" else device


@contextlib.contextmanager
def fake_device(monkeypatch, **options):
    """FakeDevice, with raymerge's questions to the driver answered by it."""
    import raymerge.device as real

    fake = FakeDevice(**options)

    def device_memory(_device):
        return real.DeviceMemory(fake.free, fake.total)

    def streamed(source, spans, device):
        for start, stop in spans:
            yield source[start:stop].to(device)

    def host_buffer(shape, dtype, _device):
        return torch.empty(tuple(shape), dtype=dtype)

    for module in ("forward", "scoring", "tail_states", "tail_loss", "worker"):
        for name, stand_in in (
            ("device_memory", device_memory),
            ("streamed", streamed),
            ("host_buffer", host_buffer),
            ("choose_device", lambda _share="auto": DEVICE),
            ("device_name", lambda _device: "a stand-in"),
        ):
            monkeypatch.setattr(f"raymerge.{module}.{name}", stand_in, raising=False)
    with fake:
        yield fake
