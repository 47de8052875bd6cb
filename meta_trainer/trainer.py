"""MetaTrainer: a Trainer whose training step is preceded by a hypergradient step on a meta module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import TrainingArguments
from transformers.utils import logging

from meta_trainer.arguments import MetaTrainingArguments
from meta_trainer.batch_checks import BatchChecks, CheckedCollator
from meta_trainer.diagnostics import Diagnostics
from meta_trainer.engines import check_engine, is_compiled
from meta_trainer.estimation import check_base_optimizer, check_precision, estimate
from meta_trainer.frozen import frozen
from meta_trainer.hypergrad import (
    BilevelProblem,
    Hypergradient,
    TrainLoss,
    preserved_random_state,
)
from meta_trainer.meta_data import MetaDataStream
from meta_trainer.meta_metrics import MetaMetrics
from meta_trainer.meta_optimizer import create_meta_optimizer, create_meta_scheduler, first_meta_step
from meta_trainer.meta_update import SkippedSteps, update_meta_module
from meta_trainer.module_modes import in_mode
from meta_trainer.modules import Batch, MetaModule, MetaModuleList
from meta_trainer.modules.meta_module import META_BATCH
from meta_trainer.overlap import overlap
from meta_trainer.resuming import ResumableTrainer
from meta_trainer.schedule_free import UseAverages, set_training_mode
from meta_trainer.scope import select_parameters
from meta_trainer.sharding import (
    ShardingEngine,
    find_engine,
    recovering,
)
from meta_trainer.shared_forward import SharedForward
from meta_trainer.sigterm import without_checkpoints_within_steps
from meta_trainer.window import Window, from_first_process

logger = logging.get_logger(__name__)


class MetaTrainer(ResumableTrainer):
    r"""`transformers.Trainer` that learns a meta module :math:`\lambda` beside the model :math:`\theta`.

    Before the base step of every `meta_every`-th optimizer step, one meta step updates :math:`\lambda` along the
    hypergradient of the meta loss. Its training loss is that of the whole optimizer step: under gradient accumulation
    the sum over all micro-batches, one after another, scaled as the base step scales them. It leaves no trace on
    parameters, buffers, gradients, modes and the global random state. Evaluation and prediction never see the
    meta module.

    Without `meta_module` this class is Trainer.

    Args:
        model: As in Trainer.
        args: `MetaTrainingArguments`; plain `TrainingArguments` get the meta settings' defaults.
        *positional: Further arguments of Trainer.
        meta_module: What is learned by the hypergradient, or several to compose.
        meta_dataset: The small trusted or target set. Not needed when the data collator puts a ``meta_batch`` into
            every train batch.
        per_example_loss: ``(outputs, labels) -> losses [N]`` for meta modules that weigh examples; by default that
            of the Hugging Face heads.
        **keywords: Further arguments of Trainer.

    Raises:
        ValueError: If the model, the scope, the data and the meta module do not fit together.
        NotImplementedError: If the engine is one that meta steps do not run on.
    """

    def __init__(
        self,
        model: Any = None,
        args: TrainingArguments | None = None,
        *positional: Any,
        meta_module: MetaModule | Sequence[MetaModule] | None = None,
        meta_dataset: Dataset[Any] | None = None,
        per_example_loss: Callable[[Any, Tensor], Tensor] | None = None,
        **keywords: Any,
    ) -> None:
        if meta_module is None and meta_dataset is not None:
            raise ValueError("`meta_dataset` was given without a `meta_module` that could learn from it.")
        if meta_module is not None:
            _check_kinds(model, args, meta_dataset, per_example_loss)
        if meta_module is not None and not isinstance(args, MetaTrainingArguments):
            args = MetaTrainingArguments.from_training_arguments(args or TrainingArguments("tmp_trainer"))
        with nullcontext() if meta_module is None else without_checkpoints_within_steps(args):
            super().__init__(model, args, *positional, **keywords)
        if meta_module is not None:
            module = meta_module if isinstance(meta_module, MetaModule) else MetaModuleList(meta_module)
            self._set_up_meta_step(module, meta_dataset, per_example_loss)

    def _set_up_meta_step(
        self,
        meta_module: MetaModule,
        meta_dataset: Dataset[Any] | None,
        per_example_loss: Callable[[Any, Tensor], Tensor] | None,
    ) -> None:
        check_engine(self, self.model, self.args, meta_module)
        check_base_optimizer(self.args, self.optimizer)
        self._check_sharing()
        if meta_module.has_loss_door and self.compute_loss_func is not None and per_example_loss is None:
            raise ValueError(
                f"{type(meta_module).__name__} weighs examples, but `compute_loss_func` gives their average only. "
                "Pass `per_example_loss`, a function (outputs, labels) -> losses [N]."
            )
        if not any(p.requires_grad for p in meta_module.parameters()):
            raise ValueError(f"{type(meta_module).__name__} has no trainable parameter, so there is nothing to learn.")
        if {id(p) for p in meta_module.parameters()} & {id(p) for p in self.model.parameters()}:
            raise ValueError("The meta module and the model share parameters. Keep the meta module outside the model.")
        meta_module.check_model(self.model)
        check_precision(self.args, select_parameters(self.model, self.args.perturb))

        self.meta_module = meta_module.to(self.args.device)
        self._broadcast_meta_module()
        self._meta_dataset = meta_dataset
        self._set_up_objective(per_example_loss)
        self._set_up_checkpoints()
        self._base_step_follows = False
        self._compiled = is_compiled(self, self.model)
        # A model from `model_init` starts anew with every `train()`, and the meta module with it.
        initial = {} if self.model_init is None else meta_module.state_dict()
        self._initial_meta_module = {name: value.detach().to("cpu", copy=True) for name, value in initial.items()}
        self._start_meta_training()
        self.add_callback(UseAverages(lambda: self.meta_optimizer))

    def _start_meta_training(self) -> None:
        """Set up all that meta steps leave behind, by the present settings."""
        self.meta_optimizer = create_meta_optimizer(self.args, self.meta_parameters)
        self.meta_scaler = torch.amp.GradScaler(
            self.args.device.type, enabled=self.args.fp16 and self.args.device.type != "cpu"
        )
        self._batch_checks: BatchChecks | None = None
        self.meta_data = None if self._meta_dataset is None else self._create_meta_data(self._meta_dataset)
        self._meta_metrics = MetaMetrics()
        self._diagnostics = Diagnostics(self.args)
        self._path_checked = False
        self._last_objective: Tensor | None = None
        self._shared_forward = SharedForward(self.args.device, compiled=self._compiled)
        self._num_meta_steps = 0
        self._last_meta_step_at: int | None = None
        self._skipped = SkippedSteps(self.args.meta_max_skipped)

    def _check_sharing(self) -> None:
        number = 2 if self.args.hypergradient == "finite_difference" else self.args.num_candidates
        if self.args.share_candidates and self.args.world_size > number:
            raise ValueError(
                f"With `share_candidates`, {self.args.world_size} processes need as many candidates, got {number}. Set "
                "`num_candidates` to a multiple of the number of processes."
            )

    def _create_meta_data(self, dataset: Dataset[Any]) -> MetaDataStream:
        collator = CheckedCollator(self.data_collator, "meta", self._check_batch)
        collate = self._get_collator_with_removed_columns(collator, description="meta")
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return MetaDataStream(
            dataset,
            self.args.per_device_meta_batch_size,
            collate,
            seed,
            self.args.process_index,
            self.args.world_size,
        )

    def _check_batch(self, batch: Batch, kind: str) -> None:
        # When it is needed, as embeddings may still be resized, and models made.
        if self._batch_checks is None:
            self._batch_checks = self._create_batch_checks()
        self._batch_checks.check(batch, kind)

    def _create_batch_checks(self) -> BatchChecks:
        # An objective of the user's own reads labels of any kind, and methods of theirs may take columns out.
        own = {
            name
            for name in ("compute_loss", "training_step", "_prepare_inputs")
            if getattr(type(self), name) is not getattr(MetaTrainer, name)
        }
        taken_out = ("labels",) if self.compute_loss_func is not None or self.label_smoother is not None else ()
        return BatchChecks(
            self.model,
            hidden=(*self.meta_module.batch_columns, META_BATCH, *taken_out),
            reads_labels=self.compute_loss_func is None and "compute_loss" not in own,
            reads_all=not own,
        )

    def get_train_dataloader(self) -> DataLoader[Any]:
        """As in Trainer; with a meta module, batches that the model cannot take are refused where they are made."""
        if self.meta_module is None:
            return super().get_train_dataloader()
        if isinstance(self.train_dataset, Mapping | str | int):
            raise ValueError(
                f"`train_dataset` should be a data set or a list of examples, got {type(self.train_dataset).__name__}. "
                "Of a dictionary of splits, choose one."
            )
        if isinstance(self.train_dataset, Sized) and not len(self.train_dataset):
            raise ValueError("`train_dataset` should hold at least one example, got none.")
        collator, self._batch_checks = self.data_collator, self._create_batch_checks()
        # What a meta module makes of a batch is not known here. Workers get the checks without the trainer.
        check = None if self.meta_module.has_batch_door else self._batch_checks.check
        self.data_collator = CheckedCollator(collator, "train", check, META_BATCH, self._batch_checks.check)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collator

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        """The meta step, when one is due, and the base step."""
        if self.meta_module is None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._take(inputs, num_items_in_batch)
        if self.meta_module.has_loss_door:
            self.loss_is_scaled_for_ga = self._sums_quotients or num_items_in_batch is not None
        base_inputs = {key: value for key, value in inputs.items() if key != META_BATCH}
        try:
            if self._meta_step_is_due():
                # Memory holds the graph of one micro-batch at a time.
                self._base_step_follows = len(self._window.batches) == 1 and not self.args.share_candidates
                # As the base step does: schedule-free optimizers train other parameters than they evaluate.
                set_training_mode(self.optimizer, True)
                set_training_mode(self.meta_optimizer, True)
                with nullcontext() if self._num_meta_steps else _first_of_a_run():
                    self.meta_step(model, inputs)
                self._last_meta_step_at = self.state.global_step
            # DeepSpeed has used the gradients by the time that its backward pass returns.
            self._divides_loss = self.is_deepspeed_enabled
            with self._shared_forward.base_step(), self._open_doors({}), frozen(self.meta_parameters):
                loss = super().training_step(model, base_inputs, num_items_in_batch)
            self._observe_objective(loss)
            return self._normalized(loss) if self._normalizers else loss
        finally:
            self._base_step_follows = self._divides_loss = False
            self._shared_forward.clear()

    def meta_step(self, model: nn.Module, inputs: Batch) -> Hypergradient:
        """Update the meta module once along its hypergradient.

        Args:
            model: The base model, wrapped or not.
            inputs: A train batch, which stands for all micro-batches of the present optimizer step if it is the first
                of them; with a ``meta_batch`` in it, or else the next batch of `meta_dataset` is used.

        Returns:
            The hypergradient, before clipping. The update is left out when it is not finite.

        Raises:
            ValueError: If there is no meta module, or no meta data.
        """
        if self.meta_module is None:
            raise ValueError("A meta step needs a `meta_module`; this trainer was made without one.")
        # Of a compiled model, the one inside: it heeds hooks and has second derivatives.
        base_model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        window = self._window if self._window.begins_with(inputs) else Window([inputs])
        with preserved_random_state([self.args.device]) as random_state, in_mode(True, base_model, self.meta_module):
            window, meta_batch = self._meta_step_batches(window)
            for batch in window.batches:
                self._observe_overlap(base_model, batch, meta_batch)
            # What the meta batch drew is no reason for other dropout masks than the base step's.
            random_state.restore()
            if self.args.share_candidates:
                window = from_first_process(window, self.args.device)
            engine = find_engine(base_model, self.model_wrapped)
            if engine is not None:
                engine.refresh()
            theta = select_parameters(base_model, self.args.perturb)
            moved = {id(parameter) for parameter in theta}
            rest = [p for p in base_model.parameters() if p.requires_grad and id(p) not in moved]
            # Outside the scope nothing is differentiated, so that no graph is kept below it.
            try:
                with recovering(engine), frozen(rest):
                    problem = self._bilevel_problem(base_model, theta, rest, window, meta_batch, engine)
                    result = self._estimate(problem)
            finally:
                if not self._base_step_follows:
                    self._shared_forward.clear()
        self._update_meta_module(result)
        self._num_meta_steps += 1
        return result

    def _observe_objective(self, loss: Tensor) -> None:
        """Compare the base step's loss with that before the update of the meta module, on the same batch."""
        if self._last_objective is not None:
            self._meta_metrics.add(objective_change=(loss / self._last_objective - 1).abs())
            self._last_objective = None

    def _meta_step_is_due(self) -> bool:
        step = self.state.global_step
        since_first = step - first_meta_step(self.args, self.state.max_steps)
        return since_first >= 0 and since_first % self.args.meta_every == 0 and step != self._last_meta_step_at

    def _meta_step_batches(self, window: Window) -> tuple[Window, Batch]:
        batches = [dict(batch) for batch in window.batches]
        # The collator gave every micro-batch one; an optimizer step has a single meta step.
        meta_batch, *_ = [batch.pop(META_BATCH, None) for batch in batches]
        if meta_batch is None:
            if self.meta_data is None:
                raise ValueError(
                    "A meta step needs meta data, but there is neither a `meta_dataset` nor a "
                    f"`meta_batch` in the train batch, whose columns are {sorted(batches[0])}."
                )
            meta_batch = next(self.meta_data)
        prepared = [dict(self._prepare_inputs(batch)) for batch in batches]
        return Window(prepared, window.num_items), dict(self._prepare_inputs(meta_batch))

    def _observe_overlap(self, model: nn.Module, batch: Batch, meta_batch: Batch) -> None:
        share = overlap(batch, meta_batch, getattr(model, "main_input_name", ""))
        if share is not None:
            self._meta_metrics.add(overlap=share)

    def _bilevel_problem(
        self,
        model: nn.Module,
        theta: list[nn.Parameter],
        rest: list[nn.Parameter],
        window: Window,
        meta_batch: Batch,
        engine: ShardingEngine | None,
    ) -> BilevelProblem:
        # Replicas may have differing numbers of tokens; in their mean, each counts as Trainer has it count.
        num_items = None if self.args.world_size == 1 else self._num_items(meta_batch)

        def val_loss() -> Tensor:
            with self.compute_loss_context_manager():
                return self.compute_loss(model, dict(meta_batch), num_items_in_batch=num_items)

        sharded = None if engine is None else engine.select(theta)
        # A forward pass under such an engine is tied to the backward pass that follows it.
        shares = sharded is None and self.args.hypergradient != "t1t2"
        if sharded is not None and rest:
            logger.warning_once("Every candidate of a meta step runs the whole base model: its parameters are spread.")
        terms = window.terms(lambda batch: self._train_term(model, theta, rest, batch, window, shares))
        args = self.args
        return BilevelProblem(
            theta=theta if sharded is None else sharded.shards,
            sharding=sharded,
            meta_params=self.meta_parameters,
            train_loss=terms if len(window.batches) > 1 else next(iter(terms)),
            val_loss=val_loss,
            state=[*model.buffers(), *self.meta_module.buffers()],
            intermediates=self._shared_forward.intermediates,
            mean=self._mean_over_replicas,
            turn=(args.process_index, args.world_size) if args.share_candidates else (0, 1),
            writes_theta=any(getattr(module, "max_norm", None) is not None for module in model.modules()),
            with_train_grads=args.needs_train_grads,
            loss_scale=self.meta_scaler.scale(torch.ones((), device=args.device))
            if self.meta_scaler.is_enabled()
            else None,
        )

    def _train_term(
        self,
        model: nn.Module,
        theta: list[nn.Parameter],
        rest: list[nn.Parameter],
        batch: Batch,
        window: Window,
        shares: bool,
    ) -> TrainLoss:
        """A micro-batch's share in the training loss, as the base step has it; its evaluations share what they can."""

        def objective(reference: Batch) -> Tensor | tuple[Tensor, Tensor]:
            with self._open_doors(reference), self.compute_loss_context_manager():
                loss = self.compute_loss(model, dict(batch), num_items_in_batch=window.num_items)
            if self._normalizers:
                return loss, self._normalizers.pop()
            return loss if self._loss_is_scaled(window.num_items) else loss / len(window.batches)

        def forward_pass() -> None:
            with self._without_trace(model):
                objective({})

        # T1-T2 runs its forward pass on other attention kernels than the base step.
        if shares:
            trainable = rest if self._base_step_follows else []
            self._shared_forward.prepare(model, theta, self.meta_parameters, trainable, forward_pass)
        reference: Batch = {}
        if self.meta_module.reference_losses == "unperturbed":
            with self._without_trace(model), torch.no_grad(), self._shared_forward.evaluation():
                objective(reference)

        def train_loss() -> Tensor | tuple[Tensor, Tensor]:
            with self._shared_forward.evaluation():
                loss = objective(reference)
            self._check_path(loss[0] if isinstance(loss, tuple) else loss)
            return loss

        return train_loss

    def _check_path(self, loss: Tensor) -> None:
        """Raise ValueError if no meta-parameter takes part in the first training loss of a run."""
        if self._path_checked or self.meta_module.may_be_idle or self.args.meta_learning_rate == 0:
            return
        inputs = [*self.meta_parameters, *(leaf for leaf, _ in self._shared_forward.intermediates)]
        grads: Sequence[Tensor | None] = ()
        if loss.numel() != 1:
            raise ValueError(f"The training loss should be a scalar, got shape {list(loss.shape)}.")
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
        if all(grad is None for grad in grads):
            raise ValueError(
                f"The training loss does not depend on any parameter of {type(self.meta_module).__name__}, so that "
                "nothing can be learned. Check that its doors use its parameters, without `detach` or `no_grad`, and "
                "that a `compute_loss` of your own calls that of MetaTrainer, which opens them; if they are shut in "
                "the first steps, say so by `may_be_idle`."
            )
        self._path_checked = True

    def _estimate(self, problem: BilevelProblem) -> Hypergradient:
        # A seed of its own for every step and run, the same on all replicas.
        seed = int(np.random.SeedSequence([self.args.seed, self._num_meta_steps]).generate_state(1)[0])
        return estimate(problem, self.args, self.optimizer, seed)

    def _update_meta_module(self, result: Hypergradient) -> None:
        train_grads = [self._mean_over_replicas(grad) for grad in result.train_grads]
        update = update_meta_module(
            result, train_grads, self.meta_parameters, self.meta_optimizer, self.meta_scaler, self.args
        )
        rate = torch.full_like(update.norm, float(self.meta_optimizer.param_groups[0]["lr"]))
        skipped = torch.full_like(update.norm, update.skipped is not None)
        self._meta_metrics.add(skipped=skipped, learning_rate=rate)
        self._last_objective = None
        if update.skipped is not None:
            self._skipped.skipped(self._num_meta_steps, update.skipped, self.model)
            return
        self._skipped.taken()
        if update.step_share is not None:
            self._meta_metrics.add(step_share=update.step_share)
        if self.meta_lr_scheduler is not None:
            self.meta_lr_scheduler.step()
        self._meta_metrics.add(grad_norm=update.norm, **self._diagnostics.observe(result))
        args = self.args
        # Blind perturbations change the loss by themselves.
        comparable = self._base_step_follows and args.world_size == 1
        self._last_objective = result.train_losses.mean() if comparable and not args.is_blind else None

    @contextmanager
    def _without_trace(self, model: nn.Module) -> Iterator[None]:
        """Give random numbers and buffers back after a forward pass."""
        buffers = [(b, b.clone()) for module in (model, self.meta_module) for b in module.buffers()]
        with preserved_random_state([self.args.device]):
            try:
                yield
            finally:
                for buffer, original in buffers:
                    buffer.data.copy_(original)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The base schedule as in Trainer, and the meta schedule beside it."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if self.meta_module is not None:
            self.meta_lr_scheduler = create_meta_scheduler(self.args, self.meta_optimizer, num_training_steps)
            self._last_meta_step_at = None
        return scheduler

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model, as in Trainer; the meta module starts anew with it, from where it was handed over."""
        model = super().call_model_init(trial)
        if self.meta_module is not None:
            self.meta_module.load_state_dict(self._initial_meta_module)
            self._start_meta_training()
        return model

    def _hp_search_setup(self, trial: Any) -> None:
        super()._hp_search_setup(trial)
        if self.meta_module is not None and trial is not None:
            # A trial sets attributes, which no one has looked at.
            self.args.check_meta_settings()
            check_engine(self, self.model, self.args, self.meta_module)
            check_base_optimizer(self.args, self.optimizer)
            self._check_sharing()
            self._start_meta_training()

    def _broadcast_meta_module(self) -> None:
        """Start every replica from the parameters of the first one."""
        if self.args.world_size > 1:
            for tensor in (*self.meta_module.parameters(), *self.meta_module.buffers()):
                broadcast(tensor.data)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As in Trainer; the training loss comes with the meta steps since the last log and the meta module."""
        if self.meta_module is not None and "loss" in logs:
            means = self._meta_metrics.take()
            self._diagnostics.check(means)
            logs.update(means)
            if means:
                logs["meta/skipped_in_all"] = self._skipped.in_all
            logs.update({f"meta_module/{name}": value.item() for name, value in self.meta_module.summary().items()})
        super().log(logs, *args, **kwargs)


