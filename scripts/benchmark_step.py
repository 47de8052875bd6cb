"""Measure what a training iteration costs with a meta step, as a multiple of a plain training step.

    python scripts/benchmark_step.py                                      # all sweeps on the reference model
    python scripts/benchmark_step.py --sweeps methods --shapes bert-base  # one sweep on another model
    python scripts/benchmark_step.py --from_json FILE                     # tables and pictures of a measurement again

Methods are compared in one process: in every round each of them takes one step of its own `trainer.train()`, and the
ratio to the plain step is that within the round, so that whatever slows the machine down slows both. The numbers are
medians and quartiles over rounds. Memory is the peak of one step, above what was alive before it.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmark_figures import AXES, Row, draw, markdown_table, read_rows, rich_table, sweeps, write_rows
from benchmark_methods import EVOGRAD, EVOGRAD_HEAD, LITERAL, METHODS, MODULES, PLAIN, Method
from benchmark_shapes import SHAPES, RandomSentences, Shape, make_model
from benchmark_turns import StepCost, SteppedTraining, take_turns
from rich.console import Console
from transformers import HfArgumentParser, PrinterCallback, Trainer

from meta_trainer import MetaTrainingArguments

SWEEPS = ("methods", *AXES)
MINIMUM_WARM_UP = 3
"""Steps that make the optimizers' states and whatever a trainer prepares in its first meta step."""

NUM_BATCHES = 8
"""Batches in the data sets, which are read over and over."""


