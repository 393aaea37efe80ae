"""Graphs that were met before: the extension walks them, and notices what is new."""

import pytest
import torch
from torch import nn

from fastminima import _native
from fastminima.capture.graph.known import KnownGraphs
from fastminima.capture.graph.tape import Tape

if _native.host() is None:
    pytest.skip("no native extension", allow_module_level=True)


class Net(nn.Module):
    """Two layers; what is between them can be changed."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 3)
        self.between = torch.tanh

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def walked(monkeypatch):
    """How many graphs Python walked."""
    from fastminima.capture.graph import known

    count = []

    def walk(*args):
        count.append(1)
        return Tape(*args)

    monkeypatch.setattr(known, "Tape", walk)
    return count


def names_of(model):
    return {id(p): name for name, p in model.named_parameters()}


def root_of(model):
    return model(torch.randn(2, 3)).square().sum().grad_fn


def assert_same(tape, root, names):
    want = Tape([root], names)
    assert tape.nodes == want.nodes
    assert (tape.names, tape.children) == (want.names, want.children)
    assert (tape.leaves, tape.copies) == (want.leaves, want.copies)
    assert tape.key == want.key and hash(tape.key) == hash(want.key)
    assert tape.parents == want.parents
    assert tape.parameter_at == want.parameter_at


def test_the_third_walk_is_the_extensions(net, walked):
    graphs, names = KnownGraphs(), names_of(net)
    for _ in range(5):
        root = root_of(net)
        assert_same(graphs.walk(root, names), root, names)
    assert len(walked) == 2


def test_several_structures_in_turn(net, walked):
    graphs, names = KnownGraphs(), names_of(net)
    for step in range(12):
        net.between = (torch.tanh, torch.sigmoid, lambda x: x.sin().cos())[step % 3]
        root = root_of(net)
        assert_same(graphs.walk(root, names), root, names)
    assert len(walked) == 6


def _swapped(net):
    net.first, net.second = net.second, net.first
    net.forward = lambda x: net.first(torch.tanh(net.second(x)))


def _without_bias(net):
    net.first = nn.Linear(3, 4, bias=False)


def _frozen(net):
    net.first.weight.requires_grad_(False)


def _shared(net):
    net.second = nn.Linear(4, 3)
    net.second.bias = nn.Parameter(torch.zeros(3))
    net.forward = lambda x: net.second(torch.tanh(net.first(x))) + net.second.bias


def _twice(net):
    def forward(x):
        hidden = torch.tanh(net.first(x))
        return net.second(hidden) + net.second(hidden)

    net.forward = forward


def _apart(net):
    """As `_twice`, with each use on a copy: the same nodes, another sharing."""

    def forward(x):
        one, two = torch.tanh(net.first(x)), torch.tanh(net.first(x))
        return net.second(one) + net.second(two)

    net.forward = forward


def _another_parameter(net):
    net.first.weight = nn.Parameter(torch.randn(4, 3))


CHANGES = [_swapped, _without_bias, _frozen, _shared, _twice, _apart]


@pytest.mark.parametrize("change", [*CHANGES, _another_parameter])
def test_what_is_new_is_noticed(net, change):
    graphs = KnownGraphs()
    for _ in range(3):
        graphs.walk(root_of(net), names_of(net))
    change(net)
    for _ in range(4):
        root, names = root_of(net), names_of(net)
        assert_same(graphs.walk(root, names), root, names)


def test_sharing_is_part_of_a_structure(net):
    graphs = KnownGraphs()
    for change in (_twice, _apart, _twice, _apart, _twice, _apart):
        change(net)
        root, names = root_of(net), names_of(net)
        assert_same(graphs.walk(root, names), root, names)


def test_names_that_change_are_noticed(net):
    """The same graph over parameters that are tracked under other names, or not."""
    graphs, names = KnownGraphs(), names_of(net)
    for _ in range(3):
        graphs.walk(root_of(net), names)
    for other in (
        {i: f"renamed {name}" for i, name in names.items()},
        dict(list(names.items())[:2]),
        {},
        names,
    ):
        root = root_of(net)
        assert_same(graphs.walk(root, other), root, other)


def test_python_functions_are_told_apart_by_name(net):
    def function(word):
        class Own(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, g):
                return 2 * g

        Own.__name__ = Own.__qualname__ = word
        return type(word, (Own,), {}).apply

    graphs, names = KnownGraphs(), names_of(net)
    one, two = function("One"), function("Two")
    for between in (one, one, one, two, two, two, one):
        net.between = between
        root = root_of(net)
        assert_same(graphs.walk(root, names), root, names)


def test_a_known_structure_holds_no_node(net):
    import gc
    import weakref

    graphs, names = KnownGraphs(), names_of(net)
    for _ in range(4):
        loss = net(torch.randn(2, 3)).square().sum()
        held = weakref.ref(loss)
        graphs.walk(loss.grad_fn, names)
        gc.collect()
        del loss
        assert held() is None


def test_conditions_of_shapes_and_numbers(net):
    host = _native.host()
    x = torch.randn(2, 3, requires_grad=True)
    tape = Tape([x.transpose(0, 1).sum().grad_fn], {})
    turned = tape.names.index("TransposeBackward0")
    conditions = host.Conditions()
    conditions.add_shapes(turned, tape.shapes(turned))
    conditions.add_value(turned, "_saved_dim0", tape.nodes[turned]._saved_dim0)
    assert conditions.hold(tape.nodes)
    other = torch.randn(5, 3, requires_grad=True)
    assert not conditions.hold(Tape([other.transpose(0, 1).sum().grad_fn], {}).nodes)
    cube = torch.randn(2, 3, 3, requires_grad=True)[0]
    for dims in ((0, 1), (1, 0)):
        nodes = Tape([cube.T.transpose(*dims).sum().grad_fn], {}).nodes
        assert not conditions.hold(nodes)
    with pytest.raises(AttributeError):
        host_conditions = host.Conditions()
        host_conditions.add_value(0, "_saved_nothing", 1)
        host_conditions.hold(tape.nodes)
