"""`GradientProbe`: per-sample gradient statistics from the backward pass that runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

from torch import Tensor, nn
from typing_extensions import TypeVar

from ..statistics import GradientStatistics
from .audit import Audit, audit_losses
from .errors import explaining
from .graph.passes import is_distributed
from .options import (
    BatchNorm,
    Measure,
    Mode,
    Options,
    Reduction,
    Request,
)
from .session.held import have_no_gradient
from .session.states import Resting
from .stepping import Stepping

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GradientProbe"]

# What a pass gives: with `every` or `accumulate`, on some passes nothing.
Found = TypeVar(
    "Found",
    bound=GradientStatistics | None,
    covariant=True,
    default=GradientStatistics,
)


class GradientProbe(Stepping, Generic[Found]):
    """Reads exact per-sample gradient statistics off a training loop's backward pass.

    g_n is the gradient of sample n's own loss, not divided by the batch size; for a
    scalar loss, the number of samples times sample n's part of the gradient. A sample
    is an index of the batch dimension: an image, a sequence. The model is not wrapped
    and its `.grad` is bitwise what it is without the probe.

    The first backward pass of each new graph structure is preceded by two or three
    extra passes (without weight gradients) that measure which rows belong to which
    sample; module and tensor hooks of the model see those too, and `retain_grad()` of
    tensors in between adds them up.

    Args:
        model: a module, or a dict name -> parameter to watch only those.
        measure: any of "norms", "second_moments", "gram", or one of them as a string.
            Norms are always measured.
        directions: `{name: v}`, v a flat vector `[parameter_count]` or a dict
            {parameter name: tensor}; adds <g_n, v> for each.
        per_parameter: keep squared norms for each parameter too.
        keep_mean: keep the mean gradient itself (needed by `a + b` and `all_reduce`).
        mode: "observe"; or "fused": `backward` leaves the weight gradients of dense
            layers over several rows a sample and of convolutions out of the pass, and
            the kernels that compute their norms make them from the same tiles. They
            are then equal to rounding, not bitwise. So are heads that are tied to a
            table; other parameters are observed.
        batchnorm: what to do about batch normalisation in training mode, which mixes
            samples: "error"; "rows", each sample's rows of the ordinary backward pass,
            which sum to the gradient; "frozen", batch statistics as constants, at the
            price of a second backward pass, which do not sum to it.
        batch_dim: the batch dimension of the tensors that a scalar loss is made of.
        every: probe only every so many steps, the first one included. On the others
            `backward` is a plain backward pass, `attach` does nothing, and `backward`
            and `collect` return None.
        accumulate: how many backward passes make up a step, where gradients are
            accumulated; None for as many as come before `end_step`. `every` then counts
            whole steps, and the last pass of a step returns the statistics of all its
            samples. Holds the mean gradient in between, a vector of parameter size.
        sample: look at so many samples of each batch, drawn anew in each step by a
            generator of the probe's own. The statistics of single samples are theirs;
            the mean gradient is that of all.
        check_every: measure a graph that is known anew after so many steps (once after
            ten, and when a loss or a norm jumps), since what moves its rows may not be
            in the graph. A disagreement is a CaptureError.
        process_group: a process group, or "world" for all ranks: `backward` and
            `collect` then return the statistics of all ranks' samples, on every rank.
            The pass must average the gradients over those ranks, as
            DistributedDataParallel and `fully_shard` do; with `keep_mean` the probe
            reduces the mean itself. Every rank creates the probe, and calls it in the
            same steps. Without it, this rank's samples are what a probe speaks of.

    Raises:
        ValueError: for an unknown word, an unknown direction, no parameter at all, an
            `every` below one, sharded parameters other than those of `fully_shard`,
            or ranks whose probes differ.

    Example:
        >>> import torch, fastminima as fm
        >>> model = torch.nn.Linear(3, 2)
        >>> probe = fm.GradientProbe(model)
        >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 0, 1, 1])
        >>> losses = torch.nn.functional.cross_entropy(model(x), y, reduction="none")
        >>> stats = probe.backward(losses)
        >>> stats.sq_norms.shape
        torch.Size([5])
    """

    @overload
    def __init__(
        self: GradientProbe[GradientStatistics],
        model: nn.Module | Mapping[str, nn.Parameter],
        measure: Measure | Iterable[Measure] = ("norms",),
        directions: Mapping[str, Tensor | Mapping[str, Tensor]] | None = None,
        per_parameter: bool = False,
        keep_mean: bool = False,
        mode: Mode = "observe",
        batchnorm: BatchNorm = "error",
        *,
        batch_dim: int = 0,
        every: Literal[1] = 1,
        accumulate: Literal[1] = 1,
        sample: int | None = None,
        check_every: int = 200,
        process_group: ProcessGroup | Literal["world"] | None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: GradientProbe[GradientStatistics | None],
        model: nn.Module | Mapping[str, nn.Parameter],
        measure: Measure | Iterable[Measure] = ("norms",),
        directions: Mapping[str, Tensor | Mapping[str, Tensor]] | None = None,
        per_parameter: bool = False,
        keep_mean: bool = False,
        mode: Mode = "observe",
        batchnorm: BatchNorm = "error",
        *,
        batch_dim: int = 0,
        every: int = 1,
        accumulate: int | None = 1,
        sample: int | None = None,
        check_every: int = 200,
        process_group: ProcessGroup | Literal["world"] | None = None,
    ) -> None: ...

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        measure: Measure | Iterable[Measure] = ("norms",),
        directions: Mapping[str, Tensor | Mapping[str, Tensor]] | None = None,
        per_parameter: bool = False,
        keep_mean: bool = False,
        mode: Mode = "observe",
        batchnorm: BatchNorm = "error",
        *,
        batch_dim: int = 0,
        every: int = 1,
        accumulate: int | None = 1,
        sample: int | None = None,
        check_every: int = 200,
        process_group: ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        options = Options.of(
            measure,
            per_parameter=per_parameter,
            keep_mean=keep_mean,
            mode=mode,
            batchnorm=batchnorm,
            batch_dim=batch_dim,
            every=every,
            accumulate=accumulate,
            sample=sample,
            check_every=check_every,
        )
        super().__init__(model, options, directions or {}, process_group)

    def backward(
        self,
        loss: Tensor,
        batch_size: int | None = None,
        reduction: Reduction = "mean",
        *,
        scale: float = 1.0,
        retain_graph: bool = False,
        batch_dim: int | None = None,
        segment_ids: Tensor | None = None,
    ) -> Found:
        """Run the backward pass and return the statistics of its samples.

        None on the steps that `every` leaves out; with `accumulate`, the statistics of
        the whole step with its last pass, and None before.

        Args:
            loss: the vector `[batch]` of per-sample losses, whose mean is
                backpropagated; or a scalar.
            batch_size: the number of samples behind a scalar loss.
            reduction: "mean" or "sum", how a scalar loss was made of its samples.
            scale: what `loss` has been multiplied with before: `1 / steps` under
                gradient accumulation, `scaler.get_scale()` for what a GradScaler
                returned. Statistics are divided by it; `.grad` is that of the loss as
                it is given.
            retain_graph: keep the graph for another backward pass.
            batch_dim: for this loss, in place of the probe's own.
            segment_ids: `[rows, time]` (or `[time]`), where documents are packed into
                rows: the sample of each token, numbered from 0, and -1 for none. The
                samples are then the segments, and `loss` the vector of their losses, or
                a scalar made of their tokens' losses. Attention must keep them apart.

        Raises:
            CaptureError: when the graph cannot be read exactly; the model, its
                gradients and hooks are then as before. (Where a region that runs again
                computes something else than was measured, the pass has begun, and
                `.grad` is incomplete.) With `process_group` it is raised on every rank
                and after the pass, as is a ValueError.
            ValueError: for a loss of two dimensions or a scalar without batch size;
                with `process_group`, when `.grad` is not the mean over all samples.
        """
        request = Request(loss, batch_size, reduction, scale, batch_dim, segment_ids)
        found: Any  # the overloads of __init__ say which it can be
        if self._steps.rests(self._owned):
            request.checked(self._options.batch_dim)
            request.mean().backward(retain_graph=retain_graph)
            found = self._steps.add(None)
            return found
        # With no gradient there before, what is there afterwards is this pass'. (Under
        # DistributedDataParallel it is the mean over ranks by then.)
        is_fresh = not is_distributed() and have_no_gradient(self._parameters)
        self._attach(request, is_fresh=is_fresh, waits=False)
        try:
            with explaining(lambda: self._pass.error):
                request.mean().backward(
                    retain_graph=retain_graph, inputs=self._pass.inputs
                )
            self._pass.deliver()
            if is_fresh:
                self._pass.read_gradients()
            found = self._collected()
            return found
        finally:
            self._detach()

    def attach(
        self,
        loss: Tensor,
        batch_size: int | None = None,
        reduction: Reduction = "mean",
        *,
        scale: float = 1.0,
        batch_dim: int | None = None,
        segment_ids: Tensor | None = None,
    ) -> None:
        """Prepare the graph of `loss`, for loops that call `loss.backward()`.

        Follow it with exactly one backward pass over the loss, then `collect()`. What
        the loss is multiplied with on the way (a GradScaler, a mean or a sum of a
        vector, weights) is seen in the gradient that arrives, and taken out: g_n is
        the gradient of the loss as it was attached, divided by `scale`. Weights that
        differ between the samples of a vector cost a backward pass. A penalty on
        weights that is added to the loss stays out of the statistics; another loss on
        the same activations is an error when it comes to `collect`.

        Raises:
            CaptureError, ValueError: as `backward`; with `process_group`, `collect`
                raises them.
        """
        if self._options.is_fused:
            raise ValueError(
                'mode="fused" runs the backward pass itself: call '
                'probe.backward(loss), or use mode="observe" where the loop calls '
                "loss.backward()."
            )
        request = Request(loss, batch_size, reduction, scale, batch_dim, segment_ids)
        if self._steps.rests(self._owned):
            self._detach()
            self._pass = Resting()
            request.checked(self._options.batch_dim)
        else:
            self._attach(request, is_fresh=False, waits=True)

    def collect(self) -> Found:
        """Statistics of the backward pass that ran since `attach`; hooks are removed.

        None as from `backward`. Of a loss that was multiplied by zero there are none:
        an error on the CPU, NaN on a device, for which nothing waits.

        Raises:
            CaptureError: when nothing was attached, or no backward pass reached it.
            ValueError: with `process_group`, as `backward`.
        """
        found: Any
        if isinstance(self._pass, Resting):
            self._detach()
            found = self._steps.add(None)
            return found
        found = self._collected()
        return found

    def end_step(self) -> GradientStatistics | None:
        """The step has had all its passes: the statistics of their samples.

        For steps of fewer passes than `accumulate` says, as at the end of an epoch, and
        for `accumulate=None`. Call it before the parameters change. None on the steps
        that `every` leaves out, where a pass was not collected, and where there was
        none since the last step.

        Example:
            >>> import torch, fastminima as fm
            >>> model = torch.nn.Linear(3, 1)
            >>> probe = fm.GradientProbe(model, accumulate=None)
            >>> for size in (4, 8):
            ...     losses = model(torch.randn(size, 3)).square().mean(1)
            ...     _ = probe.backward(losses / 2, scale=1 / 2)
            >>> probe.end_step().count
            12
        """
        return self._steps.end()

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on with: steps so far, and what `sample` draws next.

        Which samples rows belong to is measured again by the probe that loads it.
        """
        return self._state()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state, at the beginning of a step."""
        self._restore(state_dict)

    def detach(self) -> None:
        """Take back an `attach` whose backward pass did not come: removes its hooks."""
        self._detach()

    def audit(
        self,
        losses: Tensor,
        samples: int = 4,
        seed: int = 0,
        *,
        segment_ids: Tensor | None = None,
    ) -> Audit:
        """Check this probe against plain autograd on the graph of `losses`.

        Per parameter: the rule that covers it, |sum_n g_n - grad| / |grad|, the worst
        relative difference of |g_n|^2 to `autograd.grad(losses[n])` over up to
        `samples` random n, and the cost of its norms. No `.grad` changes and the graph
        stays usable. The first thing to run on a new model.

        Args:
            losses: the vector `[batch]` of per-sample losses.
            samples: how many samples to differentiate one by one.
            seed: of the choice of samples.
            segment_ids: as for `backward`.

        Raises:
            CaptureError: when the graph cannot be read.
            ValueError: for losses that are not a vector.
        """
        if losses.dim() != 1:
            raise ValueError(
                f"An audit needs the vector of per-sample losses, got shape "
                f"{tuple(losses.shape)}. Use reduction='none' in the loss."
            )
        target = Request(losses, None, "mean", 1.0, 0, segment_ids).checked(0)
        count = target.samples.count

        with explaining():
            reading = self._reader.read(losses, target.samples)
            with self._reader.extra_passes(reading.tape):
                return audit_losses(
                    lambda: self._attacher.timed_session(reading, count),
                    losses,
                    self._parameters,
                    samples=samples,
                    seed=seed,
                    reading=reading,
                    batchnorm=self._options.batchnorm,
                )
