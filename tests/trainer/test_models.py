"""Models that reach Trainer by other ways: adapters, `model_init`, checkpointed activations."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny import NUM_TRAIN, arguments, meta_trainer, same, sentences, snapshot, tiny_bert, weight_net

from meta_trainer import MetaTrainer


def adapted():
    return get_peft_model(tiny_bert(), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))


# PEFT 0.21 reads a property that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_is_meta_trained_and_resumed_bit_for_bit(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "meta_learning_rate": 0.05}
    straight = meta_trainer(tmp_path, model=adapted(), **settings)
    named = straight.model.named_parameters()
    frozen = {name: parameter.detach().clone() for name, parameter in named if not parameter.requires_grad}
    straight.train()
    resumed = meta_trainer(tmp_path / "resumed", weight_net(5), adapted(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))

    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").is_file()
    assert same(snapshot(resumed.model), snapshot(straight.model))
    assert same(snapshot(resumed.meta_module), snapshot(straight.meta_module))
    assert not same(snapshot(straight.meta_module), snapshot(weight_net()))
    assert same(frozen, {name: p for name, p in straight.model.named_parameters() if name in frozen})


def test_a_model_may_come_from_model_init(tmp_path):
    trainer = MetaTrainer(
        args=arguments(tmp_path),
        model_init=lambda trial: tiny_bert(),
        train_dataset=sentences(NUM_TRAIN, 1),
        meta_dataset=sentences(7, 2),
        meta_module=weight_net(),
    )
    trainer.train()
    assert not same(snapshot(trainer.meta_module), snapshot(weight_net()))


def test_training_twice_goes_on_with_the_meta_module(tmp_path):
    trainer = meta_trainer(tmp_path)
    trainer.train()
    halfway = snapshot(trainer.meta_module)
    trainer.train()
    assert trainer._num_meta_steps == 8
    assert not same(snapshot(trainer.meta_module), halfway)


@pytest.mark.parametrize("hypergradient", ["evograd", "t1t2", "finite_difference"])
def test_checkpointed_activations_give_the_same_meta_module(tmp_path, hypergradient):
    runs = []
    for checkpointed in (False, True):
        trainer = meta_trainer(
            tmp_path, activation_checkpointing=checkpointed, hypergradient=hypergradient, max_steps=2
        )
        assert trainer.model.is_activation_checkpointing is False
        trainer.train()
        assert trainer.model.is_activation_checkpointing is checkpointed
        runs.append(snapshot(trainer.meta_module))
    assert same(*runs)
    assert not same(runs[0], snapshot(weight_net()))
