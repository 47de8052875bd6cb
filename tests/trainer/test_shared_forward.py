"""Candidates and base step on one forward pass: whatever a model does, the numbers are those of separate passes."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from separate_passes import Witness, assert_same_steps, separate_passes, training_steps
from torch import Tensor, nn
from torch.nn import functional as F

from meta_trainer import MetaModule, MetaTrainingArguments, MetaWeightNet

SIZE = 6
# In double precision an error stands out from rounding, which a difference over a small radius amplifies.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


class Counted(nn.Linear):
    """A linear layer that knows how often it ran; a hook would keep the modules around it from being shared."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


class Toy(nn.Module):
    """The least that the models here have in common: three layers of a body, and a head."""

    perturb = ("head.*",)

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.first, self.second = Counted(SIZE, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.head = nn.Linear(SIZE, 3)

    def logits(self, x):
        raise NotImplementedError

    def forward(self, x, labels=None):
        logits = self.logits(x)
        return {"loss": None if labels is None else F.cross_entropy(logits, labels), "logits": logits}


class Shift(MetaModule):
    """A forward door: shifts what a layer returns, as often as it is called."""

    may_be_idle = True

    def __init__(self, layer: str):
        super().__init__()
        self.layer, self.shift = layer, nn.Parameter(torch.linspace(-0.1, 0.1, SIZE))

    @contextmanager
    def attach(self, model: nn.Module, batch: dict[str, Any]) -> Iterator[None]:
        hook = model.get_submodule(self.layer).register_forward_hook(self.shifted)
        try:
            yield
        finally:
            hook.remove()

    def shifted(self, module, inputs, output):
        return output + torch.tanh(self.shift) if isinstance(output, Tensor) else output


def weight_net():
    net = MetaWeightNet(hidden_size=4)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4)
    return net


DOORS = {"weights": weight_net, "early shift": lambda: Shift("first"), "late shift": lambda: Shift("second")}


def new_trainer(model, folder, door="weights", **settings):
    torch.manual_seed(1)
    defaults = {"perturb": list(model.perturb), "sigma": 0.1, "num_candidates": 3, "learning_rate": 0.1}
    args = MetaTrainingArguments(str(folder), use_cpu=True, **{**defaults, **settings})
    return Witness(model.double(), args, meta_module=DOORS[door]().double())


def batches(number=3):
    generator = torch.Generator().manual_seed(1)

    def batch():
        x = torch.randn(4, SIZE, generator=generator, dtype=torch.float64)
        return {"x": x, "labels": torch.randint(3, (4,), generator=generator)}

    return [{**batch(), "meta_batch": batch()} for _ in range(number)]


class Chain(Toy):
    def logits(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.body(x))))))


class Residual(Toy):
    def logits(self, x):
        h = self.body(x)
        h = h + torch.tanh(self.first(h))
        return self.head(h + torch.tanh(self.second(h)))


class LateTower(Toy):
    """An independent tower runs after a dependent one."""

    def logits(self, x):
        logits = self.head(x)
        return logits + self.second(torch.tanh(self.body(x)))[:, :3]


class SharedLayer(Toy):
    """One layer, called on data that do not depend on the head, and then on data that do."""

    def logits(self, x):
        h = torch.tanh(self.body(x))
        h = torch.tanh(self.body(h))
        return self.head(h) + self.body(F.pad(self.head(h), (0, SIZE - 3)))[:, :3]


class DependentFirst(Toy):
    """The same, the other way round: the later call is the one to share."""

    def logits(self, x):
        dependent = self.body(F.pad(self.head(x), (0, SIZE - 3)))[:, :3]
        return dependent + self.body(x)[:, :3] + self.head(self.second(x))


class InsideAndOutside(Toy):
    """A layer is called within a shared block, and again on its own."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.body, nn.Tanh(), self.first)

    def logits(self, x):
        logits = self.head(self.body(self.block(self.body(x))))
        return logits + self.body(F.pad(logits, (0, SIZE - 3)))[:, :3]


class Tree(Toy):
    """A layer that calls itself."""

    def __init__(self):
        super().__init__()

        class Node(Counted):
            def forward(self, x, depth=2):
                h = torch.tanh(super().forward(x))
                return h if depth == 0 else self(h, depth - 1) + self(-h, depth - 1)

        self.body = Node(SIZE, SIZE)

    def logits(self, x):
        return self.head(self.body(x))


class Scale(Toy):
    """The model owns a parameter of its own, between two shared calls."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, SIZE))

    def logits(self, x):
        return self.head(torch.tanh(self.second(self.scale * torch.tanh(self.body(x)))))


