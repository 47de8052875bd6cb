"""MetaTrainingArguments: what they refuse, keep, and read from a command line."""

import re
from dataclasses import dataclass, fields

import pytest
from tiny import arguments, meta_trainer, tiny_bert
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from meta_trainer import MetaTrainer, MetaTrainingArguments
from meta_trainer.arguments import ESTIMATORS

META_FIELDS = {f.name for f in fields(MetaTrainingArguments)} - {f.name for f in fields(TrainingArguments)}
NAN, INF = float("nan"), float("inf")


def test_the_defaults_of_the_estimator_are_those_of_the_paper(tmp_path):
    args = arguments(tmp_path)
    assert (args.hypergradient, args.num_candidates, args.sigma, args.temperature) == (
        "evograd",
        2,
        1e-3,
        0.05,
    )
    assert (args.noise, args.perturb, args.meta_every) == ("sign", ["all"], 1)


@pytest.mark.parametrize("name", ["sigma", "temperature", "meta_every", "per_device_meta_batch_size"])
@pytest.mark.parametrize("value", [0, -1, INF, NAN])
def test_what_should_be_positive_is_checked(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` should be a positive(, finite|, whole)? number, got {value}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize(
    "name",
    [
        "meta_learning_rate",
        "meta_weight_decay",
        "meta_warmup_steps",
        "meta_max_grad_norm",
        "meta_trust_region",
        "meta_delay_steps",
    ],
)
@pytest.mark.parametrize("value", [-0.5, INF, NAN])
def test_what_should_not_be_negative_is_checked(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` should be zero or a positive number, got {value}"):
        arguments(tmp_path, **{name: value})
    assert getattr(arguments(tmp_path, **{name: 0}), name) == 0


@pytest.mark.parametrize("value", [0, -1e-3, INF, NAN])
def test_an_inner_step_without_a_length_is_refused_where_one_is_taken(tmp_path, value):
    for hypergradient in ("t1t2", "finite_difference"):
        with pytest.raises(ValueError, match=f"`learning_rate` should be .*={hypergradient!r}, .*got {value}"):
            arguments(tmp_path, hypergradient=hypergradient, learning_rate=value)
    assert arguments(tmp_path, hypergradient="evograd", learning_rate=0).learning_rate == 0


@pytest.mark.parametrize("hypergradient", ESTIMATORS)
@pytest.mark.parametrize("settings", [{"use_reentrant": True}, '{"use_reentrant": true}'])
def test_reentrant_checkpointing_is_refused(tmp_path, hypergradient, settings):
    checkpointing = {"activation_checkpointing": True, "activation_checkpointing_kwargs": settings}
    with pytest.raises(ValueError, match=r"should have use_reentrant=False, got True: .*torch\.autograd\.grad"):
        meta_trainer(tmp_path, hypergradient=hypergradient, **checkpointing)
    MetaTrainer(tiny_bert(), arguments(tmp_path, **checkpointing))


@pytest.mark.parametrize(
    ("checkpointed", "settings"),
    [(True, None), (True, {"every_n_layers": 2}), (True, {"use_reentrant": False}), (False, {"use_reentrant": True})],
)
def test_other_checkpointing_is_taken(tmp_path, checkpointed, settings):
    args = arguments(tmp_path, activation_checkpointing=checkpointed, activation_checkpointing_kwargs=settings)
    args.check_activation_checkpointing()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_reentrant_checkpointing_is_refused_under_its_old_name(tmp_path):
    args = arguments(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="should have use_reentrant=False"):
        args.check_activation_checkpointing()


@pytest.mark.parametrize("name", ["num_candidates", "meta_every", "per_device_meta_batch_size", "seed"])
@pytest.mark.parametrize("value", [2.5, "3", True, None])
def test_what_is_counted_should_be_whole(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` should be a .*whole number.*, got {value!r}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["sigma", "guidance", "meta_learning_rate", "meta_adam_epsilon", "meta_trust_region"])
@pytest.mark.parametrize("value", ["0.5", True, [1.0], 10**400])
def test_what_is_measured_should_be_a_number_that_single_precision_can_hold(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` should be .*got {re.escape(repr(value))}"):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["antithetic", "orthogonal", "include_unperturbed", "relative_sigma"])
def test_a_truth_value_is_no_text(tmp_path, name):
    with pytest.raises(ValueError, match=f"`{name}` should be True or False, got 'false'"):
        arguments(tmp_path, **{name: "false"})


@pytest.mark.parametrize("value", [3, {"a": 1}, [1], [None], [["all"]]])
def test_a_scope_that_is_no_text_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=rf"list of name patterns, got {re.escape(repr(value))}"):
        arguments(tmp_path, perturb=value)


@pytest.mark.parametrize("value", [-1, 2**32])
def test_a_seed_that_numpy_would_refuse_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"`seed` should be a whole number from 0 to 4294967295, got {value}"):
        arguments(tmp_path, seed=value)


