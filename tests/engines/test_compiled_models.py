"""torch.compile: the base step runs compiled, a meta step on the model inside."""

import pytest
import torch
from accelerate.utils import is_compiled_module
from tiny import HiddenShift, Recorder, examples_for, meta_trainer, snapshot, tiny_bert, weight_net
from torch.testing import assert_close

from meta_trainer import MetaModule

# Inside torch and its compiler.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

ESTIMATORS = {
    "evograd": {},
    "guided": {"noise": "guided"},
    "finite_difference": {"hypergradient": "finite_difference"},
    "t1t2": {"hypergradient": "t1t2"},
}


class Compiled(Recorder):
    """Writes down whether the model that is handed over is a compiled one."""

    compiled: tuple = ()

    def meta_step(self, model, inputs):
        self.compiled = (*self.compiled, is_compiled_module(model))
        return super().meta_step(model, inputs)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()


def run(folder, **settings):
    trainer = meta_trainer(folder, model=tiny_bert(dropout=0.0), kind=Compiled, **settings)
    trainer.train()
    return trainer


def check_equal(plain, compiled):
    assert set(plain.compiled) == {False}
    assert set(compiled.compiled) == {True}
    assert len(compiled.compiled) == 4
    assert_close(snapshot(compiled.model), snapshot(plain.model), rtol=1e-4, atol=1e-6)
    assert_close(snapshot(compiled.meta_module), snapshot(plain.meta_module), rtol=1e-4, atol=1e-6)
    data = examples_for(plain.model, 8, 5)
    assert compiled.evaluate(data)["eval_loss"] == pytest.approx(plain.evaluate(data)["eval_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("estimator", "backend"),
    [
        *((estimator, "eager") for estimator in ESTIMATORS),
        ("t1t2", "aot_eager"),
        *(
            pytest.param(name, "aot_eager", marks=pytest.mark.slow)
            for name in ("evograd", "guided", "finite_difference")
        ),
    ],
)
def test_a_compiled_model_is_meta_trained_as_one_that_is_not(tmp_path, estimator, backend):
    plain = run(tmp_path, **ESTIMATORS[estimator])
    check_equal(plain, run(tmp_path, torch_compile=True, torch_compile_backend=backend, **ESTIMATORS[estimator]))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_model_compiled_by_inductor_is_meta_trained_as_one_that_is_not(tmp_path, estimator):
    plain = run(tmp_path, **ESTIMATORS[estimator])
    check_equal(plain, run(tmp_path, torch_compile=True, **ESTIMATORS[estimator]))


def test_patterns_of_names_are_those_of_the_model_inside(tmp_path):
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    plain = run(tmp_path, perturb=["classifier.*"])
    check_equal(plain, run(tmp_path, perturb=["classifier.*"], **settings))


@pytest.mark.parametrize("by", ["settings", "wrapping", "the model's own method"])
def test_a_forward_door_on_a_compiled_model_is_refused(tmp_path, by):
    model, settings = tiny_bert(), {}
    if by == "settings":
        settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    elif by == "wrapping":
        model = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    for module in (HiddenShift(), [weight_net(), HiddenShift()]):
        with pytest.raises(NotImplementedError, match=r"works by hooks, but a compiled model.*`torch_compile`"):
            meta_trainer(tmp_path, module, model, **settings)
    meta_trainer(tmp_path, weight_net(), model, **settings)


def test_second_derivatives_of_a_model_compiled_in_place_are_refused(tmp_path):
    model = tiny_bert()
    model.compile(backend="eager")
    with pytest.raises(NotImplementedError, match="second derivatives, which a compiled model does not have"):
        meta_trainer(tmp_path, model=model, hypergradient="t1t2")
    meta_trainer(tmp_path, model=model, hypergradient="finite_difference", max_steps=1).train()


def test_a_module_knows_whether_it_uses_the_forward_door():
    assert [MetaModule().has_forward_door, weight_net().has_forward_door, HiddenShift().has_forward_door] == [0, 0, 1]
