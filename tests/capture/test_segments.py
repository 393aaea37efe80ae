"""Documents packed into rows: each is a sample."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm

VOCABULARY = 13


class Decoder(nn.Module):
    """Pre-norm blocks whose attention stays within documents."""

    def __init__(self, width=8, heads=2, tied=True, time_first=False):
        super().__init__()
        self.heads, self.time_first = heads, time_first
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(12, width)
        self.norm = nn.RMSNorm(width)
        self.packed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width, bias=False)
        self.query_norm = nn.Parameter(torch.rand(width // heads) + 0.5)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids, documents, positions):
        x = self.tokens(ids) + self.positions(positions)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.packed(self.norm(x)).chunk(3, -1)
        )
        q = q * self.query_norm
        time = torch.arange(ids.shape[1], device=ids.device)
        allowed = documents[:, :, None] == documents[:, None, :]
        allowed = allowed & (time[:, None] >= time)
        attended = F.scaled_dot_product_attention(q, k, v, allowed[:, None])
        x = x + self.out(attended.transpose(1, 2).flatten(2)) * self.scale
        x = self.last(x)
        return (
            self.head(x.transpose(0, 1)).transpose(0, 1)
            if self.time_first
            else (self.head(x))
        )


def packed(lengths, seed=0):
    """Rows of documents of those lengths, -1 behind them; ids, documents, positions."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(sum(row) for row in lengths)
    shape = (len(lengths), longest)
    documents = torch.full(shape, -1)
    positions = torch.zeros(shape, dtype=torch.long)
    number = 0
    for i, row in enumerate(lengths):
        start = 0
        for length in row:
            documents[i, start : start + length] = number
            positions[i, start : start + length] = torch.arange(length)
            start += length
            number += 1
    ids = torch.randint(VOCABULARY, shape, generator=generator)
    return ids, documents, positions


def token_losses(model, ids, documents, positions):
    """Cross-entropy of the next token of the same document, `[rows, time]`."""
    logits = model(ids, documents, positions)
    targets = torch.roll(ids, -1, 1)
    follows = torch.roll(documents, -1, 1) == documents
    follows[:, -1] = False
    follows &= documents >= 0
    losses = F.cross_entropy(logits.mT, targets, reduction="none")
    return losses * follows


def document_losses(losses, documents):
    """The sum over the tokens of each document."""
    count = int(documents.max()) + 1
    owner = documents.clamp(min=0).flatten()
    flat = (losses * (documents >= 0)).flatten()
    return losses.new_zeros(count).index_add(0, owner, flat)


def one_by_one(model, ids, documents, positions):
    """Each document alone, in float64: `{name: [documents, *shape]}`."""
    model = copy.deepcopy(model).double()
    parameters = dict(model.named_parameters())
    found = {name: [] for name in parameters}
    for number in range(int(documents.max()) + 1):
        at = documents == number
        alone = ids[at][None], torch.zeros(1, int(at.sum())).long(), positions[at][None]
        loss = token_losses(model, *alone).sum()
        grads = torch.autograd.grad(loss, list(parameters.values()))
        for name, g in zip(parameters, grads, strict=True):
            found[name].append(g)
    return {name: torch.stack(parts) for name, parts in found.items()}


PACKINGS = [
    [[3, 4, 2], [5, 4], [2, 2, 2, 2]],
    [[1 + 3, 4], [2, 6]],
    [[6, 3, 2]],
    [[2, 2], [2, 2]],
    [[7], [3, 3]],
]


def check(stats, want):
    norms = sum(g.flatten(1).square().sum(1) for g in want.values())
    torch.testing.assert_close(stats.sq_norms.double(), norms, rtol=1e-4, atol=0)
    for name, g in want.items():
        exact = g.flatten(1).square().sum(1)
        torch.testing.assert_close(
            stats.sq_norms_by_parameter[name].double(),
            exact,
            rtol=2e-4,
            atol=1e-5 * exact.max().item() + 1e-9 * norms.max().item(),
        )