class BorrowedWeight(Toy):
    """The model reads the weight of a layer, between two shared calls."""

    def logits(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.body(x)) @ self.first.weight)))


class Borrower(Toy):
    """A layer uses the weight of another one that is no submodule of it."""

    def __init__(self):
        super().__init__()
        lender = [self.first]

        class Borrowing(nn.Linear):
            def forward(self, x):
                return super().forward(torch.tanh(x @ lender[0].weight))

        self.second = Borrowing(SIZE, SIZE)

    def logits(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.body(x)))))


class FrozenByNoGrad(Toy):
    """Features that the base step does not train."""

    def logits(self, x):
        with torch.no_grad():
            h = self.body(x)
        return self.head(torch.tanh(self.second(h)))


class UnderInferenceMode(Toy):
    def logits(self, x):
        with torch.inference_mode():
            h = self.body(x)
        return self.head(torch.tanh(self.second(h.clone())))


class Detached(Toy):
    def logits(self, x):
        return self.head(torch.tanh(self.second(self.body(x).detach())))


class Dropouts(Toy):
    """Random numbers within the shared calls, between them, around them and after them."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.first, nn.Dropout(0.3), nn.Tanh())
        self.dropout = nn.Dropout(0.2)

    def logits(self, x):
        h = self.dropout(self.body(x))
        h = F.dropout(h, 0.3, self.training) + self.block(h)
        h = h + F.dropout(self.second(h), 0.4, self.training)
        return self.dropout(self.head(self.dropout(h)))


class OtherGenerators(Toy):
    """Draws of Python and NumPy, inside and outside of the shared layers."""

    def __init__(self):
        super().__init__()

        class Noisy(nn.Linear):
            def forward(self, x):
                return super().forward(x) * random.random() + float(np.random.rand())

        self.first = Noisy(SIZE, SIZE)

    def logits(self, x):
        h = self.first(self.body(x) * np.random.rand())
        return self.head(self.second(h) * random.random()) * random.random() + np.random.rand()


class LayerDropInside(Toy):
    """A shared stack whose layers are dropped at random."""

    def __init__(self):
        super().__init__()

        class Stack(nn.ModuleList):
            def forward(self, x):
                for layer in self:
                    if random.random() < 0.5:
                        x = torch.tanh(layer(x))
                return x

        self.stack = Stack(nn.Linear(SIZE, SIZE) for _ in range(4))

    def logits(self, x):
        return self.head(self.stack(self.body(x)))


class BatchNorms(Toy):
    """Running statistics within the shared calls, between them and after them."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.first, nn.BatchNorm1d(SIZE), nn.Tanh())
        self.plain, self.last = nn.BatchNorm1d(SIZE, affine=False), nn.BatchNorm1d(3)

    def logits(self, x):
        h = self.block(self.plain(self.body(x)))
        h = self.block[1](self.second(h))
        return self.last(self.head(h))


