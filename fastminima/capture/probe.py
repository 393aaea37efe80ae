"""`GradientProbe`: per-sample gradient statistics from the backward pass that runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from .._dtypes import accumulation_dtype
from .._parameters import tracked_parameters
from ..statistics import GradientStatistics
from .audit import Audit, audit_losses
from .errors import CaptureError
from .explain import explaining
from .graph.passes import is_distributed, run_pass
from .graph.saved import frames_of
from .graph.sharding import find_sharding, reshard
from .graph.tape import Tape
from .options import (
    Asked,
    Target,
    check_dim,
    check_direction,
    check_fused,
    check_word,
    whole,
)
from .ranks import Part, Ranks, find_group
from .reading import mixing as batch_norms
from .reading.jumps import Watch
from .reading.reader import Reader, Reading
from .rows.samples import Segments
from .session.fused import Fusion, find_fusion
from .session.grouped import GroupedSession
from .session.hooks import Collected, Session
from .session.states import Attached, wait_for

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GradientProbe"]

_MEASURES = ("norms", "second_moments", "gram")


class GradientProbe:
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
            are then equal to rounding, not bitwise. For parameters used once; the rest
            is observed.
        batchnorm: what to do about batch normalisation in training mode, which mixes
            samples: "error"; "rows", each sample's rows of the ordinary backward pass,
            which sum to the gradient; "frozen", batch statistics as constants, at the
            price of a second backward pass, which do not sum to it.
        batch_dim: the batch dimension of the tensors that a scalar loss is made of.
        every: probe only every so many steps, the first one included. On the others
            `backward` is a plain backward pass, `attach` does nothing, and `backward`
            and `collect` return None.
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

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Parameter],
        measure: str | Iterable[str] = ("norms",),
        directions: Mapping[str, Tensor | Mapping[str, Tensor]] | None = None,
        per_parameter: bool = False,
        keep_mean: bool = False,
        mode: str = "observe",
        batchnorm: str = "error",
        *,
        batch_dim: int = 0,
        every: int = 1,
        sample: int | None = None,
        check_every: int = 200,
        process_group: ProcessGroup | Literal["world"] | None = None,
    ) -> None:
        sharded_modules = reshard(model)
        self._owned = tracked_parameters(model)  # they have .grad after a pass
        sharding = find_sharding(sharded_modules, model, self._owned)
        self._parameters = self._owned if sharding is None else sharding.whole
        words = (measure,) if isinstance(measure, str) else tuple(measure)
        for word in words:
            check_word("measure", word, _MEASURES)
        check_word("batchnorm", batchnorm, ("error", "rows", "frozen"))
        check_word("mode", mode, ("observe", "fused"))
        self._is_fused = mode == "fused"
        if self._is_fused:
            check_fused(words, sample, process_group)
        self._every = whole("every", every)
        self._sample = None if sample is None else whole("sample", sample)
        self._generator = torch.Generator(device="cpu").manual_seed(
            0
        )  # never the user's
        self._steps = 0  # backward passes announced so far, probed or not
        self._is_resting = False
        self._batch_dim = check_dim(batch_dim)
        self._measure = frozenset(words)
        self._given_directions = dict(directions or {})
        self._directions = {
            name: check_direction(name, v, self._parameters)
            for name, v in self._given_directions.items()
        }
        self._per_parameter = per_parameter
        self._keep_mean = keep_mean
        self._batchnorm = batchnorm
        self._parameter_count = sum(p.numel() for p in self._parameters.values())
        self._model = model
        module = model if isinstance(model, nn.Module) else None
        self._reader = Reader(
            self._parameters,
            batchnorm,
            module,
            sharding,
            check_every=whole("check_every", check_every),
            retrack=self._retrack,
        )
        self._watch = Watch()
        group = find_group(process_group)
        if group is not None and batchnorm == "frozen" and not keep_mean:
            raise ValueError(
                'batchnorm="frozen" takes another gradient than the one in .grad, so '
                "with process_group it needs keep_mean=True."
            )
        self._ranks = None
        if group is not None:
            self._ranks = Ranks(
                group,
                self._parameters,
                list(self._directions),
                per_parameter=per_parameter,
                second_moments="second_moments" in self._measure,
                keep_mean=keep_mean,
                sharding=sharding,
            )
            self._ranks.check_model(model)
        self._trouble: CaptureError | ValueError | None = None
        self._announced: set[str] = set()
        self._attached: Attached | None = None

    def backward(
        self,
        loss: Tensor,
        batch_size: int | None = None,
        reduction: str = "mean",
        *,
        scale: float = 1.0,
        retain_graph: bool = False,
        batch_dim: int | None = None,
        segment_ids: Tensor | None = None,
    ) -> GradientStatistics | None:
        """Run the backward pass and return the statistics of its samples.

        None on the steps that `every` leaves out.

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
                with `process_group`, when `.grad` is not the mean over all samples;
                with mode="fused", under `torch.distributed`.
        """
        if self._is_fused and is_distributed():
            raise ValueError(
                'mode="fused" gives parameters their gradients after the pass, when '
                'torch.distributed\'s wrappers no longer look. Use mode="observe".'
            )
        asked = Asked(loss, batch_size, reduction, scale, batch_dim, segment_ids)
        if self._rests():
            asked.checked(self._batch_dim)
            asked.mean().backward(retain_graph=retain_graph)
            return None
        # With no gradient there before, what is there afterwards is this pass'. (Under
        # DistributedDataParallel it is the mean over ranks by then.)
        is_fresh = not is_distributed() and all(
            p.grad is None and not p._post_accumulate_grad_hooks
            for p in self._parameters.values()
        )
        if self._ranks is not None:
            self._attach_joint(asked, waits=False)
        else:
            self._attach(asked, hook_gradients=not is_fresh, waits=False)
        try:
            fusion = self._attached and self._attached.fusion
            with explaining(self._before):
                asked.mean().backward(
                    retain_graph=retain_graph,
                    inputs=None if fusion is None else fusion.inputs,
                )
            if fusion is not None:
                fusion.deliver()
            if self._ranks is not None:
                return self._collected_joint(self._ranks)
            assert self._attached is not None
            session = self._attached.session
            if is_fresh and self._attached.result is None and session is not None:
                session.take_gradients(
                    {
                        name: p.grad
                        for name, p in self._parameters.items()
                        if p.grad is not None
                    }
                )
            return self._collected()
        finally:
            self._detach()

    def attach(
        self,
        loss: Tensor,
        batch_size: int | None = None,
        reduction: str = "mean",
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
        if self._is_fused:
            raise ValueError(
                'mode="fused" runs the backward pass itself: call '
                'probe.backward(loss), or use mode="observe" where the loop calls '
                "loss.backward()."
            )
        asked = Asked(loss, batch_size, reduction, scale, batch_dim, segment_ids)
        self._is_resting = self._rests()
        if self._is_resting:
            self._detach()
            asked.checked(self._batch_dim)
        elif self._ranks is not None:
            self._attach_joint(asked, waits=True)
        else:
            self._attach(asked, hook_gradients=True, waits=True)

    def _attach_joint(self, asked: Asked, *, waits: bool) -> None:
        """Attach on this rank, leaving an error to `_collected_joint`.

        The other ranks wait for this one's gradients and message, so the pass runs in
        any case, and then all of them raise.
        """
        assert self._ranks is not None
        self._trouble = self._ranks.found_earlier(self._owned)
        keep_mean = self._keep_mean
        try:
            self._attach(asked, hook_gradients=keep_mean, waits=waits)
        except (CaptureError, ValueError) as error:
            self._trouble = self._trouble or error
        if self._trouble is not None:
            self._detach()

    def _collected_joint(self, ranks: Ranks) -> GradientStatistics:
        """The statistics of all ranks; every rank gets here, in trouble or not."""
        trouble, self._trouble = self._trouble, None
        part = None
        if trouble is None:
            try:
                collected, attached = self._finished()
                reached = frozenset(collected.sq_norms)
                part = Part(
                    self._statistics(collected, attached),
                    reached,
                    float(attached.factor),
                    ranks.grad_sq_norms(self._owned, reached),
                )
            except (CaptureError, ValueError) as error:
                trouble = error
        return ranks.join(part, trouble)

    def _before(self) -> CaptureError | ValueError | None:
        """What was wrong before a joint pass, once."""
        trouble, self._trouble = self._trouble, None
        return trouble

    def _retrack(self) -> Mapping[str, Tensor]:
        """Track the parameters that the model has now.

        Raises:
            CaptureError: where a probe cannot follow.
        """
        if not isinstance(self._model, nn.Module) or self._ranks is not None:
            raise CaptureError(
                "Parameters were added, replaced, frozen or unfrozen since this probe "
                "was made with a process_group. Make a new probe, on every rank."
            )
        tracked = tracked_parameters(self._model)
        self._directions = {
            name: check_direction(name, v, tracked)
            for name, v in self._given_directions.items()
        }
        self._parameters.clear()
        self._parameters.update(tracked)
        self._parameter_count = sum(p.numel() for p in tracked.values())
        return self._parameters

    def _rests(self) -> bool:
        """Whether `every` leaves this step out; counts the step."""
        step, self._steps = self._steps, self._steps + 1
        return step % self._every != 0

    def _attach(self, asked: Asked, *, hook_gradients: bool, waits: bool) -> None:
        """Hook the graph of a loss; `waits` where the pass is the user's own."""
        self._detach()
        loss = asked.loss
        try:
            target = asked.checked(self._batch_dim)
        except ValueError:
            self._reader.accompany(loss)
            raise
        with explaining():
            self._reader.is_suspicious = self._watch.is_suspicious(loss)
            reading = self._reader.read(loss, target.samples)
            chosen = self._chosen(target.samples.count)
            if chosen is not None:
                reading = reading.choosing(chosen)
            if reading.mixing and self._batchnorm == "frozen":
                frozen = self._frozen_pass(reading, target)
                self._attached = Attached(
                    target, None, frozen, factor=target.factor, chosen=chosen
                )
                return
        self._attached = attached = Attached(
            target,
            None,
            factor=target.factor,
            chosen=chosen,
            reads_grad=not hook_gradients,
        )
        if waits:
            names = self._reader.names
            attached.arrival = wait_for(attached, names, self._weighted_pass)
        count = target.samples.count if chosen is None else len(chosen)
        groups = None
        if isinstance(target.samples, Segments) and "gram" not in self._measure:
            groups = target.samples.groups(chosen)
        if groups is not None:
            attached.session = self._grouped(reading, groups, count, hook_gradients)
            return
        if self._is_fused:
            attached.fusion = find_fusion(reading, self._parameters)
        attached.session = self._session(
            *(reading, count, self._measure, self._directions, hook_gradients),
            attached.fusion,
        )

    def _grouped(
        self, reading: Reading, groups: list[Tensor], count: int, hook_gradients: bool
    ) -> GroupedSession:
        sessions: list[Session] = []
        try:
            for group in groups:
                session = self._session(
                    reading.choosing(group),
                    len(group),
                    self._measure,
                    self._directions,
                    hook_gradients and not sessions,
                    owner=groups,
                )
                sessions.append(session)
        except BaseException:
            for session in sessions:
                session.close()
            raise
        return GroupedSession(sessions, groups, count)

    def _chosen(self, count: int) -> Tensor | None:
        """Numbers of the samples to look at; None for all of them."""
        if self._sample is None or self._sample >= count:
            return None
        order = torch.randperm(count, generator=self._generator, device="cpu")
        return order[: self._sample].sort().values

    def collect(self) -> GradientStatistics | None:
        """Statistics of the backward pass that ran since `attach`; hooks are removed.

        None on the steps that `every` leaves out.

        Raises:
            CaptureError: when nothing was attached, or no backward pass reached it.
            ValueError: with `process_group`, as `backward`.
        """
        if self._is_resting:
            self._is_resting = False
            return None
        if self._ranks is not None:
            return self._collected_joint(self._ranks)
        return self._collected()

    def detach(self) -> None:
        """Take back an `attach` whose backward pass did not come: removes its hooks."""
        self._is_resting = False
        self._detach()

    def _collected(self) -> GradientStatistics:
        collected, attached = self._finished()
        return self._statistics(collected, attached)

    def _finished(self) -> tuple[Collected, Attached]:
        if self._attached is None:
            raise CaptureError(
                "Nothing is attached to this probe; call probe.attach(loss, ...) "
                "before the backward pass and probe.collect() once after it."
            )
        attached, self._attached = self._attached, None
        return attached.finish(), attached

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
        target = Asked(losses, None, "mean", 1.0, 0, segment_ids).checked(0)
        count = target.samples.count
        with explaining():
            reading = self._reader.read(losses, target.samples)
            measure = frozenset(["norms", "totals"])
            with self._reader.extra_passes(reading.tape):
                return audit_losses(
                    lambda: self._session(reading, count, measure, {}),
                    *(losses, self._parameters, samples, seed, reading),
                    self._batchnorm,
                )

    def _session(
        self,
        reading: Reading,
        count: int,
        measure: frozenset[str],
        directions: Mapping[str, Mapping[str, Tensor]],
        hook_gradients: bool = False,
        fusion: Fusion | None = None,
        owner: object = None,
    ) -> Session:
        waiting = self._attached
        return Session(
            reading,
            self._parameters,
            count,
            measure=measure,
            directions=directions,
            keep_grads=self._keep_mean,
            hook_gradients=hook_gradients,
            defer_errors=self._ranks is not None,
            fusion=fusion,
            arrival=None if waiting is None else waiting.arrival,
            owner=owner,
            announce=self._announce,
        )

    def _frozen_pass(self, reading: Reading, target: Target) -> Collected:
        """A pass of its own in which batch normalisation keeps its statistics."""
        count = target.samples.count
        if self._sample is not None:
            count = min(count, self._sample)
        session = self._session(reading, count, self._measure, self._directions)
        handles = batch_norms.freeze(reading.tape, reading.mixing)
        try:
            return self._own_pass(session, session.owner, target, reading.tape)
        finally:
            session.close()
            for handle in handles:
                handle.remove()

    def _weighted_pass(self, attached: Attached) -> Collected:
        """A pass of its own in which all samples weigh the same.

        It runs inside the user's, whose gradients are those of weighted samples.
        """
        session = attached.session
        assert session is not None
        loss = attached.target.loss
        assert loss.grad_fn is not None
        tape = Tape([loss.grad_fn], self._reader.names)
        try:
            return self._own_pass(session, session.owner, attached.target, tape)
        finally:
            session.close()

    def _own_pass(
        self,
        session: Session | GroupedSession,
        owner: object,
        target: Target,
        tape: Tape,
    ) -> Collected:
        """What a session sees in an extra pass over the loss, or its mean."""
        loss = target.loss
        names = list(tape.leaves)
        with self._reader.extra_passes(tape):
            grads = run_pass(
                loss,
                [self._parameters[name] for name in names],
                owner,
                torch.full_like(loss, 1 / len(loss)) if loss.dim() else None,
                frames_of(tape.nodes),
            )
        found = zip(names, grads, strict=True)
        session.take_gradients({name: g for name, g in found if g is not None})
        return session.finish()

    def _statistics(
        self, collected: Collected, attached: Attached
    ) -> GradientStatistics:
        """From sums over one backward pass to statistics of g_n = factor * its part."""
        factor, chosen = attached.factor, attached.chosen
        batch = attached.target.samples.count
        count = batch if chosen is None else len(chosen)
        sq_norms = self._in_order(collected.sq_norms)
        norms = list(sq_norms.values())
        to_mean = factor / batch
        # Where ranks join without the mean nothing was read: it is in .grad by then.
        parts = collected.grad_sq_norms or [norms[0].new_zeros(())]
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum()
        statistics = GradientStatistics(
            count=count,
            parameter_count=self._parameter_count,
            sq_norms=torch.stack(norms).sum(0) * factor**2,
            mean_grad_sq_norm=total * to_mean**2,
            sq_norms_by_parameter={n: t * factor**2 for n, t in sq_norms.items()}
            if self._per_parameter
            else None,
            second_moments={
                name: t.mul_(factor**2 / count)  # made for this pass alone
                for name, t in self._in_order(collected.second_moments).items()
            }
            if "second_moments" in self._measure
            else None,
            gram=None if collected.gram is None else collected.gram * factor**2,
            dots={
                name: collected.dots[name] * factor
                if name in collected.dots
                else norms[0].new_zeros(count)  # it names only what was not reached
                for name in self._directions
            },
            mean_grad={
                name: t.to(accumulation_dtype(t.dtype)) * to_mean
                for name, t in self._in_order(collected.grads).items()
            }
            if self._keep_mean
            else None,
            mean_count=None if chosen is None else batch,
            samples=chosen,
        )
        self._watch.note(attached.target.loss, statistics)
        return statistics

    def _in_order(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By parameter in the order of the model, whatever the order of arrival."""
        return {name: found[name] for name in self._parameters if name in found}

    def _announce(self, node: str, parameters: Sequence[str]) -> None:
        """Say once for each kind of node that it is read by the universal rule."""
        if node not in self._announced:
            self._announced.add(node)
            shown = ", ".join(repr(p) for p in parameters[:4])
            warnings.warn(
                f"No rule for {node} (parameters {shown}): its backward runs once per "
                "sample. The statistics are exact; this layer costs more.",
                stacklevel=2,
            )

    def _detach(self) -> None:
        if self._attached is not None:
            self._attached.close()
            self._attached = None