@pytest.mark.parametrize("time_first", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["vector", "sum", "flat"])
def test_each_document_is_a_sample(way, tied, time_first, recwarn):
    """In packings that change from step to step, with everything a decoder has."""
    torch.manual_seed(0)
    model = Decoder(tied=tied, time_first=time_first)
    probe = fm.GradientProbe(model, per_parameter=True, measure=("norms", "gram"))
    for seed, lengths in enumerate(PACKINGS + PACKINGS[::-1]):
        batch = packed(lengths, seed)
        documents = batch[1]
        losses = token_losses(model, *batch)
        count = int(documents.max()) + 1
        if way == "vector":
            stats = probe.backward(
                document_losses(losses, documents), segment_ids=documents
            )
        elif way == "sum":
            stats = probe.backward(losses.sum(), reduction="sum", segment_ids=documents)
        else:
            loss = losses.flatten().sum() / count
            probe.attach(loss, count, segment_ids=documents)
            loss.backward()
            stats = probe.collect()
        assert stats.count == count
        want = one_by_one(model, *batch)
        check(stats, want)
        gradients = torch.cat([g.flatten(1) for g in want.values()], 1)
        torch.testing.assert_close(
            stats.gram.double(),
            gradients @ gradients.t(),
            rtol=1e-4,
            atol=1e-4 * stats.gram.diagonal().max().item(),
        )
    assert not [w for w in recwarn if "No rule" in str(w.message)]


def test_layouts_are_kept_while_the_packing_changes(monkeypatch):
    """After the first steps nothing is measured again, whatever the documents."""
    from fastminima.capture.reading import attempt

    measured = []
    run = attempt.measure_samples

    def counting(*args, **kwargs):
        measured.append(None)
        return run(*args, **kwargs)

    monkeypatch.setattr(attempt, "measure_samples", counting)
    model = Decoder()
    probe = fm.GradientProbe(model)
    for seed, lengths in enumerate([[[3, 4], [5, 2]], [[2, 5], [3, 4]], [[7], [4, 3]]]):
        batch = packed(lengths, seed)
        losses = document_losses(token_losses(model, *batch), batch[1])
        probe.backward(losses, segment_ids=batch[1])
        if seed == 0:
            first = len(measured)
    assert first == 1
    assert len(measured) == first


def test_attention_that_leaks_is_refused():
    """Documents that see each other are not samples, and the first step shows it."""
    model = Decoder()
    ids, documents, positions = packed([[3, 4], [5, 2]])
    open_rows = torch.zeros_like(documents)
    losses = F.cross_entropy(model(ids, open_rows, positions).mT, ids, reduction="none")
    with pytest.raises(fm.CaptureError, match="samples"):
        fm.GradientProbe(model).backward(
            document_losses(losses, documents), segment_ids=documents
        )


def test_audit_and_the_same_numbers_without_segment_ids():
    """The vector of losses is enough for one step; the places are measured then."""
    model = Decoder()
    batch = packed([[3, 4, 2], [5, 4]])
    documents = batch[1]
    losses = document_losses(token_losses(model, *batch), documents)
    probe = fm.GradientProbe(model)
    assert probe.audit(losses, segment_ids=documents).ok
    told = probe.backward(losses, retain_graph=True, segment_ids=documents)
    found = fm.GradientProbe(model).backward(losses)
    torch.testing.assert_close(told.sq_norms, found.sq_norms)


def test_some_documents_only():
    model = Decoder()
    batch = packed([[3, 4, 2], [5, 4]])
    losses = document_losses(token_losses(model, *batch), batch[1])
    whole = fm.GradientProbe(model).backward(
        losses, retain_graph=True, segment_ids=batch[1]
    )
    part = fm.GradientProbe(model, sample=3).backward(losses, segment_ids=batch[1])
    torch.testing.assert_close(part.sq_norms, whole.sq_norms[part.samples])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    model = Decoder()
    key = torch.zeros((), requires_grad=True)
    probe = fm.GradientProbe(model, per_parameter=True)
    for seed, lengths in enumerate(PACKINGS[:3]):
        batch = packed(lengths, seed)

        def run(ids, documents, positions, batch=batch):
            return checkpoint(lambda _: model(*batch), key, use_reentrant=use_reentrant)

        losses = document_losses(token_losses(run, *batch), batch[1])
        stats = probe.backward(losses, segment_ids=batch[1])
        check(stats, one_by_one(model, *batch))


def test_what_does_not_make_sense():
    model = Decoder()
    batch = packed([[3, 4], [5, 2]])
    documents = batch[1]
    losses = document_losses(token_losses(model, *batch), documents)
    probe = fm.GradientProbe(model)
    for bad, message in (
        (documents.float(), "integers"),
        (documents[None], "integers"),
        (documents - 5, "numbers from"),
        (documents + 9, "losses or samples"),
        (torch.full_like(documents, -1), "numbers from"),
    ):
        with pytest.raises(ValueError, match=message):
            probe.backward(losses, segment_ids=bad)
    with pytest.raises(fm.CaptureError, match="segment_ids"):
        probe.backward(losses.sum(), reduction="sum", segment_ids=documents[:, :-1])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("way", ["backward", "attach", "sample"])
