"""From what is known of each example to what is known of each of its losses."""

from torch import Tensor

from meta_trainer.modules.meta_module import EXAMPLE_OF_LOSS, Batch


def per_loss(values: Tensor, losses: Tensor, batch: Batch, owner: str, described: str) -> Tensor:
    """Values ``[N]`` of the losses ``[N]``, each that of the example that it belongs to.

    Args:
        values: Of the examples, ``[B]``.
        losses: One for each example, or for each of its tokens.
        batch: With the example of each loss, where it is known.
        owner: Name of the meta module that asks.
        described: What an error says that `values` are.

    Raises:
        ValueError: If there are neither as many losses as examples, nor is it known which example a loss belongs to.
    """
    examples = batch.get(EXAMPLE_OF_LOSS)
    if examples is not None:
        values = values[examples]
    if values.shape != losses.shape:
        raise ValueError(
            f"{owner} expects one loss per example, or for each loss the number of its example as "
            f"`{EXAMPLE_OF_LOSS}`, got {len(losses)} losses for {described}. A `per_example_loss` of your own should "
            "give one per example."
        )
    return values
