"""The estimators and settings whose hypergradients are judged, what each costs, and which exact one it should equal."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fidelity_problems import AS_TRAINED, Subject, Variant

from meta_trainer.hypergrad import BilevelProblem, Hypergradient, OptimizerStep, evograd, finite_difference, t1t2

FORWARD, BACKWARD = 1, 2
"""Costs in passes: a backward pass multiplies with every weight twice."""

SIGN_SIGMA, TEMPERATURE = 1e-3, 0.05
"""The paper's, which are the defaults for signs."""


@dataclass(frozen=True)
class Recipe:
    """How to estimate a hypergradient.

    Attributes:
        estimator: ``"evograd"``, ``"finite_difference"`` or ``"t1t2"``.
        settings: Its keywords.
        follows_optimizer: The inner step is the base optimizer's next one; otherwise gradient descent.
        variant: How losses are computed.
    """

    estimator: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    follows_optimizer: bool = False
    variant: Variant = AS_TRAINED

    @property
    def key(self) -> str:
        """The same for recipes that give the same hypergradient."""
        return repr(self)

    def estimate(self, problem: BilevelProblem, subject: Subject, seed: int) -> Hypergradient:
        """Hypergradient of a problem that a subject posed in this recipe's variant; `seed` is that of the noise."""
        inner_step = OptimizerStep(subject.optimizer, problem.theta) if self.follows_optimizer else None
        if self.estimator == "evograd":
            return evograd(problem, seed=seed, inner_step=inner_step, **self.settings)
        rate = {"lr": subject.learning_rate, **self.settings}
        estimator = t1t2 if self.estimator == "t1t2" else finite_difference
        return estimator(problem, inner_step=inner_step, **rate)

    def passes(self, scope: str) -> int:
        """What it costs, in passes over a batch: forward 1, backward 2, so that a base step costs 3.

        T1-T2 keeps the graph of the training gradient and goes back through it once more, to what the meta-parameters
        reach: as much as the training gradient itself. With the head as scope, one forward pass through the body
        serves all that is done with a batch, and what happens in the head is left out.
        """
        if scope == "head":
            return 2 * FORWARD
        validation = FORWARD + BACKWARD
        if self.estimator == "t1t2":
            return FORWARD + 2 * BACKWARD + validation
        candidates: int = self.settings.get("num_candidates", 2)
        return candidates * FORWARD + validation


@dataclass(frozen=True)
class Setting:
    """A recipe under a name.

    Attributes:
        name: As tables and pictures show it.
        group: Name of its table.
        recipe: The recipe.
        reference: The exact hypergradient that it is judged by.
        value: Of what a sweep varies; None outside sweeps.
    """

    name: str
    group: str
    recipe: Recipe
    reference: Recipe
    value: float | None = None


EXACT = Recipe("t1t2")
EXACT_OPTIMIZER = Recipe("t1t2", follows_optimizer=True)
FINITE_DIFFERENCE = Recipe("finite_difference")

OTHER_MASKS = Variant(shared_random_numbers=False)
OWN_INPUTS = Variant(shared_inputs=False)
OFFICIAL = Variant(shared_random_numbers=False, shared_inputs=False)
AUTOCAST = Variant(autocast=True)


def sign(candidates: int, variant: Variant = AS_TRAINED, **settings: Any) -> Recipe:
    """Blind noise, with the paper's sigma and temperature unless `settings` change them."""
    paper = {"noise": "sign", "sigma": SIGN_SIGMA, "temperature": TEMPERATURE}
    return Recipe("evograd", {"num_candidates": candidates, **paper, **settings}, variant=variant)


def spread_out(candidates: int, **settings: Any) -> Recipe:
    """Antithetic, orthogonal signs."""
    return sign(candidates, antithetic=True, orthogonal=True, **settings)


def guided(variant: Variant = AS_TRAINED, follows_optimizer: bool = False, **settings: Any) -> Recipe:
    """Two candidates along the validation gradient, by default as far as its own length suggests."""
    keywords = {"num_candidates": 2, "noise": "guided", "temperature": TEMPERATURE, **settings}
    return Recipe("evograd", keywords, follows_optimizer, variant)


def optimizer_noise(candidates: int) -> Recipe:
    """Signs that are larger where the optimizer takes larger steps."""
    return Recipe("evograd", {**sign(candidates).settings, "noise": "optimizer"}, follows_optimizer=True)


def _table(group: str, recipes: Mapping[str, Recipe], reference: Recipe = EXACT) -> list[Setting]:
    return [Setting(name, group, recipe, reference) for name, recipe in recipes.items()]


def _sweep(group: str, what: str, recipes: Mapping[float, Recipe]) -> list[Setting]:
    return [Setting(f"{what}={value:g}", group, recipe, EXACT, value) for value, recipe in recipes.items()]


ESTIMATORS = _table(
    "estimators",
    {
        "T1-T2": EXACT,
        "finite difference": FINITE_DIFFERENCE,
        "guided": guided(),
        "guided, half": guided(guidance=0.5),
        **{f"sign, K={k}": sign(k) for k in (2, 4, 8, 16)},
        **{f"antithetic, orthogonal, K={k}": spread_out(k) for k in (2, 4, 8, 16)},
    },
)

LAYOUT_SETTINGS: dict[str, dict[str, Any]] = {
    "independent": {},
    "antithetic": {"antithetic": True},
    "orthogonal": {"orthogonal": True},
    "antithetic, orthogonal": {"antithetic": True, "orthogonal": True},
    "include_unperturbed": {"include_unperturbed": True},
    "normal": {"noise": "normal"},
    "relative_sigma=0.02": {"relative_sigma": True, "sigma": 0.02},
}
LAYOUTS = _table(
    "layouts",
    {f"{name}, K={k}": sign(k, **settings) for k in (2, 8) for name, settings in LAYOUT_SETTINGS.items()},
)

