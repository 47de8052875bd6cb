"""Learned weights of domains: the formula, its hypergradient, and tokens that belong to examples."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from meta_trainer import DomainWeights, MetaModule, MetaTrainer, MetaTrainingArguments
from meta_trainer.hypergrad import BilevelProblem, evograd, finite_difference, t1t2
from meta_trainer.per_example_loss import PerExampleLoss

DOMAINS = ["news", "forum", "noise"]


def domain_weights(*logits: float) -> DomainWeights:
    module = DomainWeights(DOMAINS).double()
    with torch.no_grad():
        module.logits.copy_(torch.tensor(logits))
    return module


def test_all_domains_count_the_same_at_first():
    assert DomainWeights(DOMAINS).all_weights().tolist() == pytest.approx([1, 1, 1])


def test_the_objective_is_the_normalised_weighted_mean():
    module, losses, domain = domain_weights(1, 0, -2), torch.rand(5).double(), torch.tensor([0, 2, 2, 1, 0])
    weights = torch.tensor([1.0, 0.0, -2.0]).double().exp()[domain]

    found = module.reduce(losses, {"domain": domain}, None)

    assert_close(found, (weights * losses).sum() / weights.sum())


def test_only_the_ratios_of_weights_matter_and_they_are_one_in_the_mean():
    module, shifted = domain_weights(1, 0, -2), domain_weights(6, 5, 3)
    assert_close(module.all_weights(), shifted.all_weights())
    assert module.all_weights().mean().item() == pytest.approx(1)


def test_the_summary_names_every_domain():
    summary = domain_weights(1, 0, -2).summary()
    assert list(summary) == ["weight_news", "weight_forum", "weight_noise"]
    assert summary["weight_news"] > summary["weight_forum"] > summary["weight_noise"]


def test_a_token_has_the_weight_of_its_example():
    module, losses = domain_weights(1, 0, -2), torch.rand(4).double()
    batch = {"domain": torch.tensor([2, 0]), "example_of_loss": torch.tensor([0, 1, 1, 1])}
    of_tokens = {"domain": torch.tensor([2, 0, 0, 0])}

    assert_close(module.reduce(losses, batch, None), module.reduce(losses, of_tokens, None))
    assert_close(module.normalizer(losses, batch), module.normalizer(losses, of_tokens))


def test_weights_that_underflow_together_give_zero_and_not_nan():
    module, losses = domain_weights(0, 0, -1e4), torch.rand(2, requires_grad=True)
    assert module.reduce(losses, {"domain": torch.tensor([2, 2])}, None) == 0


def test_it_is_saved_with_the_names_of_its_domains(tmp_path):
    DomainWeights(DOMAINS, column="source").save_pretrained(tmp_path)
    loaded = MetaModule.from_pretrained(tmp_path)
    assert isinstance(loaded, DomainWeights)
    assert (loaded.domains, loaded.column, loaded.batch_columns) == (DOMAINS, "source", ("source",))


@pytest.mark.parametrize("domains", [["one"], [], ["a", "a"], "ab", [1, 2], None])
def test_domains_are_two_names_or_more(domains):
    with pytest.raises(ValueError, match="`domains` should be a list of at least two names, each once"):
        DomainWeights(domains)


@pytest.mark.parametrize("column", ["", None, 3])
def test_the_column_has_a_name(column):
    with pytest.raises(ValueError, match="`column` should be the name of a batch column"):
        DomainWeights(DOMAINS, column)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"labels": torch.zeros(3)}, r"numbers of the domains \['news', .*got the columns \['labels'\]"),
        ({"domain": torch.tensor([0, 3, 1])}, "got the number 3"),
        ({"domain": torch.tensor([0, -1, 1])}, "got the number -1"),
        ({"domain": torch.tensor([0.0, 1.0, 1.0])}, r"got torch.float32 of shape \[3\]"),
        ({"domain": torch.zeros(3, 1).long()}, r"got torch.int64 of shape \[3, 1\]"),
        ({"domain": ["news", "news", "noise"]}, r"got \['news', 'news', 'noise'\]"),
        ({"domain": torch.tensor([0, 1])}, "got 3 losses for 2 examples"),
    ],
)
def test_a_column_that_names_no_domain_of_each_loss_is_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        DomainWeights(DOMAINS).reduce(torch.rand(3), batch, None)


# ------------------------------------------------------------------------------ hypergradient of a linear model


class Mixture:
    """A linear model on examples of three domains, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.theta = torch.randn(4).double().requires_grad_()
        self.inputs, self.targets = torch.randn(9, 4).double(), torch.randn(9).double()
        self.held_out, self.held_out_targets = torch.randn(6, 4).double(), torch.randn(6).double()
        self.batch = {"domain": torch.arange(9) % 3}
        self.module = domain_weights(0.5, -0.3, 0.1)

    def train_loss(self, theta=None):
        theta = self.theta if theta is None else theta
        return self.module.reduce((self.inputs @ theta - self.targets).square(), self.batch, None)

    def val_loss(self, theta=None):
        theta = self.theta if theta is None else theta
        return F.mse_loss(self.held_out @ theta, self.held_out_targets)

    def problem(self):
        return BilevelProblem([self.theta], [self.module.logits], self.train_loss, self.val_loss)

    def closed_form(self, lr: float):
        """dV/dlogits of one step of gradient descent: -lr * sum_d dw_d/dlogits * <g_V, dT/dw_d>, by hand."""
        p = torch.softmax(self.module.logits.detach(), dim=0)
        residuals = self.inputs @ self.theta.detach() - self.targets
        gradients = 2 * residuals[:, None] * self.inputs  # [9, 4]
        domain = self.batch["domain"]
        share = p[domain] / p[domain].sum()
        step = share @ gradients
        moved = self.theta.detach() - lr * step
        g = 2 * (self.held_out @ moved - self.held_out_targets) @ self.held_out / 6
        # d(sum w l / sum w)/dlogit_d = sum over its examples of share * (l - mean l): a softmax over examples.
        slopes = share * ((gradients - step) @ g)  # [9]
        return -lr * torch.stack([slopes[domain == d].sum() for d in range(3)])


