"""The interface of a target density, and the wrapper that counts and checks its evaluations."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self, TypeVar

import torch
from torch import Tensor

from driftstream.envs.errors import TargetError
from driftstream.envs.finiteness import is_finite

R = TypeVar("R")
_SHOWN = 8


class Target(ABC):
    """An unnormalised density R(x) on R^dim, known through log R and its gradient.

    A subclass sets `dim` and writes `log_reward`; everything else has a default. Where `score` is written too, it is
    what every gradient comes from, and `log_reward` need not be differentiable.
    x comes as float32: on the CPU in the processes of actors, refiners and the evaluator, on the learner's device where
    the learner's process evaluates the target (Langevin policies, on-policy data, `--sync`). Only `--dry-run` tries
    float64 too, and does without.
    `diffusion_variance` (σ², per unit of time) is a suggestion to the sampler, used where the configuration leaves
    it open. A target whose features differ much in width may have a `noise_range`, the variances of the widest and of
    a narrow one: a noise that falls with time adds up to the first, and its rate falls by their ratio; annealing
    starts from Gaussians as narrow, beside a wide one.
    """

    name: str = ""
    dim: int
    log_z: float | None = None
    diffusion_variance: float = 1.0
    noise_range: tuple[float, float] | None = None
    projections: tuple[tuple[int, int], ...] = ((0, 1),)
    plot_range: tuple[float, float] = (-5.0, 5.0)
    device: torch.device = torch.device("cpu")

    @abstractmethod
    def log_reward(self, x: Tensor) -> Tensor:
        """log R(x), the unnormalised log density or minus the energy: x [..., D] -> [...]; differentiable
        where `score` is left to its default."""

    def score(self, x: Tensor) -> Tensor:
        """∇ log R(x): x [..., D] -> [..., D]; works under no_grad, differentiable where x requires grad."""
        # A subclass's `score` may call this one, which must not lead back to it.
        return (self._by_autograd(x) if self._writes_score() else self.log_reward_and_score(x))[1]

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(log R(x) [...], ∇ log R(x) [..., D]) in one pass, for less than the two apart.

        By default a subclass's own `score` is asked, so that it must not call this.
        """
        return (self.log_reward(x), self.score(x)) if self._writes_score() else self._by_autograd(x)

    def _writes_score(self) -> bool:
        return type(self).score is not Target.score

    def _by_autograd(self, x: Tensor) -> tuple[Tensor, Tensor]:
        differentiable = torch.is_grad_enabled() and x.requires_grad
        # Where simulation is checkpointed, this gradient inside it must not set off a recomputation of its own.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            leaf = x if differentiable else x.detach().requires_grad_()
            log_reward = self.log_reward(leaf)
            if isinstance(log_reward, Tensor) and not log_reward.requires_grad:
                raise TypeError(
                    "log_reward is not differentiable: write `score`, or train without the gradient "
                    "(--policy.no-langevin --refiners 0)"
                )
            (score,) = torch.autograd.grad(log_reward.sum(), leaf, create_graph=differentiable)
        return (log_reward if differentiable else log_reward.detach()), score

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        """n exact, independent samples [n, D] in the default dtype, or None where there is no such way."""
        return None

    def to(self, device: torch.device | str) -> Self:
        """Draw samples on that device from now on; evaluations follow the device of their input anyway."""
        self.device = torch.device(device)
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__}(name={self.name!r}, dim={self.dim})"


class Constants:
    """Float64 tensors, handed out in the dtype and on the device of an input and kept there."""

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tensors
        self._cast: dict[tuple[torch.dtype, torch.device], tuple[Tensor, ...]] = {}

    def like(self, x: Tensor) -> tuple[Tensor, ...]:
        key = (x.dtype, x.device)
        if key not in self._cast:
            self._cast[key] = tuple(tensor.to(x.device, x.dtype) for tensor in self._tensors)
        return self._cast[key]


