"""The study of hypergradients: its exact references, its costs and statistics, and what it writes."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from meta_trainer import MetaWeightNet
from meta_trainer.hypergrad import OptimizerStep, t1t2
from meta_trainer.tasks import ModelArguments

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import fidelity_figures
import fidelity_measures
import fidelity_problems
import fidelity_settings
import study_fidelity

TINY = fidelity_problems.Size(
    ModelArguments(
        hidden_size=32, num_hidden_layers=1, intermediate_size=64, vocab_size=400, attn_implementation="eager"
    ),
    learning_rate=1e-3,
    training_steps=4,
)


@pytest.fixture(autouse=True)
def tiny_study(monkeypatch):
    """Generated texts, and one tiny model for each kind of meta module."""
    monkeypatch.delenv("META_TRAINER_DATA", raising=False)
    monkeypatch.setitem(fidelity_problems.SIZES, "tiny", TINY)
    cases = (
        study_fidelity.Case(
            "tiny", fidelity_problems.NETWORK, "all", 9, study_fidelity.ALL_BUT_HIDDEN, scatter_batches=2
        ),
        study_fidelity.Case("tiny", fidelity_problems.NETWORK, "head", 9, ("estimators",)),
        study_fidelity.Case("tiny", fidelity_problems.TRANSFORM, "all", 9, ("optimizer",)),
    )
    monkeypatch.setattr(study_fidelity, "CASES", cases)
    thinned = [s for s in fidelity_settings.SETTINGS if s.value in (None, 1e-4, 1e-3)]
    monkeypatch.setattr(study_fidelity, "SETTINGS", thinned)
    monkeypatch.setattr(study_fidelity, "NOISE_SEEDS", 2)
    monkeypatch.setattr(study_fidelity, "SCATTER", fidelity_settings.SCATTER[:2])


@pytest.fixture(scope="module")
def subject():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("META_TRAINER_DATA", raising=False)
        return fidelity_problems.Subject(TINY, fidelity_problems.NETWORK, seed=0)


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


# ----------------------------------------------------------------------------------------------- exact hypergradients


def adamw_step(parameter, gradient, group, state):
    """One step of AdamW, written out so that autograd goes through it."""
    beta1, beta2 = group["betas"]
    time = state["step"] + 1
    mean = (beta1 * state["exp_avg"] + (1 - beta1) * gradient) / (1 - beta1**time)
    square = (beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient**2) / (1 - beta2**time)
    # The root of zero, for words that no batch held, has no derivative.
    root = torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)
    return parameter * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * mean / (root + group["eps"])


def in_float64(size=TINY, kind=fidelity_problems.NETWORK):
    subject = fidelity_problems.Subject(size, kind, seed=1)
    subject.model.double()
    subject.meta_module.double()
    for state in subject.optimizer.state.values():
        state.update({name: value.double() for name, value in state.items()})
    return subject


@pytest.mark.parametrize("kind", [fidelity_problems.NETWORK, fidelity_problems.TRANSFORM])
def test_the_exact_hypergradient_of_adamw_is_that_of_an_unrolled_step_in_float64(kind):
    subject = in_float64(kind=kind)
    batches = subject.draw()
    problem = subject.problem(batches)
    (group,) = subject.optimizer.param_groups
    names = [name for name, _ in subject.model.named_parameters()]
    states = [subject.optimizer.state[p] for p in problem.theta]

    torch.manual_seed(3)
    found = t1t2(problem, inner_step=OptimizerStep(subject.optimizer, problem.theta))

    with sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(3)
        slopes = torch.autograd.grad(subject.problem(batches).train_loss(), problem.theta, create_graph=True)
        updated = [adamw_step(p, g, group, s) for p, g, s in zip(problem.theta, slopes, states, strict=True)]
        torch.manual_seed(3)
        val_loss = functional_call(subject.model, dict(zip(names, updated, strict=True)), (), batches[1]).loss
    expected = torch.autograd.grad(val_loss, problem.meta_params)

    assert flat(expected).norm() > 1e-6
    assert_close(flat(found.grads), flat(expected), rtol=1e-8, atol=1e-10 * flat(expected).abs().max().item())
    # And the step is torch's own.
    for parameter, slope in zip(problem.theta, slopes, strict=True):
        parameter.grad = slope.detach()
    subject.optimizer.step()
    assert_close(flat(problem.theta), flat(updated), rtol=1e-12, atol=1e-14)


def test_a_factor_on_the_weight_of_an_example_has_the_derivative_of_its_weight(subject):
    losses = torch.tensor([0.1, 0.7, 2.0], dtype=torch.float64)
    module = fidelity_problems.FactoredWeights(batch_size=3).double()
    plain = MetaWeightNet.forward(module, losses)
    assert torch.equal(module(losses), plain)
    (found,) = torch.autograd.grad(module.reduce(losses, {}, None), module.log_factors)
    shares = (plain / plain.sum()).detach()
    assert_close(found, shares * (losses - shares @ losses))


def test_a_subject_has_trained_its_meta_module_but_not_the_factors(subject):
    torch.manual_seed(0)
    subject_again = fidelity_problems.Subject(replace(TINY, training_steps=1), fidelity_problems.NETWORK, seed=0)
    assert not torch.equal(
        flat(subject.meta_module.network.parameters()), flat(subject_again.meta_module.network.parameters())
    )
    assert torch.equal(subject.meta_module.log_factors, torch.zeros(fidelity_problems.BATCH_SIZE))
    assert all(p.grad is None for p in (*subject.model.parameters(), *subject.meta_module.parameters()))


def test_candidates_share_dropout_masks_unless_told_otherwise(subject):
    def losses(variant):
        problem = subject.problem(subject_batches, variant=variant)
        found = []
        for _ in range(3):
            torch.manual_seed(5)
            found.append(problem.train_loss().item())
        return found

    subject_batches = subject.draw()
    shared, own = losses(fidelity_problems.AS_TRAINED), losses(fidelity_settings.OTHER_MASKS)
    assert len(set(shared)) == 1
    assert len({shared[0], *own}) == 4


@pytest.mark.parametrize("kind", [fidelity_problems.NETWORK, fidelity_problems.TRANSFORM])
def test_the_meta_module_reads_the_same_for_every_candidate_unless_told_otherwise(kind):
    subject = fidelity_problems.Subject(replace(TINY, training_steps=1), kind, seed=0)
    module = subject.meta_module
    reader = module.networks[0] if kind == fidelity_problems.TRANSFORM else module.network[0]
    read = []
    reader.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0].clone()))
    batches = subject.draw()
    for variant in (fidelity_problems.AS_TRAINED, fidelity_settings.OWN_INPUTS):
        problem = subject.problem(batches, variant=variant)
        for _ in range(2):
            torch.manual_seed(5)
            problem.train_loss()
            with torch.no_grad():
                problem.theta[0].add_(0.1 * torch.randn_like(problem.theta[0]))

    assert torch.equal(read[0], read[1])
    assert not torch.equal(read[2], read[3])


# --------------------------------------------------------------------------------------------------------------- costs


@pytest.mark.parametrize(
    "recipe",
    [
        fidelity_settings.EXACT,
        fidelity_settings.EXACT_OPTIMIZER,
        fidelity_settings.FINITE_DIFFERENCE,
        fidelity_settings.guided(follows_optimizer=True),
        fidelity_settings.sign(2, include_unperturbed=True),
        fidelity_settings.spread_out(8),
    ],
    ids=lambda recipe: f"{recipe.estimator}-{recipe.settings.get('noise')}-{recipe.follows_optimizer}",
)
def test_the_cost_in_passes_is_that_of_the_operations_counted(subject, recipe):
    (train, _), (_, meta) = subject.draw(), subject.draw()
    length = min(train["input_ids"].shape[1], meta["input_ids"].shape[1])
    batches = tuple({k: v[:, :length] if v.dim() == 2 else v for k, v in batch.items()} for batch in (train, meta))
    problem = subject.problem(batches)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        problem.val_loss()
    with FlopCounterMode(display=False) as whole:
        recipe.estimate(problem, subject, seed=0)
    passes = whole.get_total_flops() / forward.get_total_flops()
    assert passes == pytest.approx(recipe.passes("all"), rel=0.05)


def test_with_the_head_as_scope_the_body_runs_once_for_each_batch():
    assert {setting.recipe.passes("head") for setting in fidelity_settings.ESTIMATORS} == {2}


def test_every_setting_of_a_group_has_a_name_of_its_own():
    names = [(setting.group, setting.name) for setting in fidelity_settings.SETTINGS]
    assert len(set(names)) == len(names)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_the_effective_dimension_counts_directions():
    assert fidelity_measures.effective_dimension(list(torch.eye(5))) == pytest.approx(5)
    line = torch.tensor([1.0, 2.0, 0.0])
    assert fidelity_measures.effective_dimension([line, -3 * line, line]) == pytest.approx(1)
    assert fidelity_measures.agreement([line, -3 * line, line]) == pytest.approx(-1 / 3)


def test_the_cosine_of_means_is_that_of_the_sums_and_its_error_shrinks_with_the_batches():
    exact = torch.randn(4, 10, dtype=torch.float64)
    found = exact + 2 * torch.randn(1000, 4, 10, dtype=torch.float64)
    cosine, error = fidelity_measures.cosine_of_means(found[:, 0], exact[:1].expand(1000, 10))
    assert cosine == pytest.approx(torch.cosine_similarity(found[:, 0].sum(dim=0), exact[0], dim=0).item())
    assert cosine > 0.99
    few = fidelity_measures.cosine_of_means(found[:20, 0], exact[:1].expand(20, 10))[1]
    assert 0 < error < few / 5


def test_an_exact_estimate_at_any_scale_has_cosine_1_and_zero_has_none():
    exact = torch.randn(3, 7, dtype=torch.float64)
    names = {"size": "", "scope": "", "meta_params": "", "group": "", "setting": "", "value": None, "passes": 5}
    names |= {"largest_weights": [0.5, 0.6, 0.7], "largest_scores": [0.0, 0.0, 0.0]}
    row = fidelity_measures.Row.of([*(2 * exact[:2]), 0 * exact[2]], list(exact), **names)
    assert row.cosines == pytest.approx([1, 1, 0])
    assert row.projections == pytest.approx([2, 2, 0])
    assert row.right_signs[0] == pytest.approx(2 / 3)
    assert row.largest_weight[0] == pytest.approx(0.6)


def test_bias_and_scatter_are_told_apart():
    exact = torch.tensor([[3.0, 0, 0, 0], [0, 2.0, 0, 0]], dtype=torch.float64)
    bias = torch.tensor([0, 0, 0.4, 0], dtype=torch.float64)
    noise = torch.randn(2, 4000, 4, dtype=torch.float64)
    norms = exact.norm(dim=1)[:, None, None]
    estimates = 5 * (exact[:, None] + norms * (bias + 0.7 * noise))
    names = {"size": "", "meta_params": "", "setting": ""}
    spread = fidelity_measures.Spread.of(list(estimates), list(exact), **names)
    assert spread.projection == pytest.approx(5, rel=0.02)
    assert spread.bias[0] == pytest.approx(0.4, rel=0.1)
    assert spread.scatter[0] == pytest.approx(0.7 * 2, rel=0.05)  # the root of four dimensions
    # Ten estimates scatter more than that about their mean, but their bias is not larger for it.
    few = [
        fidelity_measures.Spread.of(list(estimates[:, i : i + 10]), list(exact), **names) for i in range(0, 4000, 10)
    ]
    mean_bias = sum(sum(each.squared_biases) for each in few) / 800
    assert mean_bias == pytest.approx(0.16, abs=0.05)


def test_the_pareto_front_has_what_nothing_is_cheaper_and_better_than():
    points = [(8, 1.0), (5, 0.9), (5, 0.4), (7, 0.8), (11, 1.0), (19, 0.99)]
    assert fidelity_figures.pareto_front(points) == [(5, 0.9), (8, 1.0)]


# -------------------------------------------------------------------------------------------------------------- script


def run(folder, *arguments):
    study_fidelity.main(["--output", str(folder), "--figures", str(folder / "figures"), *arguments])
    return json.loads((folder / "fidelity.json").read_text())


def test_the_study_writes_numbers_tables_and_pictures(tmp_path, capsys):
    content = run(
        tmp_path, "--sizes", "tiny", "--batches", "2", "--markdown", "--settings", "estimators", "sigma", "bfloat16",
        "optimizer", "scatter",
    )  # fmt: skip
    printed = capsys.readouterr().out

    assert content["environment"]["torch"] == torch.__version__
    assert [(s["scope"], s["meta_params"]) for s in content["subjects"]] == [
        ("all", "MetaWeightNet"), ("all", "one weight per example"), ("head", "MetaWeightNet"),
        ("head", "one weight per example"), ("all", "RepresentationTransform"),
    ]  # fmt: skip
    exact = [
        row for row in content["rows"] if row["setting"] in ("T1-T2", "T1-T2 of AdamW") and row["group"] != "bfloat16"
    ]
    assert {row["group"] for row in exact} == {"estimators", "optimizer"}
    for row in exact:
        assert row["cosines"] == pytest.approx([1, 1], abs=1e-9)
        assert row["summary"]["cosine"] == {"mean": pytest.approx(1), "error": pytest.approx(0, abs=1e-9)}
    for row in content["rows"]:
        assert all(-1.001 < cosine < 1.001 for cosine in row["cosines"])
        assert len(row["largest_weights"]) == 2
    assert {row["setting"] for row in content["spreads"]} == {"guided, half", "sign, K=2"}

    for table in (
        "What is judged",
        "tiny, MetaWeightNet, head: estimators",
        "tiny, RepresentationTransform, all: optimizer",
    ):
        assert f"**{table}**" in printed
    assert "| guided | 5 |" in printed
    for name in ("fidelity", "sigma"):
        height, width, _ = matplotlib.image.imread(tmp_path / "figures" / f"estimators_{name}.png").shape
        assert width > 500
        assert height > 500

    study = fidelity_measures.Study.read(tmp_path / "fidelity.json")
    assert [asdict(subject) for subject in study.subjects] == content["subjects"]
    assert [row.content()["summary"] for row in study.rows] == [row["summary"] for row in content["rows"]]


def test_settings_choose_what_is_measured_and_numbers_are_the_same_again(tmp_path, capsys):
    first, second = (
        run(tmp_path / n, "--sizes", "tiny", "--batches", "2", "--settings", "learning rate") for n in "ab"
    )
    assert {row["group"] for row in first["rows"]} == {"learning rate"}
    assert first["spreads"] == []
    assert first["rows"] == second["rows"]
    assert "all: learning rate" in capsys.readouterr().out
    assert list((tmp_path / "a" / "figures").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1"], "--batches should be at least 2, got 1"),
        (["--sizes", "9B"], "invalid choice: '9B'"),
        (["--settings", "guesses"], "invalid choice: 'guesses'"),
    ],
)
def test_a_wrong_option_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        study_fidelity.main(arguments)
    assert message in capsys.readouterr().err
