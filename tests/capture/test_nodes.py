"""The vocabulary of nodes against the installed PyTorch, and against itself."""

import pytest
import torch
import torch.nn.functional as F
from cases import CASES
from functions_header import SAVED

import fastminima as fm
from fastminima.capture.graph import nodes
from fastminima.capture.graph.tape import Tape
from fastminima.capture.rules import RULES

# Tables of Aten's own nodes, all of which the header has.
NAMED = {
    name: frozenset(getattr(nodes, name))
    for name in (
        *("ALONG", "BROADCASTING", "BY_DIM", "BY_INDICES", "ELEMENTWISE", "EVEN"),
        *("FACTORS", "JOINING", "KEEPING_ORDER", "MAY_MIX", "MOVE_UNSEEN"),
        *("NORMALISING_LAST", "PICKS", "PLACING", "PRODUCTS", "REARRANGING"),
        *("REDUCING", "REORDERING", "TRANSPOSING", "VIEWS"),
    )
}
# Those are named for both versions, one of which need not exist.
VERSIONS = ("ALONG", "BY_DIM", "ELEMENTWISE", "VIEWS")
# What the oldest PyTorch that is served does not differentiate.
IS_OLDEST = torch.__version__.startswith("2.11.")
NEWER = {"AminmaxBackward0"} if IS_OLDEST else frozenset()


@pytest.mark.parametrize("table", NAMED)
def test_every_name_is_one_of_pytorch(table):
    missing = NAMED[table] - SAVED.keys() - NEWER
    if table in VERSIONS:
        missing = {n for n in missing if n[:-1] + "10"[int(n[-1])] not in SAVED}
    assert not missing, missing


def test_what_is_read_of_them_is_saved():
    read = [(n, w) for n, words in nodes.PLACING.items() for w in words]
    read += [(n, w) for n, words in nodes.FACTORS.items() for w in words if w]
    read += [(n, p.index) for n, p in nodes.PICKS.items()]
    read += [(n, w) for n, p in nodes.PRODUCTS.items() for w in p.operands if w]
    read += [(n, "normalized_shape") for n in nodes.NORMALISING_LAST]
    read += [(n, "dim") for n in nodes.JOINING]
    assert len(read) > 60
    wrong = [(n, w) for n, w in read if n not in NEWER and w not in SAVED[n]]
    assert not wrong, wrong


def test_nodes_that_move_dims_and_rows_are_compared_from_step_to_step():
    assert nodes.TRANSPOSING <= nodes.REORDERING <= nodes.REARRANGING
    assert nodes.KEEPING_ORDER <= nodes.REARRANGING
    assert nodes.EVEN.isdisjoint(nodes.REDUCING)
    # What rearranges by numbers of its own is looked at again; a transposition without
    # numbers shows in its shapes.
    harmless = {n for n in nodes.REARRANGING if n.startswith("Squeeze")}
    numberless = {"TBackward0", "TBackward1"}
    numbered = nodes.REARRANGING - nodes.KEEPING_ORDER - harmless - numberless
    assert numbered <= nodes.PLACING.keys(), numbered - nodes.PLACING.keys()
    assert numberless <= nodes.REORDERING


@pytest.mark.parametrize("table", ["PLACING", "REARRANGING", "REORDERING"])
def test_overloads_of_what_moves_rows_are_known(table):
    """`x.transpose_(0, 1)` has another node than `x.transpose(0, 1)`."""
    names = NAMED[table]
    bases = {name[:-1] for name in names}
    others = {n for n in SAVED if n[:-1] in bases and "BackwardBackward" not in n}
    # Over everything, or of two tensors: no dim is left, or none is named.
    full = nodes.EVEN | {"MaxBackward1", "MinBackward1", "MaxBackward2"}
    full |= {f"{n}Backward0" for n in ("Median", "Nanmedian", "Norm", "Prod")}
    full |= {"NormBackward2"}
    dimnames = {n for n in others if n[-1] != "0" and "names" in SAVED[n]}
    assert others - names <= full | dimnames, others - names


def test_an_index_moves_rows_by_dim_or_by_indices_and_is_guarded():
    by_index = nodes.BY_DIM | nodes.BY_INDICES
    assert nodes.PICKS.keys() <= by_index
    assert by_index.isdisjoint(nodes.MOVE_UNSEEN)
    assert nodes.BY_DIM.isdisjoint(nodes.BY_INDICES)


def test_every_node_with_an_index_is_known():
    known = nodes.BY_DIM | nodes.BY_INDICES | nodes.MOVE_UNSEEN | nodes.PLACING.keys()
    known |= {nodes.EMBEDDING, nodes.BAG}
    with_index = {n for n, words in SAVED.items() if words & {"index", "indices"}}
    with_index -= {n for n in with_index if "BackwardBackward" in n}
    # They pick places within one image. (A maximum over the batch gives its row to one
    # sample: no regular layout, and only those are remembered.)
    within = {"MaxUnpool2DBackward0", "MaxUnpool3DBackward0"}
    other_kinds = {n for n in with_index if "NestedTensor" in n or n.endswith("_copy")}
    assert with_index - known <= within | other_kinds, with_index - known


def test_an_unsafe_index_is_not_remembered():
    """What decompositions of compiled code call instead of indexing."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(3, 2), torch.randn(5, 3)
    probe = fm.GradientProbe(layer)
    for step in range(3):  # in order at first: a layout that looks like any other
        order = torch.randperm(5) if step else torch.arange(5)
        losses = torch.ops.aten._unsafe_index(layer(x), [order]).square().sum(1)
        want = fm.GradientProbe(layer).backward(layer(x[order]).square().sum(1))
        assert torch.allclose(probe.backward(losses).sq_norms, want.sq_norms)


def test_products_describe_their_inputs():
    w = torch.randn(3, 3, requires_grad=True)
    made = [w @ w, torch.addmm(w, w, w), torch.bmm(w[None], w[None]), w @ w[0]]
    made.append(F.conv1d(w[None], w[None], w[0, :1]))
    for out in made:
        node = out.grad_fn
        product = nodes.PRODUCTS[node.name()]
        assert len(product.operands) == len(node.next_functions), node.name()
        inputs = {*(product.factors or ()), *product.rows}
        inputs |= {i for i in (product.weight, product.bias) if i is not None}
        assert max(inputs) < len(node.next_functions)
    assert nodes.is_scaled(torch.addmm(w, w, w, alpha=2).grad_fn, nodes.ADDMM)
    assert nodes.is_scaled(torch.addmm(w, w, w, beta=2).grad_fn, nodes.ADDMM)
    assert not nodes.is_scaled(torch.addmm(w, w, w).grad_fn, nodes.ADDMM)
    assert not nodes.is_scaled((w @ w).grad_fn, "MmBackward0")


# Met in the models of cases.py and in no table: they are measured like any other.
MEASURED = {
    *("DoubledBackward", "MkldnnRnnLayerBackward0", "VdotBackward0"),
    "ScaledDotProductFlashAttentionForCpuBackward0",
}


def test_nodes_of_the_cases_are_known_or_named_here():
    known = frozenset.union(*NAMED.values()) | RULES.keys() | {nodes.ACCUMULATE}
    met = set()
    for case in CASES:
        model, batch = case.make()
        met |= set(Tape([case.losses(model, batch).grad_fn], {}).names)
    assert met - known == MEASURED
