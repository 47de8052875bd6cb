"""The benchmark of a training step: turns, methods, shapes, and what it writes."""

import gc
import json
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import pytest
import torch
from rich.console import Console
from torch import nn
from torch.testing import assert_close
from transformers import Trainer, TrainerCallback

from meta_trainer import MetaTrainingArguments, MetaWeightNet
from meta_trainer.hypergrad import BilevelProblem, evograd

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import benchmark_figures
import benchmark_methods
import benchmark_shapes
import benchmark_step
import benchmark_turns

TINY = {"layers": 1, "hidden_size": 16, "vocab_size": 50, "batch_size": 2, "sequence_length": 4, "rounds": 2}
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def quick_garbage_collection():
    """Every training collects garbage, and need not look each time at all that the imports have made."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def options(**changes):
    return benchmark_step.Options(**{**TINY, **changes})


def row(method="evograd", **changes):
    values = {
        "shape": "reference", "sweep": "methods", "module": "mwn", "value": None, "cycle": 1,
        "wall_ms": [20.0, 30.0, 40.0], "cpu_ms": [20.0, 20.0, 20.0],
        "plain_wall_ms": [10.0, 10.0, 10.0], "plain_cpu_ms": [10.0, 10.0, 10.0],
        "step_bytes": 3 * 2**20, "held_bytes": 2**30, "plain_step_bytes": 2**20, "plain_held_bytes": 2**30,
    }  # fmt: skip
    return benchmark_figures.Row(method=method, **{**values, **changes})


def rows_of_every_sweep():
    swept = [
        row(name, sweep=sweep, value=value)
        for sweep in benchmark_figures.AXES
        for value in (2, 4)
        for name in ("plain", "evograd")
    ]
    return [row("plain"), row("evograd"), row("t1t2", module="rtn"), *swept]


def printed(table):
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


# ------------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize("module", benchmark_methods.MODULES)
def test_every_method_has_a_finite_time_and_memory_with_every_module(module):
    (group,) = benchmark_step.groups(options(sweeps=["methods"], modules=[module]))
    rows = benchmark_step.measure(group, options())
    assert [r.method for r in rows] == [method.name for method in benchmark_methods.METHODS]
    # Two rounds are rounded up to the cycle of the method with a meta step every 4 steps.
    assert all(len(r.wall_ms) == 4 for r in rows)
    for r in rows:
        assert all(0 < value < 1e6 for value in (*r.time_ms, *r.time_ratio, *r.cpu_ratio))
        assert r.held_bytes >= rows[0].held_bytes > 0
        assert r.step_bytes >= rows[0].step_bytes > 0
    assert (rows[0].time_ratio, rows[0].step_memory_ratio, rows[0].peak_memory_ratio) == ([1.0] * 3, 1.0, 1.0)


def test_a_group_leaves_no_model_behind(monkeypatch):
    models = []

    def make_model(*arguments):
        model = benchmark_shapes.make_model(*arguments)
        models.append(weakref.ref(model))
        return model

    monkeypatch.setattr(benchmark_step, "make_model", make_model)
    (group,) = benchmark_step.groups(options(sweeps=["candidates"], candidates=[2]))
    benchmark_step.measure(group, options())
    gc.collect()
    assert len(models) == len(group.methods)
    assert all(model() is None for model in models)


def test_every_method_starts_from_the_same_weights(monkeypatch):
    weights = []

    def make_model(*arguments):
        model = benchmark_shapes.make_model(*arguments)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return model

    monkeypatch.setattr(benchmark_step, "make_model", make_model)
    (group,) = benchmark_step.groups(options(sweeps=["meta_every"], meta_every=[1]))
    benchmark_step.measure(group, options())
    assert len(weights) == 3
    assert all(torch.equal(weights[0], other) for other in weights)


def test_a_sweep_has_one_group_for_each_value_and_its_plain_step():
    chosen = options(sweeps=["sizes", "candidates", "meta_every"], hidden_sizes=[8, 16], candidates=[2, 8])
    found = list(benchmark_step.groups(chosen))
    assert [(g.sweep, g.value) for g in found] == [
        ("sizes", 8), ("sizes", 16), ("candidates", 2), ("candidates", 8),
        ("meta_every", 1), ("meta_every", 2), ("meta_every", 4), ("meta_every", 8),
    ]  # fmt: skip
    assert all(g.methods[0] == benchmark_methods.PLAIN and g.module == "mwn" for g in found)
    assert [g.shape.hidden_size for g in found[:3]] == [8, 16, 16]
    assert {m.settings["num_candidates"] for m in found[3].methods[1:]} == {8}
    assert [g.cycle for g in found[4:]] == [1, 2, 4, 8]


def test_a_shape_may_leave_out_methods_and_modules():
    (group,) = benchmark_step.groups(options(sweeps=["methods"], shapes=["llama-7b-lora"]))
    assert group.module == "mwn"
    assert [m.name for m in group.methods] == ["plain", "evograd", "evograd head", "finite difference"]


# ----------------------------------------------------------------------------------------------------------- turns


class Regression(nn.Module):
    """A model that may fail in a given call."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.calls, self.fails_at = 0, fails_at

    def forward(self, x, labels):
        self.calls += 1
        if self.calls == self.fails_at:
            raise ArithmeticError("in the middle of a step")
        return {"loss": (self.linear(x) - labels).square().mean()}