class NormOfBoth(Toy):
    """A tower with running statistics sees dependent data first, independent data then."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(self.first, nn.BatchNorm1d(SIZE), nn.Tanh())

    def logits(self, x):
        dependent = self.tower(F.pad(self.head(x), (0, SIZE - 3)))
        return self.head(self.second(self.body(x))) + (self.tower(x) * dependent)[:, :3]


class RunningScale(Toy):
    """A buffer that the backward pass reads, and that every forward pass changes."""

    def __init__(self):
        super().__init__()

        class Normalised(nn.Linear):
            def __init__(self):
                super().__init__(SIZE, SIZE)
                self.register_buffer("scale", torch.ones(SIZE))

            def forward(self, x):
                with torch.no_grad():
                    self.scale.mul_(0.5).add_(0.5 * x.std(dim=0))
                return super().forward(x) / self.scale

        self.first = Normalised()

    def logits(self, x):
        return self.head(torch.tanh(self.first(self.body(x))))


class SpectralNorm(Toy):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.first)
        nn.utils.parametrizations.weight_norm(self.second)

    def logits(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.body(x))))))


class DictOutput(Toy):
    """A backbone that returns a dictionary, one of whose entries the model replaces."""

    def __init__(self):
        super().__init__()

        class Backbone(nn.Linear):
            def forward(self, x):
                return {"hidden": super().forward(x)}

        self.first = Backbone(SIZE, SIZE)

    def logits(self, x):
        outputs = self.first(self.body(x))
        outputs["hidden"] = torch.tanh(2 * outputs["hidden"])
        return self.head(outputs["hidden"])


@dataclass
class Opaque:
    hidden: Tensor


class OpaqueOutput(Toy):
    """The same with a container of the model's own."""

    def __init__(self):
        super().__init__()

        class Backbone(nn.Linear):
            def forward(self, x):
                return Opaque(super().forward(x))

        self.first = Backbone(SIZE, SIZE)

    def logits(self, x):
        outputs = self.first(self.body(x))
        outputs.hidden = torch.tanh(2 * outputs.hidden)
        return self.head(outputs.hidden)


class InPlaceOnOutput(Toy):
    def logits(self, x):
        h = self.body(x)
        h += torch.tanh(self.first(x))
        return self.head(torch.tanh(self.second(h)))


class InPlaceOnInput(Toy):
    """A layer changes what it gets, and the model goes on with both."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.ReLU(inplace=True), self.first)

    def logits(self, x):
        h = 2 * self.body(x)
        return self.head(h + self.block(h))


class InPlaceOnDependent(Toy):
    """A layer's independent result is written into a tensor that depends on the head, and the reverse."""

    def logits(self, x):
        h = x.new_zeros(len(x), 2 * SIZE)
        h[:, :SIZE] = self.body(x)
        h[:, SIZE : SIZE + 3] = self.head(x)
        return self.head(torch.tanh(self.second(h[:, SIZE:]))) + h[:, :3]


class Collected(Toy):
    """Layers add their auxiliary losses to a list that the model gives them."""

    def __init__(self):
        super().__init__()

        class Auxiliary(nn.Linear):
            def forward(self, x, collected):
                h = super().forward(x)
                collected.append(h.square().mean())
                return h

        self.first, self.second = Auxiliary(SIZE, SIZE), Auxiliary(SIZE, SIZE)

    def logits(self, x):
        collected = []
        h = self.second(torch.tanh(self.first(self.body(x), collected)), collected)
        return self.head(torch.tanh(h)) * (1 + sum(collected))


class Memory:
    """What layers hand on past their results, as a key-value cache does."""

    def __init__(self):
        self.hidden = {}


class Remembered(Toy):
    """A layer writes into a memory, from which another one reads."""

    def __init__(self):
        super().__init__()

        class Writing(nn.Linear):
            def forward(self, x, memory):
                memory.hidden["first"] = torch.tanh(x)
                return super().forward(x)

        class Reading(nn.Linear):
            def forward(self, x, memory):
                return super().forward(x) * memory.hidden["first"][:, :3]

        self.first, self.head = Writing(SIZE, SIZE), Reading(SIZE, 3)

    def logits(self, x):
        memory = Memory()
        return self.head(torch.tanh(self.first(self.body(x), memory)), memory)


class SideChannel(Toy):
    """A layer leaves a result behind as an attribute, which the model reads."""

    def __init__(self):
        super().__init__()

        class Leaving(nn.Linear):
            def forward(self, x):
                self.left = x.square().mean()
                return super().forward(x)

        self.first = Leaving(SIZE, SIZE)

    def logits(self, x):
        h = torch.tanh(self.first(self.body(x)))
        return self.head(h) * (1 + self.first.left)


class TensorHook(Toy):
    """A hook on a tensor between two shared calls changes the gradient."""

    def logits(self, x):
        h = torch.tanh(self.body(x))
        if h.requires_grad:
            h.register_hook(lambda gradient: 3 * gradient)
        return self.head(torch.tanh(self.second(h)))


