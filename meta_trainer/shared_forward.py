"""One forward pass for all candidates and the base step, as far as they have it in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import has_compiled_regions, is_compiled_module
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers.utils import logging

from meta_trainer.dependence import Call, independent_calls, patched_forwards, version
from meta_trainer.frozen import frozen, thawed
from meta_trainer.hypergrad import RandomState

logger = logging.get_logger(__name__)

Answer = Callable[[Call, Callable[[], Any]], Any]
"""Gives the result of a call; its second argument makes the call."""


@dataclass(frozen=True)
class _Plan:
    """Which calls are shared, each in the order in which they end.

    Attributes:
        by_candidates: Those that no perturbation reaches: they do the same for every candidate.
        by_base_step: Those that the meta module does not reach either: they do the same in the base step, too.
        trace: Of the evaluation that the plan was made from.
    """

    by_candidates: tuple[Call, ...] = ()
    by_base_step: tuple[Call, ...] = ()
    trace: tuple[object, ...] = ()


@dataclass(frozen=True)
class _Result:
    """What a call returned, and what it left behind.

    Attributes:
        output: With its graph.
        leaves: The output without a graph, for candidates.
        versions: Of the output's tensors, when it was returned.
        random_state: After the call.
        buffers: Those of the module, with their values after the call.
        num_calls: Calls of every module up to then.
    """

    output: Any
    leaves: Any
    versions: list[int]
    random_state: RandomState
    buffers: list[tuple[Tensor, Tensor]]
    num_calls: Counter[nn.Module]


class SharedForward:
    """Runs that part of a train batch's forward pass once which several evaluations of the batch have in common.

    What lies below the lowest perturbed parameter is the same for all candidates: they start from its results, and what
    the meta module did to these is differentiated once for all. What also lies below the lowest door of the meta module
    is the same in the base step, which starts from its results and their graph. Random numbers and buffers go on from
    where the shared calls left them, so that all numbers are those of separate evaluations.

    Args:
        device: Whose random numbers a forward pass may draw, besides the CPU's.
        compiled: Whether the base step runs a compiled model, which starts from nobody's results.

    Attributes:
        intermediates: `BilevelProblem.intermediates` of the present batch, known after the first evaluation.
    """

    def __init__(self, device: torch.device, compiled: bool = False) -> None:
        self._device, self._compiled = device, compiled
        self._key: object = None
        self._plan = _Plan()
        self.intermediates: list[tuple[Tensor, Tensor]] = []
        self.clear()

    def clear(self) -> None:
        """Forget the batch."""
        self._num_calls: Counter[nn.Module] = Counter()
        self._modules: Sequence[nn.Module] = ()
        self._trainable: Sequence[nn.Parameter] = ()
        self._results: dict[Call, _Result] = {}
        self.intermediates.clear()

    def prepare(
        self,
        model: nn.Module,
        theta: Sequence[nn.Parameter],
        meta_params: Sequence[nn.Parameter],
        trainable: Sequence[nn.Parameter],
        forward_pass: Callable[[], object],
    ) -> None:
        """Get ready for a new batch.

        Args:
            model: The base model.
            theta: The perturbed parameters.
            meta_params: Those of the meta module.
            trainable: The other parameters, frozen for now, that a base step on this batch is going to train; none if
                there is no such step.
            forward_pass: Evaluates the batch without a trace, to find out what can be shared. Called for the first
                batch, and again when the model or the parameters are others.
        """
        self.clear()
        key = (id(model), *map(id, theta), *map(id, meta_params))
        if self._key != key:
            self._key, self._plan = key, _make_plan(model, theta, meta_params, forward_pass, self._compiled)
        self._modules, self._trainable = list(model.modules()), trainable

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Around an evaluation of the batch: the first one records, later ones start from what it recorded."""
        if self._results:
            with self._answering(self._plan.by_candidates, lambda call, run: _rebuilt(self._replay(call).leaves)):
                yield
            return
        if not self._plan.by_candidates:
            yield
            return
        try:
            with self._recording() as trace:
                yield
        except BaseException:
            self.clear()
            raise
        self._check_recording(trace)

    @contextmanager
    def base_step(self) -> Iterator[None]:
        """Around the base step on the batch; keeps no more than it needs."""
        self._results = {call: result for call, result in self._results.items() if call in self._plan.by_base_step}
        self.intermediates.clear()
        with self._answering(tuple(self._results), lambda call, run: self._replay(call).output):
            yield

    @contextmanager
    def _recording(self) -> Iterator[list[object]]:
        """Keep the results of all shared calls; gives the trace of all calls."""
        calls = (*self._plan.by_candidates, *self._plan.by_base_step)
        # The model's own operators between two shared calls belong to the graph of the base step, too.
        with torch.enable_grad(), _traced(self._modules) as trace, ExitStack() as self._base_step_graph:
            if self._plan.by_base_step:
                self._base_step_graph.enter_context(thawed(self._trainable))
            with self._answering(calls, self._record):
                yield trace

    def _check_recording(self, trace: Sequence[object]) -> None:
        if tuple(trace) != self._plan.trace:
            reason = "it does not call the same submodules in every step"
        elif any(_versions(result.output) != result.versions for result in self._results.values()):
            reason = "it changes the output of a submodule in place"
        else:
            return
        # The derivatives of this evaluation need its intermediates all the same.
        self._results, self._plan = {}, _Plan()
        _warn(reason)

    @contextmanager
    def _answering(self, calls: Sequence[Call], answer: Answer) -> Iterator[None]:
        """Let `answer` give the results of `calls`."""
        self._num_calls.clear()

        def around(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def answered(*args: Any, **kwargs: Any) -> Any:
                call = (module, self._num_calls[module])
                self._num_calls[module] += 1
                run = lambda: forward(*args, **kwargs)  # noqa: E731
                return answer(call, run) if call in calls else run()

            return answered

        with patched_forwards([module for module, _ in calls], around):
            yield

    def _record(self, call: Call, run: Callable[[], Any]) -> Any:
        for_base_step = call in self._plan.by_base_step
        output = run()
        leaves = tree_map_only(Tensor, Tensor.detach if for_base_step else self._leaf, output)
        self._results[call] = _Result(
            output=_rebuilt(output),
            leaves=leaves,
            versions=_versions(output),
            random_state=RandomState.capture([self._device]),
            buffers=[(buffer, buffer.clone()) for buffer in call[0].buffers()],
            num_calls=self._num_calls.copy(),
        )
        if for_base_step and call == self._plan.by_base_step[-1]:
            self._base_step_graph.close()
        # The graph of the base step goes through all of its calls, that of a candidate starts above them.
        return output if for_base_step else _rebuilt(leaves)

    def _leaf(self, value: Tensor) -> Tensor:
        if not value.requires_grad:
            return value.detach()
        leaf = value.detach().requires_grad_()
        self.intermediates.append((leaf, value))
        return leaf

    def _replay(self, call: Call) -> _Result:
        result = self._results[call]
        result.random_state.restore()
        for buffer, value in result.buffers:
            # Through `.data`, as the recorded graph may hold the buffer at its present version.
            buffer.data.copy_(value)
        # Calls inside this one count, though they are not made.
        self._num_calls = result.num_calls.copy()
        return result


def _make_plan(
    model: nn.Module,
    theta: Sequence[nn.Parameter],
    meta_params: Sequence[nn.Parameter],
    forward_pass: Callable[[], object],
    compiled: bool,
) -> _Plan:
    if {id(parameter) for parameter in model.parameters()} <= {id(parameter) for parameter in theta}:
        return _Plan()
    if compiled or is_compiled_module(model) or has_compiled_regions(model):
        _warn("it is compiled")
        return _Plan()
    with _traced(list(model.modules())) as trace, frozen(meta_params):
        by_candidates = independent_calls(model, theta, forward_pass)
    if not by_candidates:
        _warn("perturbed parameters are at work from its beginning on")
        return _Plan()
    return _Plan(by_candidates, independent_calls(model, [*theta, *meta_params], forward_pass), tuple(trace))


@contextmanager
def _traced(modules: Sequence[nn.Module]) -> Iterator[list[object]]:
    """The calls of modules, in order, and how many hooks these have."""
    trace: list[object] = []

    def around(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def traced(*args: Any, **kwargs: Any) -> Any:
            trace.append((module, len(module._forward_pre_hooks), len(module._forward_hooks)))
            return forward(*args, **kwargs)

        return traced

    with patched_forwards(modules, around):
        yield trace


def _rebuilt(output: Any) -> Any:
    """The same tensors in containers of their own, as a model may put other things into those it got."""
    return tree_map(lambda leaf: leaf, output)


def _versions(output: Any) -> list[int]:
    return [version(leaf) for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _warn(reason: str) -> None:
    logger.warning(f"Every candidate of a meta step runs the whole base model: {reason}.")