class Recorder(TrainerCallback):
    """Writes down who begins a step, in which thread, and who ends one."""

    def __init__(self, name, events):
        self.name, self.events = name, events

    def on_step_begin(self, *arguments, **keywords):
        self.events.append((self.name, "begin", threading.get_ident()))

    def on_step_end(self, *arguments, **keywords):
        self.events.append((self.name, "end", threading.get_ident()))


def training(folder, name="a", events=None, fails_at=None, max_steps=9):
    def make_trainer():
        args = MetaTrainingArguments(
            output_dir=str(folder), max_steps=max_steps, use_cpu=True, report_to="none", save_strategy="no",
            disable_tqdm=True, per_device_train_batch_size=2,
        )  # fmt: skip
        data = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 4
        recorder = Recorder(name, [] if events is None else events)
        return Trainer(Regression(fails_at), args, train_dataset=data, callbacks=[recorder])

    return benchmark_turns.SteppedTraining(make_trainer)


def test_trainings_take_turns_and_another_one_begins_each_round(tmp_path):
    events = []
    with (
        training(tmp_path, "a", events) as a,
        training(tmp_path, "b", events) as b,
        training(tmp_path, "c", events) as c,
    ):
        memory, times = benchmark_turns.take_turns([a, b, c], warm_up=1, rounds=4)
    assert "".join(name for name, what, _ in events if what == "begin") == "abc" + "abc" + "abcbcacababc"
    # A step ends before the next one begins.
    assert [what for _, what, _ in events] == ["begin", "end"] * 18
    assert len({thread for *_, thread in events} - {threading.get_ident()}) == 3
    assert [len(costs) for costs in times] == [4, 4, 4]
    assert all(cost.wall_ms > 0 and cost.step_bytes == 0 for costs in times for cost in costs)
    assert all(cost.step_bytes > 0 and cost.held_bytes > 0 for cost in memory)


def test_what_a_training_raises_surfaces_and_ends_all_the_others(tmp_path):
    before = threading.active_count()
    with (
        pytest.raises(ArithmeticError, match="middle of a step"),
        training(tmp_path) as sound,
        training(tmp_path, fails_at=3) as failing,
        training(tmp_path) as waiting,
    ):
        benchmark_turns.take_turns([sound, failing, waiting], warm_up=9, rounds=0)
    assert threading.active_count() == before


def test_what_the_making_of_a_trainer_raises_surfaces():
    def make_trainer():
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"), benchmark_turns.SteppedTraining(make_trainer) as broken:
        broken.step()


