"""Sharpness from the graph that a training step has recorded."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastminima as fm


class Attending(nn.Module):
    """A sequence classifier with attention, dropout and layer norm."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = (
            t.unflatten(-1, (2, 4)).transpose(1, 2)
            for t in self.qkv(self.norm(x)).chunk(3, -1)
        )
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.drop(x + o.transpose(1, 2).flatten(2))).mean(1)


def attending(device):
    torch.manual_seed(0)
    model = Attending().to(device)
    ids = torch.randint(11, (16, 6), device=device)
    return model, (ids, torch.randint(3, (16,), device=device))


def dense(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    x = torch.randn(64, 12, device=device)
    return model, (x, torch.randint(4, (64,), device=device))


def losses_of(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def loss(model, batch):
    return losses_of(model, batch).mean()


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def test_gradient_is_that_of_backward_and_value_that_of_a_batch(device):
    model, batch = dense(device)
    losses_of(model, batch).mean().backward()
    plain = gradients(model)
    model.zero_grad()
    pairs = fm.SharpnessProbe(model).backward(losses_of(model, batch))
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model), strict=True))
    by_batch = fm.SharpnessProbe(model, loss)(batch)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, by_batch.values, rtol=1e-4, atol=0)


def test_gradient_is_added_to_what_is_there(device):
    model, batch = dense(device)
    losses_of(model, batch).mean().backward()
    once = gradients(model)
    fm.SharpnessProbe(model).backward(losses_of(model, batch))
    for p, grad in zip(model.parameters(), once, strict=True):
        assert torch.equal(p.grad, grad + grad)
        assert p.grad.grad_fn is None


def test_attention_and_dropout_in_a_training_run(device):
    """Trained with and without the probe, from the same random numbers."""
    model, batch = attending(device)
    twin = copy.deepcopy(model)
    sharpness = fm.SharpnessProbe(model)
    for step in range(6):
        for net in (model, twin):
            torch.manual_seed(step)
            with fm.twice_differentiable():
                losses = losses_of(net, batch)
            if net is model:
                assert sharpness.backward(losses).converged
            else:
                losses.mean().backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def test_products_are_those_of_the_hessian_at_the_same_draw(device):
    model, batch = attending(device)
    model.double()
    state = torch.get_rng_state()
    if device.type == "cuda":
        torch.cuda.manual_seed(0)
    H = fm.Hessian(model, loss, batch)
    v = torch.randn(H.shape[0], device=device, dtype=torch.float64)
    expected = H @ v
    torch.set_rng_state(state)
    if device.type == "cuda":
        torch.cuda.manual_seed(0)
    with fm.twice_differentiable():
        mine = fm.LossHessian(model, 8 * losses_of(model, batch), scale=8)
    torch.testing.assert_close(mine @ v, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mine.gradient, H.gradient, rtol=1e-10, atol=1e-12)
    both = torch.stack([v, 2 * v], dim=1)
    torch.testing.assert_close((mine @ both)[:, 1], 2 * expected, rtol=1e-10, atol=1e-9)


def test_fused_attention_is_refused_before_anything_happens(device):
    model, batch = attending(device)
    with pytest.raises(ValueError, match=r"fused attention.*twice_differentiable"):
        fm.SharpnessProbe(model).backward(losses_of(model, batch))
    assert all(p.grad is None for p in model.parameters())


def test_scaled_losses(device):
    model, batch = dense(device)
    sharpness = fm.SharpnessProbe(model)
    once = sharpness(loss=losses_of(model, batch))
    assert all(p.grad is None for p in model.parameters())
    sharpness.reset()
    scaled = sharpness.backward(1024 * losses_of(model, batch).mean(), scale=1024)
    torch.testing.assert_close(once.values, scaled.values, rtol=1e-3, atol=0)
    grad = gradients(model)
    model.zero_grad()
    (1024 * losses_of(model, batch).mean()).backward()
    assert all(torch.equal(a, b) for a, b in zip(grad, gradients(model), strict=True))