def test_documents_of_very_different_lengths(way):
    """One long document among many short ones is not padded for."""
    torch.manual_seed(0)
    model = Decoder()
    lengths = [[12], [2] * 6, [3, 3, 3, 3], [2] * 6, [2] * 6, [2, 3, 2, 3, 2]]
    batch = packed(lengths)
    documents = batch[1]
    direction = torch.randn(sum(p.numel() for p in model.parameters()))
    options = {
        "measure": "second_moments",
        "directions": {"v": direction},
        "per_parameter": True,
        "keep_mean": True,
    }
    probe = fm.GradientProbe(model, sample=26 if way == "sample" else None, **options)
    losses = document_losses(token_losses(model, *batch), documents)
    if way == "attach":
        probe.attach(losses, segment_ids=documents)
        assert type(probe._pass.observer).__name__ == "GroupedSession"
        losses.mean().backward()
        stats = probe.collect()
    else:
        stats = probe.backward(losses, segment_ids=documents)
    want = one_by_one(model, *batch)
    if stats.samples is not None:
        want = {name: g[stats.samples] for name, g in want.items()}
    check(stats, want)
    gradients = torch.cat([g.flatten(1) for g in want.values()], 1)
    dots = gradients @ direction.double()
    scale = dots.abs().max()
    torch.testing.assert_close(
        stats.dots["v"].double() / scale, dots / scale, rtol=1e-4, atol=1e-5
    )
    for name, g in want.items():
        moment = g.square().mean(0)
        scale = moment.max()
        torch.testing.assert_close(
            stats.second_moments[name].double() / scale,
            moment / scale,
            rtol=1e-4,
            atol=1e-5,
        )
    for name, p in model.named_parameters():
        torch.testing.assert_close(stats.mean_grad[name], p.grad)


def test_one_document_a_step():
    """In more lengths than are measured before layouts are carried over."""
    torch.manual_seed(0)
    model = Decoder()
    probe = fm.GradientProbe(model, per_parameter=True)
    for length in (3, 5, 4, 6, 7, 6):
        batch = packed([[length]], length)
        losses = document_losses(token_losses(model, *batch), batch[1])
        check(probe.backward(losses, segment_ids=batch[1]), one_by_one(model, *batch))


@pytest.mark.parametrize("count", [4, 9, 16, 140])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_loss_of_tokens_of_none_is_refused(count, rows):
    """It is no sample's, whatever number the weight of such tokens stands for."""
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20))
    documents = torch.arange(count).repeat_interleave(2).view(rows, -1)
    documents = torch.cat([documents, torch.full((rows, 3), -1)], 1)
    ids = torch.randint(20, documents.shape)
    losses = F.cross_entropy(model(ids).mT, ids, reduction="none")
    probe = fm.GradientProbe(model)
    with pytest.raises(fm.CaptureError, match="-1 in segment_ids must have no part"):
        probe.backward(losses.sum(), reduction="sum", segment_ids=documents)
    own = losses * (documents >= 0)
    stats = probe.backward(own.sum(), reduction="sum", segment_ids=documents)
    assert stats.count == count


def test_documents_of_one_token_gathered_by_a_matrix():
    """Rows of documents may look like rows of tokens, as long as those are in order."""
    torch.manual_seed(0)
    a, b = nn.Linear(4, 5), nn.Linear(5, 2)
    named = dict(nn.ModuleList([a, b]).named_parameters())
    probe = fm.GradientProbe(named)
    for order in ([0, 1, 2, 3, 4, 5], [1, 0, 2, 4, 3, 5], [5, 4, 3, 2, 1, 0]):
        documents = torch.tensor(order).view(2, 3)
        gather = F.one_hot(documents.flatten()).float().T
        losses = b(gather @ a(torch.randn(6, 4)).tanh()).sin().sum(1)
        want = [
            torch.autograd.grad(loss, list(named.values()), retain_graph=True)
            for loss in losses
        ]
        want = torch.stack([sum(g.square().sum() for g in gs) for gs in want])
        got = probe.backward(losses, segment_ids=documents).sq_norms
        torch.testing.assert_close(got, want)


def test_convolutions_over_packed_rows():
    """Over single tokens: of data refused with the reason, above other layers exact."""
    first, second = nn.Linear(4, 4), nn.Conv1d(4, 3, 1)
    model = nn.ModuleList([first, second])
    _, documents, _ = packed([[3, 4], [5, 2]])
    x = torch.randn(*documents.shape, 4)
    losses = document_losses(second(x.mT).square().sum(1), documents)
    with pytest.raises(fm.CaptureError, match="convolutions"):
        fm.GradientProbe(second).backward(losses, segment_ids=documents)
    losses = document_losses(second(first(x).tanh().mT).square().sum(1), documents)
    with pytest.warns(UserWarning, match="No rule"):
        assert fm.GradientProbe(model).audit(losses, segment_ids=documents).ok
