"""EvoGrad: a hypergradient from first-order derivatives only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from meta_trainer.hypergrad.checks import is_integer, is_positive
from meta_trainer.hypergrad.inner_step import InnerStep
from meta_trainer.hypergrad.noise import INDEPENDENT, Layout, Noise, Perturbations, check_noise_name
from meta_trainer.hypergrad.problem import BilevelProblem, Hypergradient
from meta_trainer.hypergrad.sandbox import Sandbox
from meta_trainer.hypergrad.shape import Shape
from meta_trainer.hypergrad.sharding import seed_of_shard

DEFAULT_SIGMA = 1e-3
"""Standard deviation of blind noise: the paper's."""

MOST_CANDIDATES = 10_000

AUTO = "auto"
"""The temperature that is the standard deviation of the candidates' losses."""


def evograd(
    problem: BilevelProblem,
    num_candidates: int = 2,
    sigma: float | None = None,
    temperature: float | str | None = 0.05,
    noise: Noise = "sign",
    seed: int = 0,
    *,
    antithetic: bool = False,
    orthogonal: bool = False,
    include_unperturbed: bool = False,
    relative_sigma: bool = False,
    guidance: float = 1.0,
    inner_step: InnerStep | None = None,
) -> Hypergradient:
    r"""Hypergradient through an evolutionary inner step.

    With candidates :math:`\theta_k = \theta + \epsilon_k`, their training losses :math:`\ell_k`, weights
    :math:`w = softmax(-\ell/\tau)` and :math:`\theta^* = \sum_k w_k \theta_k`, the hypergradient is

    .. math:: \frac{d\ell_V(\theta^*)}{d\lambda} = \frac{\partial\ell_V}{\partial\lambda}
              + \sum_k c_k \frac{\partial\ell_k}{\partial\lambda}

    with the coefficients of :func:`loss_cotangents`. This factored form takes each candidate's derivative as soon as
    its loss is known: one candidate's graph is alive at a time, and none where :math:`\lambda` enters after the model.
    All candidates see the same random numbers.

    For small perturbations it is, in the mean over their draws, the hypergradient of the inner step
    :math:`\theta' = \theta - \frac{1}{\tau} Cov(\epsilon)\,\partial\ell_T/\partial\theta`. The kinds of noise differ
    in this covariance, and in how much single draws scatter:

    - ``"sign"`` and ``"normal"``, :math:`\sigma^2 I`: blind directions. The signal is the one component of a draw that
      lies along the validation gradient, among all those of theta.
    - ``"optimizer"``, :math:`\sigma^2 D` with the rates D of `inner_step`, relative to a typical one: signs, larger
      where the optimizer takes larger steps.
    - ``"guided"``: along :math:`D g`, where :math:`g = \partial\ell_V/\partial\theta` is taken beforehand, so
      long that :math:`\langle g, \epsilon_k \rangle` varies as it does for blind noise: the mean of that noise, given
      what the validation loss sees of it. The inner step along g is the same, the scatter is gone. Without
      `inner_step`, D = I and :math:`\sigma` is the length of a perturbation. For K = 2 this is DARTS' central
      difference. The passes are those of blind noise, the validation pass first.

    Args:
        problem: The bilevel problem.
        num_candidates: K, at least 2.
        sigma: Standard deviation of the perturbations, in units of the parameters; by default 1e-3, the paper's. For
            ``"guided"`` noise by default what changes the validation loss by a thousandth, to first order, between
            1e-6 and 1e-2: the losses are far more curved along a gradient. Its scale then changes from batch to batch,
            where no `inner_step` sets another.
        temperature: :math:`\tau > 0`, in units of the training loss; small values select the best candidate. ``"auto"``
            is the standard deviation of the candidates' losses: selection is neither blind nor absolute.
        noise: ``"sign"`` (:math:`\pm\sigma`), ``"normal"``, ``"optimizer"``, ``"guided"``, or a function
            ``(k, theta) -> list of tensors`` whose :math:`\epsilon_k` is used as it is.
        seed: Seed of the perturbations; the global random state is not touched.
        antithetic: Candidates come in pairs of opposite perturbations.
        orthogonal: No two perturbations of different directions share a component, before any scaling; for signs.
        include_unperturbed: The first candidate is theta itself.
        relative_sigma: `sigma` is in units of each tensor's root mean square; that of all theta for a tensor of zeros.
        guidance: For ``"guided"``: share of the variance along the known direction, in (0, 1]; signs have the rest.
        inner_step: The step whose hypergradient is estimated, also in scale; None for that of the formula, whose rate
            is :math:`\sigma^2/\tau`. The validation gradient is taken where its momentum leads.

    Returns:
        The hypergradient, with K `train_losses`, `weights` and `scores`. With ``"guided"`` noise, `val_loss` is that
        where the validation gradient was taken.

    Raises:
        ValueError: If a setting is out of range or does not go with another, or a loss is not a scalar.

    References:
        Bohdal et al., `EvoGrad: Efficient Gradient-Based Meta-Learning and Hyperparameter Optimization
        <https://arxiv.org/abs/2106.10575>`_, NeurIPS 2021. Noise along known gradients: Maheswaranathan et al.,
        `Guided evolutionary strategies <https://arxiv.org/abs/1806.10230>`_, ICML 2019.
    """
    layout = Layout(antithetic, orthogonal, include_unperturbed)
    check_evograd_settings(num_candidates, sigma, temperature, noise, layout, guidance, relative_sigma)
    _check_inner_step(noise, relative_sigma, guidance, inner_step)
    if not is_integer(seed):
        raise ValueError(f"`seed` should be a whole number, got {seed!r}.")
    length: float | Tensor = DEFAULT_SIGMA if sigma is None else sigma
    with Sandbox(problem) as sandbox:
        shape = Shape(sandbox, noise, relative_sigma, inner_step)
        validation, guide = None, None
        if noise == "guided":
            validation = sandbox.look_ahead(shape.drift)
            reads_gradient = inner_step is not None and inner_step.reads_gradient
            guide = shape.guide(validation.theta_grad, guidance, sandbox.train_gradient() if reads_gradient else None)
            length = validation.short_step(guide.slope) if sigma is None else sigma
        seed = seed if problem.sharding is None else seed_of_shard(seed, problem.sharding.index)
        scale, offset = shape.scale(), shape.offset()
        perturbations = Perturbations(noise, problem.theta, num_candidates, length, seed, layout, scale, guide, offset)

        losses, meta_grads = sandbox.evaluate_candidates(perturbations)  # [K]
        tau = _temperature(temperature, losses)
        weights = torch.softmax(-losses / tau, dim=0)  # [K]
        if validation is None:
            sandbox.settle_at(lambda: perturbations.combination(weights))
            validation = sandbox.validate()
            scores = _scores_on_the_way_back(sandbox, perturbations, weights, validation.theta_grad)
        else:
            scores = perturbations.scores(validation.theta_grad, sandbox.over_shards)
        scores = sandbox.over_replicas(scores.to(losses))  # [K]

        factor: float | Tensor = 1.0
        if shape.rate is not None:
            factor = shape.rate * tau / (length**2 * perturbations.variance(weights))
        change = (weights - 1 / num_candidates) @ scores * factor + sandbox.slope(validation.theta_grad, shape.drift)
        total = sandbox.hypergradient(validation.direct, loss_cotangents(losses, scores, tau) * factor, meta_grads)
        train_grads = sandbox.train_grads(meta_grads)
    return Hypergradient(
        grads=tuple(problem.mean(grad) for grad in total),
        # What was taken beforehand is an average already.
        val_loss=problem.mean(validation.loss) if guide is None else validation.loss,
        train_losses=losses,
        weights=weights,
        scores=scores,
        val_loss_change=change,
        train_grads=train_grads,
    )


