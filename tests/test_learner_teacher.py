"""The adaptive teacher: its reward against naive transcriptions, and what it converges to where that is known."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from driftstream.actors.policy import DiffusionPolicy, PolicyConfig
from driftstream.actors.rollout import rollout, score_trajectories
from driftstream.actors.weights import TEACHER, published_tensors
from driftstream.envs.errors import ConfigError
from driftstream.envs.grids import uniform_grid
from driftstream.envs.processes import BrownianProcess
from driftstream.envs.targets import CountedTarget
from driftstream.envs.targets_gmm import GaussianMixture
from driftstream.eval.distances import wasserstein2
from driftstream.launch.config import resolve
from driftstream.launch.methods import load_method
from driftstream.launch.roles import build_learner, build_local_actors
from driftstream.learner.learner import GUIDED_STEPS, Learner
from driftstream.learner.losses import Paths
from driftstream.learner.objectives import log_weights, teacher_log_reward, teacher_reward
from driftstream.learner.optim import OptimConfig
from driftstream.learner.teacher import Teacher, TeacherConfig, teacher_policy


@pytest.mark.parametrize("weight", [1.0, 20.0])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_reward_is_the_papers(alpha: float, weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    residual = 3.0 * torch.randn(40, dtype=torch.float64, generator=generator)
    residual[0] = 0.0
    log_reward = 5.0 * torch.randn(40, dtype=torch.float64, generator=generator)
    for delta, log_r, r_t, log_target in zip(
        residual.tolist(),
        log_reward.tolist(),
        teacher_reward(residual, weight).tolist(),
        teacher_log_reward(residual, log_reward, alpha, weight).tolist(),
        strict=True,
    ):
        naive = math.log(1.001 + (weight if delta > 0 else 1.0) * 0.5 * delta**2)
        assert r_t == pytest.approx(naive, rel=1e-12)
        assert log_target == pytest.approx(math.log(naive) + alpha * log_r, rel=1e-12)


def test_no_gradient_reaches_the_student_through_the_reward() -> None:
    residual = torch.ones(3, requires_grad=True)
    assert not teacher_reward(residual, 20.0).requires_grad


def make(target: str = "gmm9", **changes: object) -> Learner:
    method = load_method("teacher").config
    config = replace(method, target=target, grid=replace(method.grid, sampling_steps=6))
    config = replace(config, **{"policy": replace(config.policy, hidden=8, harmonics=4), **changes})
    return build_learner(resolve(config), seed=3)


@pytest.mark.parametrize("objective", ["trajectory_balance", "vargrad"])
@pytest.mark.parametrize("langevin", [False, True])
def test_the_teacher_is_trained_on_the_students_residuals_of_the_same_paths(objective: str, langevin: bool) -> None:
    config = load_method("teacher").config
    learner = make(
        objective=replace(config.objective, name=objective),
        policy=replace(config.policy, hidden=8, harmonics=4, langevin=langevin),
        learner=replace(config.learner, batch_size=16),
    )
    teacher = learner.teacher
    assert teacher is not None
    times = uniform_grid(6)
    batch = rollout(learner.policy, learner.process, learner.target, times, 16, exploration_std=1.0)
    learner.log_z.data.fill_(0.7)
    learner._log_z_started = True
    paths = Paths(batch["states"], times, batch["log_reward"], batch.get("scores", None))
    log_pf, log_pb = score_trajectories(learner.policy, learner.process, *vars_of(paths))
    residual = (log_weights(log_pf, log_pb, paths.log_reward) - 0.7).detach()
    teacher_pf, teacher_pb = score_trajectories(teacher.policy, teacher.process, *vars_of(paths))
    expected = teacher_log_reward(residual, paths.log_reward, 0.5, 20.0)
    log_weight = log_weights(teacher_pf, teacher_pb, expected).detach()
    loss = (log_weight.median() - log_weight).square().mean()
    metrics = learner.learn_fresh(batch, 0.0, "teacher")
    assert metrics is not None
    assert float(metrics["teacher/loss"]) == pytest.approx(float(loss), rel=1e-4)


def vars_of(paths: Paths) -> tuple[Tensor, Tensor, Tensor | None]:
    return paths.states, paths.times, paths.scores


def test_replay_by_loss_holds_the_residuals_of_the_last_visit() -> None:
    learner = make()
    times = uniform_grid(6)
    batch = rollout(learner.policy, learner.process, learner.target, times, 300, exploration_std=2.0)
    learner.learn_fresh(batch, 0.0, "teacher")
    rows = learner.replay._buffer[:]
    before = rows["priority"].clone()
    assert bool(before.isfinite().all())
    assert float(before.max()) < 1e6
    learner.learn_replayed(0.0)
    after = learner.replay._buffer[:]["priority"]
    changed = after != before
    assert 0 < int(changed.sum()) < 300
    # The largest losses are drawn first, hence are the ones that were measured again.
    assert float(before[changed].mean()) > float(before[~changed].mean())


def test_a_teacher_may_learn_at_every_nth_step_only() -> None:
    learner = make(teacher=TeacherConfig(every=3))
    assert learner.teacher is not None
    batch = rollout(learner.policy, learner.process, learner.target, uniform_grid(6), 4, exploration_std=1.0)
    learned = ["teacher/loss" in (learner.learn_fresh(batch, 0.0) or {}) for _ in range(7)]
    assert learned == [True, False, False, True, False, False, True]


def test_a_teacher_may_guide_a_part_of_training_only() -> None:
    learner = make(teacher=TeacherConfig(until=0.5))
    batch = rollout(learner.policy, learner.process, learner.target, uniform_grid(6), 4, exploration_std=1.0)
    learned = ["teacher/loss" in (learner.learn_fresh(batch, progress) or {}) for progress in (0.0, 0.49, 0.5, 1.0)]
    assert learned == [True, True, False, False]
    method = load_method("teacher").config
    config = resolve(replace(method, target="gmm9", teacher=TeacherConfig(until=0.5)))
    actor = build_local_actors(config, build_learner(config, 0), [5, 6, 7])[2]
    behaviours = []
    for progress in (0.49, 0.5):
        actor.context.progress = progress
        behaviours.append(actor.explorer.behaviour(actor.context))
    assert behaviours == [actor.context.teacher, actor.context.policy]


def test_a_student_may_learn_where_the_teachers_paths_end_and_not_the_paths() -> None:
    learner = make(teacher=TeacherConfig(until=0.5, student_learns="ends"))
    assert learner.teacher is not None
    batch = rollout(learner.policy, learner.process, learner.target, uniform_grid(6), 4, exploration_std=1.0)
    before, of_teacher = (
        {name: value.clone() for name, value in policy.state_dict().items()}
        for policy in (learner.policy, learner.teacher.policy)
    )
    log_weight = learner.log_weight(Paths(batch["states"], uniform_grid(6), batch["log_reward"]))
    assert learner.learn_fresh(batch, 0.49, "teacher") is None
    assert (learner.step, len(learner.terminals)) == (0, 4)
    assert float(learner.log_z.detach()) == pytest.approx(float(log_weight.median()))
    assert all(torch.equal(value, before[name]) for name, value in learner.policy.state_dict().items())
    changed = [not torch.equal(v, of_teacher[name]) for name, v in learner.teacher.policy.state_dict().items()]
    assert any(changed)
    assert learner.statistics.metrics()["kind/teacher/share"] == 0.0
    for progress, kind in ((0.49, "explore"), (0.5, "teacher")):
        assert learner.learn_fresh(batch, progress, kind) is not None


@pytest.mark.parametrize("method", ["teacher+ls", "teacher+lp+ls"])
def test_every_kind_of_batch_teaches_the_teacher(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_method(method).config
    policy = replace(config.policy, hidden=8, harmonics=4)
    config = replace(config, target="gmm9", policy=policy, grid=replace(config.grid, sampling_steps=4))
    learner = build_learner(resolve(replace(config, learner=replace(config.learner, batch_size=4))), seed=0)
    assert learner.teacher is not None
    actors = build_local_actors(resolve(config), learner, [5, 6, 7])
    batches = [(actor.kind, actor.generate(0.0)[:4]) for actor in actors]
    learner.refined.add(batches[0][1]["states"][:, -1], batches[0][1]["log_reward"])
    lessons: dict[str, int] = {}
    monkeypatch.setattr(Teacher, "learn", lambda *_: lessons.update({turn: lessons.get(turn, 0) + 1}) or {})
    for n in range(60):
        kind, batch = batches[n // 2 % 3]
        turn = "replay" if n % 2 else kind
        if turn == "replay":
            learner.learn_replayed(0.0)
        else:
            learner.learn_fresh(batch, 0.0, kind)
    assert lessons == {"explore": 4, "teacher": 2, "replay": 6}


def test_a_saved_teacher_knows_what_it_has_seen() -> None:
    first, second = make(teacher=TeacherConfig(every=5)), make(teacher=TeacherConfig(every=5))
    batch = rollout(first.policy, first.process, first.target, uniform_grid(6), 4, exploration_std=1.0)
    for _ in range(3):
        first.learn_fresh(batch, 0.0)
    second.load_state(*first.state())
    learned = ["teacher/loss" in (second.learn_fresh(batch, 0.0) or {}) for _ in range(3)]
    assert learned == [False, False, True]


def test_a_run_of_teachers_alone_asks_for_seeds_until_there_is_something_to_replay() -> None:
    learner = make(teacher=TeacherConfig(until=0.5, student_learns="ends"))
    assert learner.needs_replay(0.49)
    assert not learner.needs_replay(0.5)
    batch = rollout(learner.policy, learner.process, learner.target, uniform_grid(6), 300, exploration_std=1.0)
    learner.learn_fresh(batch, 0.0, "teacher")
    assert not learner.needs_replay(0.49)


def test_a_student_that_learns_ends_needs_replay() -> None:
    method = load_method("teacher").config
    config = replace(method, target="gmm9", teacher=TeacherConfig(student_learns="ends"))
    with pytest.raises(ConfigError, match=r"teacher\.student_learns = 'ends'.*replay\.ratio = 0"):
        resolve(replace(config, replay=replace(method.replay, ratio=0.0)))
    with pytest.raises(ConfigError, match=r"teacher\.student_learns = 'both'"):
        TeacherConfig(student_learns="both")  # type: ignore[arg-type]


def test_published_weights_hold_both_samplers() -> None:
    learner = make()
    assert learner.teacher is not None
    tensors = learner.published_tensors()
    of_teacher = {name.removeprefix(TEACHER) for name in tensors if name.startswith(TEACHER)}
    assert of_teacher == learner.teacher.policy.state_dict().keys()
    assert tensors.keys() == published_tensors(learner.policy, learner.teacher.policy).keys()


def test_a_saved_teacher_goes_on_exactly() -> None:
    def step(learner: Learner) -> float:
        batch = build_local_actors(config, learner, [5, 6, 7])[2].generate(0.0)
        metrics = learner.learn_fresh(batch, 0.0, "teacher")
        assert metrics is not None
        return float(metrics["teacher/loss"])

    method = load_method("teacher").config
    config = resolve(replace(method, target="gmm9", grid=replace(method.grid, sampling_steps=6)))
    first, second = build_learner(config, 1), build_learner(config, 2)
    step(first)
    second.load_state(*first.state())
    assert step(first) == step(second)


def test_what_a_teacher_cannot_learn_from_is_refused() -> None:
    method = load_method("teacher").config
    objective = replace(method.objective, name="subtrajectory_balance")
    with pytest.raises(ConfigError, match=r"^objective.name = "):
        resolve(replace(method, target="gmm9", objective=objective))


def test_refiners_beside_a_teacher_are_trained_on() -> None:
    method = load_method("teacher").config
    searched = replace(method, target="gmm9", refiner=replace(method.refiner, count=1))
    assert resolve(searched).replay.source == "refined"
    idle = replace(searched, replay=replace(method.replay, source="terminals"))
    with pytest.raises(ConfigError, match=r"^replay.source = 'terminals'"):
        resolve(idle)


def test_the_students_ends_are_replayed_once_no_other_actor_sends_any() -> None:
    learner = make()
    batch = rollout(learner.policy, learner.process, learner.target, uniform_grid(6), 4, exploration_std=1.0)
    learner.learn_fresh(batch, 0.0)
    assert len(learner.terminals) == 0
    learner.learn_fresh(batch, 0.0, "teacher")
    assert len(learner.terminals) == 4
    learner.step += GUIDED_STEPS
    learner.learn_fresh(batch, 0.0)
    assert len(learner.terminals) == 8


def test_undefined_weights_do_not_start_the_teachers_log_z() -> None:
    learner = make()
    teacher = learner.teacher
    assert teacher is not None
    batch = rollout(learner.policy, learner.process, learner.target, uniform_grid(6), 4, exploration_std=1.0)
    paths = Paths(batch["states"], uniform_grid(6), batch["log_reward"])
    metrics = teacher.learn(paths, torch.full((4,), torch.nan), 0.0)
    assert metrics["teacher/skipped"] == 1
    assert bool(teacher.log_z.isfinite())
    teacher.learn(paths, torch.ones(4), 0.0)
    assert teacher.skipped == 1


@pytest.mark.parametrize("field", ["alpha", "weight", "rate_factor", "clip_grad_norm"])
def test_bad_configuration_is_named(field: str) -> None:
    with pytest.raises(ConfigError, match=f"teacher.{field} = -1"):
        TeacherConfig(**{field: -1.0})


def test_a_teacher_of_a_frozen_student_converges_to_its_density() -> None:
    """The student is Brownian motion, whose residual is a function of the end alone: the density is known."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    process, config = BrownianProcess(4.0), TeacherConfig()
    means = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [-2.0, -2.0], [2.0, -2.0]])
    target = CountedTarget(GaussianMixture("corners", means, variance=0.5))
    student_log_z = 0.0

    def residual_at(x: Tensor) -> Tensor:
        reference = -x.square().sum(-1) / (2 * 4.0) - math.log(2 * math.pi * 4.0)
        return target.log_reward(x) - reference - student_log_z

    axis = torch.linspace(-7.0, 7.0, 281)
    grid = torch.cartesian_prod(axis, axis)
    log_density = teacher_log_reward(residual_at(grid), target.log_reward(grid), config.alpha, config.weight)

    def exact(n: int) -> Tensor:
        cell = torch.multinomial(log_density.softmax(0), n, replacement=True, generator=generator)
        return grid[cell] + (axis[1] - axis[0]) * (torch.rand(n, 2, generator=generator) - 0.5)

    student = DiffusionPolicy(2, PolicyConfig())
    policy = DiffusionPolicy(2, teacher_policy(PolicyConfig(learned_variance=True)))
    optim = OptimConfig(learning_rate=1e-3, schedule="cosine", ema_decay=0.0)
    teacher, times = Teacher(policy, process, config, optim), uniform_grid(8)
    steps = 400
    for step in range(steps):
        behaviour, std = (student, 1.0) if step % 3 == 0 else (policy, 1.0 if step < steps // 2 else 0.0)
        batch = rollout(behaviour, process, target, times, 128, exploration_std=std, generator=generator)
        paths = Paths(batch["states"], times, batch["log_reward"])
        # What the learner computes from whole paths is the function of the end.
        log_pf, log_pb = score_trajectories(student, process, paths.states, times)
        residual = (log_weights(log_pf, log_pb, paths.log_reward) - student_log_z).detach()
        if step == 0:
            torch.testing.assert_close(residual, residual_at(paths.states[:, -1]), rtol=1e-3, atol=1e-3)
        teacher.learn(paths, residual, step / steps)
    samples = rollout(policy, process, target, times, 1000, generator=generator)["states"][:, -1]
    floor = wasserstein2(exact(1000), exact(1000))
    assert wasserstein2(samples, exact(1000)) < 2 * floor
    # Which says something: the student is far from it, and so is the target.
    away = rollout(student, process, target, times, 1000, generator=generator)["states"][:, -1]
    assert wasserstein2(away, exact(1000)) > 2 * floor
