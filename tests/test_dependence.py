"""Which calls are independent of some tensors: what the data flow says, and when it cannot be known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from meta_trainer.dependence import independent_calls, patched_forwards

SIZE = 4


class Linear(nn.Linear):
    """A layer of the one size."""

    def __init__(self):
        super().__init__(SIZE, SIZE)


class Model(nn.Module):
    """Three layers, of which `head` may change; `steps` is its forward pass."""

    def __init__(self, steps, **modules):
        super().__init__()
        self.first, self.second, self.head = Linear(), Linear(), Linear()
        for name, module in modules.items():
            self.add_module(name, module)
        self.steps = steps

    def forward(self, x):
        return self.steps(self, x)


def independent(model, sources=None, times=1):
    """Names and ordinals of the independent calls."""
    sources = list(model.head.parameters()) if sources is None else sources
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is source for source in sources))
    names = {module: name for name, module in model.named_modules()}
    calls = independent_calls(model, sources, lambda: [model(torch.ones(3, SIZE)) for _ in range(times)])
    return [(names[module], ordinal) for module, ordinal in calls]


class Numpy(torch.autograd.Function):
    """A kernel that PyTorch's dispatcher does not see."""

    @staticmethod
    def forward(context, x):
        return torch.from_numpy(2 * x.detach().numpy())

    @staticmethod
    def backward(context, gradient):
        return 2 * gradient


def in_place(model, x):
    target = torch.zeros(3, SIZE)
    target[0].copy_(model.head(x)[0])
    return model.first(x) + model.second(target)


def through_data(model, x):
    target = torch.zeros(3, SIZE)
    target.data.add_(model.head(x))
    return model.second(target)


def into_an_argument(model, x):
    target = torch.zeros(3, SIZE)
    torch.add(x, model.head(x).detach(), out=target)
    return model.second(target)


def by_foreach(model, x):
    target = torch.zeros(3, SIZE)
    torch._foreach_copy_([target], [model.head(x).detach()])
    return model.second(target)


def by_item(model, x):
    return model.first(x) if model.head(x).sum().item() > 0 else model.second(x)


def by_equality(model, x):
    h = model.head(x).detach()
    return model.first(x) if torch.equal(h, x) else model.second(x)


def by_list(model, x):
    return model.first(x[: 1 + sum(number > 0 for number in model.head(x)[0].tolist())])


def by_shape(model, x):
    return model.first(x[: 1 + len(model.head(x)[0].nonzero())])


def by_numpy(model, x):
    return model.first(torch.from_numpy(model.head(x).detach().numpy() + 1))


FLOWS = {
    "a chain": (lambda m, x: m.head(m.second(m.first(x))), [("first", 0), ("second", 0)]),
    "after the head": (lambda m, x: m.second(m.head(m.first(x))), [("first", 0)]),
    "a residual": (lambda m, x: m.head(x + m.first(x)) + m.second(x), [("first", 0), ("second", 0)]),
    "a late tower": (lambda m, x: m.head(x) * m.second(m.first(x)), [("first", 0), ("second", 0)]),
    "one layer, independent first": (lambda m, x: m.first(m.head(m.first(x))), [("first", 0)]),
    "one layer, dependent first": (lambda m, x: m.first(m.head(x)) + m.first(x), [("first", 1)]),
    "another layer's weight": (lambda m, x: m.first(F.linear(x, m.head.weight)), []),
    "a weight as an argument": (lambda m, x: m.second(m.first(x) @ m.head.weight), [("first", 0)]),
    "a detached tensor": (lambda m, x: m.second(m.head(x).detach()), []),
    "without gradients": (lambda m, x: m.second(torch.no_grad()(m.head)(x)), []),
    "a copy": (lambda m, x: m.second(m.head(x).detach().clone().view(3, SIZE)), []),
    "a number": (by_item, []),
    "an equality": (by_equality, []),
    "a list": (by_list, []),
    "a shape": (by_shape, []),
    "NumPy": (by_numpy, []),
    "a kernel of one's own": (lambda m, x: m.second(Numpy.apply(m.head(x))), []),
    "a slice written in place": (in_place, [("first", 0)]),
    "written through data": (through_data, []),
    "an output argument": (into_an_argument, []),
    "a list of tensors written at once": (by_foreach, []),
    "nothing of the head": (lambda m, x: m.second(m.first(x)), [("", 0)]),
}


@pytest.mark.parametrize("flow", FLOWS)
def test_the_data_are_followed_through(flow):
    steps, expected = FLOWS[flow]
    assert independent(Model(steps)) == expected


def test_a_tied_weight_makes_both_ends_dependent():
    model = Model(lambda m, x: m.head(m.second(m.first(x))))
    model.first.weight = model.head.weight
    assert independent(model) == []


def test_the_outermost_calls_count():
    block = nn.Sequential(Linear(), nn.Tanh(), nn.Sequential(Linear(), Linear()))
    assert independent(Model(lambda m, x: m.head(m.block(x)), block=block)) == [("block", 0)]


def test_within_a_dependent_block_the_independent_ones_count():
    block = nn.Sequential(Linear(), nn.Tanh(), nn.Sequential(Linear(), Linear()))
    model = Model(lambda m, x: m.block(x), block=block)
    sources = list(block[2][1].parameters())
    assert independent(model, sources) == [("block.0", 0), ("block.2.0", 0)]


def test_calls_inside_others_count_for_the_ordinal():
    def steps(model, x):
        return model.head(model.block(x)) + model.inner(x)

    inner = Linear()
    model = Model(steps, inner=inner, block=nn.Sequential(inner, inner))
    assert independent(model) == [("block", 0), ("inner", 2)]


