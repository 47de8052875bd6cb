"""MetaTrainingArguments, whatever their fields are given."""

from dataclasses import fields
from numbers import Real
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from oracle import REFUSED, attempt, cases
from transformers import HfArgumentParser, TrainingArguments
from values import objects, plain, scalars, texts

from meta_trainer import MetaTrainingArguments
from meta_trainer.arguments import ESTIMATORS, GUARDS, INNER_STEPS
from meta_trainer.hypergrad import NOISE_NAMES

META_FIELDS = sorted({f.name for f in fields(MetaTrainingArguments)} - {f.name for f in fields(TrainingArguments)})
INTEGERS = ("num_candidates", "meta_every", "per_device_meta_batch_size")
FLAGS = ("antithetic", "orthogonal", "include_unperturbed", "relative_sigma", "share_candidates")
NAMES = {"hypergradient": ESTIMATORS, "noise": NOISE_NAMES, "inner_step": INNER_STEPS, "meta_guard": GUARDS}
# A wrong value in one field should not hide what those of the others do.
likely = st.fixed_dictionaries({}, optional={name: st.sampled_from(known) for name, known in NAMES.items()})
strange = st.dictionaries(st.sampled_from(META_FIELDS), objects, max_size=3)
strange_for_trainer = st.dictionaries(
    st.sampled_from(["learning_rate", "seed", "data_seed", "per_device_train_batch_size", "max_steps"]),
    plain,
    max_size=1,
)


def check_sound(args: MetaTrainingArguments) -> None:
    """What was not refused is what the annotations say, and finite."""
    for name in INTEGERS:
        value = getattr(args, name)
        assert type(value) is int, (name, value)
        assert value >= (2 if name == "num_candidates" else 1), (name, value)
    for name in FLAGS:
        assert type(getattr(args, name)) is bool, name
    for name, known in NAMES.items():
        assert getattr(args, name) in known, name
    assert isinstance(args.perturb, list | tuple)
    assert all(isinstance(pattern, str) and pattern for pattern in args.perturb)
    for name in META_FIELDS:
        value = getattr(args, name)
        if isinstance(value, Real):
            assert 0 <= value < float("inf"), (name, value)
        else:
            assert value is None or isinstance(value, str | list), (name, value)


@cases(400)
@given(likely=likely, strange=strange)
def test_arguments_are_sound_or_refused(likely, strange):
    args = attempt(lambda: MetaTrainingArguments("out", use_cpu=True, **{**likely, **strange}))
    if args is not REFUSED:
        check_sound(args)


@cases(100)
@given(likely=likely, strange=strange, trainer=strange_for_trainer)
def test_a_dictionary_of_arguments_is_sound_or_refused(likely, strange, trainer):
    parser = HfArgumentParser(MetaTrainingArguments)
    content = {"output_dir": "out", "use_cpu": True, **likely, **strange, **trainer}
    args = attempt(lambda: parser.parse_dict(content)[0])
    if args is not REFUSED:
        check_sound(args)


def words_of(name: str, value: Any) -> list[str]:
    return [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]


@cases(150)
@given(values=st.dictionaries(st.sampled_from(META_FIELDS), st.one_of(texts, scalars, st.lists(texts)), max_size=3))
def test_a_command_line_of_arguments_is_sound_or_refused(values):
    words = ["--output_dir", "out", "--use_cpu", "true"]
    for name, value in values.items():
        words += words_of(name, value)

    def parse() -> Any:
        try:
            return HfArgumentParser(MetaTrainingArguments).parse_args_into_dataclasses(words)[0]
        except SystemExit:  # argparse has printed the flag and the value
            return REFUSED

    args = attempt(parse)
    if args is not REFUSED:
        check_sound(args)
