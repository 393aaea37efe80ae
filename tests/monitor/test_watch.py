"""`fm.monitor.watch` in plain loops: what it writes, and that training is the same."""

import copy
import gc
import json
import math
import warnings

import pytest
import torch
from oracles import flat, single_sample_gradients
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastminima as fm
from fastminima.monitor.origins import Origin


def setup(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)


def batches(count, size=8, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    for _ in range(count):
        x = torch.randn(size, 6, generator=random, dtype=dtype)
        yield x, (x[:, 0] > 0).long()


def losses(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def mean_loss(model, batch):
    return losses(model, batch).mean()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(model, optimizer, watch, data, accumulate=1):
    """The loop; with None in place of a watch the plain one."""
    for i, batch in enumerate(data):
        if i % accumulate == 0:
            optimizer.zero_grad()
        found = losses(model, batch)
        if watch is None:
            (found.mean() / accumulate).backward()
        else:
            watch.backward(
                found, batch=batch, ids=[f"{i}.{n}" for n in range(len(found))]
            )
        if i % accumulate == accumulate - 1:
            optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("every", [1, 2])
def test_training_is_bitwise_the_same(accumulate, every, tmp_path):
    states = []
    for is_watched in (False, True):
        model, optimizer = setup()
        watch = None
        if is_watched:
            watch = fm.monitor.watch(
                model, optimizer, mean_loss, tmp_path / "run", every, 2,
                accumulate=accumulate,
            )  # fmt: skip
        train(model, optimizer, watch, batches(12), accumulate)
        states.append(model.state_dict())
    plain, watched = states
    for name, value in plain.items():
        if accumulate == 1:
            assert torch.equal(watched[name], value), name
        else:  # vectors are divided before their mean is taken
            torch.testing.assert_close(watched[name], value)


def test_files(tmp_path, capsys):
    model, optimizer = setup()
    folder = tmp_path / "runs" / "a"
    with fm.monitor.watch(model, optimizer, mean_loss, folder, 2, 4, largest=3) as w:
        train(model, optimizer, w, batches(10))
        assert w.step == 10
    rows = lines(folder / "rows.jsonl")
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    assert ["sharpness/eigenvalue_1" in row for row in rows] == [True, False] * 2 + [
        True
    ]
    assert rows[0]["sharpness/two_over_lr"] == pytest.approx(2 * 1.5 / 0.1)
    samples = lines(folder / "samples.jsonl")
    assert [one["step"] for one in samples] == [0, 2, 4, 6, 8]
    histograms = lines(folder / "histograms.jsonl")
    assert all(sum(one["counts"]) == 8 for one in histograms)
    assert not (folder / "spikes.jsonl").exists()
    about = json.loads((folder / "run.json").read_text())
    assert about["optimizer"]["name"] == "SGD"
    assert about["optimizer"]["options"]["momentum"] == 0.5
    assert [one["name"] for one in about["layers"]] == ["0", "2"]
    assert sum(one["parameters"] for one in about["layers"]) == about["parameters"]
    out = capsys.readouterr().out
    assert f"python -m fastminima report {folder}" in out
    w.close()
    assert not capsys.readouterr().out  # once


def test_largest_samples_are_those_of_single_gradients(tmp_path):
    """Over a step of two batches: ids, losses, norms and layers."""
    model, optimizer = setup(torch.float64)
    data = list(batches(2, dtype=torch.float64))
    w = fm.monitor.watch(model, optimizer, to=tmp_path, accumulate=2, largest=4)
    joined = [torch.cat(parts) for parts in zip(*data, strict=True)]
    grads = single_sample_gradients(model, losses, joined)
    wanted = losses(model, joined).tolist()
    train(model, optimizer, w, data, accumulate=2)
    w.close()
    norms = flat(grads).norm(dim=1)
    (line,) = lines(tmp_path / "samples.jsonl")
    order = norms.argsort(descending=True)[:4].tolist()
    assert [s["id"] for s in line["samples"]] == [f"{n // 8}.{n % 8}" for n in order]
    first = torch.cat([grads[n].flatten(1) for n in ("0.weight", "0.bias")], 1)
    for n, sample in zip(order, line["samples"], strict=True):
        assert (sample["microbatch"], sample["index"]) == (n // 8, n % 8)
        assert sample["norm"] == pytest.approx(norms[n].item())
        assert sample["loss"] == pytest.approx(wanted[n])
        share = (first[n].square().sum() / norms[n].square()).item()
        assert sample["layers"] == pytest.approx({"0": share, "2": 1 - share})
    (row,) = lines(tmp_path / "rows.jsonl")
    assert row["gradient/count"] == row["factors/batch_size"] == 16
    assert row["gradient/covariance_trace"] == pytest.approx(
        flat(grads).var(0).sum().item()
    )
    assert row["loss"] == pytest.approx(sum(wanted) / 16)


def test_share_of_the_mean_where_the_gram_matrix_is_there(tmp_path):
    model, optimizer = setup(torch.float64)
    batch = next(batches(1, dtype=torch.float64))
    g = flat(single_sample_gradients(model, losses, batch))
    w = fm.monitor.watch(
        model, optimizer, to=tmp_path, largest=8, measure=("norms", "gram")
    )
    w.backward(losses(model, batch))
    w.close()
    (line,) = lines(tmp_path / "samples.jsonl")
    want = g @ g.mean(0) / (8 * g.mean(0).square().sum())
    for sample in line["samples"]:
        assert sample["share"] == pytest.approx(want[sample["index"]].item())
        bound = g[sample["index"]].norm() / (8 * g.mean(0).norm())
        assert sample["share_at_most"] == pytest.approx(bound.item())
        assert sample["id"] == sample["index"]
    assert sum(sample["share"] for sample in line["samples"]) == pytest.approx(1)


def test_how_much_of_the_mean_a_sample_can_be_where_some_are_looked_at(tmp_path):
    model, optimizer = setup(torch.float64)
    batch = next(batches(1, dtype=torch.float64))
    g = flat(single_sample_gradients(model, losses, batch))
    w = fm.monitor.watch(model, optimizer, to=tmp_path, sample=3)
    w.backward(losses(model, batch))
    w.close()
    (line,) = lines(tmp_path / "samples.jsonl")
    assert len(line["samples"]) == 3
    for sample in line["samples"]:
        assert sample["share"] is None
        bound = g[sample["index"]].norm() / (8 * g.mean(0).norm())
        assert sample["share_at_most"] == pytest.approx(bound.item())


def test_sampled_statistics_name_samples_of_the_batch(tmp_path):
    model, optimizer = setup(torch.float64)
    batch = next(batches(1, dtype=torch.float64))
    norms = flat(single_sample_gradients(model, losses, batch)).norm(dim=1)
    values = losses(model, batch).tolist()
    w = fm.monitor.watch(model, optimizer, to=tmp_path, largest=8, sample=3)
    w.backward(losses(model, batch))
    w.close()
    (line,) = lines(tmp_path / "samples.jsonl")
    assert len(line["samples"]) == 3
    for sample in line["samples"]:
        assert sample["norm"] == pytest.approx(norms[sample["index"]].item())
        assert sample["loss"] == pytest.approx(values[sample["index"]])


def test_samples_of_several_ranks():
    """Three ranks of two samples in each of two batches; this one is the first."""
    origin = Origin(ids="abcd", microbatches=(6, 6), ranks=3)
    found = [origin.of(number) for number in range(12)]
    assert [one["rank"] for one in found] == [0, 0, 1, 1, 2, 2] * 2
    assert [one["index"] for one in found] == [0, 1] * 6
    assert [one["microbatch"] for one in found] == [0] * 6 + [1] * 6
    assert [one["id"] for one in found] == ["a", "b", 0, 1, 0, 1, "c", "d", 0, 1, 0, 1]
    uneven = Origin(ids="ab", microbatches=(7,), ranks=3).of(6)
    assert uneven == {"id": 6, "index": 6, "rank": None, "microbatch": 0}


def test_samples_of_ranks_that_have_different_numbers():
    """The second and fourth process of a job; this one is rank 0 of another."""
    counts, others = ((5, 3), (2, 6)), {7: "x", 9: torch.tensor(4)}
    origin = Origin(None, (8, 8), 2, counts, members=(1, 3), others=others)
    found = [tuple(origin.of(n).values()) for n in (0, 4, 5, 7, 8, 9, 10, 15)]
    assert found == [
        *((0, 0, 1, 0), (4, 4, 1, 0), (0, 0, 3, 0), ("x", 2, 3, 0)),
        *((0, 0, 1, 1), (4, 1, 1, 1), (0, 0, 3, 1), (5, 5, 3, 1)),
    ]
    own = Origin("abcdefghi", (5, 8), 2, ((3, 2), (6, 2)), members=(0, 1))
    assert [own.of(n)["id"] for n in (0, 2, 3, 5, 10, 11)] == ["a", "c", 0, "d", "i", 0]
    assert own.told_by_all([1, 2]) is own  # nobody is asked
    unknown = Origin("abcd", (4,), 2, counts=None).of(3)
    assert unknown == {"id": 3, "index": 3, "rank": None, "microbatch": 0}


def test_documents_of_packed_rows(tmp_path):
    """A document is a sample, and its id says row and document."""
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, -1]])
    tokens = torch.randint(7, documents.shape, generator=torch.manual_seed(0))
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    per_token = F.cross_entropy(model(tokens).mT, tokens, reduction="none")
    of = [documents == number for number in range(4)]
    found = torch.stack([per_token[where].mean() for where in of])
    alone = [
        torch.autograd.grad(x, model.parameters(), retain_graph=True) for x in found
    ]
    w = fm.monitor.watch(model, to=tmp_path)
    ids = [(row, n) for row in range(2) for n in range(2)]
    row = w.backward(found, ids=ids, segment_ids=documents)
    w.close()
    assert row["gradient/count"] == 4
    (line,) = lines(tmp_path / "samples.jsonl")
    norms = {
        name: math.sqrt(sum(part.square().sum().item() for part in parts))
        for name, parts in zip(ids, alone, strict=True)
    }
    assert {tuple(s["id"]): s["norm"] for s in line["samples"]} == pytest.approx(norms)
    assert [s["loss"] for s in line["samples"]] == [
        pytest.approx(found[ids.index(tuple(s["id"]))].item()) for s in line["samples"]
    ]
    with pytest.raises(ValueError, match="3 ids for 4 samples"):
        w.backward(found, ids=ids[:3], segment_ids=documents)


