"""A model and its loss, from the name of a function that makes them."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..callbacks.batches import leading_size
from .usage import UsageError

__all__ = ["HELP", "Target", "load_target"]

HELP = """\
MODULE:FUNCTION names a function without arguments, in a module that Python finds from
here (train:setup, package.train:setup) or in a file (path/train.py:setup). It returns

  (model, loss, batch)   loss(model, batch) gives the vector of per-sample losses, or
                         their mean, of which an audit has the curvature only
  (model, losses)        losses() gives the vector of per-sample losses

with the model in the mode, on the device and in the dtype in which it is trained."""


@dataclass(frozen=True)
class Target:
    """What a user's function returned, in one form.

    Attributes:
        model: the module.
        loss: `loss(model, batch)`, as the user wrote it.
        batch: its second argument.
        is_batch_known: whether the function returned one.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    batch: Any
    is_batch_known: bool = True

    def losses(self) -> Tensor:
        """The losses of the batch, or their mean, with a graph."""
        with torch.enable_grad():
            found = self.loss(self.model, self.batch)
        if not isinstance(found, Tensor):
            raise UsageError(
                f"The loss must be a tensor, got {type(found).__name__}. Return the "
                "vector of per-sample losses, or their mean."
            )
        return found

    @property
    def batch_size(self) -> int | None:
        """Samples in the batch, by the leading size of its first tensor; None if none.

        What is a sample the losses say; this is what one would think.
        """
        if not self.is_batch_known:
            return None
        try:
            return leading_size(self.batch)
        except ValueError:
            return None

    def mean(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean loss, as curvature takes it."""
        return self.loss(model, batch).mean()


def load_target(name: str) -> Target:
    """Import the function, call it, and look at what it returns.

    What it prints goes to stderr, so that output stays JSON where that is asked for.

    Raises:
        UsageError: there is no such function, or it returns something else. What the
            user's own code raises is left as it is.
    """
    module_name, colon, function_name = name.rpartition(":")
    if not colon or not module_name or not function_name:
        raise UsageError(
            f"{name!r} names no function. Write MODULE:FUNCTION, as in train:setup or "
            "path/to/train.py:setup."
        )
    with contextlib.redirect_stdout(sys.stderr):
        module = _module(module_name)
        function = getattr(module, function_name, None)
        if not callable(function):
            named = [n for n, v in vars(module).items() if callable(v) and n[0] != "_"]
            raise UsageError(
                f"{module_name!r} has no function {function_name!r}; it has "
                f"{', '.join(named[:12]) or 'none'}."
            )
        if _wants_arguments(function):
            raise UsageError(
                f"{function_name} takes arguments. Name a function without any, which "
                "returns (model, loss, batch) or (model, losses)."
            )
        return _target(function())


def _module(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` has it; a console script does not
        sys.path.insert(0, here)
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and asks for something that is not
            raise UsageError(
                f"There is no module {name!r} in {here} or where Python looks. Name it "
                "as `import` would, or give the file: path/train.py:setup."
            ) from error
    path = Path(name)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        raise UsageError(f"There is no file {name!r}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # classes in it are looked up there
    spec.loader.exec_module(module)
    return module


def _target(made: object) -> Target:
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise UsageError(
            f"The function returned {_told(made)}. It must return (model, loss, batch) "
            "or (model, losses)."
        )
    model, loss, *rest = made
    if not isinstance(model, nn.Module) or not callable(loss):
        raise UsageError(
            f"The function returned {_told(made)}. The first must be a torch.nn.Module "
            "and the second a function."
        )
    given = cast(Callable[..., Tensor], loss)
    if rest:
        return Target(model, given, rest[0])
    if _wants_arguments(given):
        raise UsageError(
            "The function returned a model and a function that takes arguments. Return "
            "the batch too, (model, loss, batch), or a losses() without arguments."
        )
    # An operator weighs batches by their leading size; of one batch any will do.
    batch = torch.zeros(1, dtype=torch.float32, device="cpu")
    return Target(model, lambda model, batch: given(), batch, is_batch_known=False)


def _wants_arguments(function: Callable[..., Any]) -> bool:
    """Whether it cannot be called as it is; what has no signature can."""
    try:
        inspect.signature(function).bind()
    except TypeError:
        return True
    except ValueError:
        return False
    return False


def _told(made: object) -> str:
    if isinstance(made, tuple):
        return "(" + ", ".join(type(x).__name__ for x in made) + ")"
    return type(made).__name__