def test_several_forward_passes_are_counted_on():
    model = Model(lambda m, x: m.head(m.first(x)))
    assert independent(model, times=2) == [("first", 0), ("first", 1)]


def test_modules_without_parameters_do_not_count():
    model = Model(lambda m, x: m.head(m.act(m.norm(x))), act=nn.Tanh(), norm=nn.BatchNorm1d(SIZE, affine=False))
    assert independent(model) == []


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_a_call_with_a_hook_inside_is_left_out_and_those_around_the_hook_are_found(kind):
    model = Model(lambda m, x: m.head(m.block(x)), block=nn.Sequential(Linear(), nn.Tanh(), Linear()))
    getattr(model.block[1], f"register_{kind}_hook")(lambda *arguments: None)
    assert independent(model) == [("block.0", 0), ("block.2", 0)]


def test_a_forward_hook_on_the_called_module_itself_does_not_matter():
    model = Model(lambda m, x: m.head(m.first(x)))
    model.first.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert independent(model) == [("first", 0)]


def test_a_hook_that_brings_a_source_in_makes_what_follows_dependent():
    source = nn.Parameter(torch.ones(SIZE))
    model = Model(lambda m, x: m.head(m.second(m.first(x))))
    model.first.register_forward_hook(lambda module, inputs, output: output + source)
    assert independent(model, [source]) == [("first", 0)]


def test_what_was_computed_from_a_source_beforehand_is_known_by_its_gradient():
    source = nn.Parameter(torch.zeros(2))
    weights = torch.softmax(source, dim=0)
    model = Model(lambda m, x: m.second(m.first(x) * weights[0]))
    assert independent(model, [source]) == [("first", 0)]


@pytest.mark.parametrize("detached", [False, True])
def test_a_source_may_be_used_before_the_model_runs(detached):
    source, model = nn.Parameter(torch.zeros(2)), Model(lambda m, x: m.second(m.first(x)))
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def forward_pass():
        weights = torch.softmax(source, dim=0)
        weights = weights.detach() if detached else weights
        hook = model.first.register_forward_hook(lambda module, inputs, output: output * weights[0])
        model(torch.ones(3, SIZE))
        hook.remove()

    assert independent_calls(model, [source], forward_pass) == ((model.first, 0),)


def test_running_statistics_carry_what_they_saw():
    """A later call reads them, and they would be given back as the first candidate left them."""
    model = Model(lambda m, x: m.norm(m.head(x)) + m.norm(m.first(x)), norm=nn.BatchNorm1d(SIZE))
    assert independent(model) == [("first", 0)]


def test_a_layer_that_changes_its_input_is_no_substitute_for_its_result():
    def steps(model, x):
        h = 2 * model.first(x)
        return model.head(h + model.block(h))

    model = Model(steps, block=nn.Sequential(nn.ReLU(inplace=True), Linear()))
    assert ("block", 0) not in independent(model)


def test_a_layer_that_adds_to_a_list_is_no_substitute_for_its_result():
    class Adding(Linear):
        def forward(self, x, collected):
            collected.append(x.mean())
            return super().forward(x)

    def steps(model, x):
        collected = []
        return model.head(model.adding(x, collected)) * sum(collected)

    assert ("adding", 0) not in independent(Model(steps, adding=Adding()))


def test_a_layer_that_leaves_an_attribute_behind_is_no_substitute_for_its_result():
    class Leaving(Linear):
        def forward(self, x):
            self.left = x.mean()
            return super().forward(x)

    assert independent(Model(lambda m, x: m.head(m.leaving(x)) * m.leaving.left, leaving=Leaving())) == []


class Opaque:
    """A container that nobody can look into."""

    def __init__(self, hidden):
        self.hidden = hidden


def test_a_container_of_a_layers_own_is_no_result_to_give_again():
    class Wrapping(Linear):
        def forward(self, x):
            return Opaque(super().forward(x))

    assert independent(Model(lambda m, x: m.head(m.wrapping(x).hidden), wrapping=Wrapping())) == []


def test_a_dependent_tensor_in_a_container_makes_its_user_dependent():
    class Reading(Linear):
        def forward(self, container):
            return super().forward(container.hidden)

    model = Model(lambda m, x: m.reading(Opaque(m.head(x))), reading=Reading())
    assert independent(model) == []


def forwards(model):
    return {name: module.__dict__.get("forward") for name, module in model.named_modules()}


@pytest.mark.parametrize("fails", [False, True])
def test_every_forward_is_given_back(fails):
    model = Model(lambda m, x: m.head(m.second(m.first(x))))
    own, whole = model.second.forward, model.forward
    model.second.forward = lambda x: own(x)
    model.forward = lambda x: whole(x)
    before = forwards(model)
    if fails:
        model.head.forward = before["head"] = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            independent(model)
    else:
        assert independent(model) == [("first", 0), ("second", 0)]
    assert forwards(model) == before


def test_a_module_that_takes_no_forward_leaves_the_others_as_they_were():
    class Stubborn(Linear):
        def __setattr__(self, name, value):
            if name == "forward":
                raise AttributeError("no")
            super().__setattr__(name, value)

    model = Model(lambda m, x: x, stubborn=Stubborn())
    with (
        pytest.raises(AttributeError, match="no"),
        patched_forwards(list(model.modules()), lambda module, forward: forward),
    ):
        pass
    assert not any(forwards(model).values())


def test_what_is_put_around_sees_module_and_forward():
    seen, first, second = [], Linear(), Linear()

    def around(module, forward):
        def watched(x):
            seen.append(module)
            return 2 * forward(x)

        return watched

    x = torch.ones(1, SIZE)
    with patched_forwards([first, second, first], around):
        doubled = first(second(x))
    assert seen == [first, second] or seen == [first, second][::-1]
    assert torch.equal(doubled, 2 * first(2 * second(x)))