TEMPERATURES = _table(
    "temperature",
    {
        **{f"sign, K=2, temperature={t}": sign(2, temperature=t) for t in (TEMPERATURE, "auto")},
        **{f"sign, K=8, temperature={t}": sign(8, temperature=t) for t in (0.0005, 0.005, TEMPERATURE, 0.5, "auto")},
        **{f"antithetic, orthogonal, K=8, temperature={t}": spread_out(8, temperature=t) for t in (0.05, "auto")},
    },
)

SIGMAS = [
    *_table(
        "sigma", {"guided, sigma=automatic": guided(), "finite difference, step_size=automatic": FINITE_DIFFERENCE}
    ),
    *_sweep("sigma", "sign, K=2, sigma", {s: sign(2, sigma=s) for s in (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}),
    *_sweep("sigma", "sign, K=8, sigma", {s: sign(8, sigma=s) for s in (1e-4, 1e-3, 1e-2)}),
    *_sweep(
        "sigma",
        "guided, sigma",
        {s: guided(sigma=s) for s in (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)},
    ),
    *_sweep(
        "sigma",
        "finite difference, step_size",
        {s: Recipe("finite_difference", {"step_size": s}) for s in (1e-5, 1e-4, 1e-3, 1e-2)},
    ),
]

RANDOM_NUMBERS = _table(
    "random numbers",
    {
        "T1-T2, other dropout masks": Recipe("t1t2", variant=OTHER_MASKS),
        "guided, masks of each candidate's own": guided(OTHER_MASKS),
        "guided, sigma=0.01, masks of each candidate's own": guided(OTHER_MASKS, sigma=1e-2),
        "sign, K=2, masks shared": sign(2),
        "sign, K=2, masks of each candidate's own": sign(2, OTHER_MASKS),
        "sign, K=2, losses of each candidate's own": sign(2, OWN_INPUTS),
        "sign, K=2, masks and losses of each candidate's own": sign(2, OFFICIAL),
        "guided, losses of each candidate's own": guided(OWN_INPUTS),
        "sign, K=8, masks shared": sign(8),
        "sign, K=8, masks of each candidate's own": sign(8, OTHER_MASKS),
    },
)

OPTIMIZER = _table(
    "optimizer",
    {
        "T1-T2 of AdamW": EXACT_OPTIMIZER,
        "finite difference of AdamW": Recipe("finite_difference", follows_optimizer=True),
        "guided, AdamW": guided(follows_optimizer=True),
        "optimizer noise, K=2": optimizer_noise(2),
        "optimizer noise, K=8": optimizer_noise(8),
        "T1-T2 of gradient descent": EXACT,
        "guided, gradient descent": guided(),
        "sign, K=2": sign(2),
        "sign, K=8": sign(8),
    },
    reference=EXACT_OPTIMIZER,
)

PRECISION = [
    *_table("bfloat16", {"T1-T2": Recipe("t1t2", variant=AUTOCAST), "guided, sigma=automatic": guided(AUTOCAST)}),
    *_sweep("bfloat16", "guided, sigma", {s: guided(AUTOCAST, sigma=s) for s in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)}),
    *_sweep("bfloat16", "sign, K=2, sigma", {s: sign(2, AUTOCAST, sigma=s) for s in (1e-3, 1e-2)}),
    *_sweep("bfloat16", "sign, K=8, sigma", {s: sign(8, AUTOCAST, sigma=s) for s in (1e-3,)}),
]

LEARNING_RATES = [
    Setting(f"guided, exact at lr={lr:g}", "learning rate", guided(), Recipe("t1t2", {"lr": lr}), lr)
    for lr in (1e-5, 1e-4, 1e-3, 1e-2)
]

INPUTS = [
    *_table(
        "hidden states",
        {
            "guided, shared": guided(),
            "guided, each candidate's own": guided(OWN_INPUTS),
            **{f"guided, each candidate's own, sigma={s:g}": guided(OWN_INPUTS, sigma=s) for s in (1e-5, 1e-2)},
            "sign, K=2, shared": sign(2),
            "sign, K=2, each candidate's own": sign(2, OWN_INPUTS),
            "sign, K=16, shared": sign(16),
            "sign, K=16, each candidate's own": sign(16, OWN_INPUTS),
        },
    ),
    *_table(
        "hidden states",
        {
            "guided, AdamW, shared": guided(follows_optimizer=True),
            "guided, AdamW, each candidate's own": guided(OWN_INPUTS, follows_optimizer=True),
        },
        EXACT_OPTIMIZER,
    ),
]

SCATTER = [
    *_table(
        "scatter",
        {
            "guided, half": guided(guidance=0.5),
            "sign, K=2": sign(2),
            "sign, K=2, masks of each candidate's own": sign(2, OTHER_MASKS),
            "sign, K=8": sign(8),
            "sign, K=8, sigma=0.01": sign(8, sigma=1e-2),
            "antithetic, orthogonal, K=8": spread_out(8),
        },
    ),
    *_table("scatter", {"optimizer noise, K=8": optimizer_noise(8)}, EXACT_OPTIMIZER),
]
"""Settings whose bias is told from their scatter."""

SETTINGS = (
    *ESTIMATORS,
    *LAYOUTS,
    *SIGMAS,
    *TEMPERATURES,
    *RANDOM_NUMBERS,
    *OPTIMIZER,
    *PRECISION,
    *LEARNING_RATES,
    *INPUTS,
)
GROUPS = tuple(dict.fromkeys(setting.group for setting in SETTINGS))
