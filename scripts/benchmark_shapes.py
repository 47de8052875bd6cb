"""The models that the benchmark trains, random weights throughout, and the random batches that it trains them on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

from meta_trainer.modules.representation_transform import SOURCE_COLUMN

NUM_LABELS = 2
FIRST_TOKEN = 5
"""The ids below are special ones, such as padding."""


@dataclass(frozen=True)
class Shape:
    """A model for sequence classification and the size of its batches.

    Attributes:
        name: By which the command line knows it.
        model_type: Of transformers' configurations.
        layers: Number of blocks.
        hidden_size: Of the hidden states.
        vocab_size: Number of token ids.
        batch_size: Examples in a train batch, and in a meta batch.
        sequence_length: Tokens of an example; there is no padding.
        head_size: Of an attention head.
        intermediate_ratio: Size of the feed-forward layer, in hidden sizes.
        settings: Further ones of the configuration.
        lora: Train adapters of rank 16 on the queries and the values, and the head, instead of the whole model.
        methods: Those that make sense for this model; all when empty.
        modules: Likewise.
    """

    name: str
    model_type: str
    layers: int
    hidden_size: int
    vocab_size: int
    batch_size: int
    sequence_length: int
    head_size: int = 64
    intermediate_ratio: float = 4.0
    settings: dict[str, Any] = field(default_factory=dict)
    lora: bool = False
    methods: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    def config(self) -> PreTrainedConfig:
        """The configuration of the model."""
        return AutoConfig.for_model(
            self.model_type,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden_size,
            num_attention_heads=max(1, self.hidden_size // self.head_size),
            intermediate_size=int(self.hidden_size * self.intermediate_ratio),
            vocab_size=self.vocab_size,
            num_labels=NUM_LABELS,
            **self.settings,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("reference", "bert", 4, 512, 8000, batch_size=16, sequence_length=128),
        Shape("bert-base", "bert", 12, 768, 30522, batch_size=32, sequence_length=128),
        Shape(
            "xlm-r-base",
            "xlm-roberta",
            12,
            768,
            250002,
            batch_size=32,
            sequence_length=128,
            # Positions count from 2 in this family.
            settings={"max_position_embeddings": 514},
        ),
        Shape(
            "llama-7b-lora",
            "llama",
            32,
            4096,
            32000,
            batch_size=8,
            sequence_length=512,
            head_size=128,
            intermediate_ratio=2.6875,
            settings={"pad_token_id": 0},
            lora=True,
            methods=("plain", "evograd", "evograd head", "finite difference"),
            modules=("mwn",),
        ),
    )
}


def make_model(shape: Shape, device: torch.device, bf16: bool, seed: int) -> nn.Module:
    """Make the model on the device, with scaled dot-product attention; the same weights for the same seed.

    What is trained is in float32. With `bf16`, the frozen weights under adapters are in bfloat16.
    """
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if bf16 and shape.lora else torch.float32
    with device:
        model: nn.Module = AutoModelForSequenceClassification.from_config(
            shape.config(), dtype=dtype, attn_implementation="sdpa"
        )
        if shape.lora:
            # A tool of development, which the other shapes do without.
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(task_type="SEQ_CLS", r=16, target_modules=["q_proj", "v_proj"])
            model = get_peft_model(model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


class RandomSentences(Dataset[dict[str, Tensor]]):
    """Random token ids with random labels; every example is one of the source, for the modules that ask.

    Args:
        shape: Of the model that reads them.
        num_batches: Size in batches.
        seed: Of the random numbers.
    """

    def __init__(self, shape: Shape, num_batches: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = (num_batches * shape.batch_size, shape.sequence_length)
        self._ids = torch.randint(FIRST_TOKEN, shape.vocab_size, size, generator=generator)  # [N, T]
        self._labels = torch.randint(0, NUM_LABELS, size[:1], generator=generator)  # [N]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self._ids[index],
            "labels": self._labels[index],
            SOURCE_COLUMN: torch.ones((), dtype=torch.bool),
        }
