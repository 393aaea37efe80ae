"""The host's share of a probed step on a GPU, without one: what launching costs.

python -m benchmarks.launches                   a GPT-2 and a Llama, deep and narrow
python -m benchmarks.launches --rounds 40
python -m benchmarks.launches --mode fused     weight gradients too

The models run on the CPU, in float32 or bfloat16, and every statistic goes the way of a
GPU: kernels are compiled for an H100 and recorded, and from the third step on the
extension launches them, through a driver that counts and launches nothing. Printed is
the CPU time of a probed step beside a plain one, for each use of a parameter: of all of
it, and of the backward pass alone, where the hooks are. Launched by the extension and,
for comparison, by Python: there without what Triton itself takes for a launch, some 20
to 40 us each.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

import fastminima as fm
from benchmarks.models import narrow_gpt2
from benchmarks.records import describe_run, save
from fastminima.capture.graph.extension import learned
from fastminima.capture.session import called, making
from fastminima.ops.table import Op
from tools.kernels.compile import compiling

Losses = Callable[[], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mode", default="observe")
    parser.add_argument("--record", type=Path, help="a file, or - for none")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    found: dict[str, dict] = {}
    for name, make in MODELS.items():
        model, losses = make()
        with as_on_a_gpu():
            found[name] = _measured(model, losses, options.rounds, options.mode)
        print(f"{name:20} {_told(found[name])}", flush=True)
    if str(options.record) != "-":
        run = {"run": describe_run(threads=1), "mode": options.mode}
        content = {**run, "models": found}
        print("record:", save(content, options.record, suffix="-launches"))


def _llama() -> tuple[nn.Module, Losses]:
    """12 blocks as Llama has them, where Python is all that counts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=12,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=16,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).train()
    ids = torch.randint(64, (4, 16))

    def losses() -> Tensor:
        logits = model(ids).logits.float()
        return nn.functional.cross_entropy(logits.mT, ids, reduction="none").mean(1)

    return model, losses


def _gpt2() -> tuple[nn.Module, Losses]:
    return narrow_gpt2(width=32)


MODELS = {"GPT-2, float32": _gpt2, "Llama, bfloat16": _llama}


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Statistics of CPU tensors by a GPU's kernels, of which none is run."""
    host = learned()
    if host is None:
        raise SystemExit("The extension is not built, or this PyTorch too old for it.")

    usual = Op.__call__

    def op(self: Op, first: object, *args: object, **kwargs: object) -> object:
        if not isinstance(first, Tensor):  # all gradients: one kernel on either side
            return usual(self, first, *args, **kwargs)
        backends = self.backends("cuda", first.dtype)
        backend = "triton" if "triton" in backends else "reference"
        return self.on(backend, "cuda", first.dtype)(first, *args, **kwargs)

    def yes(*_: object) -> bool:
        return True  # nothing is computed that could be looked at

    with contextlib.ExitStack() as stack:
        kernels = stack.enter_context(compiling("sm_90a"))
        stack.enter_context(_launchable(kernels))
        for change in (
            mock.patch.object(Op, "__call__", op),
            mock.patch.object(called, "can_be_launched", lambda device: True),
            mock.patch.object(called, "is_same", yes),
            mock.patch.object(called, "says_something", yes),
            mock.patch.object(making.Making, "is_for_kernels", False),
        ):
            stack.enter_context(change)
        host.use_driver(host.counting_driver())
        stack.callback(host.use_driver, 0)
        yield


@contextlib.contextmanager
def _launchable(kernels: list) -> Iterator[None]:
    """Each kernel is compiled once, and has a function."""
    from triton.runtime.jit import JITFunction

    compile_only, known = JITFunction.run, {}

    def run(self, *args, grid, warmup=False, **options):
        key = (self, tuple(_kind(x) for x in args), tuple(options.items()))
        if key not in known:
            known[key] = compile_only(self, *args, grid=grid, warmup=warmup, **options)
            known[key].function = 4096 + len(known)
        return known[key]

    with mock.patch.object(JITFunction, "run", run):
        yield


def _kind(x: object) -> object:
    """What a kernel is compiled for; numbers by value, which is finer than needed."""
    return (x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x


def _told(found: dict) -> str:
    whole, in_pass = found["us_a_use"], found["us_a_use_in_the_pass"]
    return (
        f"{found['uses']} uses, {found['launched']} launched, "
        f"{found['launches']} launches a step; us a use: {whole['launched']:.1f}, "
        f"in the backward pass {in_pass['launched']:.1f}; "
        f"by Python {whole['called']:.0f} and {in_pass['called']:.0f}"
    )


def _measured(model: nn.Module, losses: Losses, rounds: int, mode: str) -> dict:
    host = learned()
    probe, by_python = (
        fm.GradientProbe(model, mode=mode, check_every=10**9) for _ in range(2)
    )

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        losses().mean().backward()

    def launched() -> None:
        model.zero_grad(set_to_none=True)
        probe.backward(losses())

    def called_in_python() -> None:
        model.zero_grad(set_to_none=True)
        with mock.patch.object(called, "can_be_launched", lambda device: False):
            by_python.backward(losses())

    ways = plain, launched, called_in_python
    for way in ways:
        for _ in range(15):  # the structure is measured anew after ten
            way()
    before = host.launches_counted()
    launched()
    launches = host.launches_counted() - before
    (structure,) = probe._reader._structures.values()
    (recipe,) = structure._recipes.values()
    (program,) = recipe.programs.values()
    uses, by_extension = len(program.uses), len(program.launched.nodes)
    rows = [[_seconds(way) for way in ways] for _ in range(rounds)]
    plain, *probed = (
        [statistics.median(column) for column in zip(*pairs, strict=True)]
        for pairs in zip(*rows, strict=True)
    )
    whole, in_pass = (
        {
            name: 1e6 * (times[i] - plain[i]) / uses
            for name, times in zip(("launched", "called"), probed, strict=True)
        }
        for i in range(2)
    )
    return {
        "uses": uses,
        "launched": by_extension,
        "launches": launches,
        "us_a_use": whole,
        "us_a_use_in_the_pass": in_pass,
        "seconds": rows,  # of plain, launched and called steps, and of their passes
    }


def _seconds(step: Callable[[], None]) -> tuple[float, float]:
    """Of a step, and of its backward pass."""
    in_pass = 0.0
    honest = torch.autograd.backward

    def timed(*args: object, **kwargs: object) -> None:
        nonlocal in_pass
        start = time.process_time_ns()
        honest(*args, **kwargs)
        in_pass += (time.process_time_ns() - start) / 1e9  # fused mode has two

    with mock.patch.object(torch.autograd, "backward", timed):
        start = time.process_time_ns()
        step()
        return (time.process_time_ns() - start) / 1e9, in_pass


if __name__ == "__main__":
    main()