def test_losses_of_one_rank_stay_out_of_the_table(tmp_path):
    stats = fm.GradientStatistics(6, 3, torch.arange(6.0), torch.tensor(0.5))
    monitor = fm.monitor.Monitor(fm.monitor.RunFolder(tmp_path), largest=2)
    row = monitor.log(0, stats, loss=torch.tensor([1.0, 2.0]), ids="ab", ranks=3)
    assert row["loss"] == 1.5
    (line,) = lines(tmp_path / "samples.jsonl")
    places = [(s["rank"], s["index"], s["loss"]) for s in line["samples"]]
    assert places == [(2, 1, None), (2, 0, None)]


def test_scaled_losses():
    """A GradScaler's factor leaves no trace in the row, and stays in `.grad`."""
    model, optimizer = setup(torch.float64)
    batch = next(batches(1, dtype=torch.float64))
    plain = fm.monitor.watch(model, optimizer)
    want = plain.backward(losses(model, batch))
    grad = model[0].weight.grad.clone()
    optimizer.zero_grad()
    scaled = fm.monitor.watch(model, optimizer)
    got = scaled.backward(losses(model, batch) * 1024, scale=1024)
    assert got == pytest.approx(want, nan_ok=True)
    torch.testing.assert_close(model[0].weight.grad, grad * 1024)


