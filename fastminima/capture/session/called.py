"""What Python computes for a use on a device, until the extension can launch it.

    first step   the call is recorded: kernels, grids, arguments, and where they point
    second       computed as before, and launched into a table of its own: same bits?
                 put off where these say nothing: all zero, or not finite
    from then on the extension launches the kernels, and Python is not called

A step is launched for tensors like those of the recording alone: device, shapes,
strides, dtypes and alignment are compared in each step. All others are computed here.
Of fused uses the gradients are outputs too, which the extension allocates in each step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ops.recording import Recorded, recorded
from ..graph.extension import learned

__all__ = [
    "Called",
    "Launched",
    "Repeated",
    "can_be_launched",
    "is_same",
    "new_table",
]

MOST_KINDS = 8  # of tensors that one use is recorded for
MOST_CHECKS = 16  # of a recording, while its outputs say nothing
ROW = 64  # numbers that a row of a table is a multiple of: its address stays aligned


@dataclass
class Launched:
    """What the extension launches of a program.

    Attributes:
        nodes: of the uses.
        bytes: of scratch, as the largest of them needs.
    """

    nodes: set[int] = field(default_factory=set)
    bytes: int = 1


def can_be_launched(device: torch.device) -> bool:
    """Whether launches on a device can be recorded, and made again, at this moment."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    host = learned()
    return host is not None and host.has_driver()


def new_table(rows: int, batch: int, device: torch.device) -> Tensor:
    """Memory for squared norms `[rows, batch]`, each row aligned."""
    width = -(-batch // ROW) * ROW
    table = torch.empty(rows, width, dtype=torch.float32, device=device)
    return table[:, :batch]


class Repeated:
    """What `run` computes on a device, until launches are known that give the same.

    Args:
        run: gives outputs, each a tensor or None.
        wanted: of each output, whether it is asked for.
        places: where the outputs that are go, as `launched` understands it: numbers
            from 0 for rows of a table, below for tensors of their own.
        of_outputs: bytes of the latter.
        launched: is told the launches, and how much scratch they take.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor | None]],
        wanted: Sequence[bool],
        places: Sequence[int],
        of_outputs: int,
        launched: Callable[[Any, int], None],
    ) -> None:
        self._run, self._wanted, self._places = run, list(wanted), list(places)
        self._bytes, self._launched = of_outputs, launched
        self._recorded: dict[tuple, Recorded | None] = {}
        self._checks: dict[tuple, int] = {}  # left, of what is recorded

    def __call__(self, *tensors: Tensor) -> Sequence[Tensor | None]:
        """What `run` gives for these."""
        if not can_be_launched(tensors[0].device):
            return self._run(*tensors)
        if not all(map(learned().is_readable, tensors)):
            return self._run(*tensors)
        kind = tuple(map(_kind_of, tensors))
        if kind not in self._recorded and len(self._recorded) < MOST_KINDS:
            outputs, found = recorded(*(self._run, tensors, self._wanted, self._bytes))
            self._recorded[kind], self._checks[kind] = found, MOST_CHECKS
            return outputs
        outputs = self._run(*tensors)
        found = self._recorded.get(kind)
        if found is not None:
            self._check(kind, found, tensors, outputs)
        return outputs

    def _check(
        self,
        kind: tuple,
        found: Recorded,
        tensors: Sequence[Tensor],
        outputs: Sequence[Tensor | None],
    ) -> None:
        """Launch what was recorded from now on, or never, where outputs show it."""
        pairs = zip(self._wanted, outputs, strict=True)
        expected = [x for is_wanted, x in pairs if is_wanted and x is not None]
        self._checks[kind] -= 1
        is_shown = all(map(says_something, expected))
        if is_shown or not self._checks[kind]:
            self._recorded[kind] = None
        if is_shown:
            self._launch_from_now_on(found, tensors, expected)

    def _launch_from_now_on(
        self, found: Recorded, tensors: Sequence[Tensor], expected: Sequence[Tensor]
    ) -> None:
        """Hand the launches on, if they give these outputs."""
        tensors, device = list(tensors), tensors[0].device
        launches = learned().Launches(
            tensors, found.launches, self._places, found.bytes, found.kept
        )
        scratch = torch.empty(max(1, found.bytes), dtype=torch.uint8, device=device)
        count = sum(place >= 0 for place in self._places)
        got = [*new_table(count, len(expected[0]), device)]
        got += [torch.empty_like(x) for x in expected[count:]]
        # What is not written stays no number, in any dtype of floats, and is seen.
        scratch.fill_(255)
        for x in got:
            x.fill_(torch.nan)
        try:
            is_launched = launches.run(tensors, got, scratch)
        except RuntimeError:  # the driver refuses what Python has just launched
            is_launched = False
        pairs = zip(got, expected, strict=True)
        if is_launched and all(is_same(a, b) for a, b in pairs):
            self._launched(launches, found.bytes)


class Called:
    """The norms of one use, of the gradient and what was saved.

    Args:
        run: gives norms for each of the names, then gradients.
        names: parameters; None where nobody asks.
        gradients: shapes of those that it makes, by parameter.
        rows: of the table, by parameter.
        node: of the use.
        steps: of the program, as the extension has them.
        launched: what is launched of all uses.
    """

    def __init__(
        self,
        run: Callable[..., Sequence[Tensor | None]],
        names: Sequence[str | None],
        gradients: Mapping[str, Sequence[int]],
        rows: Mapping[str, int],
        node: int,
        steps: Any,
        launched: Launched,
    ) -> None:
        self._names, self._gradients = names, gradients
        # Rows of the table; the gradients are numbered downwards, from -1.
        places = [rows[name] for name in names if name is not None]
        places += [-1 - i for i in range(len(gradients))]
        wanted = [name is not None for name in names] + [True] * len(gradients)
        self._node, self._steps, self._launched = node, steps, launched
        elements = sum(torch.Size(shape).numel() for shape in gradients.values())
        of_gradients = elements * torch.float32.itemsize
        self._outputs = Repeated(run, wanted, places, of_gradients, self._launch)

    def found(self, *tensors: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Norms and gradients by parameter, of the gradient and the saved tensors."""
        outputs = self._outputs(*tensors)
        count = len(self._names)
        norms = zip(self._names, outputs[:count], strict=True)
        gradients = zip(self._gradients, outputs[count:], strict=True)
        return (
            {n: x for n, x in norms if n is not None and x is not None},
            {n: x for n, x in gradients if x is not None},
        )

    def _launch(self, launches: Any, scratch: int) -> None:
        """Let the extension launch it from now on."""
        self._launched.bytes = max(self._launched.bytes, scratch)
        self._launched.nodes.add(self._node)
        self._steps.launch(self._node, launches)


def says_something(x: Tensor) -> bool:
    """Whether numbers show that they were computed; waits for the device.

    Zeros, as below a layer that starts at zero, come of any launches, and what is not
    a number, as in the first steps under a loss scale, of none.
    """
    return bool(x.isfinite().all() & x.any())


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are; waits for the device."""
    return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _kind_of(x: Tensor) -> tuple:
    return x.device, x.dtype, x.shape, x.stride(), x.data_ptr() % 16
