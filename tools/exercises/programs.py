"""A Triton kernel without Triton: its programs one after the other, in PyTorch, with every place watched.

    play_kernel(my_kernel, (num_tokens, 2), x, out, 100, 64)      as my_kernel[num_tokens, 2](x, out, 100, 64) on a GPU

It shows what a kernel reads and writes, and not what a compiler makes of it: that is tested on GPUs.
"""

import inspect
import itertools
import math
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tools.exercises.verdict import NotYet, describe_error


class Pointer:
    """Places in a tensor, as a kernel's argument stands for them: pointer + offsets."""

    def __init__(self, name: str, flat: Tensor, owner: Tensor, at: Tensor | int = 0) -> None:
        self.name, self.flat, self.owner, self.at = name, flat, owner, at
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, offsets: Tensor | int) -> "Pointer":
        return Pointer(self.name, self.flat, self.owner, self.at + offsets)

    def places(self, mask: Tensor | bool | None, does: str) -> tuple[Tensor, Tensor]:
        """The places that are meant, and which of them the mask lets through. NotYet outside of the tensor."""
        mask = torch.as_tensor(True if mask is None else mask)
        at, mask = torch.broadcast_tensors(torch.as_tensor(self.at), mask)
        for place in at[mask & ((at < 0) | (at >= len(self.flat)))].tolist():
            there = f"place {place} of {self.name}, which has {len(self.flat)}"
            raise NotYet(f"{does} {there}: mask what sticks out")
        return at, mask


class PlayedLanguage:
    """The part of `triton.language` that a kernel of rows needs. One program at a time: `program` is its number."""

    constexpr, float32, int32, int64, bfloat16 = int, torch.float32, torch.int32, torch.int64, torch.bfloat16
    static_range = staticmethod(range)
    sigmoid, exp, where, maximum = torch.sigmoid, torch.exp, torch.where, torch.maximum
    sum, cumsum, zeros = torch.sum, torch.cumsum, torch.zeros
    program: tuple[int, ...] = ()
    number = 0  # of this program among all

    def program_id(self, axis: int) -> Tensor:
        return torch.tensor(self.program[axis])

    def arange(self, start: int, end: int) -> Tensor:
        if end <= start or (end - start) & (end - start - 1):
            raise NotYet(f"arange({start}, {end}): Triton wants a power of two")
        return torch.arange(start, end)

    def load(self, pointer: Pointer, mask: Tensor | None = None, other: float | None = None) -> Tensor:
        at, mask = pointer.places(mask, f"program {self.program} reads")
        nothing = torch.nan if pointer.flat.is_floating_point() else -(2**31)  # Triton promises nothing here
        found = torch.full(at.shape, nothing if other is None else other, dtype=pointer.flat.dtype)
        found[mask] = pointer.flat[at[mask]]
        return found

    def store(self, pointer: Pointer, value: Tensor | float, mask: Tensor | None = None) -> None:
        at, mask = pointer.places(mask, f"program {self.program} writes")
        value = torch.as_tensor(value).to(pointer.flat.dtype).broadcast_to(at.shape)
        at, value = at[mask], value[mask]
        for other in at[(pointer.owner[at] >= 0) & (pointer.owner[at] != self.number)].tolist():
            place = f"place {other} of {pointer.name}"
            raise NotYet(f"program {self.program} writes {place}, where another program has written")
        pointer.owner[at] = self.number
        pointer.flat[at] = value


def in_language(function: FunctionType, language: PlayedLanguage) -> FunctionType:
    """The function with `language` for its `tl`, and so the kernels that it calls."""
    played: dict[str, Any] = {"tl": language}
    for name in function.__code__.co_names:
        kernel = function.__globals__.get(name)
        kernel = getattr(kernel, "fn", kernel)
        if isinstance(kernel, FunctionType) and "tl" in kernel.__code__.co_names and kernel is not function:
            played[name] = in_language(kernel, language)
    return FunctionType(function.__code__, function.__globals__ | played)


def play_kernel(kernel: Callable, grid: tuple[int, ...], *arguments: Any) -> int:
    """Runs every program of a grid, in place on the tensors given -> how many they were.

    kernel: a function that uses `tl`, as it is or after triton.jit. arguments: contiguous tensors and numbers. NotYet
    where a program reads or writes outside of a tensor, writes where another one has written, or fails.
    """
    function = getattr(kernel, "fn", kernel)
    if not isinstance(function, FunctionType):
        raise NotYet(f"this wants a kernel, a function, and got {type(kernel).__name__}")
    language = PlayedLanguage()
    played = in_language(function, language)
    try:
        given = inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise NotYet(f"the kernel takes other arguments: {error}") from None
    for name, value in given.arguments.items():
        if isinstance(value, Tensor):
            flat = value.view(-1)
            given.arguments[name] = Pointer(name, flat, torch.full((len(flat),), -1))
    for number, program in enumerate(itertools.product(*map(range, grid))):
        language.number, language.program = number, program
        try:
            played(*given.args)
        except NotYet:
            raise
        except Exception as error:
            raise NotYet(describe_error(error, played)) from None
    return math.prod(grid)
