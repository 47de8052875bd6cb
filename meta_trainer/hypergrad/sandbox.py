"""The room in which an estimator moves the parameters about: whatever happens inside leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from meta_trainer.hypergrad.displacement import Displacement, add
from meta_trainer.hypergrad.flat_blocks import FlatBlocks, inner_product
from meta_trainer.hypergrad.problem import BilevelProblem
from meta_trainer.hypergrad.random_state import preserved_random_state


@dataclass(frozen=True)
class Validation:
    r"""The validation loss at some point.

    Attributes:
        loss: Scalar.
        theta_grad: Derivatives by theta.
        direct: Derivatives by the meta-parameters, the direct term.
    """

    loss: Tensor
    theta_grad: tuple[Tensor, ...]
    direct: tuple[Tensor, ...]

    def short_step(self, slope: Tensor) -> Tensor:
        """How far to go for a difference quotient: until the loss has changed by a thousandth, to first order.

        Far enough for float32 to tell the losses apart, and near enough for them to be straight in between.

        Args:
            slope: Derivative of the loss along the way, per unit of length.

        Returns:
            The length, between 1e-6 and 1e-2.
        """
        return (1e-3 * self.loss.abs() / slope).nan_to_num(nan=0.0).clamp(1e-6, 1e-2).to(slope)


class Sandbox:
    """Evaluates the losses of a problem at displaced parameters, and gives everything back on leaving.

    Every evaluation replays the random state found on entering and starts from the state tensors found on entering, so
    that two evaluations differ by the parameters alone: the same dropout masks, the same running statistics.

    Parameters are written through ``.data``, which leaves their version counters alone: a graph recorded at the
    original point stays usable once the parameters are back there.
    """

    def __init__(self, problem: BilevelProblem) -> None:
        self.problem = problem
        self.blocks = FlatBlocks(problem.theta)
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        """Copy what may change: parameters, state, random numbers, ``requires_grad`` and the grad mode."""
        problem = self.problem
        self._data = [t.data for t in problem.theta]
        self._versions = self._present_versions()
        # Copied by the first move, so that what comes before it needs no room for the copy.
        self._origin = [t.clone() for t in self._data] if problem.writes_theta else None
        self._last_move: tuple[Displacement, Callable[[], Iterable[Tensor]]] | None = None
        self._state = [t.detach().clone() for t in problem.state]
        with ExitStack() as stack:
            devices = {t.device for t in (*problem.theta, *problem.meta_params)}
            self._random_state = stack.enter_context(preserved_random_state(devices))
            for tensor in (*problem.theta, *problem.meta_params):
                stack.callback(tensor.requires_grad_, tensor.requires_grad)
            stack.callback(self._restore_state)
            stack.callback(self.move_back)
            stack.enter_context(torch.enable_grad())
            for tensor in problem.meta_params:
                tensor.requires_grad_(True)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        """Give everything back, whether or not an exception is under way."""
        self._cleanup.close()

    @torch.no_grad()
    def move_to(self, displacement: Iterable[Tensor]) -> None:
        """Set the parameters to their original values plus a displacement, given by its flat blocks."""
        if self._origin is None:
            self._origin = [t.clone() for t in self._data]
        for block, step in zip(self.blocks, displacement, strict=True):
            add(block, self._data, self._origin, step)

    @torch.no_grad()
    def move_back(self, displacement: Iterable[Tensor] = ()) -> None:
        """Set the parameters to their original values.

        Args:
            displacement: The flat blocks of that of :meth:`settle_at`, where the caller goes through them anyway.
        """
        if self._last_move is not None:
            move, steps = self._last_move
            move.undo(displacement or steps())
            self._last_move = None
        for _ in displacement:
            pass
        if self._origin is not None:
            torch._foreach_copy_(self._data, self._origin)

    @torch.no_grad()
    def settle_at(self, displacement: Callable[[], Iterable[Tensor]]) -> None:
        """Move for the last time, and drop the copy of the original values: what follows needs the memory.

        Args:
            displacement: Gives the flat blocks of the displacement, the same at every call.
        """
        if self._origin is None or self._versions != self._present_versions():
            # A forward pass that writes into the parameters (`Embedding(max_norm=...)`) would spoil the way back.
            self.move_to(displacement())
            return
        move = Displacement(self.blocks, self._data, self._origin, displacement())
        self._last_move, self._origin = (move, displacement), None

    def slope(self, vector: Sequence[Tensor], displacement: Sequence[Tensor] | None) -> Tensor:
        """Inner product over theta; zero for no displacement."""
        if displacement is None:
            return torch.zeros((), device=vector[0].device)
        return inner_product(self.blocks.flatten(vector), self.blocks.flatten(displacement))

    def differentiate_theta(self, needed: bool) -> None:
        """Record graphs through the parameters only while their gradient is needed."""
        for tensor in self.problem.theta:
            tensor.requires_grad_(needed)

    def train_loss(self) -> Tensor:
        """Training loss at the present parameters."""
        return self._evaluate("train_loss", self.problem.train_loss)

    def look_ahead(self, displacement: Sequence[Tensor] | None) -> Validation:
        """Validation loss at a point near the original parameters, and its derivatives, there and back.

        Args:
            displacement: Of the point, aligned with theta; None for the original parameters.

        Returns:
            Loss and derivatives by theta are averages over the replicas, so that all move along the same direction.
        """
        if displacement is not None:
            self.move_to(self.blocks.flatten(displacement))
        validation = self.validate()
        if displacement is not None:
            self.move_back()
        mean = self.problem.mean
        return replace(
            validation, loss=mean(validation.loss), theta_grad=tuple(mean(grad) for grad in validation.theta_grad)
        )

    def validate(self) -> Validation:
        """Validation loss at the present parameters, and its derivatives."""
        theta = self.problem.theta
        self.differentiate_theta(True)
        loss = self._evaluate("val_loss", self.problem.val_loss)
        grads = self.gradient(loss, (*theta, *self.problem.meta_params))
        return Validation(loss.detach(), grads[: len(theta)], grads[len(theta) :])

    def evaluate_candidates(
        self, displacements: Iterable[Iterable[Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor | None, ...]]]:
        """Training loss at every displacement, ``[K]``, and what :meth:`meta_gradient` gives for it."""
        self.differentiate_theta(False)
        losses, meta_grads = [], []
        for displacement in displacements:
            self.move_to(displacement)
            loss = self.train_loss()
            meta_grads.append(self.meta_gradient(loss))
            losses.append(loss.detach())
            del loss  # and its graph, before the next one
        return torch.stack(losses), meta_grads

    def gradient(
        self, loss: Tensor, inputs: Sequence[Tensor], create_graph: bool = False, retain_graph: bool | None = None
    ) -> tuple[Tensor, ...]:
        """Gradient of `loss`, zero for what does not reach it; no ``.grad`` field is touched."""
        if not loss.requires_grad:
            return tuple(torch.zeros_like(t) for t in inputs)
        scale = self.problem.loss_scale
        scaled = loss if scale is None else loss * scale
        grads = torch.autograd.grad(
            scaled,
            inputs,
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
            materialize_grads=True,
        )
        return grads if scale is None else tuple(grad / scale for grad in grads)

    def meta_gradient(self, loss: Tensor) -> tuple[Tensor | None, ...]:
        """Derivatives of a training loss by :attr:`meta_inputs`; None for no influence."""
        if not loss.requires_grad:
            return (None,) * len(self.meta_inputs)
        # Intermediates may hang on the same graph.
        retain = len(self.problem.intermediates) > 0
        return self._pull_back(loss, torch.ones_like(loss), self.meta_inputs, retain_graph=retain)

    def hypergradient(
        self, direct: Sequence[Tensor], coefficients: Tensor, meta_grads: Sequence[Sequence[Tensor | None]]
    ) -> tuple[Tensor, ...]:
        r"""Sum up :math:`\partial\ell_V/\partial\lambda + \sum_k c_k\,\partial\ell_k/\partial\lambda`.

        Args:
            direct: The first term, aligned with `meta_params`.
            coefficients: ``[K]``.
            meta_grads: What :meth:`meta_gradient` gave for each candidate.
        """
        total = [_weighted_sum(coefficients, grads) for grads in zip(*meta_grads, strict=True)]
        # From the last intermediate on, each passes its derivative on to what it was computed from.
        for _, value in reversed(self.problem.intermediates):
            cotangent = total.pop()
            if cotangent is not None:
                passed_on = self._pull_back(value, cotangent, self.meta_inputs[: len(total)], retain_graph=True)
                total = [_sum(terms) for terms in zip(total, passed_on, strict=True)]
        return tuple(first if rest is None else first + rest for first, rest in zip(direct, total, strict=True))

    def train_grads(self, meta_grads: Sequence[Sequence[Tensor | None]]) -> tuple[Tensor, ...]:
        """Mean over the candidates of the training loss's derivatives by the meta-parameters, if it is asked for."""
        if not self.problem.with_train_grads:
            return ()
        zeros = [torch.zeros_like(t) for t in self.problem.meta_params]
        return self.hypergradient(zeros, zeros[0].new_full((len(meta_grads),), 1 / len(meta_grads)), meta_grads)

    @property
    def meta_inputs(self) -> tuple[Tensor, ...]:
        """The meta-parameters and the leaves of the intermediates."""
        return (*self.problem.meta_params, *(leaf for leaf, _ in self.problem.intermediates))

    def _pull_back(
        self, output: Tensor, cotangent: Tensor, inputs: Sequence[Tensor], retain_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        scale = 1.0 if self.problem.loss_scale is None else self.problem.loss_scale
        scaled = (cotangent * scale).to(output.dtype)
        grads = torch.autograd.grad(output, inputs, scaled, retain_graph=retain_graph, allow_unused=True)
        # The candidates' derivatives nearly cancel: no precision may be lost on the way to their sum.
        return tuple(None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) / scale for g in grads)

    def _evaluate(self, name: str, loss_function: Callable[[], Tensor]) -> Tensor:
        self._random_state.restore()
        self._restore_state()
        loss = loss_function()
        if self._origin is None and self._last_move is None and self._versions != self._present_versions():
            raise ValueError(
                f"`{name}` writes into theta, which could not be given back. Set `writes_theta` of the problem."
            )
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"`{name}` should return a scalar tensor, got {found}. Average over the batch first.")
        if not loss.is_floating_point():
            raise ValueError(f"`{name}` should return a floating-point tensor, got {loss.dtype}.")
        # Low precision would round the differences between candidates away.
        return loss.reshape(()).to(torch.promote_types(loss.dtype, torch.float32))

    def _present_versions(self) -> list[int]:
        return [t._version for t in self.problem.theta]

    def _restore_state(self) -> None:
        with torch.no_grad():
            for tensor, original in zip(self.problem.state, self._state, strict=True):
                tensor.data.copy_(original)


def _weighted_sum(weights: Tensor, tensors: Sequence[Tensor | None]) -> Tensor | None:
    return _sum([None if t is None else w.to(t) * t for w, t in zip(weights, tensors, strict=True)])


def _sum(terms: Sequence[Tensor | None]) -> Tensor | None:
    present = [term for term in terms if term is not None]
    return sum(present[1:], start=present[0]) if present else None
