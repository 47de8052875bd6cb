"""Measure what a step of few-shot training costs with plain training, T1-T2 and EvoGrad, on a small and a large ResNet.

    python scripts/benchmark_few_shot.py                          # measures, writes JSON and the picture
    python scripts/benchmark_few_shot.py --from_json FILE         # the picture of a measurement again

All methods train a RelationNet on the same random episodes with the feature-wise transformation; they take turns, one
step of their own `trainer.train()` each in a round. Memory is the peak of one step above what was alive before it:
activations, gradients and perturbations, but not parameters and the optimizer's state, which all methods have. At the
defaults, a quarter of the paper's width and half its image size, activations are as large beside the parameters as in
the paper, for a 64th of the arithmetic.
"""

import gc
import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from benchmark_turns import SteppedTraining, take_turns
from matplotlib.figure import Figure
from transformers import HfArgumentParser, PrinterCallback, Trainer

from meta_trainer import FeatureWiseTransform, MetaTrainer, MetaTrainingArguments
from meta_trainer.modules.feature_wise_transform import find_channels
from meta_trainer.report import COLOURS, environment
from meta_trainer.tasks.few_shot.build import make_relation_net
from meta_trainer.tasks.few_shot.relation_net import DEPTHS, RelationNetConfig

METHODS: dict[str, dict[str, Any]] = {
    "plain": {"meta_every": 10**9},  # only the first step, which warms up, holds a meta step
    "T1-T2": {"hypergradient": "t1t2"},
    "EvoGrad": {"hypergradient": "evograd"},
}
MIB = 2**20


@dataclass
class Options:
    """What to measure.

    Raises:
        ValueError: If a number is not positive.
    """

    backbones: list[str] = field(default_factory=lambda: list(DEPTHS), metadata={"help": "Feature extractors."})
    backbone_width: int = field(default=16, metadata={"help": "Channels of the first stage; the paper has 64."})
    image_size: int = field(default=112, metadata={"help": "Height and width; the paper has 224."})
    stem: str = field(default="imagenet", metadata={"help": "First layers."})
    n_way: int = field(default=5, metadata={"help": "Classes of an episode."})
    k_shot: int = field(default=5, metadata={"help": "Support images of a class."})
    num_queries: int = field(default=16, metadata={"help": "Query images of a class."})
    warm_up: int = field(default=2, metadata={"help": "Steps that make the optimizers' states."})
    rounds: int = field(default=5, metadata={"help": "Timed steps of each method."})
    seed: int = field(default=0, metadata={"help": "Of weights, data and noise."})
    output_dir: str = field(default="runs/benchmark_few_shot", metadata={"help": "Folder of JSON file and picture."})
    from_json: str | None = field(default=None, metadata={"help": "Measure nothing, draw what this file holds."})

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name in (
            "backbone_width", "image_size", "n_way", "k_shot", "num_queries", "warm_up", "rounds"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` should be at least 1, got {getattr(self, name)}.")


class RandomEpisodes:
    """Episodes of random pixels, a train batch and its meta batch in one."""

    def __init__(self, options: Options) -> None:
        self._options = options

    def __call__(self, rows: Sequence[int]) -> dict[str, Any]:
        """The batch of one episode, a function of its number."""
        batch = self._episode(2 * rows[0])
        return {**batch, "meta_batch": {**self._episode(2 * rows[0] + 1), "use_running_statistics": True}}

    def _episode(self, number: int) -> dict[str, Any]:
        o = self._options
        generator = torch.Generator().manual_seed(number)
        num_images = o.n_way * (o.k_shot + o.num_queries)
        pixels = torch.rand(1, num_images, 3, o.image_size, o.image_size, generator=generator) * 2 - 1
        return {"pixel_values": pixels, "labels": torch.arange(o.n_way).repeat_interleave(o.num_queries)[None]}


def make_trainer(backbone: str, method: str, options: Options, folder: str) -> Trainer:
    """Make a method's model and its trainer, which reports and saves nothing."""
    max_steps = options.warm_up + 1 + options.rounds
    args = MetaTrainingArguments(
        output_dir=folder,
        max_steps=max_steps,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        perturb=["resnet", "relation_module"],
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **METHODS[method],
    )
    config = RelationNetConfig(
        backbone, options.backbone_width, options.stem, options.image_size, options.n_way, options.k_shot
    )
    model = make_relation_net(config, options.seed)
    trainer = MetaTrainer(
        model,
        args,
        meta_module=FeatureWiseTransform(find_channels(model)),
        train_dataset=range(max_steps),
        data_collator=RandomEpisodes(options),
    )
    # It prints a summary at the end where there is no progress bar.
    trainer.remove_callback(PrinterCallback)
    return trainer


def measure(backbone: str, options: Options) -> list[dict[str, Any]]:
    """Time and memory of all methods on one backbone."""
    with TemporaryDirectory() as folder, ExitStack() as stack:
        makers = [partial(make_trainer, backbone, method, options, folder) for method in METHODS]
        trainings = [stack.enter_context(SteppedTraining(maker)) for maker in makers]
        memory, times = take_turns(trainings, options.warm_up, options.rounds)
    gc.collect()
    return [
        {
            "backbone": backbone,
            "method": method,
            "step_ms": statistics.median(cost.wall_ms for cost in timed),
            "cpu_ms": statistics.median(cost.cpu_ms for cost in timed),
            "step_mib": counted.step_bytes / MIB,
            "held_mib": counted.held_bytes / MIB,
        }
        for method, counted, timed in zip(METHODS, memory, times, strict=True)
    ]


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Memory and time of every method, both backbones side by side."""
    backbones = list(dict.fromkeys(row["backbone"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    width = 0.8 / len(methods)
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = (("step_mib", 1 / 1024, "memory of a step (GiB)"), ("step_ms", 1e-3, "time of a step (s)"))
    for axes, (key, unit, label) in zip(figure.subplots(1, 2), panels, strict=True):
        for i, method in enumerate(methods):
            heights = [row[key] * unit for row in rows if row["method"] == method]
            positions = [number + (i - (len(methods) - 1) / 2) * width for number in range(len(heights))]
            bars = axes.bar(positions, heights, width, color=COLOURS[i], label=method)
            axes.bar_label(bars, fmt="%.2f", padding=2, fontsize="small")
        axes.set_xticks(range(len(backbones)), [name.replace("resnet", "ResNet-") for name in backbones])
        axes.set(ylabel=label)
        axes.margins(y=0.12)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, and show."""
    parser = HfArgumentParser(Options, description=__doc__)  # type: ignore[arg-type]
    try:
        (options,) = parser.parse_args_into_dataclasses(arguments)
    except ValueError as error:
        parser.error(str(error))
    folder = Path(options.output_dir)
    if options.from_json is None:
        rows = [row for backbone in options.backbones for row in measure(backbone, options)]
        folder.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "options": asdict(options), "rows": rows}
        (folder / "few_shot_cost.json").write_text(json.dumps(content, indent=2) + "\n")
    else:
        rows = json.loads(Path(options.from_json).read_text())["rows"]
    for row in rows:
        print(f"{row['backbone']:9} {row['method']:8} {row['step_mib']:8.0f} MiB {row['step_ms']:8.0f} ms")
    draw(rows, folder / "few_shot_cost.png")


if __name__ == "__main__":
    main()