@dataclass
class Options:
    """What to measure.

    Raises:
        ValueError: If a name is unknown or a number is not positive.
    """

    sweeps: list[str] = field(default_factory=lambda: list(SWEEPS), metadata={"help": f"Any of {', '.join(SWEEPS)}."})
    shapes: list[str] = field(
        default_factory=lambda: ["reference"], metadata={"help": f"Models: any of {', '.join(SHAPES)}."}
    )
    modules: list[str] = field(
        default_factory=lambda: list(MODULES),
        metadata={"help": f"Meta modules of the sweep over methods: any of {', '.join(MODULES)}."},
    )
    rounds: int = field(default=20, metadata={"help": "Timed steps of each method, rounded up to whole cycles."})
    hidden_sizes: list[int] = field(
        default_factory=lambda: [128, 256, 384, 512, 768], metadata={"help": "Values of the sweep over sizes."}
    )
    candidates: list[int] = field(
        default_factory=lambda: [2, 4, 8, 16], metadata={"help": "Values of the sweep over candidates."}
    )
    meta_every: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8], metadata={"help": "Values of the sweep over meta_every."}
    )
    layers: int | None = field(default=None, metadata={"help": "Blocks, instead of the shape's own number."})
    hidden_size: int | None = field(default=None, metadata={"help": "Likewise."})
    vocab_size: int | None = field(default=None, metadata={"help": "Likewise."})
    batch_size: int | None = field(default=None, metadata={"help": "Of train and meta batches, likewise."})
    sequence_length: int | None = field(default=None, metadata={"help": "Likewise."})
    dropout: float | None = field(
        default=None, metadata={"help": "Of hidden states and attention, instead of the configuration's own."}
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads; PyTorch's choice by default."})
    bf16: bool | None = field(default=None, metadata={"help": "Mixed precision; by default on CUDA only."})
    seed: int = field(default=0, metadata={"help": "Of weights, data and noise."})
    output_dir: str = field(default="runs/benchmark_step", metadata={"help": "Folder of the JSON file and pictures."})
    from_json: str | None = field(default=None, metadata={"help": "Measure nothing, show what this file holds."})

    def __post_init__(self) -> None:
        """Check names and numbers."""
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available()
        for name, known in (("sweeps", SWEEPS), ("shapes", SHAPES), ("modules", MODULES)):
            unknown = sorted(set(getattr(self, name)) - set(known))
            if unknown:
                raise ValueError(f"`{name}` should be among {', '.join(known)}, got {', '.join(unknown)}.")
        for name in ("rounds", *OVERRIDES, "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"`{name}` should be at least 1, got {getattr(self, name)}.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` should be at least 0 and below 1, got {self.dropout}.")

    def shape(self, name: str) -> Shape:
        """A named shape with what this measurement changes about it."""
        changes = {key: getattr(self, key) for key in OVERRIDES if getattr(self, key) is not None}
        shape = replace(SHAPES[name], **changes)
        if self.dropout is None:
            return shape
        # Each family of models knows some of these names and ignores the others.
        dropout = dict.fromkeys(
            ("hidden_dropout_prob", "attention_probs_dropout_prob", "attention_dropout"), self.dropout
        )
        return replace(shape, settings={**shape.settings, **dropout})


OVERRIDES = ("layers", "hidden_size", "vocab_size", "batch_size", "sequence_length")


@dataclass(frozen=True)
class Group:
    """Methods that are measured side by side, the plain one first."""

    sweep: str
    shape: Shape
    module: str
    methods: tuple[Method, ...]
    value: int | None = None

    @property
    def cycle(self) -> int:
        """Steps after which the meta steps of all methods repeat."""
        return math.lcm(*(method.cycle for method in self.methods))


def groups(options: Options) -> Iterator[Group]:
    """Every group of the chosen sweeps, shape by shape."""
    for name in options.shapes:
        shape = options.shape(name)
        for sweep in options.sweeps:
            for group in _groups_of(sweep, shape, options):
                methods = tuple(m for m in group.methods if not shape.methods or m.name in shape.methods)
                if not shape.modules or group.module in shape.modules:
                    yield replace(group, methods=methods)


def _groups_of(sweep: str, shape: Shape, options: Options) -> Iterator[Group]:
    if sweep == "methods":
        for module in options.modules:
            yield Group(sweep, shape, module, METHODS)
    elif sweep == "sizes":
        methods = tuple(method for method in METHODS if method.cycle == 1)
        for size in options.hidden_sizes:
            yield Group(sweep, replace(shape, hidden_size=size), "mwn", methods, size)
    elif sweep == "candidates":
        for number in options.candidates:
            varied = tuple(m.with_settings(num_candidates=number) for m in (LITERAL, EVOGRAD, EVOGRAD_HEAD))
            yield Group(sweep, shape, "mwn", (PLAIN, *varied), number)
    else:
        for every in options.meta_every:
            varied = tuple(m.with_settings(meta_every=every) for m in (EVOGRAD, EVOGRAD_HEAD))
            yield Group(sweep, shape, "mwn", (PLAIN, *varied), every)


def make_trainer(group: Group, method: Method, options: Options, max_steps: int, folder: str) -> Trainer:
    """Make a method's model and its trainer, which reports and saves nothing."""
    on_cuda = torch.cuda.is_available()
    args = MetaTrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=group.shape.batch_size,
        per_device_meta_batch_size=group.shape.batch_size,
        use_cpu=not on_cuda,
        bf16=bool(options.bf16),
        dataloader_pin_memory=on_cuda,
        seed=options.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **method.settings,
    )
    model = make_model(group.shape, args.device, bool(options.bf16), options.seed)
    train_dataset = RandomSentences(group.shape, NUM_BATCHES, options.seed)
    if method.name == PLAIN.name and group.module == "mwn":
        trainer = Trainer(model, args, train_dataset=train_dataset)
    else:
        trainer = method.trainer(
            model,
            args,
            train_dataset=train_dataset,
            meta_dataset=RandomSentences(group.shape, NUM_BATCHES, options.seed + 1),
            meta_module=MODULES[group.module](group.shape.config(), method),
        )
    # It prints a summary at the end where there is no progress bar.
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(group: Group, options: Options) -> list[Row]:
    """Measure one group."""
    # Memory is counted in the step after the warm-up, which whole cycles make one with a meta step.
    warm_up, rounds = (_whole_cycles(steps, group.cycle) for steps in (MINIMUM_WARM_UP, options.rounds))
    with TemporaryDirectory() as folder, ExitStack() as stack:
        makers = [partial(make_trainer, group, m, options, warm_up + 1 + rounds, folder) for m in group.methods]
        trainings = [stack.enter_context(SteppedTraining(maker)) for maker in makers]
        memory, times = take_turns(trainings, warm_up, rounds)
    return [_row(group, *each, memory[0], times[0]) for each in zip(group.methods, memory, times, strict=True)]


def _whole_cycles(steps: int, cycle: int) -> int:
    return -(-steps // cycle) * cycle


def _row(
    group: Group,
    method: Method,
    memory: StepCost,
    times: Sequence[StepCost],
    plain_memory: StepCost,
    plain_times: Sequence[StepCost],
) -> Row:
    return Row(
        shape=group.shape.name,
        sweep=group.sweep,
        module=group.module,
        value=group.value,
        method=method.name,
        cycle=method.cycle,
        wall_ms=[cost.wall_ms for cost in times],
        cpu_ms=[cost.cpu_ms for cost in times],
        plain_wall_ms=[cost.wall_ms for cost in plain_times],
        plain_cpu_ms=[cost.cpu_ms for cost in plain_times],
        step_bytes=memory.step_bytes,
        held_bytes=memory.held_bytes,
        plain_step_bytes=plain_memory.step_bytes,
        plain_held_bytes=plain_memory.held_bytes,
    )


def run(options: Options, console: Console) -> list[Row]:
    """Measure all groups; the JSON file is written after each, so that nothing is lost when the run is stopped."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    settings = {**asdict(options), "shape_settings": [asdict(options.shape(name)) for name in options.shapes]}
    rows: list[Row] = []
    planned = list(groups(options))
    for number, group in enumerate(planned, start=1):
        subject = group.module if group.value is None else f"{AXES[group.sweep]} {group.value}"
        console.print(
            f"[{number}/{len(planned)}] {group.shape.name}, {group.sweep}: {subject}", highlight=False, markup=False
        )
        rows += measure(group, options)
        write_rows(rows, Path(options.output_dir) / "benchmark_step.json", settings)
        # Trainers are cyclic garbage; the next group needs their memory.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and show."""
    parser = HfArgumentParser(Options, description=__doc__)  # type: ignore[arg-type]
    try:
        (options,) = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    if options.from_json is None:
        rows = run(options, console)
        for table in sweeps(rows):
            console.print(rich_table(*table))
    else:
        rows = read_rows(Path(options.from_json))
        for shape, sweep, group in sweeps(rows):
            print(f"\n**{shape}: {sweep}**\n\n{markdown_table(sweep, group)}")
    for path in draw(rows, Path(options.output_dir)):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