def test_statistics_of_the_same_pass(device):
    model, batch = dense(device)
    alone = fm.GradientProbe(model).backward(losses_of(model, batch))
    model.zero_grad()
    probe, sharpness = fm.GradientProbe(model), fm.SharpnessProbe(model)
    for _ in range(3):
        losses = losses_of(model, batch)
        probe.attach(losses)
        assert sharpness.backward(losses).converged
        stats = probe.collect()
        torch.testing.assert_close(stats.sq_norms, alone.sq_norms, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            stats.covariance_trace, alone.covariance_trace, rtol=1e-4, atol=0
        )


def test_hooks_run_once_and_change_no_product(device):
    model, batch = dense(device)
    plain = fm.SharpnessProbe(model).backward(losses_of(model, batch))
    model.zero_grad()
    met = []
    model[0].weight.register_hook(lambda grad: met.append("leaf") or 3 * grad)
    model[2].weight.register_post_accumulate_grad_hook(lambda _: met.append("after"))
    pairs = fm.SharpnessProbe(model).backward(losses_of(model, batch))
    assert met == ["leaf", "after"]
    torch.testing.assert_close(plain.values, pairs.values)
    grad = model[0].weight.grad.clone()
    model.zero_grad()
    losses_of(model, batch).mean().backward()
    assert torch.equal(grad, model[0].weight.grad)


def test_leaves_of_others_get_their_gradients(device):
    model, (x, y) = dense(device)
    shift = torch.zeros(12, device=device, requires_grad=True)
    losses_of(model, (x + shift, y)).mean().backward()
    plain, shift.grad = shift.grad, None
    fm.SharpnessProbe(model).backward(losses_of(model, (x + shift, y)))
    assert torch.equal(shift.grad, plain)


def test_losses_that_are_a_parameter_stay_one(device):
    model, _ = dense(device)
    pairs = fm.SharpnessProbe(model).backward(model[0].bias)
    assert float(pairs.values[0]) == 0
    assert model[0].bias.requires_grad
    assert torch.equal(model[0].bias.grad, torch.full((16,), 1 / 16, device=device))


def test_losses_are_used_up(device):
    model, batch = dense(device)
    losses = losses_of(model, batch)
    sharpness = fm.SharpnessProbe(model)
    sharpness.backward(losses)
    with pytest.raises(ValueError, match="backward pass has been run"):
        sharpness.backward(losses)


def test_gradients_need_not_be_on(device):
    """As for `backward` of a loss."""
    model, batch = dense(device)
    losses = losses_of(model, batch)
    with torch.no_grad():
        assert fm.SharpnessProbe(model).backward(losses).converged
    assert all(p.grad is not None for p in model.parameters())