def tripled(module, inputs, outputs):
    return tuple(None if gradient is None else 3 * gradient for gradient in inputs)


class BackwardHook(Toy):
    """A module in the middle changes the gradient of its input."""

    def __init__(self):
        super().__init__()

        class Middle(nn.Module):
            def __init__(self, first, head):
                super().__init__()
                self.first, self.head = first, head

            def forward(self, x):
                return self.head(torch.tanh(self.first(x)))

        self.middle = Middle(self.first, self.head)
        self.middle.register_full_backward_hook(tripled)

    def logits(self, x):
        return self.middle(torch.tanh(self.body(x)))


class LeafBackwardHook(Toy):
    def __init__(self):
        super().__init__()
        self.first.register_full_backward_hook(tripled)

    def logits(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.body(x))))))


class TwoBlocks(Toy):
    """Two calls of one layer whose outputs are views of one tensor."""

    def logits(self, x):
        left, right = self.body(x).chunk(2, dim=1)
        h = torch.cat([torch.tanh(right), left], dim=1)
        return self.head(torch.tanh(self.second(h)) + self.first(h))


class Dropped(Toy):
    """The perturbed layer is left out at random, in the first step for instance."""

    perturb = ("first.*",)

    def logits(self, x):
        h = torch.tanh(self.body(x))
        if random.random() < 0.3:
            h = torch.tanh(self.first(h))
        return self.head(torch.tanh(self.second(h)))


class DroppedFromStack(Toy):
    """The same within a block that would be shared as a whole."""

    perturb = ("block.first.*",)

    def __init__(self):
        super().__init__()

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.first = nn.Linear(SIZE, SIZE)

            def forward(self, x):
                return torch.tanh(self.first(x)) if random.random() < 0.3 else x

        self.block = Block()

    def logits(self, x):
        return self.head(torch.tanh(self.second(self.block(self.body(x)))))


class Warmup(Toy):
    """A layer joins after the first step."""

    perturb = ("first.*",)

    def __init__(self):
        super().__init__()
        self.register_buffer("age", torch.zeros(()))

    def logits(self, x):
        h = torch.tanh(self.body(x))
        if self.age > 0:
            h = torch.tanh(self.first(h))
        self.age += 1
        return self.head(torch.tanh(self.second(h)))


class ListRouting(Toy):
    """Python reads from a list which examples a layer gets, and how many."""

    def logits(self, x):
        chosen = [row > 0 for row in self.head(x)[:, 0].tolist()]
        rows = [number for number, is_chosen in enumerate(chosen) if is_chosen] or [0]
        return self.head(x) + torch.tanh(self.second(self.body(x[rows]))).mean(dim=0)[:3]


class ShapeRouting(Toy):
    """The number of calls hangs on how many examples are above a threshold."""

    def logits(self, x):
        h = x
        for _ in range(len((self.head(x)[:, 0] > 0.1).nonzero())):
            h = torch.tanh(self.body(h))
        return self.head(x) + self.second(h)[:, :3]


class NumpyRouting(Toy):
    """Integers of a dependent tensor pass through NumPy."""

    def logits(self, x):
        order = torch.from_numpy(np.argsort(self.head(x)[:, 0].detach().numpy()))
        return self.head(x) + torch.tanh(self.second(self.body(x[order])))[:, :3]


class Comparison(Toy):
    """The model compares a tensor as a whole."""

    def logits(self, x):
        h = torch.tanh(self.body(x))
        unperturbed = torch.equal(self.head(x), self.head(x) * 1) and bool(self.head.weight[0, 0] < 0)
        return self.head(self.second(h) if unperturbed else self.first(h))


class Numpy(torch.autograd.Function):
    """A kernel that PyTorch's dispatcher does not see."""

    @staticmethod
    def forward(context, x):
        return torch.from_numpy(np.tanh(x.detach().numpy()))

    @staticmethod
    def backward(context, gradient):
        return gradient


class OwnKernel(Toy):
    def logits(self, x):
        h = Numpy.apply(self.body(x))
        return self.second(Numpy.apply(F.pad(self.head(h), (0, SIZE - 3))))[:, :3]