def loss_cotangents(losses: Tensor, scores: Tensor, temperature: float | Tensor) -> Tensor:
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


def _scores_on_the_way_back(
    sandbox: Sandbox, perturbations: Perturbations, weights: Tensor, theta_grad: Sequence[Tensor]
) -> Tensor:
    """Inner products ``[K]`` of a gradient with the perturbations, while these lead the way back from theta*."""
    blocks = perturbations.blocks
    products, vectors = [], blocks.flatten(theta_grad)

    def observe(parts: Sequence[Tensor]) -> None:
        vector = next(vectors)
        products.append(torch.stack([torch.dot(vector, part) for part in parts]))

    sandbox.move_back(perturbations.combination(weights, observe))
    return sandbox.over_shards(blocks.sum_of(products, len(perturbations)))


def _temperature(setting: float | str | None, losses: Tensor) -> float | Tensor:
    if isinstance(setting, float | int):
        return setting
    spread = losses.std()
    # Equal losses have equal weights at any temperature.
    return torch.where(spread > 0, spread, torch.ones_like(spread))


def check_evograd_settings(
    num_candidates: int,
    sigma: float | None,
    temperature: float | str | None,
    noise: Noise = "sign",
    layout: Layout = INDEPENDENT,
    guidance: float = 1.0,
    relative_sigma: bool = False,
) -> None:
    """Raise ValueError for settings of :func:`evograd` that are out of range or do not go together."""
    if not is_integer(num_candidates):
        raise ValueError(f"`num_candidates` should be a whole number, got {num_candidates!r}.")
    if num_candidates == 1:
        raise ValueError(
            "`num_candidates` should be at least 2, got 1. A single candidate has weight 1 whatever its loss, so that "
            "the meta-parameters would get no gradient through the inner step."
        )
    if num_candidates < 2:
        raise ValueError(f"`num_candidates` should be at least 2, got {num_candidates}.")
    if num_candidates > MOST_CANDIDATES:
        raise ValueError(f"`num_candidates` should be at most {MOST_CANDIDATES}, got {num_candidates}: each is a pass.")
    if isinstance(temperature, str):
        if temperature != AUTO:
            raise ValueError(f"`temperature` should be a positive, finite number or {AUTO!r}, got {temperature!r}.")
        temperature = 1.0
    for name, value in (("sigma", DEFAULT_SIGMA if sigma is None else sigma), ("temperature", temperature)):
        if not is_positive(value):
            raise ValueError(f"`{name}` should be a positive, finite number, got {value!r}.")
    check_noise_name(noise)
    for name, value in (*vars(layout).items(), ("relative_sigma", relative_sigma)):
        if not isinstance(value, bool):
            raise ValueError(f"`{name}` should be True or False, got {value!r}.")
    if relative_sigma and (callable(noise) or noise == "optimizer"):
        raise ValueError(
            f"`relative_sigma` scales signs, normal and guided noise, but noise={noise!r} has a scale of its own."
        )
    if not is_positive(guidance) or guidance > 1:
        raise ValueError(f"`guidance` should be above 0 and at most 1, got {guidance!r}.")
    if guidance < 1 and noise != "guided":
        raise ValueError(f"`guidance` is the share of a known direction in noise='guided', but `noise` is {noise!r}.")
    blind = not callable(noise) and (noise != "guided" or guidance < 1)
    for name in ("antithetic", "orthogonal"):
        if getattr(layout, name) and not blind:
            raise ValueError(f"`{name}` is a layout of random perturbations, of which noise={noise!r} has none.")
    if layout.orthogonal and noise == "normal":
        raise ValueError("`orthogonal` is a layout of random signs: choose noise='sign' or 'optimizer', not 'normal'.")
    if layout.include_unperturbed and callable(noise):
        raise ValueError("`include_unperturbed` does not go with a function as `noise`: let it return zeros for k = 0.")


def _check_inner_step(noise: Noise, relative_sigma: bool, guidance: float, inner_step: InnerStep | None) -> None:
    if noise == "optimizer" and inner_step is None:
        raise ValueError("noise='optimizer' needs an `inner_step`, whose learning rates shape it.")
    if callable(noise) and inner_step is not None:
        raise ValueError("`inner_step` scales named noise; the tensors of a function stay as they are.")
    if inner_step is None or inner_step.is_uniform:
        return
    if inner_step.reads_gradient and noise != "guided":
        raise ValueError(f"An `inner_step` of given length needs noise='guided', got {noise!r}.")
    if relative_sigma or guidance < 1:
        raise ValueError("`relative_sigma` and `guidance` do not go with an `inner_step` that has rates of its own.")
    if noise in ("sign", "normal"):
        raise ValueError(f"An `inner_step` with rates of its own needs noise='optimizer' or 'guided', got {noise!r}.")
