"""The room in which an estimator moves the parameters about: whatever happens inside leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from meta_trainer.hypergrad.displacement import Displacement, add
from meta_trainer.hypergrad.flat_blocks import FlatBlocks
from meta_trainer.hypergrad.problem import BilevelProblem, TrainLoss
from meta_trainer.hypergrad.random_state import RandomState, preserved_random_state
from meta_trainer.hypergrad.sharding import Sharding
from meta_trainer.hypergrad.term_sums import Derivatives, TermSum, added, averaged, scaled


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
    that two evaluations differ by the parameters alone: the same dropout masks, the same running statistics. Of several
    terms of a training loss, each replays the random state that the one before it left behind, as training does.

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
            self._devices = {t.device for t in (*problem.theta, *problem.meta_params)}
            self._random_state = stack.enter_context(preserved_random_state(self._devices))
            self._term_random_state = self._random_state
            self._refresh()
            for tensor in (*self._recorded, *problem.meta_params):
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
        self._refresh()

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
        self._refresh()

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
        self._refresh()

    def inner_product(self, left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
        """Inner product of two vectors over all of theta, each aligned with it."""
        pairs = zip(self.blocks.flatten(left), self.blocks.flatten(right), strict=True)
        return self.over_shards(self.blocks.sum_of([torch.dot(a, b) for a, b in pairs]))

    def slope(self, vector: Sequence[Tensor], displacement: Sequence[Tensor] | None) -> Tensor:
        """Inner product over theta; zero for no displacement."""
        if displacement is None:
            return torch.zeros((), device=vector[0].device)
        return self.inner_product(vector, displacement)

    def over_shards(self, tensor: Tensor) -> Tensor:
        """Sum of what each replica finds for its part of theta."""
        sharding = self.problem.sharding
        return tensor if sharding is None else sharding.total(tensor)

    def over_replicas(self, tensor: Tensor) -> Tensor:
        """Average of a gradient by theta, or of what was made of one, which for shards is an average already."""
        return self.problem.mean(tensor) if self.problem.sharding is None else tensor

    def differentiate_theta(self, needed: bool) -> None:
        """Record graphs through the parameters only while their gradient is needed."""
        for tensor in self._recorded:
            tensor.requires_grad_(needed)

    @property
    def _recorded(self) -> Sequence[Tensor]:
        """What a forward pass records a graph through."""
        return self.problem.theta if self.problem.sharding is None else self.problem.sharding.parameters

    def _refresh(self) -> None:
        if self.problem.sharding is not None:
            self.problem.sharding.refresh()

    @property
    def has_terms(self) -> bool:
        """Whether the training loss is given by several terms."""
        return not callable(self.problem.train_loss)

    def train_terms(self) -> Iterator[TrainLoss]:
        """The terms of the training loss, one after another; in between, :meth:`train_loss` evaluates them."""
        train_loss = self.problem.train_loss
        terms = [train_loss] if callable(train_loss) else train_loss
        self._term_random_state = self._random_state
        self._random_state.restore()
        for term in terms:
            yield term
            self._term_random_state = RandomState.capture(self._devices)

    def train_loss(self, term: TrainLoss) -> tuple[Tensor, ...]:
        """The term whose turn it is at the present parameters, or its numerator and denominator."""
        self._begin_evaluation(self._term_random_state)
        loss = term()
        return tuple(self._checked("train_loss", part) for part in (loss if isinstance(loss, tuple) else (loss,)))

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
        return replace(
            validation,
            loss=self.problem.mean(validation.loss),
            theta_grad=tuple(self.over_replicas(grad) for grad in validation.theta_grad),
        )

    def validate(self) -> Validation:
        """Validation loss at the present parameters, and its derivatives."""
        theta = self.problem.theta
        self.differentiate_theta(True)
        self._begin_evaluation(self._random_state)
        loss = self._checked("val_loss", self.problem.val_loss())
        if self.problem.sharding is not None:
            return Validation(loss.detach(), *self._sharded_gradient(loss, self.problem.sharding))
        grads = self.gradient(loss, (*theta, *self.problem.meta_params))
        return Validation(loss.detach(), grads[: len(theta)], grads[len(theta) :])

    def train_gradient(self) -> list[Tensor]:
        """Gradient of the training loss by theta at the present parameters, an average over the replicas.

        Raises:
            ValueError: If theta is sharded.
        """
        problem = self.problem
        if problem.sharding is not None:
            raise ValueError("The training gradient is that of whole parameters, but `sharding` spreads them.")
        self.differentiate_theta(True)
        total = TermSum()
        for term in self.train_terms():
            parts = self.train_loss(term)
            total.add(parts, [self.gradient(parts[0], problem.theta)])
        _, *denominator = problem.mean(torch.stack(total.values))  # [1], or [2] with a denominator
        grads = [problem.mean(part) for part in total.grads[0] if part is not None]
        return [grad / denominator[0].to(grad) for grad in grads] if denominator else grads

    def evaluate_candidates(self, displacements: Sequence[Iterable[Tensor]]) -> tuple[Tensor, list[Derivatives]]:
        """Training loss at every displacement and its derivatives by :attr:`meta_inputs`.

        Args:
            displacements: The flat blocks of K displacements, the same at every access.

        Returns:
            The losses ``[K]``, averages over the replicas, and K lists of derivatives, empty for a candidate that is
            another replica's.

        Raises:
            ValueError: If there are fewer candidates than replicas that they are dealt out to.
        """
        self.differentiate_theta(False)
        (turn, num_turns), number = self.problem.turn, len(displacements)
        if number < num_turns:
            raise ValueError(f"{num_turns} replicas should have at least as many candidates to share, got {number}.")
        sums = [TermSum() for _ in range(number)]
        for term in self.train_terms():
            for k in range(number):
                mine = k % num_turns == turn
                # The first one may leave something for the others to read, intermediates above all.
                if mine or k == 0:
                    self.move_to(displacements[k])
                    parts = self.train_loss(term)
                    if mine:
                        sums[k].add(parts, self._meta_gradients(parts))
                    del parts  # and their graph, before the next ones
        return averaged(sums, self.problem.mean, num_turns)

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

    def _sharded_gradient(self, loss: Tensor, sharding: Sharding) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        scale = 1.0 if self.problem.loss_scale is None else self.problem.loss_scale
        by_theta, by_meta = sharding.gradient(loss * scale, self.problem.meta_params)
        return tuple(grad / scale for grad in by_theta), tuple(grad / scale for grad in by_meta)

    def _meta_gradients(self, parts: Sequence[Tensor]) -> list[Derivatives]:
        """Derivatives of the parts of a training loss by :attr:`meta_inputs`; None for no influence.

        Those of one term of it are by the meta-parameters alone, since its intermediates go when the next one comes.
        """
        return [self._meta_gradient(part, retain_graph=part is not parts[-1]) for part in parts]

    def _meta_gradient(self, part: Tensor, retain_graph: bool) -> Derivatives:
        if not part.requires_grad:
            return (None,) * (len(self.problem.meta_params) if self.has_terms else len(self.meta_inputs))
        # Intermediates may hang on the same graph.
        retain_graph = retain_graph or len(self.problem.intermediates) > 0
        grads = self._pull_back(part, torch.ones_like(part), self.meta_inputs, retain_graph=retain_graph)
        return self._through_intermediates(grads) if self.has_terms else grads

    def hypergradient(
        self, direct: Sequence[Tensor], coefficients: Tensor, meta_grads: Sequence[Derivatives]
    ) -> tuple[Tensor, ...]:
        r"""Sum up :math:`\partial\ell_V/\partial\lambda + \sum_k c_k\,\partial\ell_k/\partial\lambda`.

        Args:
            direct: The first term, aligned with `meta_params`.
            coefficients: ``[K]``.
            meta_grads: Each candidate's derivatives, as :meth:`evaluate_candidates` gave them.
        """
        # The mean over the replicas divides the sum over the candidates by the number that they are dealt out to.
        shares = coefficients * self.problem.turn[1]
        total: Derivatives = ()
        for share, grads in zip(shares, meta_grads, strict=True):
            total = added(total, scaled(grads, share))
        if not self.has_terms:
            total = self._through_intermediates(total)
        return tuple(first if rest is None else first + rest for first, rest in zip(direct, total, strict=True))

    def train_grads(self, meta_grads: Sequence[Derivatives]) -> tuple[Tensor, ...]:
        """Mean over the candidates of the training loss's derivatives by the meta-parameters, if it is asked for."""
        if not self.problem.with_train_grads:
            return ()
        zeros = [torch.zeros_like(t) for t in self.problem.meta_params]
        return self.hypergradient(zeros, zeros[0].new_full((len(meta_grads),), 1 / len(meta_grads)), meta_grads)

    @property
    def meta_inputs(self) -> tuple[Tensor, ...]:
        """The meta-parameters and the leaves of the intermediates."""
        return (*self.problem.meta_params, *(leaf for leaf, _ in self.problem.intermediates))

    def _through_intermediates(self, grads: Derivatives) -> list[Tensor | None]:
        """From derivatives by :attr:`meta_inputs` to those by the meta-parameters."""
        total = list(grads)
        # From the last intermediate on, each passes its derivative on to what it was computed from.
        for _, value in reversed(self.problem.intermediates):
            cotangent = total.pop()
            if cotangent is not None:
                passed_on = self._pull_back(value, cotangent, self.meta_inputs[: len(total)], retain_graph=True)
                total = list(added(total, passed_on))
        return total

    def _pull_back(
        self, output: Tensor, cotangent: Tensor, inputs: Sequence[Tensor], retain_graph: bool = False
    ) -> tuple[Tensor | None, ...]:
        scale = 1.0 if self.problem.loss_scale is None else self.problem.loss_scale
        scaled = (cotangent * scale).to(output.dtype)
        grads = torch.autograd.grad(output, inputs, scaled, retain_graph=retain_graph, allow_unused=True)
        # The candidates' derivatives nearly cancel: no precision may be lost on the way to their sum.
        return tuple(None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) / scale for g in grads)

    def _begin_evaluation(self, random_state: RandomState) -> None:
        random_state.restore()
        self._restore_state()

    def _checked(self, name: str, loss: Tensor) -> Tensor:
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