def test_a_training_that_has_ended_takes_no_step(tmp_path):
    with training(tmp_path, max_steps=1) as short:
        short.step()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="larger `max_steps`"):
                short.step()


def test_a_training_that_never_had_a_turn_ends(tmp_path):
    before = threading.active_count()
    with training(tmp_path):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_peak_memory_is_that_above_what_was_alive():
    kept = torch.zeros(1000)
    with benchmark_turns.PeakMemory(CPU) as memory:
        torch.zeros(500)
        kept.add_(1)
    assert memory.bytes == 500 * 4


def test_held_bytes_are_those_of_parameters_and_optimizer_states_of_model_and_meta_module(tmp_path):
    method = benchmark_methods.EVOGRAD
    group = benchmark_step.Group("methods", options().shape("reference"), "mwn", (method,))
    trainer = benchmark_step.make_trainer(group, method, options(), 1, str(tmp_path))
    trainer.train()
    parameters = [*trainer.model.parameters(), *trainer.meta_module.parameters()]
    expected = sum(3 * p.nbytes + 4 for p in parameters)  # AdamW: two moments, and a float32 count of steps
    buffers = sum(b.nbytes for b in trainer.model.buffers())
    assert benchmark_turns.held_bytes(trainer) == expected + buffers


# --------------------------------------------------------------------------------------------------------- methods