@pytest.mark.parametrize("value", [1, 0, -2])
def test_fewer_than_two_candidates_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match=f"`num_candidates` should be at least 2, got {value}"):
        arguments(tmp_path, num_candidates=value)


@pytest.mark.parametrize(
    "name", ["hypergradient", "noise", "inner_step", "meta_guard", "meta_optim", "meta_lr_scheduler_type"]
)
def test_unknown_names_are_answered_with_the_known_ones(tmp_path, name):
    default = getattr(arguments(tmp_path), name)
    with pytest.raises(ValueError, match=f"`{name}` should be one of .*{default}.*, got 'evo'"):
        arguments(tmp_path, **{name: "evo"})


@pytest.mark.parametrize("value", [[], "", ["classifier.*", ""]])
def test_an_empty_scope_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="`perturb` should be 'all', 'head' or a list of name patterns"):
        arguments(tmp_path, perturb=value)


@pytest.mark.parametrize("word", ["all", "head"])
def test_a_scope_of_a_word_and_patterns_is_refused(tmp_path, word):
    with pytest.raises(ValueError, match=f"alone, or name patterns, got both.*{word}"):
        arguments(tmp_path, perturb=[word, "classifier.*"])


@pytest.mark.parametrize(
    ("value", "expected"), [("head", ["head"]), ("bert.*", ["bert.*"]), (["a.*", "b.*"], ["a.*", "b.*"])]
)
def test_the_scope_may_be_one_string_or_several(tmp_path, value, expected):
    assert arguments(tmp_path, perturb=value).perturb == expected


def test_values_of_training_arguments_are_still_checked(tmp_path):
    with pytest.raises(ValueError, match="no_such_strategy"):
        arguments(tmp_path, save_strategy="no_such_strategy")


def test_plain_training_arguments_keep_every_field(tmp_path):
    plain = arguments(
        tmp_path,
        TrainingArguments,
        optim="sgd",
        lr_scheduler_type="cosine",
        lr_scheduler_kwargs={"num_cycles": 2},
        warmup_steps=0.25,
        eval_strategy="steps",
        eval_steps=5,
        logging_steps=0.5,
        accelerator_config={"split_batches": True},
        data_seed=8,
        label_names=["labels"],
        hub_strategy="all_checkpoints",
        report_to="none",
        bf16=True,
    )
    found = MetaTrainingArguments.from_training_arguments(plain, sigma=0.5, meta_every=3)
    for field in fields(TrainingArguments):
        assert getattr(found, field.name) == getattr(plain, field.name), field.name
    assert (found.sigma, found.meta_every, found.num_candidates) == (0.5, 3, 2)
    assert (found.device, found.world_size) == (plain.device, plain.world_size)


def test_arguments_with_fields_of_their_own_are_refused_and_may_be_combined(tmp_path):
    with pytest.raises(ValueError, match=r"Seq2SeqTrainingArguments has the fields .*predict_with_generate"):
        MetaTrainingArguments.from_training_arguments(arguments(tmp_path, Seq2SeqTrainingArguments))

    @dataclass
    class Both(MetaTrainingArguments, Seq2SeqTrainingArguments):
        pass

    plain = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True)
    args = Both.from_training_arguments(plain)
    assert (args.predict_with_generate, args.hypergradient) == (True, "evograd")


