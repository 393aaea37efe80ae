"""Congregational gradient descent: members on one stream, the unfit start anew."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_map

from .._dtypes import accumulation_dtype
from ._checks import at_least, check_range

__all__ = ["Congregation"]

# What a copy needs beside what the base class keeps.
_KEPT = (
    *("members", "congregations", "tau", "tolerance", "margin", "check", "period"),
    *("clip", "seed", "_make_model", "_loss", "_restarts", "_model", "_values"),
    *("_buffers", "_ages", "_mean_cost", "_costs", "_steps"),
)


class Congregation(torch.optim.Optimizer):
    r"""Trains several members on one stream of data and restarts those that are stuck.

    All members take SGD steps on the same batches. Each keeps running means of its cost
    and gradient,

        c <- (1 - tau) c + tau cost,   divided by 1 - (1 - tau)^age,

    and the same for g. A member of age above 4 / tau whose |g| is below `tolerance` has
    converged. It is unfit, and starts anew at random with age 0, if its running cost
    is above the least one of all members older than 4 / tau by more than `margin`: the
    best is never restarted, nor are its equals. A member whose running cost is no more
    finite is unfit at any age. Hasty members are tested every `check` steps; with
    `period` they are tested on the multiples of that clock only.

    The members' parameters are stacked, so that a step costs one pass of a wider
    network. The loop is the usual one, and schedulers of learning rates work:

        congregation.zero_grad()
        congregation.losses(inputs, targets).sum().backward()
        congregation.step()

    Args:
        make_model: makes a member, drawing its parameters at random from PyTorch's
            default generator, which is seeded for it from `(seed, member, restarts)`
            and left as it was. All members have to be alike but for their values.
        members: number of members.
        lr: learning rate of all members.
        loss: `loss(predictions, targets)`, the mean cost of one member on a batch. With
            functions of `torch.vmap` only, as the model.
        momentum: of SGD; a restarted member begins without velocity.
        tau: weight of a step in the running means, above 0 and at most 1.
        tolerance: gradient norm below which an old member has converged.
        margin: how much worse than the best a member may be.
        check: steps between two tests, without a clock.
        period: steps between two tests on a clock; None is hasty.
        clip: (lowest, highest) value of any parameter that is trained, of new members
            and after each step.
        seed: of the members' parameters, at least 0.
        congregations: number of independent congregations that are run side by side, to
            repeat an experiment. With more than one, inputs and targets have a leading
            dimension of this size, each congregation its own stream, and results have
            it too.

    Raises:
        ValueError: for a value out of range, or a loss that is not one number a member.
        RuntimeError: from `step()` without `losses()` before it.

    Example:
        >>> import torch, fastminima as fm
        >>> congregation = fm.optim.Congregation(
        ...     lambda: torch.nn.Linear(2, 1),
        ...     members=3,
        ...     lr=0.1,
        ...     loss=torch.nn.functional.mse_loss,
        ... )
        >>> for _ in range(100):
        ...     x = torch.randn(16, 2)
        ...     congregation.zero_grad()
        ...     congregation.losses(x, x.sum(1, keepdim=True)).sum().backward()
        ...     congregation.step()
        >>> congregation.costs.shape
        torch.Size([3])
        >>> model = congregation.member(congregation.best)
        >>> bool((model.weight - 1).abs().max() < 0.01)
        True

    Source: Blackmore, Williamson, Mareels, Sethares (1995), COLT, pp. 265-272, doi
    10.1145/225298.225330 (members, restarts, the clock). The tests of convergence and
    fitness are ours, as are the defaults.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        members: int,
        lr: float | Tensor,
        *,
        loss: Callable[[Any, Any], Tensor],
        momentum: float = 0.0,
        tau: float = 0.005,
        tolerance: float = 0.05,
        margin: float = 0.02,
        check: int = 10,
        period: int | None = None,
        clip: tuple[float, float] | None = None,
        seed: int = 0,
        congregations: int = 1,
    ) -> None:
        self.members = at_least(1, "members", members)
        self.congregations = at_least(1, "congregations", congregations)
        self.check = at_least(1, "check", check)
        self.period = None if period is None else at_least(1, "period", period)
        self.seed = at_least(0, "seed", seed)
        check_range("lr", float(lr), 0)
        check_range("momentum", momentum, 0, below=1)
        check_range("tolerance", tolerance, 0)
        check_range("margin", margin, 0)
        if not 0 < tau <= 1:
            raise ValueError(f"tau must be above 0 and at most 1, got {tau}.")
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(
                f"clip must be (lowest, highest) with lowest < highest, got {clip}."
            )
        self.tau, self.tolerance, self.margin = tau, tolerance, margin
        self.clip = clip
        self._make_model, self._loss = make_model, loss
        self._restarts = [0] * (self.members * self.congregations)
        models = [self._made(k) for k in range(len(self._restarts))]
        self._model = models[0]  # for its structure; its own values are not used
        self._values, self._buffers = stack_module_state(models)
        trained = [p for p in self._values.values() if p.requires_grad]
        if not trained:
            raise ValueError(
                "make_model() made a model without a parameter that requires a "
                "gradient; there is nothing to train."
            )
        self._ages = torch.zeros(len(models), dtype=torch.int64, device="cpu")
        self._mean_cost = trained[0].new_zeros(
            len(models), dtype=accumulation_dtype(trained[0].dtype)
        )
        self._costs: Tensor | None = None
        self._steps = 0
        super().__init__(trained, {"lr": lr, "momentum": momentum})
        for p in trained:
            self.state[p]["mean_grad"] = torch.zeros_like(p)
            if momentum:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        self._clip()

    def losses(self, inputs: Any, targets: Any) -> Tensor:
        """The cost of each member on a batch, `[members]`; differentiable.

        With several congregations `[congregations, members]`, from inputs and targets
        that have the leading dimension `congregations`. Under `torch.no_grad()` it only
        looks: `step()` goes by the last costs that had a gradient.
        """
        data_dim = None
        if self.congregations > 1:
            data_dim = 0
            inputs, targets = tree_map(self._for_each_member, (inputs, targets))
        run = torch.vmap(
            self._cost, in_dims=(0, 0, data_dim, data_dim), randomness="different"
        )
        costs = run(self._values, self._buffers, inputs, targets)
        if costs.shape != (len(self._restarts),):
            raise ValueError(
                "loss must return one number for a member, got a tensor of shape "
                f"{tuple(costs.shape[1:])}. Take its mean."
            )
        if torch.is_grad_enabled():
            self._costs = costs.detach()
        return self._arranged(costs)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all members by the gradients of the last `losses`, test and restart.

        Args:
            closure: clears the gradients, calls `losses` and `backward`; what it
                returns is returned.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        if self._costs is None:
            raise RuntimeError(
                "step() needs the members' costs of this step. Call "
                "losses(inputs, targets).sum().backward() before each step()."
            )
        self._mean_cost.lerp_(self._costs.to(self._mean_cost.dtype), self.tau)
        self._costs = None
        self._ages += 1
        self._steps += 1
        for group in self.param_groups:
            for p in group["params"]:
                self._move(p, float(group["lr"]), group["momentum"])
        self._clip()
        if self._steps % (self.period or self.check) == 0:
            for k in self._unfit():
                self._restart(k)
        return result

    @property
    def costs(self) -> Tensor:
        """Running cost of each member, its bias corrected; NaN at age 0."""
        return self._arranged(self._mean_cost / self._weights())

    @property
    def gradient_norms(self) -> Tensor:
        """Norm of each member's running gradient, its bias corrected; NaN at age 0."""
        squares = [
            state["mean_grad"].reshape(len(self._ages), -1).square().sum(1)
            for state in self.state.values()
        ]
        norms = torch.stack(squares).sum(0).sqrt()
        return self._arranged(norms / self._weights())

    @property
    def ages(self) -> Tensor:
        """Steps since each member began, on the CPU."""
        return self._arranged(self._ages.clone())

    @property
    def restarts(self) -> Tensor:
        """How often each member was started anew, on the CPU."""
        return self._arranged(
            torch.tensor(self._restarts, dtype=torch.int64, device="cpu")
        )

    @property
    def best(self) -> int:
        """The member of least running cost among those of age above 4 / tau.

        Among all of them as long as none is that old; the first one of equals. A member
        whose cost is not finite is none, but where all are so. Of the first
        congregation, where there are several: see `bests`.
        """
        return self.bests[0]

    @property
    def bests(self) -> list[int]:
        """`best` of each congregation."""
        shape = (self.congregations, self.members)
        costs = self.costs.double().cpu().reshape(shape)
        is_finite = costs.isfinite()
        is_candidate = self._is_old().reshape(shape) & is_finite
        is_candidate |= ~is_candidate.any(1, keepdim=True) & is_finite
        costs = torch.where(is_candidate, costs, math.inf).tolist()
        return [row.index(min(row)) for row in costs]

    def member(self, i: int, congregation: int = 0) -> nn.Module:
        """A model of its own with the present values of a member."""
        if not 0 <= i < self.members or not 0 <= congregation < self.congregations:
            raise ValueError(
                f"There are {self.members} members and {self.congregations} "
                f"congregations, got member {i} of congregation {congregation}."
            )
        model = copy.deepcopy(self._model)
        k = congregation * self.members + i
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(self._values[name][k])
            for name, b in model.named_buffers():
                b.copy_(self._buffers[name][k])
        return model

    def state_dict(self) -> dict[str, Any]:
        """The usual state, and as "members" all else: values, means, ages, restarts."""
        members = {
            "values": {name: p.detach() for name, p in self._values.items()},
            "buffers": dict(self._buffers),
            "mean_cost": self._mean_cost,
            "ages": self._ages,
            "restarts": list(self._restarts),
            "congregations": self.congregations,
            "steps": self._steps,
            "seed": self.seed,
        }
        return {**super().state_dict(), "members": members}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore everything, the values of the members included.

        Raises:
            ValueError: for a state with another number of members or congregations, or
                without members.
        """
        if "members" not in state_dict:
            raise ValueError(
                "The state has no 'members'. Load one that Congregation.state_dict() "
                "has made."
            )
        members = state_dict["members"]
        congregations = members["congregations"]
        count = len(members["restarts"]) // congregations
        if (count, congregations) != (self.members, self.congregations):
            raise ValueError(
                f"The state has {count} members in each of {congregations} "
                f"congregations, and here are {self.members} in each of "
                f"{self.congregations}. Make as many."
            )
        # What is loaded stays as it is when members move.
        usual = {k: v for k, v in state_dict.items() if k != "members"}
        super().load_state_dict(copy.deepcopy(usual))
        for mine, saved in (
            (self._values, members["values"]),
            (self._buffers, members["buffers"]),
        ):
            for name, value in mine.items():
                value.copy_(saved[name])
        self._mean_cost.copy_(members["mean_cost"])
        self._ages.copy_(members["ages"])
        self._restarts = list(members["restarts"])
        self._steps, self.seed = members["steps"], members["seed"]

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**super().__getstate__(), **kept}

    def _cost(
        self,
        values: dict[str, Tensor],
        buffers: dict[str, Tensor],
        inputs: Any,
        targets: Any,
    ) -> Tensor:
        """The cost of one member."""
        predictions = functional_call(self._model, (values, buffers), (inputs,))
        return self._loss(predictions, targets)

    def _move(self, p: Tensor, lr: float, momentum: float) -> None:
        """Step one stacked parameter; what no cost reached has a gradient of zero."""
        state = self.state[p]
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        state["mean_grad"].lerp_(grad, self.tau)
        if momentum:
            grad = state["momentum_buffer"].mul_(momentum).add_(grad)
        p.add_(grad, alpha=-lr)

    @torch.no_grad()
    def _clip(self) -> None:
        """Move all parameters that are trained to the values allowed."""
        if self.clip is not None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(*self.clip)

    def _unfit(self) -> list[int]:
        """Members to start anew: converged ones behind their best, and broken ones."""
        shape = (self.congregations, self.members)
        costs = self.costs.double().cpu().reshape(shape)
        norms = self.gradient_norms.double().cpu().reshape(shape)
        is_old = self._is_old().reshape(shape)
        is_broken = ~costs.isfinite()
        costs_of_old = torch.where(is_old & ~is_broken, costs, math.inf)
        least = costs_of_old.min(1, keepdim=True).values
        is_behind = costs > least + self.margin
        is_unfit = is_old & (norms < self.tolerance) & is_behind | is_broken
        return is_unfit.flatten().nonzero().flatten().tolist()

    @torch.no_grad()
    def _restart(self, k: int) -> None:
        """Give a member new values, and forget what was known of it."""
        self._restarts[k] += 1
        model = self._made(k)
        for name, p in model.named_parameters():
            self._values[name][k].copy_(p)
        for name, b in model.named_buffers():
            self._buffers[name][k].copy_(b)
        for state in self.state.values():
            for tensor in state.values():
                tensor[k].zero_()
        self._mean_cost[k].zero_()
        self._ages[k] = 0
        self._clip()

    def _made(self, k: int) -> nn.Module:
        """A new model from the seed of a member and of how often it was restarted."""
        key = (self.seed, k, self._restarts[k])
        seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
        is_used = torch.cuda.is_available() and torch.cuda.is_initialized()
        devices = range(torch.cuda.device_count()) if is_used else ()
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return self._make_model()

    def _weights(self) -> Tensor:
        """What the weights of each member's running means add up to; NaN at age 0."""
        weights = 1 - (1 - self.tau) ** self._ages.double()
        weights[self._ages == 0] = math.nan
        return weights.to(self._mean_cost)

    def _is_old(self) -> Tensor:
        return self._ages > 4 / self.tau

    def _for_each_member(self, batch: Any) -> Any:
        """The stream of each congregation, once for each of its members."""
        if not isinstance(batch, Tensor):
            return batch
        if batch.dim() == 0 or len(batch) != self.congregations:
            raise ValueError(
                f"With {self.congregations} congregations inputs and targets have that "
                f"leading dimension, got a tensor of shape {tuple(batch.shape)}."
            )
        return batch.repeat_interleave(self.members, 0)

    def _arranged(self, values: Tensor) -> Tensor:
        """One value a member, with the congregations as rows if there are several."""
        if self.congregations == 1:
            return values
        return values.reshape(self.congregations, self.members)
