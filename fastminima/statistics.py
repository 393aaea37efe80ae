"""What one backward pass says about the gradients of its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from ._sums import concatenated, joined, merged, numbered, sq_norms, weighted

__all__ = ["GradientStatistics"]

_OPTIONAL = ("sq_norms_by_parameter", "second_moments", "gram", "mean_grad")


@dataclass(frozen=True, eq=False, repr=False)
class GradientStatistics:
    """Statistics of the per-sample gradients g_n of one batch.

    g_n is the gradient of sample n's own loss (not divided by the batch size). Tensors
    are in the accumulation dtype: float64 for float64 models, float32 otherwise.
    Dictionaries hold the parameters that the loss reached; an absent one counts as
    zero.

    Attributes:
        count: number of samples N.
        parameter_count: number of tracked scalars P, whether the loss reached them or
            not.
        sq_norms: `[count]`, |g_n|^2, or None when norms were not measured.
        mean_grad_sq_norm: 0-d, squared norm of the mean of the g_n.
        sq_norms_by_parameter: `{name: [count]}`, with `per_parameter=True`.
        mean_grad_sq_norms_by_parameter: `{name: 0-d}`, squared norm of each parameter's
            part of the mean, with `per_parameter=True`; they add up to
            `mean_grad_sq_norm`.
        second_moments: `{name: like the parameter}`, mean over n of g_n^2 elementwise.
        gram: `[count, count]`, <g_n, g_m>.
        dots: `{direction: [count]}`, <g_n, v>.
        mean_grad: `{name: like the parameter}`, with `keep_mean=True`.
        mean_count: number of samples behind the mean gradient, where only `count` of
            them were looked at (`sample=`); None where it is the same.
        samples: `[count]`, which samples of the batch were looked at, numbered on from
            one batch to the next where statistics were added up; None for all, and
            where several ranks looked at some of theirs.
    """

    count: int
    parameter_count: int
    sq_norms: Float[Tensor, " count"] | None
    mean_grad_sq_norm: Float[Tensor, ""]
    sq_norms_by_parameter: dict[str, Tensor] | None = None
    second_moments: dict[str, Tensor] | None = None
    gram: Float[Tensor, "count count"] | None = None
    dots: dict[str, Tensor] = field(default_factory=dict)
    mean_grad: dict[str, Tensor] | None = None
    mean_count: int | None = None
    samples: Tensor | None = None
    mean_grad_sq_norms_by_parameter: dict[str, Tensor] | None = None

    def __repr__(self) -> str:
        of = "" if self.mean_count is None else f" of {self.mean_count}"
        shown = f"{self.count}{of} samples, {self.parameter_count} parameters"
        if self.sq_norms is None or self.all_count < 2 or self.sq_norms.is_meta:
            numbers = {"mean_grad_sq_norm": self.mean_grad_sq_norm}
        else:
            names = ("covariance_trace", "signal", "noise_scale")
            numbers = {name: getattr(self, name) for name in names}
        if not self.mean_grad_sq_norm.is_meta:
            listed = [f"{name} {value:.4g}" for name, value in numbers.items()]
            shown += f"; {', '.join(listed)}"
        held = [name for name in _OPTIONAL if getattr(self, name) is not None]
        held += [f"dots[{name!r}]" for name in self.dots]
        shown += f"; with {', '.join(held)}" if held else ""
        return f"GradientStatistics({shown})"

    @property
    def all_count(self) -> int:
        """Number of samples behind the mean gradient."""
        return self.count if self.mean_count is None else self.mean_count

    @property
    def covariance_trace(self) -> Float[Tensor, ""]:
        """Trace of Sigma, the summed variance of the gradient over samples; unbiased.

        N / (N - 1) (mean_n |g_n|^2 - |mean|^2), the first mean over the samples that
        were looked at, the second over all N.

        Raises:
            ValueError: for one sample, or when norms were not measured.
        """
        self._need_two("A covariance")
        n = self.all_count
        spread = self._mean_sq_norm() - self.mean_grad_sq_norm.double()
        return (spread * (n / (n - 1))).to(self.mean_grad_sq_norm.dtype)

    @property
    def covariance_trace_error(self) -> Float[Tensor, ""]:
        """Standard error of `covariance_trace` from looking at some samples only.

        N / (N - 1) s sqrt((1 - m / N) / m), s the standard deviation of |g_n|^2 over
        the m samples looked at: what drawing others of this batch would change. Zero
        where all were looked at.

        Source: Cochran (1977), Sampling Techniques, 3rd edition, theorem 2.2.

        Raises:
            ValueError: for one sample looked at out of several.
        """
        n, m = self.all_count, self.count
        if m == n:
            return torch.zeros_like(self.mean_grad_sq_norm)
        if m < 2 or self.sq_norms is None:
            raise ValueError(
                f"The standard error of a sampled trace needs 2 samples looked at, got "
                f"{m}. Create the probe with a larger `sample`."
            )
        spread = self.sq_norms.double().std() * (n / (n - 1))
        error = spread * math.sqrt((1 - m / n) / m)
        return error.to(self.mean_grad_sq_norm.dtype)

    @property
    def signal(self) -> Float[Tensor, ""]:
        """|E g|^2, unbiased: |mean|^2 - tr Sigma / N. It may come out negative.

        Source: McCandlish et al. (2018), arXiv:1812.06162, appendix A.1.
        """
        return self.mean_grad_sq_norm - self.covariance_trace / self.all_count

    @property
    def noise_scale(self) -> Float[Tensor, ""]:
        """Trace of Sigma over |E g|^2, in samples: where noise and signal are equal.

        Numerator and denominator are unbiased, their ratio is not: average them over
        steps before dividing. Negative when the batch is too small to see the signal.

        Source: McCandlish et al. (2018), arXiv:1812.06162, "simple noise scale".
        """
        return self.covariance_trace / self.signal

    @property
    def variance(self) -> dict[str, Tensor]:
        """Unbiased elementwise variance of g_n, `{name: like the parameter}`.

        Raises:
            ValueError: for one sample, or without second moments and the mean.
        """
        self._need_two("A variance")
        if self.second_moments is None or self.mean_grad is None:
            raise ValueError(
                "A variance needs the second moments and the mean gradient; create "
                "the probe with measure=('second_moments',) and keep_mean=True."
            )
        factor = self.all_count / (self.all_count - 1)
        return {
            name: (moment - self.mean_grad[name].square()).clamp_min(0) * factor
            for name, moment in self.second_moments.items()
        }

    @property
    def is_finite(self) -> bool:
        """Whether every number here is finite (waits for the device)."""
        return all(bool(torch.isfinite(t).all()) for t in self._tensors())

    def to_dict(self) -> dict[str, Any]:
        """Numbers and lists for a log line; tensors of parameter size stay out.

        Quantities that need two samples are left out when there is one. For tables:
        `pandas.DataFrame([stats.to_dict() for stats in found])` has a row a step, and
        `pandas.DataFrame(stats.to_columns())` a row a sample.
        """
        row: dict[str, Any] = {
            "count": self.count,
            "parameter_count": self.parameter_count,
            "mean_grad_sq_norm": self.mean_grad_sq_norm.item(),
        }
        if self.sq_norms is not None:
            row["sq_norms"] = self.sq_norms.tolist()
            if self.all_count > 1:
                for name in ("covariance_trace", "signal", "noise_scale"):
                    row[name] = getattr(self, name).item()
        if self.mean_count is not None:
            row["mean_count"] = self.mean_count
            if self.sq_norms is not None and self.count > 1:
                row["covariance_trace_error"] = self.covariance_trace_error.item()
        if self.sq_norms_by_parameter is not None:
            row["sq_norms_by_parameter"] = {
                name: t.tolist() for name, t in self.sq_norms_by_parameter.items()
            }
        if self.mean_grad_sq_norms_by_parameter is not None:
            row["mean_grad_sq_norms_by_parameter"] = {
                name: t.item()
                for name, t in self.mean_grad_sq_norms_by_parameter.items()
            }
        if self.dots:
            row["dots"] = {name: t.tolist() for name, t in self.dots.items()}
        return row

    def to_columns(self) -> dict[str, list[Any]]:
        """What is known of each sample, a list of `count` numbers by name.

        "sample", its number in the batch (of several batches in the order of adding);
        "sq_norm", "sq_norm/" and a parameter, "dot/" and a direction.

        Example:
            >>> import torch, fastminima as fm
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
            >>> stats = fm.GradientProbe(model).backward(model(x).sum(1))
            >>> stats.to_columns()
            {'sample': [0, 1], 'sq_norm': [1.0, 4.0]}
        """
        numbers = range(self.count) if self.samples is None else self.samples.tolist()
        columns = {} if self.sq_norms is None else {"sq_norm": self.sq_norms}
        for name, norms in (self.sq_norms_by_parameter or {}).items():
            columns[f"sq_norm/{name}"] = norms
        columns |= {f"dot/{name}": dots for name, dots in self.dots.items()}
        found = {name: column.tolist() for name, column in columns.items()}
        return {"sample": list(numbers), **found}

    def __add__(self, other: GradientStatistics) -> GradientStatistics:
        """Statistics of both sets of samples, taken at the same parameters.

        The Gram matrix has no sum (its cross blocks were never seen): it is None.

        Raises:
            ValueError: without `keep_mean=True`, or for different measurements.
        """
        if not isinstance(other, GradientStatistics):
            return NotImplemented
        self._check_same_kind(other)
        a, b = self.count, other.count
        all_a, all_b = self.all_count, other.all_count
        mean = weighted(self._kept_mean(), all_a, other._kept_mean(), all_b)
        return replace(
            self._with_mean(mean),
            count=a + b,
            sq_norms=concatenated(self.sq_norms, other.sq_norms),
            second_moments=None
            if self.second_moments is None or other.second_moments is None
            else weighted(self.second_moments, a, other.second_moments, b),
            sq_norms_by_parameter=joined(
                self.sq_norms_by_parameter, a, other.sq_norms_by_parameter, b
            ),
            gram=None,
            dots=joined(self.dots, a, other.dots, b) or {},
            mean_count=None if all_a + all_b == a + b else all_a + all_b,
            samples=numbered(
                (one.samples, one.count, one.all_count) for one in (self, other)
            ),
        )

    def scaled(self, factor: float) -> GradientStatistics:
        """Statistics of gradients that are `factor` times as large.

        Example:
            >>> import torch, fastminima as fm
            >>> model = torch.nn.Linear(2, 1)
            >>> stats = fm.GradientProbe(model).backward(model(torch.ones(3, 2)).sum(1))
            >>> [round(one.sq_norms[0].item()) for one in (stats, stats.scaled(2))]
            [3, 12]
        """
        square = factor * factor

        def each(
            found: dict[str, Tensor] | None, power: float
        ) -> dict[str, Tensor] | None:
            if found is None:
                return None
            return {name: t * power for name, t in found.items()}

        return replace(
            self,
            sq_norms=None if self.sq_norms is None else self.sq_norms * square,
            mean_grad_sq_norm=self.mean_grad_sq_norm * square,
            sq_norms_by_parameter=each(self.sq_norms_by_parameter, square),
            mean_grad_sq_norms_by_parameter=each(
                self.mean_grad_sq_norms_by_parameter, square
            ),
            second_moments=each(self.second_moments, square),
            gram=None if self.gram is None else self.gram * square,
            dots=each(self.dots, factor) or {},
            mean_grad=each(self.mean_grad, factor),
        )

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> GradientStatistics:
        """Statistics of the samples of all ranks of `group`, the same on each rank.

        Samples come in rank order. Every rank must call it.

        Raises:
            ValueError: without `keep_mean=True`.
        """
        self._kept_mean()
        parts: list[GradientStatistics | None] = [None] * dist.get_world_size(group)
        small = replace(self, mean_grad={}, second_moments=None, gram=None)
        dist.all_gather_object(parts, small, group=group)
        ranks = [part for part in parts if part is not None]
        total = ranks[0]
        for part in ranks[1:]:
            total = total + part
        weight = self.all_count / total.all_count
        mean = self._reduced(self._kept_mean(), weight, group)
        moments = self.second_moments
        if moments is not None:
            moments = self._reduced(moments, self.count / total.count, group)
        return replace(total._with_mean(mean), second_moments=moments)

    def _with_mean(self, mean: dict[str, Tensor]) -> GradientStatistics:
        """With another mean gradient, and its norms."""
        total, each = sq_norms(mean, self.mean_grad_sq_norm)
        is_asked = self.sq_norms_by_parameter is not None
        return replace(
            self,
            mean_grad=mean,
            mean_grad_sq_norm=total,
            mean_grad_sq_norms_by_parameter=each if is_asked else None,
        )

    def _reduced(
        self,
        part: Mapping[str, Tensor],
        weight: float,
        group: dist.ProcessGroup | None,
    ) -> dict[str, Tensor]:
        """Mean over all ranks' samples; ranks may have reached different parameters."""
        names: list[list[tuple[str, torch.Size]]] = [[]] * dist.get_world_size(group)
        mine = [(name, t.shape) for name, t in part.items()]
        dist.all_gather_object(names, mine, group=group)
        shapes = {name: shape for rank in names for name, shape in rank}
        order: list[str] = []
        for rank in names:
            order = merged(order, [name for name, _ in rank])
        result = {}
        for name in order:
            shape = shapes[name]
            t = part[name] if name in part else self.mean_grad_sq_norm.new_zeros(shape)
            result[name] = t * weight
            dist.all_reduce(result[name], group=group)
        return result

    def _mean_sq_norm(self) -> Tensor:
        if self.sq_norms is None:
            raise ValueError(
                "The gradient norms were not measured; add 'norms' to the probe's "
                "`measure`."
            )
        return self.sq_norms.double().mean()

    def _need_two(self, what: str) -> None:
        if self.all_count < 2:
            raise ValueError(
                f"{what} needs at least 2 samples, got {self.all_count}. Use a larger "
                "batch, or add the statistics of several (keep_mean=True)."
            )

    def _kept_mean(self) -> dict[str, Tensor]:
        if self.mean_grad is None:
            raise ValueError(
                "Statistics can be added or reduced only with the mean gradient; "
                "create the probe with keep_mean=True."
            )
        return self.mean_grad

    def _check_same_kind(self, other: GradientStatistics) -> None:
        for what, a, b in (
            ("tracked parameters", self.parameter_count, other.parameter_count),
            ("directions", sorted(self.dots), sorted(other.dots)),
            ("norms", self.sq_norms is None, other.sq_norms is None),
        ):
            if a != b:
                raise ValueError(
                    f"These statistics differ in their {what} ({a} and {b}); add only "
                    "statistics of one probe."
                )

    def _tensors(self) -> list[Tensor]:
        tensors = [self.mean_grad_sq_norm, *self.dots.values()]
        for part in (
            *(self.second_moments, self.mean_grad),
            *(self.sq_norms_by_parameter, self.mean_grad_sq_norms_by_parameter),
        ):
            tensors += (part or {}).values()
        return tensors + [t for t in (self.sq_norms, self.gram) if t is not None]
