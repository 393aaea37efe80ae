"""What rules read of nodes, against what PyTorch says that those nodes save."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fastminima.capture.graph.saved_names import (
    BATCH_NORMS,
    CALLED_ONLY,
    batch_statistics,
    is_training,
)
from fastminima.capture.reading.plan import Slot
from fastminima.capture.rows.layout import RegularLayout
from fastminima.capture.rules import RULES

# Written from derivatives.yaml when PyTorch is built: the classes of all nodes.
HEADER = Path(torch.__file__).parent / "include/torch/csrc/autograd/generated"
HEADER /= "Functions.h"
if not HEADER.exists():
    pytest.skip("this PyTorch comes without its headers", allow_module_level=True)

FIELD = re.compile(r"^  (?!void|using|return)[\w:<>, ]+ (\w+?)_?(?: = \w+)?;$", re.M)


def fields_by_node():
    """What each node saves, by the node's name."""
    classes = re.split(r"^struct TORCH_API ", HEADER.read_text(), flags=re.M)[1:]
    parts = (text.partition("\n};")[0] for text in classes)
    return {p.split(maxsplit=1)[0]: set(FIELD.findall(p)) for p in parts}


SAVED = fields_by_node()


def read_by(function):
    """The attributes that a rule reads, itself and where it hands on the node."""
    module = inspect.getmodule(function)
    source = inspect.getsource(function)
    words = set(re.findall(r"node\._saved_(\w+)", source))
    for name in re.findall(r"(\w+)\(node\b", source):
        other = getattr(module, name, None)
        if inspect.isfunction(other) and other not in (function, batch_statistics):
            words |= read_by(other)
    return words


def test_the_header_is_understood():
    w = torch.randn(3, 3, requires_grad=True)
    for out in (torch.addmm(w, w, w), F.layer_norm(w, (3,), w[0]), w * w, w[[0]]):
        name, words = out.grad_fn.name(), attributes(out.grad_fn)
        assert words, name
        assert words <= SAVED[name], name


def attributes(node):
    names = (word for word in dir(node) if word.startswith("_saved_"))
    return {name.removeprefix("_saved_") for name in names}


@pytest.mark.parametrize("name", sorted(RULES))
def test_what_a_rule_reads_is_saved(name):
    words = read_by(RULES[name])
    if name in SAVED:  # Aten's; others are of a later or an earlier version
        assert words <= SAVED[name], (name, words - SAVED[name])


def test_rules_read_something():
    assert sum(bool(read_by(rule)) for rule in RULES.values()) >= 20
    assert len(RULES.keys() - SAVED.keys()) <= 2, RULES.keys() - SAVED.keys()


@pytest.mark.parametrize("name", BATCH_NORMS)
def test_names_of_batch_norms(name):
    names = BATCH_NORMS[name]
    words = {names.eps, names.input, names.weight, names.mean, names.rstd}
    words |= {w for w in (names.running_mean, names.running_var) if w is not None}
    words |= {names.training} if isinstance(names.training, str) else set()
    assert words <= SAVED[name], words - SAVED[name]
    # What the node has, and nothing here says, would be the name of another version.
    assert ("training" in SAVED[name]) == isinstance(names.training, str)
    assert ("running_var" in SAVED[name]) == (names.running_var is not None)


def test_every_batch_norm_is_in_the_table():
    layers = {n for n in SAVED if re.fullmatch(r"\w*BatchNorm\w*Backward\d", n)}
    of_layers = {n for n in layers if "BackwardBackward" not in n}
    inner = {"BatchNormStatsBackward", "BatchNormElemt", "BatchNormGather"}
    assert {n for n in of_layers if not n.startswith(tuple(inner))} <= set(BATCH_NORMS)


def test_nodes_that_are_called_exist_and_have_no_rule():
    assert CALLED_ONLY.isdisjoint(RULES)
    missing = {n for n in CALLED_ONLY if n not in SAVED}
    assert not missing, missing
    fused = {n for n in SAVED if re.match(r"ScaledDotProduct\w+Backward0", n)}
    fused = {n for n in fused if "BackwardBackward" not in n}
    assert fused <= CALLED_ONLY, fused - CALLED_ONLY


class StandIn:
    """A node of another backend: the attributes that it has, and no others."""

    def __init__(self, name, **values):
        self.name = lambda: name
        for word, value in values.items():
            if word in SAVED[name]:
                setattr(self, f"_saved_{word}", value)


@pytest.mark.usefixtures("on_the_cpu")  # the node that the others are compared with
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_every_backend_gives_what_the_native_node_gives(name, training):
    fixed = BATCH_NORMS[name].training
    if isinstance(fixed, bool) and fixed != training:
        pytest.skip("a node of the other mode")
    if BATCH_NORMS[name].running_var is None and not training:
        pytest.skip("it has no running statistics to use")
    x = torch.randn(6, 3, 4)
    weight, bias = (torch.randn(3, requires_grad=True) for _ in range(2))
    running = torch.randn(3), torch.rand(3) + 0.5
    out = F.batch_norm(x, *running, weight, bias, training=training, eps=0.1)
    native = out.grad_fn
    values = {word: getattr(native, f"_saved_{word}") for word in attributes(native)}
    values["epsilon"] = values["eps"]
    node = StandIn(name, **values)
    assert is_training(node) == training
    layout = RegularLayout(0, 1, 6, 1)
    slots = [Slot(n, (0, 0), (3,), ()) for n in (1, 2)]
    g = torch.randn(6, 3, 4)
    want = RULES[native.name()](native, g, layout, slots)
    got = RULES[name](node, g, layout, slots)
    whole = native(g)  # the sum over the samples
    for n in (1, 2):
        samples = got[n].per_sample(0, 6)
        assert torch.equal(samples, want[n].per_sample(0, 6))
        torch.testing.assert_close(samples.sum(0), whole[n])
