"""One forward pass for all candidates and the base step, as far as they have it in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_compiled_regions, is_compiled_module
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.utils import logging

from meta_trainer.dependence import Call, independent_calls, patched_forwards
from meta_trainer.hypergrad import RandomState

logger = logging.get_logger(__name__)


class SharedForward:
    """Keeps results of submodules from one evaluation of a train batch for the next.

    They are the results of those calls that neither a perturbation nor the meta module changes: all that lies below the
    lowest of them. In the first evaluation these calls run and record a graph for the base step. In the evaluations of
    the other candidates they return what they returned before, and in the base step they return it with its graph, so
    that the backward pass goes all the way down. Random numbers and buffers go on from where each call left them, so
    that all numbers are those of separate evaluations.

    Args:
        device: Whose random numbers a forward pass may draw, besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._plan: tuple[object, tuple[Call, ...]] = (None, ())
        self._num_calls: Counter[nn.Module] = Counter()
        self._start((), ())

    def prepare(
        self,
        model: nn.Module,
        changing: Sequence[Tensor],
        trainable: Sequence[nn.Parameter],
        keep_graph: bool,
        forward_pass: Callable[[], object],
    ) -> None:
        """Get ready for a new batch.

        Args:
            model: The base model.
            changing: The perturbed parameters and those of the meta module.
            trainable: The other parameters that the base step trains, frozen for now.
            keep_graph: Whether a base step is going to use the first evaluation.
            forward_pass: Evaluates the batch once without a trace, to find out what can be shared; called for the first
                batch, and again when the model or the changing parameters are others.
        """
        key = (id(model), *map(id, changing))
        if self._plan[0] != key:
            self._plan = (key, self._find_calls(model, changing, bool(trainable), forward_pass))
        self._start(self._plan[1], trainable if keep_graph else ())

    def clear(self) -> None:
        """Forget the batch."""
        self._start((), ())

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation of the batch for a candidate."""
        if self._results:
            with self._answering(lambda call, run: tree_map_only(Tensor, Tensor.detach, self._replay(call))):
                yield
            return
        try:
            with self._answering(self._record):
                yield
            self._check_recording()
        except BaseException:
            self._results.clear()
            raise

    @contextmanager
    def base_step(self) -> Iterator[None]:
        """Around the base step on the batch, whose own forward pass starts from the recorded graph."""
        with self._answering(lambda call, run: self._replay(call)) if self._results else nullcontext():
            yield

    def _start(self, calls: tuple[Call, ...], trainable: Sequence[nn.Parameter]) -> None:
        self._keep_graph = bool(trainable)
        wanted = {id(parameter) for parameter in trainable}
        self._calls = dict.fromkeys(calls)
        self._trainable = {module: [p for p in module.parameters() if id(p) in wanted] for module, _ in calls}
        self._results: dict[Call, _Result] = {}

    def _find_calls(
        self, model: nn.Module, changing: Sequence[Tensor], narrow: bool, forward_pass: Callable[[], object]
    ) -> tuple[Call, ...]:
        if {id(parameter) for parameter in model.parameters()} <= {id(tensor) for tensor in changing}:
            return ()
        if is_compiled_module(model) or has_compiled_regions(model):
            reason = "it is compiled"
        elif calls := independent_calls(model, changing, forward_pass):
            return calls
        else:
            reason = "a perturbed parameter or the meta module reaches all of it"
        if narrow:
            logger.warning(f"Every candidate of a meta step runs the whole {type(model).__name__}: {reason}.")
        return ()

    @contextmanager
    def _answering(self, answer: Callable[[Call, Callable[[], Any]], Any]) -> Iterator[None]:
        """Let `answer` give the results of the shared calls."""
        self._num_calls.clear()

        def around(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def answered(*args: Any, **kwargs: Any) -> Any:
                call = (module, self._num_calls[module])
                self._num_calls[module] += 1
                run = lambda: forward(*args, **kwargs)  # noqa: E731
                return answer(call, run) if call in self._calls else run()

            return answered

        with patched_forwards(list(self._trainable), around):
            yield

    def _record(self, call: Call, run: Callable[[], Any]) -> Any:
        module, _ = call
        frozen = [parameter for parameter in self._trainable[module] if not parameter.requires_grad]
        try:
            for parameter in frozen:
                parameter.requires_grad_(True)
            with torch.set_grad_enabled(self._keep_graph or torch.is_grad_enabled()):
                output = run()
        finally:
            for parameter in frozen:
                parameter.requires_grad_(False)
        self._results[call] = _Result(
            output=output,
            versions=_versions(output),
            random_state=RandomState.capture([self._device]),
            buffers=[(buffer, buffer.clone()) for buffer in module.buffers()],
            num_calls=self._num_calls.copy(),
        )
        return output

    def _replay(self, call: Call) -> Any:
        result = self._results[call]
        result.random_state.restore()
        for buffer, value in result.buffers:
            # Through `.data`, as the recorded graph may hold the buffer at its present version.
            buffer.data.copy_(value)
        # Calls inside this one are counted, though they are not made.
        self._num_calls.update(result.num_calls - self._num_calls)
        return result.output

    def _check_recording(self) -> None:
        if tuple(self._results) != tuple(self._calls):
            reason = "it does not call the same submodules in every step"
        elif any(_versions(result.output) != result.versions for result in self._results.values()):
            reason = "it changes the output of a submodule in place"
        else:
            return
        logger.warning(f"From now on every candidate of a meta step runs the whole model: {reason}.")
        self._plan = (self._plan[0], ())
        self.clear()


@dataclass(frozen=True)
class _Result:
    """What a call returned, and what it left behind."""

    output: Any
    versions: list[int]
    random_state: RandomState
    buffers: list[tuple[Tensor, Tensor]]
    num_calls: Counter[nn.Module]


def _versions(output: Any) -> list[int]:
    return [leaf._version for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
