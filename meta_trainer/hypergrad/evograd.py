"""EvoGrad: a hypergradient from first-order derivatives only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meta_trainer.hypergrad.noise import Noise, Perturbations
from meta_trainer.hypergrad.problem import BilevelProblem, Hypergradient
from meta_trainer.hypergrad.sandbox import Sandbox


def evograd(
    problem: BilevelProblem,
    num_candidates: int = 2,
    sigma: float = 1e-3,
    temperature: float = 0.05,
    noise: Noise = "sign",
    seed: int = 0,
) -> Hypergradient:
    r"""Hypergradient through an evolutionary inner step.

    With candidates :math:`\theta_k = \theta + \epsilon_k`, their training losses :math:`\ell_k`, weights
    :math:`w = softmax(-\ell/\tau)` and :math:`\theta^* = \sum_k w_k \theta_k`, the hypergradient is

    .. math:: \frac{d\ell_V(\theta^*)}{d\lambda} = \frac{\partial\ell_V}{\partial\lambda}
              + \sum_k c_k \frac{\partial\ell_k}{\partial\lambda}

    with the coefficients of :func:`loss_cotangents`. This factored form takes each candidate's derivative as soon as
    its loss is known: one candidate's graph is alive at a time, and none where :math:`\lambda` enters after the model.
    All candidates see the same random numbers.

    Args:
        problem: The bilevel problem.
        num_candidates: K, at least 2.
        sigma: Standard deviation of the perturbations, in units of the parameters.
        temperature: :math:`\tau > 0`, in units of the training loss; small values select the best candidate.
        noise: ``"sign"`` (:math:`\pm\sigma`), ``"normal"``, or a function ``(k, theta) -> list of tensors`` whose
            :math:`\epsilon_k` is used as it is.
        seed: Seed of the perturbations; the global random state is not touched.

    Returns:
        The hypergradient, with K `train_losses`, `weights` and `scores`.

    Raises:
        ValueError: If a setting is out of range or a loss is not a scalar.

    References:
        Bohdal et al., `EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization
        <https://arxiv.org/abs/2106.10575>`_, NeurIPS 2021.
    """
    _check_settings(num_candidates, sigma, temperature)
    perturbations = Perturbations(noise, problem.theta, num_candidates, sigma, seed)
    with Sandbox(problem) as sandbox:
        losses, meta_grads = _evaluate_candidates(sandbox, perturbations)
        losses = problem.mean(losses)  # [K]
        weights = torch.softmax(-losses / temperature, dim=0)  # [K]

        sandbox.settle_at(lambda: perturbations.combination(weights))
        sandbox.differentiate_theta(True)
        val_loss = sandbox.val_loss()
        grads = sandbox.gradient(val_loss, (*problem.theta, *problem.meta_params))
        theta_grad, direct = grads[: len(problem.theta)], grads[len(problem.theta) :]
        scores = problem.mean(_scores(sandbox, perturbations, weights, theta_grad).to(losses))  # [K]

        total = sandbox.hypergradient(direct, loss_cotangents(losses, scores, temperature), meta_grads)
    return Hypergradient(
        grads=tuple(problem.mean(grad) for grad in total),
        val_loss=problem.mean(val_loss.detach()),
        train_losses=losses,
        weights=weights,
        scores=scores,
    )


def loss_cotangents(losses: Tensor, scores: Tensor, temperature: float) -> Tensor:
    r"""Coefficient of each candidate's training loss in the EvoGrad hypergradient.

    With :math:`w = softmax(-\ell/\tau)` and :math:`s_k = \langle \partial\ell_V/\partial\theta, \epsilon_k \rangle`,
    the chain rule gives :math:`c_k = -w_k (s_k - \sum_j w_j s_j) / \tau`.

    Args:
        losses: ``[K]``, training loss of each candidate.
        scores: ``[K]``, slope of the validation loss along each perturbation.
        temperature: :math:`\tau > 0`.

    Returns:
        ``[K]``, summing to zero.
    """
    weights = torch.softmax(-losses / temperature, dim=0)  # [K]
    return -weights * (scores - weights @ scores) / temperature


def _evaluate_candidates(
    sandbox: Sandbox, perturbations: Perturbations
) -> tuple[Tensor, list[tuple[Tensor | None, ...]]]:
    """Training loss of every candidate, ``[K]``, and its derivatives by the meta-parameters."""
    sandbox.differentiate_theta(False)
    losses, meta_grads = [], []
    for epsilon in perturbations:
        sandbox.move_to(epsilon)
        loss = sandbox.train_loss()
        meta_grads.append(sandbox.meta_gradient(loss))
        losses.append(loss.detach())
        del loss  # and its graph, before the next one
    return torch.stack(losses), meta_grads


def _scores(sandbox: Sandbox, perturbations: Perturbations, weights: Tensor, theta_grad: Sequence[Tensor]) -> Tensor:
    """Inner products ``[K]`` of a gradient with the perturbations, while these lead the way back from theta*."""
    products, vectors = [], perturbations.blocks.flatten(theta_grad)

    def observe(parts: Sequence[Tensor]) -> None:
        vector = next(vectors)
        products.append(torch.stack([torch.dot(vector, part) for part in parts]))

    sandbox.move_back(perturbations.combination(weights, observe))
    return torch.stack(products).sum(dim=0)


def _check_settings(num_candidates: int, sigma: float, temperature: float) -> None:
    if num_candidates == 1:
        raise ValueError(
            "`num_candidates` should be at least 2, got 1. A single candidate has weight 1 whatever its loss, so that "
            "the meta-parameters would get no gradient through the inner step."
        )
    if num_candidates < 2:
        raise ValueError(f"`num_candidates` should be at least 2, got {num_candidates}.")
    for name, value in (("sigma", sigma), ("temperature", temperature)):
        if not 0 < value < float("inf"):
            raise ValueError(f"`{name}` should be a positive, finite number, got {value}.")
