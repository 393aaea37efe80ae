"""Hooks run in the thread of a backward pass, whose settings are not the model's.

On a GPU that is another thread than that of the forward pass. What a statistic is must
not depend on what is set there: autocast, grad mode, default device.
"""

import contextlib
import threading
import warnings

import pytest
import torch
from cases import CASES

import fastminima as fm

OPTIONS = {
    "measure": ("norms", "second_moments", "gram"),
    "per_parameter": True,
    "keep_mean": True,
}
FIELDS = (
    *("sq_norms", "sq_norms_by_parameter", "second_moments", "gram", "dots"),
    *("mean_grad", "mean_grad_sq_norm"),
)


def in_a_thread(call, *contexts):
    """What a call returns in a thread of its own, where other things are set."""
    outcome = []

    def run():
        try:
            with contextlib.ExitStack() as stack, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for context in contexts:
                    stack.enter_context(context())
                outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


OTHER = {
    "no grad": lambda: torch.set_grad_enabled(False),
    "grad": lambda: torch.set_grad_enabled(True),
    "meta device": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def probed(case, **more):
    """A model, its batch, and the options of a probe with a direction."""
    model, batch = case.make()
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    direction = torch.randn(count)
    return model, batch, OPTIONS | {"directions": {"v": direction}} | more


def attached(case, *contexts, times=2):
    """Statistics of the last of some steps, and the gradients that they left."""
    torch.manual_seed(0)
    model, batch, options = probed(case)
    probe = fm.GradientProbe(model, **options)
    for _ in range(times):  # the first one measures rows
        torch.manual_seed(1)
        model.zero_grad()
        losses = case.losses(model, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe.attach(losses)
        loss = losses.mean()
        if contexts:
            in_a_thread(loss.backward, *contexts)
        else:
            loss.backward()
        stats = probe.collect()
    return stats, [None if p.grad is None else p.grad for p in model.parameters()]


def assert_same_bits(got, want, what):
    for name in FIELDS:
        pair = getattr(got, name), getattr(want, name)
        torch.testing.assert_close(
            *pair, rtol=0, atol=0, msg=lambda m, name=name: f"{what}, {name}: {m}"
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_settings_of_the_backward_thread(case):
    want, _ = attached(case)
    for names in (["no grad"], ["grad", "meta device"], ["float64"]):
        got, _ = attached(case, *(OTHER[name] for name in names))
        assert_same_bits(got, want, f"{case.name}, {names}")


def test_autocast_in_the_backward_thread():
    """Where it does not round what PyTorch itself computes, it rounds nothing."""
    compared = 0
    for case in CASES:
        want, grads = attached(case)
        got, rounded = attached(case, OTHER["autocast"])
        if all(
            a is b or torch.equal(a, b) for a, b in zip(grads, rounded, strict=True)
        ):
            assert_same_bits(got, want, case.name)
            compared += 1
    assert compared >= 20


@pytest.mark.parametrize("mode", ["observe", "fused"])
@pytest.mark.parametrize("case", CASES[::2], ids=lambda case: case.name)
def test_a_pass_in_another_thread(case, mode):
    """The measuring passes too; the forward pass was in this one."""

    def step(*contexts):
        torch.manual_seed(0)
        model, batch, options = probed(case, mode=mode)
        if mode == "fused":
            options["measure"] = ("norms", "second_moments")
        probe = fm.GradientProbe(model, **options)
        losses = case.losses(model, batch)
        if contexts:
            return in_a_thread(lambda: probe.backward(losses), *contexts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe.backward(losses)

    want = step()
    for names in (["grad"], ["float64"]):
        got = step(*(OTHER[name] for name in names))
        assert_same_bits(got, want, f"{case.name}, {names}")
