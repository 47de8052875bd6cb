"""What an estimator is given, a :class:`BilevelProblem`, and what it returns, a :class:`Hypergradient`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from meta_trainer.hypergrad.checks import is_integer
from meta_trainer.hypergrad.sharding import Sharding

Loss = Callable[[], Tensor]
"""A function ``() -> scalar`` of what theta and the meta-parameters are when it is called."""

TrainLoss = Callable[[], Tensor | tuple[Tensor, Tensor]]
"""A :data:`Loss`, or a function ``() -> (numerator, denominator)`` whose second value does not depend on theta."""


def identity(tensor: Tensor) -> Tensor:
    """Return `tensor`: the mean over replicas when there is only one."""
    return tensor


@dataclass(frozen=True)
class BilevelProblem:
    r"""Choose meta-parameters such that a model trained with them does well on validation data.

    :math:`\lambda^* = \arg\min_\lambda \ell_V(\theta^*(\lambda))` with
    :math:`\theta^*(\lambda) = \arg\min_\theta \ell_T(\theta, \lambda)`.

    Args:
        theta: Leaf tensors that may be perturbed. An estimator changes them in place and gives them back bit for bit,
            even after an exception.
        meta_params: Leaf tensors :math:`\lambda`.
        train_loss: ``() -> scalar``, reads `theta` and `meta_params` as they stand. Or several such functions, whose
            sum is the training loss: the micro-batches of an accumulated one. Each is done with before the next one is
            asked for, so that memory holds the graph of one at a time; they may be asked for more than once. Where they
            return two scalars, numerator and denominator, the training loss is the quotient of the sums over functions
            and replicas: a weighted mean whose weights are normalised over all examples.
        val_loss: ``() -> scalar``, reads `theta` as it stands. What it reads of `meta_params` is the direct term.
        state: Tensors that a forward pass may change, such as the running statistics of batch normalisation. Every
            evaluation of a loss starts from their present values, and they are given back bit for bit.
        intermediates: Pairs ``(leaf, value)``, in the order of computation. A `value` was computed from `meta_params`
            and earlier leaves, not from `theta`, and `train_loss` goes on from `leaf`, a detached copy that requires a
            gradient: what all candidates have in common is then differentiated once. The first evaluation of
            `train_loss` may fill the list; with several functions, each may fill it anew.
        mean: Average of a tensor over data-parallel replicas; the identity when there is only one. Estimators send K
            losses, K scores and the meta-gradients through it.
        turn: ``(i, n)`` deals the candidates out to n replicas that all have the same train batch: this one evaluates
            the k-th if k mod n is i, and the first one in any case.
        loss_scale: Factor on every loss before its backward pass, divided out of the gradient afterwards, against
            underflow in float16; None for no scaling.
        writes_theta: Whether a forward pass may write into theta, as that of `torch.nn.Embedding(max_norm=...)` does; a
            copy is then made before the first one.
        with_train_grads: Whether the result is to hold the derivative of the training loss by the meta-parameters.
        sharding: How theta is spread over the replicas, which then hold shards of it; None where each has all of it.

    Raises:
        ValueError: If `theta` or `meta_params` is empty, holds a tensor twice or shares one with the other, or holds
            a tensor that is no floating-point leaf; if a loss cannot be called; if `turn` is none of n; or if
            candidates of sharded parameters are to be dealt out.
    """

    theta: Sequence[Tensor]
    meta_params: Sequence[Tensor]
    train_loss: TrainLoss | Iterable[TrainLoss]
    val_loss: Loss
    state: Sequence[Tensor] = ()
    intermediates: Sequence[tuple[Tensor, Tensor]] = ()
    mean: Callable[[Tensor], Tensor] = identity
    turn: tuple[int, int] = (0, 1)
    loss_scale: Tensor | None = None
    writes_theta: bool = False
    with_train_grads: bool = False
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        """Refuse tensors that could not be perturbed, or whose gradient would be ambiguous."""
        for name, tensors in (("theta", self.theta), ("meta_params", self.meta_params)):
            _check_leaves(name, tensors)
            # Of a few small parameters, one replica of many may hold no part at all.
            if self.sharding is None or name != "theta":
                _check_numbers(name, tensors)
        if {id(t) for t in self.theta} & {id(t) for t in self.meta_params}:
            raise ValueError(
                "`theta` and `meta_params` should have no tensor in common, but they share at least one. "
                "Keep the meta-parameters outside the base model."
            )
        self._check_losses()
        if not _is_turn(self.turn):
            raise ValueError(f"`turn` should be whole numbers (i, n) with 0 <= i < n, got {self.turn!r}.")

        if self.sharding is not None and self.turn != (0, 1):
            raise ValueError(
                "Replicas that hold shards of theta evaluate every candidate together, so `turn` should be (0, 1), got "
                f"{self.turn}."
            )

    def _check_losses(self) -> None:
        if not callable(self.val_loss):
            raise ValueError(f"`val_loss` should be a function () -> scalar, got {self.val_loss!r}.")
        if not callable(self.train_loss) and not isinstance(self.train_loss, Iterable):
            raise ValueError(f"`train_loss` should be a function () -> scalar or several, got {self.train_loss!r}.")
        if isinstance(self.train_loss, Sized) and not callable(self.train_loss) and not len(self.train_loss):
            raise ValueError("`train_loss` should be a function () -> scalar or several, got none.")


def _is_turn(turn: Any) -> bool:
    whole = isinstance(turn, tuple) and len(turn) == 2 and all(is_integer(part) for part in turn)
    return whole and 0 <= turn[0] < turn[1]


def _check_leaves(name: str, tensors: Sequence[Tensor]) -> None:
    if isinstance(tensors, Tensor):
        raise ValueError(f"`{name}` should be a list of tensors, got a tensor of shape {list(tensors.shape)}.")
    if not tensors:
        raise ValueError(f"`{name}` should hold at least one tensor, got none.")
    if len({id(t) for t in tensors}) != len(tensors):
        raise ValueError(f"`{name}` holds the same tensor twice. List each tied parameter once.")
    for position, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"`{name}[{position}]` should be a tensor, got {type(tensor).__name__}.")
        if not tensor.is_floating_point():
            raise ValueError(f"`{name}[{position}]` should be a floating-point tensor, got {tensor.dtype}.")
        if not tensor.is_leaf:
            raise ValueError(
                f"`{name}[{position}]` should be a leaf tensor, but it is the result of an operation that autograd "
                "recorded. Pass the parameter itself."
            )


def _check_numbers(name: str, tensors: Sequence[Tensor]) -> None:
    if not any(tensor.numel() for tensor in tensors):
        raise ValueError(
            f"`{name}` should hold at least one number, got tensors of the shapes {[[*t.shape] for t in tensors]}."
        )


@dataclass(frozen=True)
class Hypergradient:
    r"""Gradient of the validation loss after one inner step with respect to the meta-parameters.

    All tensors are detached. K is the number of points at which the training loss was evaluated: the candidates of
    `evograd`, the two sides of `finite_difference`, one for `t1t2`.

    Attributes:
        grads: Aligned with `BilevelProblem.meta_params`, zero where a parameter has no influence.
        val_loss: Scalar, the validation loss at :math:`\theta^*`; where no pass is spent there, at :math:`\theta`.
        train_losses: ``[K]``, training loss of each candidate.
        weights: ``[K]``, share of each candidate in :math:`\theta^*`; sums to one.
        scores: ``[K]``, slope of the validation loss along each candidate's perturbation,
            :math:`\langle \partial\ell_V/\partial\theta, \epsilon_k \rangle`.
        val_loss_change: Scalar, what the inner step changes the validation loss by, to first order; negative where
            training on the train batch helps the validation batch.
        train_grads: Aligned with `BilevelProblem.meta_params`, derivative of this replica's training loss, in the mean
            over the K points; empty unless `BilevelProblem.with_train_grads`.
    """

    grads: tuple[Tensor, ...]
    val_loss: Tensor
    train_losses: Tensor
    weights: Tensor
    scores: Tensor
    val_loss_change: Tensor
    train_grads: tuple[Tensor, ...] = ()