def test_arguments_survive_the_way_into_a_dictionary_and_back(tmp_path):
    args = arguments(tmp_path, perturb="head", sigma=0.5)
    again = MetaTrainingArguments(**{**args.to_dict(), "use_cpu": True})
    assert {name: getattr(again, name) for name in META_FIELDS} == {name: getattr(args, name) for name in META_FIELDS}


COMMAND_LINE = {
    "hypergradient": ("t1t2", "t1t2"),
    "num_candidates": ("4", 4),
    "sigma": ("1e-2", 0.01),
    "temperature": ("0.5", 0.5),
    "noise": ("guided", "guided"),
    "antithetic": ("true", True),
    "orthogonal": ("true", True),
    "include_unperturbed": ("true", True),
    "relative_sigma": ("true", True),
    "guidance": ("0.5", 0.5),
    "inner_step": ("sgd", "sgd"),
    "share_candidates": ("false", False),
    "perturb": ("classifier.* bert.pooler.*", ["classifier.*", "bert.pooler.*"]),
    "meta_every": ("3", 3),
    "meta_delay_steps": ("0.25", 0.25),
    "meta_learning_rate": ("1e-4", 1e-4),
    "meta_optim": ("sgd", "sgd"),
    "meta_weight_decay": ("0.1", 0.1),
    "meta_adam_epsilon": ("1e-10", 1e-10),
    "meta_lr_scheduler_type": ("linear", "linear"),
    "meta_warmup_steps": ("0.1", 0.1),
    "meta_max_grad_norm": ("0", 0.0),
    "meta_guard": ("ascent", "ascent"),
    "meta_trust_region": ("0.01", 0.01),
    "meta_max_skipped": ("5", 5),
    "per_device_meta_batch_size": ("16", 16),
}


def test_every_meta_field_is_read_from_a_command_line(tmp_path):
    assert set(COMMAND_LINE) == META_FIELDS
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true"]
    for name, (text, _) in COMMAND_LINE.items():
        words += [f"--{name}", *text.split()]
    (args,) = HfArgumentParser(MetaTrainingArguments).parse_args_into_dataclasses(words)
    assert {name: getattr(args, name) for name in META_FIELDS} == {name: v for name, (_, v) in COMMAND_LINE.items()}


def test_the_help_describes_every_meta_field():
    text = re.sub(r"\s+", " ", HfArgumentParser(MetaTrainingArguments).format_help())
    for field in fields(MetaTrainingArguments):
        if field.name in META_FIELDS:
            assert f"--{field.name}" in text
            assert field.metadata["help"][:25] in text


def test_guided_noise_is_guarded_by_default_and_nothing_else_is(tmp_path):
    for settings in ({}, {"hypergradient": "t1t2"}, {"noise": "optimizer"}):
        assert arguments(tmp_path, **settings).meta_guard == "none"
    assert arguments(tmp_path, noise="guided").meta_guard == "ascent"
    assert arguments(tmp_path, noise="guided", meta_guard="none").meta_guard == "none"


def test_a_meta_learning_rate_that_no_optimizer_could_use_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`meta_learning_rate` should be at most 3e\+37, got 3e\+38"):
        arguments(tmp_path, meta_learning_rate=3e38)


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy", "warmup_stable_decay", "cosine_with_min_lr"])
def test_a_meta_schedule_that_needs_more_than_the_step_is_refused(tmp_path, schedule):
    with pytest.raises(ValueError, match=f"a schedule of the step alone, got '{schedule}', which needs"):
        MetaTrainingArguments(str(tmp_path), meta_lr_scheduler_type=schedule)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("label_smoothing_factor", value) for value in (-0.1, 2, NAN, "0.1")],
        *[("gradient_accumulation_steps", value) for value in (0, -1, 1.5)],
        *[("per_device_train_batch_size", value) for value in (0, -1, 2.5)],
        *[("data_seed", value) for value in (-1, 1.5, "1")],
        *[("learning_rate", value) for value in (-1, NAN, "x", None)],
    ],
)
def test_settings_of_trainer_that_a_meta_step_computes_with_are_checked(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"`{name}` should be .*, got {value!r}"):
        MetaTrainingArguments(str(tmp_path), **{name: value})