def test_the_literal_formula_and_evograd_have_the_same_hypergradient():
    shape = replace(
        options().shape("reference"), settings={"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    )
    model = benchmark_shapes.make_model(shape, CPU, bf16=False, seed=0).double()
    module = MetaWeightNet(loss_input="candidate").double()
    batch, meta_batch = (
        torch.utils.data.default_collate(
            [
                {key: example[key] for key in ("input_ids", "labels")}
                for example in benchmark_shapes.RandomSentences(shape, 1, seed)
            ]
        )
        for seed in (1, 2)
    )
    theta = dict(model.named_parameters())
    epsilons = [[0.1 * torch.randn_like(p) for p in theta.values()] for _ in range(3)]

    def train_loss(parameters):
        return benchmark_methods.objective(model, parameters, batch, module)

    def val_loss(parameters):
        return benchmark_methods.objective(model, parameters, meta_batch)

    found = benchmark_methods.literal_evograd(
        train_loss, val_loss, theta, list(module.parameters()), epsilons, temperature=0.2
    )
    problem = BilevelProblem(
        theta=list(theta.values()),
        meta_params=list(module.parameters()),
        train_loss=lambda: train_loss(theta),
        val_loss=lambda: val_loss(theta),
    )
    expected = evograd(problem, num_candidates=3, temperature=0.2, noise=lambda k, _: epsilons[k])

    assert max(grad.abs().max() for grad in found.grads) > 1e-8
    assert_close(found.grads, expected.grads, rtol=1e-9, atol=1e-18)
    for name in ("val_loss", "train_losses", "weights"):
        assert_close(getattr(found, name), getattr(expected, name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", benchmark_methods.MODULES)
def test_a_literal_meta_step_moves_the_meta_module_alone(module, tmp_path):
    method = benchmark_methods.LITERAL
    group = benchmark_step.Group("methods", options().shape("reference"), module, (method,))
    trainer = benchmark_step.make_trainer(group, method, options(), 1, str(tmp_path))
    meta_before = [p.detach().clone() for p in trainer.meta_module.parameters()]
    before = [p.detach().clone() for p in trainer.model.parameters()]
    result = trainer.meta_step(trainer.model, next(iter(trainer.get_train_dataloader())))
    assert all(torch.isfinite(grad).all() for grad in result.grads)
    assert any(
        not torch.equal(old, new) for old, new in zip(meta_before, trainer.meta_module.parameters(), strict=True)
    )
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))
    assert all(p.grad is None for p in (*trainer.model.parameters(), *trainer.meta_module.parameters()))


def test_feature_wise_noise_acts_after_every_block():
    shape = replace(options().shape("reference"), layers=2)
    model = benchmark_shapes.make_model(shape, CPU, bf16=False, seed=0).eval()
    module = benchmark_methods.MODULES["hook"](shape.config(), benchmark_methods.EVOGRAD)
    ids = torch.arange(5, 13)[None]
    plain = model(ids).logits
    with module.attach(model, {}):
        noisy = model(ids).logits
    grads = torch.autograd.grad(noisy.sum(), list(module.parameters()))
    assert len(grads) == 4
    assert all((grad.abs() > 0).any() for grad in grads)
    for parameter in module.parameters():
        nn.init.constant_(parameter, -1000.0)  # softplus underflows to zero
    with module.attach(model, {}):
        assert torch.equal(model(ids).logits, plain)
    assert not torch.equal(noisy, plain)


# ---------------------------------------------------------------------------------------------------------- shapes


def test_the_shapes_are_those_of_the_models_they_are_named_after():
    configs = {name: shape.config() for name, shape in benchmark_shapes.SHAPES.items()}
    sizes = {
        name: (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.intermediate_size, c.vocab_size)
        for name, c in configs.items()
    }
    assert sizes == {
        "reference": (4, 512, 8, 2048, 8000),
        "bert-base": (12, 768, 12, 3072, 30522),
        "xlm-r-base": (12, 768, 12, 3072, 250002),
        "llama-7b-lora": (32, 4096, 32, 11008, 32000),
    }
    assert [type(c).__name__ for c in configs.values()] == [
        "BertConfig",
        "BertConfig",
        "XLMRobertaConfig",
        "LlamaConfig",
    ]


# PEFT 0.21 reads a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", benchmark_shapes.SHAPES)
def test_a_small_version_of_every_shape_is_measured(name):
    small = options(shapes=[name], sweeps=["methods"], modules=["mwn"], rounds=1)
    (group,) = benchmark_step.groups(small)
    rows = benchmark_step.measure(replace(group, methods=group.methods[:4]), small)
    assert all(r.time_ratio[1] > 0 and r.step_memory_ratio >= 1 for r in rows)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_and_head_are_trained_in_float32_over_frozen_weights_in_bfloat16():
    model = benchmark_shapes.make_model(options().shape("llama-7b-lora"), CPU, bf16=True, seed=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-1] == "weight" and ("lora" in name or "score" in name) for name in trained} == {True}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


# --------------------------------------------------------------------------------------------------------- results


def test_ratios_are_taken_within_a_round_and_then_their_median():
    measured = row(wall_ms=[20.0, 90.0, 20.0], plain_wall_ms=[10.0, 30.0, 20.0])
    assert measured.time_ratio == [1.5, 2.0, 2.5]
    assert measured.cpu_ratio == [2.0, 2.0, 2.0]
    assert measured.time_ms[1] == 20.0
    assert measured.step_memory_ratio == 3.0
    assert measured.peak_memory_ratio == (2**30 + 3 * 2**20) / (2**30 + 2**20)


def test_the_time_of_a_method_with_fewer_meta_steps_is_an_average_over_its_cycle():
    measured = row(
        cycle=2, wall_ms=[30.0, 10.0, 50.0, 10.0], plain_wall_ms=[10.0] * 4, cpu_ms=[1.0] * 4, plain_cpu_ms=[1.0] * 4
    )
    assert measured.time_ms[1] == 25.0
    assert measured.time_ratio == [2.25, 2.5, 2.75]


def test_rows_that_are_written_and_read_make_the_same_tables(tmp_path):
    rows, path = rows_of_every_sweep(), tmp_path / "run" / "benchmark_step.json"
    benchmark_figures.write_rows(rows, path, {"rounds": 3})
    again = benchmark_figures.read_rows(path)
    assert again == rows
    for before, after in zip(benchmark_figures.sweeps(rows), benchmark_figures.sweeps(again), strict=True):
        assert printed(benchmark_figures.rich_table(*before)) == printed(benchmark_figures.rich_table(*after))
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["settings"] == {"rounds": 3}
    assert content["environment"]["torch"] == torch.__version__
    assert content["rows"][1]["summary"]["time_ratio"] == [2.5, 3.0, 3.5]


def test_the_tables_show_time_and_memory_as_multiples_of_the_plain_step():
    cells = ["mwn", "evograd", "30.0", "3.00", "2.50–3.50", "2.00", "3.0", "3.00", "1.00", "1.00"]
    markdown = benchmark_figures.markdown_table("methods", [row("plain"), row()])
    assert markdown.splitlines()[-1] == f"| {' | '.join(cells)} |"
    text = printed(benchmark_figures.rich_table("reference", "methods", [row("plain"), row()]))
    assert next(line.split() for line in text.splitlines() if "evograd" in line) == cells


def test_there_is_a_picture_of_every_sweep_that_was_measured_and_no_other(tmp_path):
    rows = rows_of_every_sweep()
    paths = benchmark_figures.draw(rows, tmp_path / "all")
    assert [path.name for path in paths] == [f"reference_{sweep}.png" for sweep in benchmark_step.SWEEPS]
    for path in paths:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.shape[0] > 300
        assert pixels.std() > 0.01
    assert benchmark_figures.draw(rows[:3], tmp_path / "one") == [tmp_path / "one" / "reference_methods.png"]


def test_the_command_measures_writes_and_shows_again(tmp_path, capsys):
    tiny = [word for key, value in {**TINY, "rounds": 1}.items() for word in (f"--{key}", str(value))]
    chosen = ["--sweeps", "sizes", "candidates", "--hidden_sizes", "16", "--candidates", "3"]
    benchmark_step.main([*tiny, *chosen, "--threads", "1", "--output_dir", str(tmp_path / "run")])
    assert "reference: candidates" in capsys.readouterr().out
    names = {"benchmark_step.json", "reference_sizes.png", "reference_candidates.png"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == names
    content = json.loads((tmp_path / "run" / "benchmark_step.json").read_text(encoding="utf-8"))
    assert content["settings"]["shape_settings"][0]["vocab_size"] == 50
    assert {r["value"] for r in content["rows"]} == {16, 3}

    again = ["--from_json", str(tmp_path / "run" / "benchmark_step.json"), "--output_dir", str(tmp_path / "again")]
    benchmark_step.main(again)
    assert "| 3 | evograd head |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "again").iterdir()} == names - {"benchmark_step.json"}


@pytest.mark.parametrize("name", benchmark_shapes.SHAPES)
@pytest.mark.parametrize("dropout", [None, 0.0, 0.3])
def test_dropout_is_the_configurations_own_or_the_one_asked_for(name, dropout):
    found = options(dropout=dropout).shape(name).config().to_dict()
    own = benchmark_shapes.SHAPES[name].config().to_dict()
    keys = [key for key in ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout") if key in own]
    assert keys
    assert [found[key] for key in keys] == [own[key] if dropout is None else dropout for key in keys]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweeps": ["speed"]}, "`sweeps` should be among methods, sizes, candidates, meta_every, got speed"),
        ({"shapes": ["gpt"]}, "`shapes` should be among reference, bert-base, xlm-r-base, llama-7b-lora, got gpt"),
        ({"modules": ["mwn", "cnn"]}, "`modules` should be among mwn, rtn, hook, got cnn"),
        ({"rounds": 0}, "`rounds` should be at least 1, got 0"),
        ({"layers": 0}, "`layers` should be at least 1, got 0"),
        ({"dropout": 1.0}, "`dropout` should be at least 0 and below 1, got 1.0"),
    ],
)
def test_wrong_options_are_errors_that_name_what_is_possible(changes, message, capsys):
    with pytest.raises(ValueError, match=message):
        options(**changes)
    words = [
        word
        for key, value in changes.items()
        for word in (f"--{key}", *(value if isinstance(value, list) else [str(value)]))
    ]
    with pytest.raises(SystemExit):
        benchmark_step.main(words)
    assert message in capsys.readouterr().err
