"""Which calls of submodules, in a forward pass, do not depend on given tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

Call = tuple[nn.Module, int]
"""A module and the ordinal of one of its calls within a forward pass, counted from 0."""


def independent_calls(
    model: nn.Module, sources: Sequence[Tensor], forward_pass: Callable[[], object]
) -> tuple[Call, ...]:
    """Find the calls whose results stay the same when `sources` change, by following the data through every operator.

    Only calls of modules that own parameters count, and of nested ones the outermost. A call is left out where giving
    its output again would not stand for making it: hooks run inside it, or its output is changed in place later on, or
    it changes its arguments, attributes or the buffers that a backward pass may read, or its output cannot be looked
    into.

    Args:
        model: What `forward_pass` runs.
        sources: The tensors that may change. No other parameter requires a gradient.
        forward_pass: Runs the model once. The effects on buffers and random numbers are the caller's to undo.

    Returns:
        The calls in the order in which they end.
    """
    tracker = _Tracker(sources)
    with patched_forwards(list(model.modules()), tracker.observe), _ReadByPython(tracker), tracker:
        forward_pass()
    return tracker.outermost_independent_calls()


@contextmanager
def patched_forwards(
    modules: Sequence[nn.Module], around: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Put ``around(module, forward)`` in the place of each module's `forward` for a while.

    The hooks of a module run outside of it, as they do with its own `forward`.
    """
    # Others may have put a function of their own there, as accelerate does for mixed precision.
    instance_forwards = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module in instance_forwards:
            module.forward = around(module, module.forward)
        yield
    finally:
        for module, forward in instance_forwards.items():
            if forward is not None:
                module.forward = forward
            else:
                module.__dict__.pop("forward", None)


@dataclass(frozen=True)
class _FinishedCall:
    """A call whose operators read nothing that depends on the sources.

    Attributes:
        call: Which.
        first_inner: Position of the first call inside it in the list of finished calls.
        output: The tensors that it returned.
        versions: Theirs when it returned.
    """

    call: Call
    first_inner: int
    output: list[Tensor]
    versions: list[int]


class _ReadByPython(TorchFunctionMode):
    """Notices numbers that reach Python past the dispatcher."""

    def __init__(self, tracker: _Tracker) -> None:
        super().__init__()
        self._tracker = tracker

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__):
            self._tracker.python_reads(args)
        return func(*args, **(kwargs or {}))


class _Tracker(TorchDispatchMode):
    """Marks what is computed from the sources, and counts the operators that read it."""

    def __init__(self, sources: Sequence[Tensor]) -> None:
        super().__init__()
        self._dependent = WeakIdKeyDictionary()
        self._num_dependent_operations = 0
        self._control_flow_depends = False
        self._num_calls: Counter[nn.Module] = Counter()
        self._finished: list[_FinishedCall] = []
        for source in sources:
            self._mark(source)

    def observe(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward function of `module`, watched."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            call = (module, self._num_calls[module])
            self._num_calls[module] += 1
            operations, first_inner = self._num_dependent_operations, len(self._finished)
            reads_dependent = self._any_dependent(tuple(module.buffers()))
            before = _traces(module, args, kwargs)
            output = forward(*args, **kwargs)
            if module._backward_hooks or module._backward_pre_hooks:
                # They tie the gradient of the output to that of the input: no graph may start in between.
                del self._finished[first_inner:]
            if self._num_dependent_operations != operations:
                for buffer in module.buffers(recurse=False):
                    # Kernels of batch normalisation do not say that they change their running statistics.
                    self._mark(buffer)
            elif (
                not (reads_dependent or self._any_dependent(output))
                and _is_plain((args, kwargs, output))
                and _traces(module, args, kwargs) == before
            ):
                tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
                self._finished.append(_FinishedCall(call, first_inner, tensors, [version(t) for t in tensors]))
            return output

        return watched

    def python_reads(self, tree: Any) -> None:
        """A number that Python reads may decide on everything that follows."""
        self._control_flow_depends |= self._any_dependent(tree)

    def outermost_independent_calls(self) -> tuple[Call, ...]:
        """Of the calls that may be left out, those that are not inside another one."""
        chosen: dict[int, Call] = {}
        for position, finished in enumerate(self._finished):
            unchanged = [version(t) for t in finished.output] == finished.versions
            if unchanged and _may_be_skipped(finished.call[0]):
                chosen = {p: call for p, call in chosen.items() if p < finished.first_inner}
                chosen[position] = finished.call
        return tuple(chosen.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        depends = self._control_flow_depends or self._any_dependent((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if depends:
            self._num_dependent_operations += 1
            leaves = tree_leaves(result)
            # So may a shape.
            self._control_flow_depends |= torch.Tag.dynamic_output_shape in func.tags or any(
                leaf is not None and not isinstance(leaf, Tensor) for leaf in leaves
            )
            for leaf in (*leaves, *_written(func, args, kwargs or {})):
                if isinstance(leaf, Tensor):
                    self._mark(leaf)
        return result

    def _mark(self, tensor: Tensor) -> None:
        if tensor.layout == torch.strided:
            self._dependent[tensor.untyped_storage()] = True

    def _any_dependent(self, tree: Any) -> bool:
        # Autograd also sees through kernels that bypass the dispatcher.
        return any(
            leaf.requires_grad or leaf.layout != torch.strided or leaf.untyped_storage() in self._dependent
            for leaf in tree_leaves(tree)
            if isinstance(leaf, Tensor)
        )


def version(tensor: Tensor) -> int:
    """How often the tensor was changed in place, where that is known."""
    return 0 if tensor.is_inference() else tensor._version


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator changes."""
    written = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.is_write:
            written += tree_leaves(args[position] if position < len(args) else kwargs.get(argument.name))
    return written


def _traces(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[int, int]]:
    """What a call of `module` changes besides its result if it changes anything."""
    attributes = [value for m in module.modules() for value in vars(m).values() if isinstance(value, Tensor)]
    buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
    things = [*tree_leaves((args, kwargs)), *attributes, *buffers]
    return [(id(thing), version(thing) if isinstance(thing, Tensor) else 0) for thing in things]


_PLAIN = (Tensor, bool, int, float, str, torch.dtype, torch.device, type(None))


def _is_plain(tree: Any) -> bool:
    """Whether there is nothing but containers that can be looked into, and values."""
    return all(isinstance(leaf, _PLAIN) for leaf in tree_leaves(tree))


def _may_be_skipped(module: nn.Module) -> bool:
    if next(module.parameters(), None) is None or module._backward_hooks or module._backward_pre_hooks:
        return False
    inner = (submodule for submodule in module.modules() if submodule is not module)
    return not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in inner
    )
