"""An accelerator made of CPU memory: its tensors say `vacc:0`, and refuse to meet those of the CPU as those of a GPU do.

Every tensor of it holds one of the CPU, and every operation on it runs there, by torch's hooks for backends written in Python.
`register` adds it to the process for good, and torch then takes it for the accelerator of the machine. So the tests that need it
run in a process of their own: see tests/test_devices.py.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "vacc"
CPU = torch.device("cpu")
CROSSING = {"aten::copy_", "aten::_to_copy", "aten::_copy_from"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
NO_SCALARS = {"aten::cat", "aten::stack"}  # elsewhere a number may stay on the CPU, if it is not written to
FACTORIES = ("arange", "eye", "linspace", "logspace", "randperm")  # torch would let their results grow in their place
WITHOUT_DOUBLE = [False]  # whether the accelerator has no float64, as Apple's has none

LIBRARIES: list[torch.library.Library] = []  # the hooks live as long as these


class Virtual(torch.Tensor):
    """A tensor on the accelerator."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Virtual":
        options: dict[str, Any] = dict(strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype)
        if WITHOUT_DOUBLE[0] and held.dtype == torch.float64:
            raise TypeError(f"the accelerator {NAME} has no float64.")
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=torch.device(NAME, 0), **options)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(options.pop("device", self.device))

    def tolist(self) -> Any:
        return self.held.tolist()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_lists_as_tensors(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_lists_as_tensors(index), value)

    def __repr__(self, **_: Any) -> str:
        return f"virtual({self.held!r})"

    def __format__(self, form: str) -> str:
        return format(self.held.detach(), form)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        rebuild: Any = torch._utils._rebuild_device_tensor_from_cpu_tensor
        return rebuild, (self.held.detach(), self.dtype, NAME, self.requires_grad)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Virtual":
        if id(self) not in memo:
            made = self.detach().clone().requires_grad_(self.requires_grad)
            made.__dict__ |= {key: value for key, value in self.__dict__.items() if key != "held"}  # a parameter is one
            made.grad = None if self.grad is None else self.grad.clone()
            memo[id(self)] = made
        return memo[id(self)]

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: "Virtual") -> None:
        super(Virtual, type(self)).data.__set__(self, value)  # pyright: ignore
        self.held = value.held


def _lists_as_tensors(index: Any) -> Any:
    """Return an index with tensors of the CPU in place of lists, of which torch would make tensors without calling a hook."""
    if isinstance(index, tuple):
        return tuple(map(_lists_as_tensors, index))
    return torch.tensor(list(index)) if isinstance(index, list | range) else index


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on what its tensors hold, and say where the result is."""
    virtual = any(isinstance(leaf, Virtual) for leaf in tree_leaves((args, kwargs)))
    device = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    target = CPU if device is None and not virtual else device or torch.device(NAME)
    check(func, args, kwargs, target)
    named = {key: False if key == "pin_memory" else CPU if key == "device" else value for key, value in kwargs.items()}
    on_cpu, by_name = tree_map(lambda leaf: leaf.held if isinstance(leaf, Virtual) else leaf, (args, named))
    with torch._C._DisableTorchDispatch():
        out = func(*on_cpu, **by_name)
        if torch.Tag.inplace_view in func.tags and virtual:
            func(*args, **kwargs)  # the sizes of the tensor itself change too
    written = [argument for argument in _written(func, args, kwargs) if isinstance(argument, torch.Tensor)]
    for tensor in written:
        if isinstance(tensor, Virtual) and tensor.shape != tensor.held.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor in its place.")
    if written and isinstance(out, torch.Tensor):
        return written[0]
    if target.type == "cpu":
        return out
    wrap = lambda leaf: Virtual(leaf) if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Virtual) else leaf  # noqa: E731
    return tree_map(wrap, out)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that an operation writes to."""
    declared = [(a.name, a.alias_info is not None and a.alias_info.is_write) for a in func._schema.arguments]
    by_name = dict(zip([name for name, _ in declared], args, strict=False)) | kwargs
    return [by_name[name] for name, is_written in declared if is_written and name in by_name]


def check(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.device) -> None:
    """Refuse what a GPU refuses: tensors of two devices, and a generator of the CPU."""
    name, checked = func._schema.name, (args, kwargs)
    generator = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Generator)), None)
    if generator is not None and target.type == NAME and generator.device.type != NAME:
        raise RuntimeError(f"Expected a {NAME!r} device type for generator but found {generator.device.type!r}")
    if name in CROSSING or target.type != NAME:
        return
    if name in INDEXING and isinstance(args[0], Virtual):
        checked = args[2:3]  # positions may be of the CPU
    written = {id(leaf) for leaf in tree_leaves(_written(func, args, kwargs))}
    for leaf in tree_leaves(checked):
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, Virtual):
            if leaf.dim() == 0 and id(leaf) not in written and name not in NO_SCALARS:
                continue
            raise RuntimeError(
                f"Expected all tensors to be on one device, got {NAME}:0 and cpu {tuple(leaf.shape)}: {func}"
            )


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of the module of a device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()  # random numbers are drawn on the CPU

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def memory_allocated(self, device: Any = None) -> int:
        return 0


def _move_after(build: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Let a constructor make a tensor of the accelerator on the CPU first; torch calls no hook in it."""

    @functools.wraps(build)
    def made(*args: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return build(*args, **options) if device is None else build(*args, device=device, **options)
        return build(*args, **options).to(device)

    return made


@functools.cache
def register() -> torch.device:
    """Add the accelerator to this process, and return its device."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    call = lambda op, *args, **kwargs: run(op, args, kwargs)  # noqa: E731
    LIBRARIES.append(torch.library.Library("_", "IMPL"))
    LIBRARIES[-1].fallback(call, "PrivateUse1")
    LIBRARIES[-1].fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")  # it casts nothing
    LIBRARIES.append(torch.library.Library("aten", "IMPL"))
    for operation in (getattr(torch.ops.aten, name) for name in FACTORIES):
        for overload in (getattr(operation, name) for name in operation.overloads() if "out" not in name):
            LIBRARIES[-1].impl(overload, functools.partial(call, overload), "PrivateUse1")
    torch.tensor, torch.as_tensor = _move_after(torch.tensor), _move_after(torch.as_tensor)
    torch.__future__.set_swap_module_params_on_conversion(True)  # a moved parameter stays the same object, as on a GPU
    return torch.device(NAME, 0)


@contextmanager
def without_double() -> Iterator[None]:
    """Take float64 from the accelerator inside the block."""
    WITHOUT_DOUBLE[0] = True
    try:
        yield
    finally:
        WITHOUT_DOUBLE[0] = False