def _check_kinds(model: Any, args: Any, meta_dataset: Any, per_example_loss: Any) -> None:
    """Raise ValueError for arguments that are no such thing at all."""
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"`model` should be a module of PyTorch, got {type(model).__name__}. Load it first.")
    if args is not None and not isinstance(args, TrainingArguments):
        raise ValueError(f"`args` should be MetaTrainingArguments, got {type(args).__name__}.")
    if isinstance(meta_dataset, Mapping | str):
        raise ValueError(
            f"`meta_dataset` should be a data set or a list of examples, got {type(meta_dataset).__name__}. Of a "
            "dictionary of splits, choose one."
        )
    if per_example_loss is not None and not callable(per_example_loss):
        raise ValueError(f"`per_example_loss` should be a function (outputs, labels) -> [N], got {per_example_loss!r}.")


@contextmanager
def _first_of_a_run() -> Iterator[None]:
    """A batch that a model of the user's own cannot take is found out by its first forward pass."""
    try:
        yield
    except (IndexError, TypeError, RuntimeError) as error:
        # What is out of memory may be tried again with a smaller batch; subclasses have a meaning of their own.
        if type(error) not in (IndexError, TypeError, RuntimeError) or should_reduce_batch_size(error):
            raise
        raise ValueError(
            f"The first meta step failed with {type(error).__name__}: {error}. If that is about data, check that the "
            "model takes the train and the meta batches: columns, shapes and types, the range of labels and indices."
        ) from error
