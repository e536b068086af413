"""The contract of targets, as checks that `driftstream check` and the test-suite run alike."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from driftstream.envs.targets import CountedTarget, Target, make_target
from driftstream.eval.estimators import effective_sample_size, khat, log_z_importance
from driftstream.launch.contract import NO_OPTIONS, rate
from driftstream.launch.dry_run import TOLERANCE, gradient_errors
from driftstream.launch.findings import Check, ContractError, DoubtError, Finding, run_checks

POINTS, BATCH, EXACT = 64, 300, 2000
LEAST_EFFECTIVE, LARGEST_KHAT = 100, 0.5
"""Bounds beyond which an importance estimate of log Z says nothing: above 0.5 its variance may not exist."""


def check_target(name: str, options: Mapping[str, Any] = NO_OPTIONS) -> list[Finding]:
    """Whether a target, by name or place, is a density that a run can train on: shapes, gradients, dtypes, samples."""
    trial = _TargetTrial(name, options)
    return run_checks(
        [
            Check("loads", trial.loads, essential=True),
            Check("attributes", trial.attributes),
            Check("shapes", trial.shapes, essential=True),
            Check("finite", trial.finite),
            Check("score", trial.score),
            Check("float64", trial.float64),
            Check("batch independence", trial.independence),
            Check("determinism", trial.determinism),
            Check("input", trial.input),
            Check("exact samples", trial.samples),
            Check("log Z", trial.log_z),
            Check("speed", trial.speed, "info"),
        ]
    )


class _TargetTrial:
    """A target, asked as actors, refiners and the evaluator ask it."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name = name
        self._values = dict(options)

    def loads(self) -> str:
        self.target = make_target(self._name, **self._values)
        self.counted = CountedTarget(self.target)
        return f"{type(self.target).__name__} {self.target.name!r}, {self.target.dim} dimensions"

    def attributes(self) -> str:
        target = self.target
        variance, (low, high) = target.diffusion_variance, target.plot_range
        if not 0 < variance < math.inf:
            raise ContractError(f"diffusion_variance = {variance!r}: expected a positive number")
        if target.log_z is not None and not math.isfinite(target.log_z):
            raise ContractError(f"log_z = {target.log_z!r}: expected a finite number, or None")
        if not low < high:
            raise ContractError(f"plot_range = {target.plot_range!r}: expected (low, high)")
        axes = {axis for pair in target.projections for axis in pair}
        if target.dim > 1 and not axes <= set(range(target.dim)):
            raise ContractError(
                f"projections = {target.projections!r}: expected pairs of axes below dim = {target.dim}"
            )
        noise = "" if target.noise_range is None else ", noise_range = ({:g}, {:g})".format(*target.noise_range)
        return f"diffusion_variance = {variance:g}{noise}, plot_range = ({low:g}, {high:g})"

    def shapes(self) -> str:
        # CountedTarget says what is wrong.
        for x in (self._points(), self._points().view(8, 8, -1), self._points()[:0]):
            self.counted.log_reward(x)
            with torch.no_grad():
                self.counted.score(x)
                self.counted.log_reward_and_score(x)
        return "[B, D] and [B, T, D], and none at all: log_reward, score, log_reward_and_score"

    def finite(self) -> str:
        points = self._points()
        defined = self.counted.log_reward(points).isfinite()
        scores = self.target.score(points).isfinite().all(-1)
        share, share_of_scores = float(defined.float().mean()), float(scores.float().mean())
        variance = f"N(0, diffusion_variance = {self.target.diffusion_variance:g})"
        if not share:
            raise ContractError(f"no log reward is finite at points of {variance}, where an untrained sampler ends")
        if not share_of_scores:
            raise ContractError(f"no score is finite at points of {variance}, where an untrained sampler ends")
        if min(share, share_of_scores) < 1:
            raise DoubtError(f"{share:.0%} of log rewards and {share_of_scores:.0%} of scores at points of {variance}")
        return f"at points of {variance}"

    def score(self) -> str:
        worst: dict[str, float] = {}
        for seed in range(5):
            errors, dtype = gradient_errors(self.target, seed)
            for method, error in errors.items():
                worst[method] = max(worst.get(method, 0.0), error, key=lambda e: math.inf if math.isnan(e) else e)
        wrong = [method for method, error in worst.items() if not error < TOLERANCE[dtype]]
        seen = ", ".join(f"{method} {error:.0e}" for method, error in worst.items())
        if wrong:
            raise ContractError(f"differs from central differences of log_reward (relative errors: {seen})")
        return f"agrees with central differences in {_short(dtype)} (relative errors: {seen})"

    def float64(self) -> str:
        points = self._points().double()
        try:
            fine = self.target.log_reward(points)
        except Exception as error:
            return f"not taken, nor needed ({type(error).__name__})"
        coarse = self.counted.log_reward(points.float()).double()
        difference = _relative_error(coarse, fine.double())
        if not difference < 1e-2:
            raise ContractError(f"float32 differs from float64 (relative error {difference:.0e})")
        return f"float32 agrees with it (relative error {difference:.0e})"

    def independence(self) -> str:
        points = self._points()
        both, alone = self._evaluate(points), [self._evaluate(points[row : row + 1]) for row in range(8)]
        for name, values, index in (("log_reward", both[0], 0), ("score", both[1], 1)):
            error = _relative_error(torch.cat([row[index] for row in alone]), values[:8])
            if not error < 1e-3:
                raise ContractError(
                    f"{name} of a point depends on the batch that it is in (relative error {error:.0e})"
                )
        return "a point alone gives what it gives in a batch"

    def determinism(self) -> str:
        again = CountedTarget(make_target(self._name, **self._values))
        for other in (self.counted, again):
            for first, second in zip(
                self._evaluate(self._points()), self._evaluate(self._points(), other), strict=True
            ):
                if not torch.equal(first.nan_to_num(), second.nan_to_num()):
                    raise ContractError("a second call gives other values: log_reward has to be a function of x alone")
        return "a second call, and another instance, give the same"

    def input(self) -> str:
        points = self._points()
        self._evaluate(points)
        if not torch.equal(points, self._points()):
            raise ContractError("x is changed in place")
        with torch.no_grad():
            if self.target.score(points).requires_grad:
                raise ContractError("score carries a gradient under no_grad")
        return "left as it is"

    def samples(self) -> str:
        first, again, other = (self._exact(seed, 200) for seed in (0, 0, 1))
        if first is None or again is None or other is None:
            return "none given"
        if list(first.shape) != [200, self.target.dim]:
            raise ContractError(f"sample(200) has shape {list(first.shape)}: expected [200, {self.target.dim}]")
        if not bool(first.isfinite().all()) or not bool(self.counted.log_reward(first.float()).isfinite().all()):
            raise ContractError("samples that are not finite, or whose log reward is not")
        if not torch.equal(first, again) or torch.equal(first, other):
            raise ContractError("samples do not follow the generator: draw with generator=generator")
        return f"finite, and decided by the generator; mean log reward {float(self._mean(first)):.3g}"

    def log_z(self) -> str:
        """An importance estimate: the proposal is a kernel density estimate on exact samples."""
        true, exact = self.target.log_z, self._exact(2, EXACT)
        if true is None or exact is None:
            return "not given" if true is None else f"{true:.4f}; cannot be told without exact samples"
        generator = torch.Generator().manual_seed(6)
        exact = exact.double()
        width = exact.std(0) * EXACT ** (-1.0 / (self.target.dim + 4))
        centres = exact[torch.randint(EXACT, (EXACT,), generator=generator)]
        proposal = centres + width * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        squares = torch.cdist(proposal / width, exact / width).square()
        normaliser = math.log(EXACT) + float(width.log().sum()) + 0.5 * self.target.dim * math.log(2 * math.pi)
        log_q = (-0.5 * squares).logsumexp(1) - normaliser
        log_weight = self.counted.log_reward(proposal.float()).double() - log_q
        log_weight = log_weight.masked_fill(~log_weight.isfinite(), -math.inf)
        estimate, effective = log_z_importance(log_weight), EXACT * effective_sample_size(log_weight)
        tail = khat(log_weight)
        if not (effective >= LEAST_EFFECTIVE and tail < LARGEST_KHAT):
            return f"{true:.4f}; cannot be told from samples ({effective:.0f} effective of {EXACT}, k-hat {tail:.2f})"
        error = math.sqrt(1.0 / effective)
        if abs(estimate - true) > 5.0 * error:
            raise ContractError(f"log_z = {true:.4f}, and an importance estimate {estimate:.3f} ± {error:.3f}")
        return f"{true:.4f}; an importance estimate {estimate:.3f} ± {error:.3f}"

    def speed(self) -> str:
        points = self._points(BATCH)
        with torch.no_grad():
            alone, both = (rate(partial(f, points)) for f in (self.target.log_reward, self.target.log_reward_and_score))
        return f"{alone:,.0f} calls/s of {BATCH} points, {both:,.0f} with the score"

    def _points(self, count: int = POINTS) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return self.target.diffusion_variance**0.5 * torch.randn(count, self.target.dim, generator=generator)

    def _evaluate(self, x: Tensor, target: Target | None = None) -> tuple[Tensor, Tensor]:
        target = target or self.counted
        with torch.no_grad():
            return target.log_reward(x), target.score(x)

    def _exact(self, seed: int, count: int) -> Tensor | None:
        with torch.random.fork_rng(devices=[]):
            torch.seed()
            return self.counted.sample(count, torch.Generator().manual_seed(seed))

    def _mean(self, x: Tensor) -> Tensor:
        return self.counted.log_reward(x.float()).mean()


def _relative_error(values: Tensor, expected: Tensor) -> float:
    error = (values - expected).abs() / (1.0 + expected.abs())
    # Where both are undefined alike there is nothing to compare.
    same = (values == expected) | (values.isnan() & expected.isnan())
    return float(error.masked_fill(same, 0.0).max()) if values.numel() else 0.0


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
