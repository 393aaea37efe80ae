"""Every test makes its models and batches on the device of `--device`."""

import pytest
import torch

from fastminima.capture.session import fused, hooks, repeat, taking


@pytest.fixture(autouse=True)
def _placed(placed):
    """See `placed`."""


@pytest.fixture
def compiling(device):
    """Fresh compilers, in place of `placed`: they would trace what places tensors."""
    if device.type == "apart":
        pytest.skip("compilers do not know the device `apart`")
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(False)  # they compile something else then
    yield
    torch._dynamo.reset()


@pytest.fixture
def host_reads(device):
    """Whether the tensors are the host's, whose kernels take what they can read.

    Who takes a use is another question on a device: there kernels are called by Python
    until the extension launches them, and none reads what the host's kernels read. The
    numbers are the same everywhere, and tests ask for them everywhere.
    """
    return device.type == "cpu"


@pytest.fixture
def driver(on_the_cpu):
    """Kernels are interpreted on the tensors of tests, which are the host's.

    What a GPU does with the same launches say the tests that are marked so.
    """
    fake_driver = pytest.importorskip("fake_driver")  # imports Triton
    with fake_driver.driving() as found:
        yield found


@pytest.fixture
def fusions(monkeypatch):
    """The names that each backward pass fused."""
    seen = []

    def spying(*args, **options):
        fusion = fused.find_fusion(*args, **options)
        seen.append(set() if fusion is None else set(fusion.names))
        return fusion

    monkeypatch.setattr("fastminima.capture.session.attach.find_fusion", spying)
    return seen


@pytest.fixture
def by_python(monkeypatch):
    """What Python was asked to take of each pass: nodes, by rule or by a function."""
    passes = []

    def starting(honest):
        def start(session, *args):
            passes.append([])
            return honest(session, *args)

        return start

    for owner, name in ((hooks.Session, "_hook_program"), (repeat.Repeated, "hook")):
        monkeypatch.setattr(owner, name, starting(getattr(owner, name)))
    for name in ("generic", "call", "part"):
        honest = getattr(taking.Taking, name)

        def spy(session, node, *args, _honest=honest, _name=name):
            passes[-1].append((_name, session._program.use_at[node].name))
            return _honest(session, node, *args)

        monkeypatch.setattr(taking.Taking, name, spy)
    return passes


@pytest.fixture
def repeated(monkeypatch):
    """Whether each step that could be like the one before was taken so."""
    found = []
    honest = repeat.Repeat.attach

    def attach(self, *args):
        made = honest(self, *args)
        found.append(made is not None)
        return made

    monkeypatch.setattr(repeat.Repeat, "attach", attach)
    return found
