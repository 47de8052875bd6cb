"""The methods and the meta modules that the benchmark compares, and EvoGrad as its authors' code computes it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from meta_trainer import FeatureWiseTransform, MetaModule, MetaTrainer, MetaWeightNet, RepresentationTransform
from meta_trainer.hypergrad import Hypergradient
from meta_trainer.modules import Batch
from meta_trainer.per_example_loss import per_example_losses

NEVER = 10**9
"""As `meta_every`: only the first step, which warms up, holds a meta step."""


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: As tables and pictures show it.
        settings: Fields of `MetaTrainingArguments`.
        trainer: Class of the trainer.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    trainer: type[MetaTrainer] = MetaTrainer

    @property
    def cycle(self) -> int:
        """Number of steps after which meta steps repeat."""
        meta_every: int = self.settings.get("meta_every", 1)
        return 1 if meta_every == NEVER else meta_every

    def with_settings(self, **settings: Any) -> Self:
        """The same method with other settings."""
        return replace(self, settings={**self.settings, **settings})


Parameters = Mapping[str, Tensor]
"""Parameters of a model by name."""


def literal_evograd(
    train_loss: Callable[[Parameters], Tensor],
    val_loss: Callable[[Parameters], Tensor],
    theta: Parameters,
    meta_params: Sequence[Tensor],
    epsilons: Sequence[Sequence[Tensor]],
    temperature: float,
) -> Hypergradient:
    r"""Hypergradient by automatic differentiation of the formula as it is written.

    All K candidates :math:`\theta_k = \theta + \epsilon_k` and the graphs of their losses are kept, and autograd goes
    back through :math:`\theta^* = \sum_k w_k \theta_k` and the softmax, as in the authors' code.

    Args:
        train_loss: Scalar at given parameters, which reads `meta_params`.
        val_loss: Scalar at given parameters.
        theta: The parameters to perturb.
        meta_params: The tensors to differentiate by.
        epsilons: K perturbations, each aligned with `theta`.
        temperature: Of the softmax.

    Returns:
        The hypergradient; scores and what follows from them, which this way does not compute, are nan.
    """
    candidates = [
        {name: tensor.detach() + e for (name, tensor), e in zip(theta.items(), epsilon, strict=True)}
        for epsilon in epsilons
    ]
    losses = torch.stack([train_loss(candidate) for candidate in candidates])  # [K]
    weights = torch.softmax(-losses / temperature, dim=0)  # [K]
    star = {
        name: reduce(torch.add, (w * candidate[name] for w, candidate in zip(weights, candidates, strict=True)))
        for name in theta
    }
    loss = val_loss(star)
    grads = torch.autograd.grad(loss, meta_params, allow_unused=True, materialize_grads=True)
    return Hypergradient(
        grads=grads,
        val_loss=loss.detach(),
        train_losses=losses.detach(),
        weights=weights.detach(),
        scores=torch.full_like(losses.detach(), torch.nan),
        val_loss_change=torch.full_like(loss.detach(), torch.nan),
    )


class LiteralMetaTrainer(MetaTrainer):
    """MetaTrainer whose meta step is :func:`literal_evograd` over all of the model."""

    def meta_step(self, model: nn.Module, inputs: Batch) -> Hypergradient:
        """Update the meta module once; every candidate has noise, random numbers and losses of its own."""
        model.train()
        base_model: nn.Module = self.accelerator.unwrap_model(model)
        if self.meta_data is None:
            raise ValueError("A meta step needs meta data. Give the trainer a `meta_dataset`.")
        batch = dict(self._prepare_inputs(inputs))
        meta_batch = dict(self._prepare_inputs(next(self.meta_data)))
        # The model does not know the module's columns, and the doors are shut.
        meta_batch = {key: value for key, value in meta_batch.items() if key not in self.meta_module.batch_columns}
        theta = {name: p for name, p in base_model.named_parameters() if p.requires_grad}
        sigma, temperature = float(self.args.sigma or 0.0), float(self.args.temperature or 0.0)
        epsilons = [
            [sigma * torch.sign(torch.randn_like(p)) for p in theta.values()] for _ in range(self.args.num_candidates)
        ]
        with self.compute_loss_context_manager():
            result = literal_evograd(
                lambda parameters: objective(base_model, parameters, batch, self.meta_module),
                lambda parameters: objective(base_model, parameters, meta_batch),
                theta,
                self.meta_parameters,
                epsilons,
                temperature,
            )
        self.meta_optimizer.zero_grad()
        for parameter, grad in zip(self.meta_parameters, result.grads, strict=True):
            parameter.grad = grad
        self.meta_optimizer.step()
        self.meta_optimizer.zero_grad()
        return result


def objective(model: nn.Module, parameters: Parameters, batch: Batch, meta_module: MetaModule | None = None) -> Tensor:
    """Loss of a Hugging Face classifier at other parameters, through the doors of a meta module where there is one."""
    if meta_module is None:
        return _call(model, parameters, batch)["loss"]
    batch = meta_module.transform_batch(batch)
    with meta_module.attach(model, batch):
        inputs = {key: value for key, value in batch.items() if key not in meta_module.batch_columns}
        outputs = _call(model, parameters, inputs)
    if not meta_module.has_loss_door:
        return outputs["loss"]
    return meta_module.reduce(per_example_losses(outputs["logits"], batch["labels"]), batch, outputs)


def _call(model: nn.Module, parameters: Parameters, inputs: Batch) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = functional_call(model, dict(parameters), (), inputs)
    return outputs


PLAIN = Method("plain", {"meta_every": NEVER})
LITERAL = Method("evograd literal", trainer=LiteralMetaTrainer)
EVOGRAD = Method("evograd")
EVOGRAD_HEAD = Method("evograd head", {"perturb": "head"})
FINITE_DIFFERENCE = Method("finite difference", {"hypergradient": "finite_difference"})
T1T2 = Method("t1t2", {"hypergradient": "t1t2"})
GUIDED = Method("evograd guided", {"noise": "guided"})

METHODS = (
    PLAIN,
    LITERAL,
    EVOGRAD,
    EVOGRAD_HEAD,
    Method("evograd head, meta_every=4", {"perturb": "head", "meta_every": 4}),
    FINITE_DIFFERENCE,
    T1T2,
    GUIDED,
)


def _meta_weight_net(config: PreTrainedConfig, method: Method) -> MetaModule:
    # The authors' network reads each candidate's own losses.
    return MetaWeightNet(loss_input="candidate") if method.trainer is LiteralMetaTrainer else MetaWeightNet()


MODULES: dict[str, Callable[[PreTrainedConfig, Method], MetaModule]] = {
    "mwn": _meta_weight_net,
    "rtn": lambda config, method: RepresentationTransform(config.hidden_size),
    "hook": lambda config, method: FeatureWiseTransform(
        [(number + 1, config.hidden_size) for number in range(config.num_hidden_layers)], channel_dim=-1
    ),
}
"""Meta modules by name, made for a model's configuration and a method."""