def test_t1t2_is_the_closed_form_of_a_linear_model():
    case = Mixture()
    assert_close(t1t2(case.problem(), lr=0.1).grads[0], case.closed_form(0.1), rtol=1e-10, atol=1e-12)


def test_finite_differences_converge_to_the_closed_form():
    case = Mixture()
    found = finite_difference(case.problem(), lr=1e-6, step_size=1e-4).grads[0]
    assert_close(found, case.closed_form(1e-6), rtol=1e-4, atol=1e-12)


def test_evograd_is_autograd_through_the_literal_formula():
    case, noise = Mixture(), 1e-3 * torch.randn(3, 4).double()
    candidates = case.theta.detach() + noise
    losses = torch.stack([case.train_loss(candidate) for candidate in candidates])
    moved = torch.softmax(-losses / 0.05, dim=0) @ candidates
    (expected,) = torch.autograd.grad(case.val_loss(moved), case.module.logits)

    found = evograd(case.problem(), num_candidates=3, noise=lambda k, theta: [noise[k]], temperature=0.05).grads[0]

    assert expected.abs().max() > 1e-8
    assert_close(found, expected, rtol=1e-9, atol=1e-15)


# ------------------------------------------------------------------------------ under MetaTrainer


def tiny_llama(shared: int = 8) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": shared, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def counting(number: int, seed: int, good: bool) -> list[dict]:
    """Rows that count upwards, or random ones; a differing number of labels counts."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(3, 10, (number, 1), generator=generator)
    noise = torch.randint(3, 20, (number, 8), generator=generator)
    ids = starts + torch.arange(8) if good else noise
    return [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(8) > 4 + i % 4, -100), "domain": int(not good)}
        for i, row in enumerate(ids)
    ]


def test_the_rows_of_shifted_labels_are_those_of_the_losses():
    labels = torch.tensor([[1, 2, -100, 3], [4, -100, -100, -100], [-100, 5, 6, 7]])
    causal = PerExampleLoss(tiny_llama())
    losses = causal({"logits": torch.zeros(3, 4, 8)}, labels)
    assert causal.examples(labels).tolist() == [0, 0, 2, 2, 2]
    assert len(losses) == 5
    tokens = PerExampleLoss(torch.nn.Linear(1, 1))
    assert tokens.examples(labels).tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert tokens.examples(torch.tensor([3, 1, 2])).tolist() == [0, 1, 2]
    assert tokens.examples(torch.rand(2, 5)).tolist() == [0, 1]


@pytest.mark.parametrize("hypergradient", ["evograd", "t1t2"])
def test_a_causal_language_model_learns_to_leave_a_source_of_noise_out(tmp_path, hypergradient):
    module = DomainWeights(["counting", "noise"])
    args = MetaTrainingArguments(
        tmp_path,
        hypergradient=hypergradient,
        noise="guided",
        meta_learning_rate=0.1,
        learning_rate=1e-2,
        max_steps=25,
        per_device_train_batch_size=8,
        logging_steps=5,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [row for pair in zip(counting(40, 1, True), counting(40, 2, False), strict=True) for row in pair]
    trainer = MetaTrainer(
        tiny_llama(), args, meta_module=module, train_dataset=rows, meta_dataset=counting(20, 3, True)
    )
    trainer.train()
    counted, noise = module.all_weights().tolist()
    assert counted > 1.3
    assert noise < 0.7
    logged = [log["meta_module/weight_noise"] for log in trainer.state.log_history if "loss" in log]
    assert logged[-1] == pytest.approx(noise)
    assert logged[0] > logged[-1]


def test_a_loss_of_the_users_own_should_give_one_per_example(tmp_path):
    args = MetaTrainingArguments(tmp_path, max_steps=1, use_cpu=True, disable_tqdm=True, report_to="none")
    rows = counting(8, 1, True)

    def per_token(outputs: SimpleNamespace, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction="none")

    trainer = MetaTrainer(
        tiny_llama(),
        args,
        meta_module=DomainWeights(["counting", "noise"]),
        train_dataset=rows,
        meta_dataset=rows,
        per_example_loss=per_token,
    )
    with pytest.raises(ValueError, match="got 64 losses for 8 examples"):
        trainer.train()