MODELS = [
    Chain,
    Residual,
    LateTower,
    SharedLayer,
    DependentFirst,
    InsideAndOutside,
    Tree,
    Scale,
    BorrowedWeight,
    Borrower,
    FrozenByNoGrad,
    UnderInferenceMode,
    Detached,
    Dropouts,
    OtherGenerators,
    LayerDropInside,
    BatchNorms,
    NormOfBoth,
    RunningScale,
    SpectralNorm,
    DictOutput,
    OpaqueOutput,
    InPlaceOnOutput,
    InPlaceOnInput,
    InPlaceOnDependent,
    Collected,
    Remembered,
    SideChannel,
    TensorHook,
    BackwardHook,
    LeafBackwardHook,
    TwoBlocks,
    Dropped,
    DroppedFromStack,
    Warmup,
    ListRouting,
    ShapeRouting,
    NumpyRouting,
    Comparison,
    OwnKernel,
]


# The derivative of a backward hook's module goes by its outputs where no input needs one.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_a_shared_forward_pass_gives_the_numbers_of_separate_ones(tmp_path, kind, door):
    with separate_passes():
        expected = training_steps(new_trainer(kind(), tmp_path, door), batches())
    found = training_steps(new_trainer(kind(), tmp_path, door), batches())
    assert_same_steps(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", [Residual, LateTower, BatchNorms, Scale])
@pytest.mark.parametrize("door", DOORS)
def test_finite_differences_share_it_as_well(tmp_path, kind, door):
    settings = {"hypergradient": "finite_difference"}
    with separate_passes():
        expected = training_steps(new_trainer(kind(), tmp_path, door, **settings), batches())
    found = training_steps(new_trainer(kind(), tmp_path, door, **settings), batches())
    # A difference over a short way amplifies rounding.
    assert_same_steps(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", [Chain, Residual, LateTower, Dropouts, BatchNorms, OtherGenerators, LayerDropInside])
@pytest.mark.parametrize("door", DOORS)
def test_the_body_runs_once_for_the_train_batch_and_once_for_the_meta_batch(tmp_path, kind, door):
    trainer = new_trainer(kind(), tmp_path, door)
    first, second = batches(2)
    training_steps(trainer, [first])
    trainer.model.body.runs = 0
    training_steps(trainer, [second])
    assert trainer.model.body.runs == 2


@pytest.mark.parametrize("kind", [Chain, Residual, Dropouts, BatchNorms, Scale])
def test_the_unperturbed_losses_come_from_the_shared_pass(tmp_path, monkeypatch, kind):
    def net():
        net = weight_net()
        net.reference_losses = "unperturbed"
        return net

    monkeypatch.setitem(DOORS, "unperturbed", net)
    with separate_passes():
        expected = training_steps(new_trainer(kind(), tmp_path, "unperturbed"), batches())
    found = training_steps(new_trainer(kind(), tmp_path, "unperturbed"), batches())
    assert_same_steps(found, expected, **CLOSE)


class Occasional(Shift):
    """A door that is open for some batches only, not for the first one."""

    @contextmanager
    def attach(self, model, batch):
        if torch.equal(batch["x"], batches(1)[0]["x"]):
            yield
        else:
            with super().attach(model, batch):
                yield


class Block(Toy):
    """Layers within a block that is shared as a whole while nobody hooks into it."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(self.body, nn.Tanh(), self.first, nn.Tanh())

    def logits(self, x):
        return self.head(torch.tanh(self.second(self.block(x))))


@pytest.mark.parametrize("layer", ["block.0", "block.1", "block", "second", "head"])
def test_a_door_may_open_later_than_in_the_first_step(tmp_path, monkeypatch, layer):
    def door():
        shift = Occasional(layer)
        shift.shift.data = torch.linspace(-0.1, 0.1, 3 if layer == "head" else SIZE)
        return shift

    monkeypatch.setitem(DOORS, "occasional", door)
    with separate_passes():
        expected = training_steps(new_trainer(Block(), tmp_path, "occasional"), batches())
    found = training_steps(new_trainer(Block(), tmp_path, "occasional"), batches())
    assert_same_steps(found, expected, **CLOSE)