def test_vectors_of_other_parameters_are_not_followed(device):
    """A call for parameters that are new, of as many numbers, is a cold one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(device)
    x = torch.randn(32, 8, device=device)
    sharpness = fm.SharpnessProbe(model)
    for layer, other in ((0, 2), (2, 0)):
        model[layer].requires_grad_(True)
        model[other].requires_grad_(False)
        assert sharpness.backward(model(x).square()).upper < float("inf")


def test_gradient_is_there_after_a_failure(device):
    model, batch = dense(device)
    sharpness = fm.SharpnessProbe(model, max_products=1)
    with pytest.warns(RuntimeWarning, match="stopped after 1 products"):
        sharpness.backward(losses_of(model, batch))
    model.zero_grad()
    with pytest.raises(RuntimeWarning), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fastminima.spectrum.sharpness.finished",
            lambda *_, **__: (_ for _ in ()).throw(RuntimeWarning("raised")),
        )
        sharpness.backward(losses_of(model, batch))
    assert all(p.grad is not None for p in model.parameters())


class Held:
    def __init__(self, tensor):
        self.tensor = tensor


def test_graph_is_freed(device):
    model, batch = dense(device)
    seen = []

    def pack(tensor):
        held = Held(tensor.detach())  # of outputs too, which would hold themselves
        seen.append(weakref.ref(held))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        losses = losses_of(model, batch)
    assert len(seen) > 4
    fm.SharpnessProbe(model).backward(losses)
    gc.collect()
    assert losses.grad_fn is None
    assert all(held() is None for held in seen)


def test_checkpointed_attention(device):
    model, batch = attending(device)
    model.eval()

    def losses():
        outputs = torch.utils.checkpoint.checkpoint(
            model, batch[0], use_reentrant=False
        )
        return F.cross_entropy(outputs, batch[1], reduction="none")

    plain = fm.SharpnessProbe(model, loss)(batch)
    with fm.twice_differentiable():
        found = losses()
    pairs = fm.SharpnessProbe(model).backward(found)
    torch.testing.assert_close(plain.values, pairs.values, rtol=1e-3, atol=0)


@pytest.mark.parametrize("is_hooked", [False, True], ids=["plain", "hooked"])
def test_checkpointed_batch_norm_moves_as_in_a_plain_step(is_hooked, device):
    """Once forward and once when it is run again, whatever products do."""
    torch.manual_seed(0)
    layers = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 4)
    model = nn.Sequential(*layers).to(device)
    twin = copy.deepcopy(model)
    batch = torch.randn(32, 12, device=device), torch.zeros(32, device=device).long()
    for net in (model, twin):
        if is_hooked:
            net[3].register_full_backward_hook(lambda *_: None)
        torch.manual_seed(0)
        outputs = torch.utils.checkpoint.checkpoint(net, batch[0], use_reentrant=False)
        losses = F.cross_entropy(outputs, batch[1], reduction="none")
        if net is model:
            before = [b.clone() for b in net.buffers()]
            assert fm.SharpnessProbe(net)(loss=losses).converged
            assert all(map(torch.equal, before, net.buffers()))
            fm.SharpnessProbe(net).backward(losses)
        else:
            losses.mean().backward()
    assert all(map(torch.equal, model.buffers(), twin.buffers()))
    assert all(map(torch.equal, gradients(model), gradients(twin)))


def test_parameters_that_moved(device):
    model, batch = dense(device)
    H = fm.LossHessian(model, losses_of(model, batch))
    with torch.no_grad():
        model[0].bias += 1
    with pytest.raises(ValueError, match="parameters have changed"):
        H @ torch.ones(H.shape[0], device=device)


class Detached(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x.detach() * grad


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_function_that_one_graph_cannot_judge(device):
    model, batch = dense(device)

    def through(function):
        outputs = function.apply(model(batch[0]))
        return F.cross_entropy(outputs, batch[1], reduction="none")

    sharpness = fm.SharpnessProbe(model, lambda _, __: through(Doubled).mean())
    for function in (Detached, Doubled):
        with pytest.raises(ValueError, match=f"{function.__name__}.*one graph"):
            sharpness(loss=through(function))
    by_batch = sharpness(batch)
    pairs = sharpness(loss=through(Doubled))
    torch.testing.assert_close(pairs.values, by_batch.values, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either a batch or loss="),
        ({"loss": torch.ones(3)}, "without a graph"),
        ({"loss": 0.3}, "real numbers, at least one.*got 0.3"),
        ({"loss": torch.ones(0, requires_grad=True)}, r"got torch.float32 of shape"),
        ({"loss": torch.ones(2).long()}, "got torch.int64"),
        ({"loss": torch.ones(2).cfloat()}, "got torch.complex64"),
        ({"loss": torch.ones(1), "scale": float("inf")}, "positive and finite"),
        ({"loss": torch.ones(1, requires_grad=True) * float("nan")}, "non-finite"),
        ({"loss": torch.ones(4, requires_grad=True) * 2}, "reaches none"),
        ({"batch": 1}, "without a loss"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        fm.SharpnessProbe(nn.Linear(2, 2))(**arguments)