class CountedTarget(Target):
    """A target with its evaluations counted (in points, not calls) and its output checked.

    `energy_evaluations` and `gradient_evaluations` count the points at which log R and its gradient were
    computed, `nonfinite` those where either was NaN or infinite. A log reward is passed on as it is; a score
    with a non-finite entry becomes 0 in that row. Whatever the wrapped target raises, and any output of a
    wrong kind or shape, becomes a TargetError that names it, and the input that did it. `on_call` is called at every
    evaluation: a sign of life; `doing` says what is evaluated at present.
    """

    def __init__(self, target: Target) -> None:
        self.on_call: Callable[[], None] = _nothing
        self.target = target
        self.name = target.name
        self.dim = target.dim
        self.log_z = target.log_z
        self.diffusion_variance = target.diffusion_variance
        self.noise_range = target.noise_range
        self.projections = target.projections
        self.plot_range = target.plot_range
        self.device = target.device
        self.energy_evaluations = 0
        self.gradient_evaluations = 0
        self.nonfinite = 0
        self._evaluated: Tensor | None = None

    @property
    def calls(self) -> int:
        """Energy and gradient evaluations together."""
        return self.energy_evaluations + self.gradient_evaluations

    def log_reward(self, x: Tensor) -> Tensor:
        log_reward = self._check(self._guard(self.target.log_reward, x), x, x.shape[:-1], "log_reward")
        self.energy_evaluations += log_reward.numel()
        if not is_finite(log_reward):
            self.nonfinite += int((~log_reward.isfinite()).sum())
        return log_reward

    def score(self, x: Tensor) -> Tensor:
        score = self._check(self._guard(self.target.score, x), x, x.shape, "score")
        self.gradient_evaluations += score.numel() // self.dim
        if not is_finite(score):
            finite = score.isfinite().all(-1)
            self.nonfinite += int((~finite).sum())
            score = torch.where(finite.unsqueeze(-1), score, 0.0)
        return score

    def log_reward_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_reward, score = self._guard(self.target.log_reward_and_score, x)
        log_reward = self._check(log_reward, x, x.shape[:-1], "log_reward")
        score = self._check(score, x, x.shape, "score")
        self.energy_evaluations += log_reward.numel()
        self.gradient_evaluations += log_reward.numel()
        if not (is_finite(log_reward) and is_finite(score)):
            finite = score.isfinite().all(-1)
            self.nonfinite += int((~(finite & log_reward.isfinite())).sum())
            score = torch.where(finite.unsqueeze(-1), score, 0.0)
        return log_reward, score

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor | None:
        return self._guard(self.target.sample, n, generator)

    def to(self, device: torch.device | str) -> Self:
        self.target.to(device)
        return super().to(device)

    def _guard(self, function: Callable[..., R], *args: object) -> R:
        self.on_call()
        x = args[0] if args and isinstance(args[0], Tensor) else None
        self._evaluated = x
        try:
            return function(*args)
        except Exception as error:
            where = "" if x is None else f" (at {_culprit(function, x)})"
            raise TargetError(f"target {self.name!r} raised {type(error).__name__}: {error}{where}") from error
        finally:
            self._evaluated = None

    def doing(self) -> str:
        """The evaluation under way, "target 'name' at x ...", or nothing; from any thread."""
        x = self._evaluated
        return "" if x is None else f"target {self.name!r} at {describe_point(x)}"

    def _check(self, value: object, x: Tensor, shape: torch.Size, what: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise TargetError(f"target {self.name!r}: {what} gave {type(value).__name__}, expected a Tensor")
        if value.shape != shape:
            raise TargetError(
                f"target {self.name!r}: {what} of x {list(x.shape)} has shape {list(value.shape)}, "
                f"expected {list(shape)}"
            )
        return value if value.dtype == x.dtype else value.to(x.dtype)


def _nothing() -> None:
    pass


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def unwrap(target: Target) -> Target:
    """The target inside a CountedTarget: its evaluations are not counted, and its type tells what it is."""
    return target.target if isinstance(target, CountedTarget) else target


def describe_point(x: Tensor) -> str:
    """The first point of x [..., D] in a few words, for messages."""
    shown = x.detach().reshape(-1, x.shape[-1])[:1].flatten()
    values = ", ".join(f"{value:.6g}" for value in shown[:_SHOWN].tolist())
    more = ", …" if len(shown) > _SHOWN else ""
    others = f", the first of {x.numel() // x.shape[-1]}" if x.ndim > 1 and x.numel() > x.shape[-1] else ""
    return f"x = [{values}{more}]{others}"


def _culprit(function: Callable[..., object], x: Tensor) -> str:
    """A point of a batch at which `function` raises, found by halving; the whole batch where no half raises alone."""
    rows = x.detach().reshape(-1, x.shape[-1])
    while len(rows) > 1:
        half = len(rows) // 2
        raising = next((part for part in (rows[:half], rows[half:]) if _raises(function, part)), None)
        if raising is None:
            break
        rows = raising
    return describe_point(rows)


def _raises(function: Callable[..., object], x: Tensor) -> bool:
    try:
        function(x)
    except Exception:
        return True
    return False
