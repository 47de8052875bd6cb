"""Which loss goes through the loss door."""

import pytest
import torch
from tiny import HiddenShift, MeanLoss, PointClassifier, batch_of, meta_trainer, points, sentences, tiny_bert
from torch.nn import functional as F


def test_a_model_whose_loss_is_no_plain_mean_is_refused_at_the_loss_door(tmp_path):
    trainer = meta_trainer(tmp_path, model=PointClassifier(class_weights=torch.tensor([1.0, 9.0])))
    with pytest.raises(ValueError, match="objective is no plain mean"):
        trainer.train()


def test_a_per_example_loss_of_ones_own_replaces_that_of_the_heads(tmp_path):
    weights = torch.tensor([1.0, 9.0])

    def per_example_loss(outputs, labels):
        return F.cross_entropy(outputs["logits"], labels, weight=weights, reduction="none")

    trainer = meta_trainer(
        tmp_path,
        MeanLoss(),
        PointClassifier(class_weights=weights),
        keywords={"per_example_loss": per_example_loss},
    )
    result = trainer.meta_step(trainer.model, batch_of(points(8, 5), 8))
    outputs = PointClassifier().train()(**batch_of(points(8, 5), 8))
    assert result.train_losses.mean() > 2 * outputs["loss"]
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_loss_function_of_trainer_cannot_feed_the_loss_door(tmp_path):
    with pytest.raises(ValueError, match=r"MetaWeightNet weighs examples.*Pass `per_example_loss`"):
        meta_trainer(tmp_path, keywords={"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: None})


def test_a_loss_function_of_trainer_serves_the_other_doors(tmp_path):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return 3 * F.cross_entropy(outputs["logits"], labels)

    trainer = meta_trainer(tmp_path, HiddenShift(), tiny_bert(0.0), keywords={"compute_loss_func": loss_function})
    batch = batch_of(sentences(4, 5))
    own = tiny_bert(0.0).train()(**batch).loss
    result = trainer.meta_step(trainer.model, {**batch, "meta_batch": batch})
    torch.testing.assert_close(result.val_loss, 3 * own.detach(), rtol=1e-2, atol=0)


def test_a_batch_without_labels_cannot_be_weighed(tmp_path):
    trainer = meta_trainer(tmp_path)
    batch = batch_of(sentences(4, 5))
    with pytest.raises(ValueError, match=r"needs a column `labels`, got the columns \['input_ids'"):
        trainer.meta_step(trainer.model, {"input_ids": batch["input_ids"]})