def test_sharpness_of_the_steps_own_graph_and_of_a_loss():
    found = []
    for loss in (None, mean_loss):
        model, optimizer = setup(torch.float64)
        w = fm.monitor.watch(model, optimizer, loss, sharpness=1)
        batch = next(batches(1, dtype=torch.float64))
        found.append(w.backward(losses(model, batch), batch=batch))
        assert model[0].weight.grad is not None
    own, other = found
    assert own["sharpness/eigenvalue_1"] == pytest.approx(
        other["sharpness/eigenvalue_1"], rel=0.02
    )
    for name in ("gradient/covariance_trace", "layers/0/share", "loss"):
        assert own[name] == pytest.approx(other[name])


class Copies(TorchDispatchMode):
    """Counts what makes a device's numbers Python's."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        kept = torch.Tensor.tolist

        def tolist(tensor):
            self.count += 1
            return kept(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", tolist)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # `.item()`, `float(x)` and `bool(x)` are this operation.
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_one_copy_a_row_and_none_without(tmp_path, monkeypatch):
    model, optimizer = setup()
    probe = fm.GradientProbe(model, per_parameter=True)
    batch = next(batches(1))
    found = losses(model, batch)
    stats = probe.backward(found)
    pairs = fm.SharpnessProbe(model, mean_loss)(batch)
    monitor = fm.monitor.Monitor(
        fm.monitor.RunFolder(tmp_path), largest=4, histograms=True, spikes=6.0
    )
    with Copies(monkeypatch) as copies:
        row = monitor.log(
            0, stats, loss=found.detach(), optimizer=optimizer, sharpness=pairs,
            extra={"norm": torch.tensor(3.0)}, ids=range(8),
        )  # fmt: skip
    assert copies.count == 1
    assert row["norm"] == 3.0
    with copies:
        assert monitor.log(1, None, loss=found.detach().mean()) is None
    assert copies.count == 1


def test_steps_that_are_left_out_are_plain(monkeypatch):
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, every=3)
    seen = []
    kept = fm.GradientProbe.backward

    def backward(probe, *args, **kwargs):
        seen.append(w.step)
        return kept(probe, *args, **kwargs)

    monkeypatch.setattr(fm.GradientProbe, "backward", backward)
    train(model, optimizer, w, batches(7))
    assert seen == [0, 3, 6]


def test_a_step_of_fewer_passes(tmp_path):
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, to=tmp_path, accumulate=3)
    data = list(batches(5))
    train(model, optimizer, w, data[:2], accumulate=3)
    row = w.end_step()
    assert (row["step"], row["gradient/count"]) == (0, 16)
    assert w.end_step() is None
    optimizer.step()
    train(model, optimizer, w, data[:2], accumulate=3)
    optimizer.step()  # without a word
    with pytest.warns(UserWarning, match="changed after 2 of the 3 backward passes"):
        train(model, optimizer, w, data[2:], accumulate=3)
    assert [
        (r["step"], r["gradient/count"]) for r in lines(tmp_path / "rows.jsonl")
    ] == [*((0, 16), (2, 24))]


def test_passes_of_different_sizes_and_fewer_of_them():
    """All samples count alike; the step is as large as what is backpropagated."""
    model, optimizer = setup(torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    w = fm.monitor.watch(model, optimizer, accumulate=3)
    data = [next(batches(1, size, torch.float64)) for size in (8, 3, 5, 6)]
    whole = [torch.cat(parts) for parts in zip(*data[:3], strict=True)]
    g = flat(single_sample_gradients(model, losses, whole))
    for x, y in data[:3]:
        mean = mean_loss(model, (x, y))  # scalars
        row = w.backward(mean, batch_size=len(x))
    assert row["gradient/covariance_trace"] == pytest.approx(g.var(0).sum().item())
    assert row["gradient/mean_grad_sq_norm"] == pytest.approx(
        g.mean(0).square().sum().item()
    )
    assert row["loss"] == pytest.approx(mean_loss(model, whole).item())
    torch.testing.assert_close(w.stats.sq_norms, g.square().sum(1))
    optimizer.zero_grad()
    w.backward(losses(model, data[3]))
    row, before = w.end_step(), nn.utils.parameters_to_vector(model.parameters())
    optimizer.step()
    moved = before - nn.utils.parameters_to_vector(model.parameters())
    assert row["factors/learning_rate"] == 0.1
    assert row["factors/ratio"] == pytest.approx(0.1 / 3 / 6)
    assert row["gradient/mean_grad_sq_norm"] == pytest.approx(
        moved.square().sum().item() / (0.1 / 3) ** 2
    )


def test_a_pass_that_fails_can_be_made_again():
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, accumulate=2)
    first, second = batches(2)
    assert w.backward(losses(model, first)) is None
    with pytest.raises(fm.CaptureError):
        w.backward(losses(lambda x: model(x) / model(x).std(0), second))
    row = w.backward(losses(model, second))
    assert (row["step"], row["gradient/count"]) == (0, 16)


def test_means_of_passes_are_not_kept():
    """Between passes there is one vector, however many there were."""
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, accumulate=6)
    held = []
    for batch in batches(5):
        w.backward(losses(model, batch))
        gc.collect()
        shapes = [t.shape for t in gc.get_objects() if type(t) is torch.Tensor]
        held.append(shapes.count(model[0].weight.shape))
    assert len(set(held)) == 1, held


def test_a_call_that_fails_is_no_pass():
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer)
    batch = next(batches(1))
    with pytest.raises(ValueError, match="scalar or a vector"):
        w.backward(model(batch[0]))
    with pytest.raises(ValueError, match="3 ids for 8 samples"):
        w.backward(losses(model, batch), ids=range(3))
    assert w.step == 0
    assert w.backward(losses(model, batch))["step"] == 0
    assert w.step == 1


def test_scalar_losses_of_several_passes():
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, accumulate=2)
    means = []
    for batch in batches(2):
        means.append(mean_loss(model, batch))
        row = w.backward(means[-1], batch_size=8)
    assert row["gradient/count"] == 16
    assert row["loss"] == pytest.approx((means[0] + means[1]).item() / 2)


def test_resuming_goes_on(tmp_path):
    def run(cuts):
        model, optimizer = setup()
        data, state, start = list(batches(30)), None, 0
        for end in (*cuts, 30):
            w = fm.monitor.watch(model, optimizer, to=tmp_path / str(cuts), every=2)
            if state is not None:
                w.load_state_dict(json.loads(json.dumps(state)))
            train(model, optimizer, w, data[start:end])
            state, start = w.state_dict(), end
            w.close()
        return lines(tmp_path / str(cuts) / "rows.jsonl")

    whole, resumed = run(()), run((11,))
    assert resumed == whole
    assert (
        whole[-1]["gradient/noise_scale_high"] != whole[0]["gradient/noise_scale_high"]
    )


def test_spike_with_its_sample(tmp_path):
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, to=tmp_path)
    data = list(batches(34))
    train(model, optimizer, w, data[:33])
    weights = torch.ones(8).index_fill(0, torch.tensor([5]), 1e5)
    w.backward(losses(model, data[33]) * weights, ids=[f"33.{n}" for n in range(8)])
    found = lines(tmp_path / "spikes.jsonl")  # before it is closed
    assert [spike["what"] for spike in found] == ["loss", "norm"]
    for spike in found:
        assert spike["step"] == 33
        assert spike["samples"][0]["id"] == "33.5"
        assert spike["z"] > 6
    w.close()


def test_adam_in_the_norm_of_its_steps():
    model, _ = setup(torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    w = fm.monitor.watch(model, optimizer, precondition=True)
    data = list(batches(3, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, w, data[:2])
    before = copy.deepcopy(model)
    divisor = fm.preconditioner(model, optimizer)
    row = w.backward(losses(model, data[2]))
    g = flat(single_sample_gradients(before, losses, data[2]))
    trace = (g.var(0) / divisor).sum().item()
    signal = (g.mean(0).square() / divisor).sum().item() - trace / 8
    assert row["gradient/preconditioned_covariance_trace"] == pytest.approx(trace)
    assert row["gradient/preconditioned_signal"] == pytest.approx(signal)
    assert row["factors/ratio"] == pytest.approx(0.01 / 8)
    temperature = 0.01 / 8 * trace / g.shape[1] / 2
    assert row["factors/temperature"] == pytest.approx(temperature)
    assert row["factors/momentum"] == 0.9


def test_adam_without_it_says_what_to_do():
    model, _ = setup()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    w = fm.monitor.watch(model, optimizer)
    with pytest.warns(UserWarning, match=r"AdamW rescales .*precondition=True"):
        row = w.backward(losses(model, next(batches(1))))
    assert "factors/ratio" not in row
    assert row["factors/weight_decay"] == 0.02
    assert "sharpness/two_over_lr" not in row


def test_what_is_printed_of_it():
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer, every=2)
    train(model, optimizer, w, batches(3))
    shown = repr(w)
    assert shown.startswith("Watch(Monitor(no logger), GradientProbe(Sequential, ")
    assert shown.endswith("every=2; 3 steps)")


def test_clipping_is_counted():
    model, optimizer = setup()
    batch = next(batches(1))
    free = fm.monitor.watch(model, optimizer).backward(losses(model, batch))
    optimizer.zero_grad()
    limit = 0.5 * math.sqrt(free["gradient/mean_grad_sq_norm"])
    row = fm.monitor.watch(model, optimizer, max_norm=limit).backward(
        losses(model, batch)
    )
    before = model[0].weight.grad.clone()
    nn.utils.clip_grad_norm_(model.parameters(), limit)
    ratio = (model[0].weight.grad.norm() / before.norm()).item()
    assert row["factors/clip"] == pytest.approx(ratio, rel=1e-4)
    assert row["factors/ratio"] == pytest.approx(
        free["factors/ratio"] * ratio, rel=1e-4
    )
    assert row["factors/learning_rate"] == 0.1


@pytest.mark.parametrize("value", ["a word", [1.0, 2.0], torch.ones(2)])
def test_extra_that_is_no_number(value):
    model, optimizer = setup()
    w = fm.monitor.watch(model, optimizer)
    with pytest.raises(TypeError, match=r"extra\['x'\] must be a number"):
        w.backward(losses(model, next(batches(1))), extra={"x": value})


@pytest.mark.parametrize("bad", [{"every": 0}, {"accumulate": 1.5}, {"sharpness": -1}])
def test_options_outside_their_range(bad):
    model, optimizer = setup()
    with pytest.raises(ValueError, match="must be a positive integer"):
        fm.monitor.watch(model, optimizer, **bad)
