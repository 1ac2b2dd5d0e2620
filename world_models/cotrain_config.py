"""Settings of co-training. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simtoreal.policies.config import DiffusionConfig, TrainerConfig
from simtoreal.world_models.config import WorldModelConfig, WorldModelTrainerConfig


@dataclass(frozen=True, kw_only=True)
class KeyframeConfig:
    """Which real frames in the middle of episodes imagined rollouts also begin in (KIR, WoVR §3.2).

    Raises:
        ValueError: a value is out of range.
    """

    share: float = 1 / 3
    """Share of the rollouts' starts that are key frames, the others being first frames; 0 uses none. With many more,
    the policy learns the last centimetres only."""
    lead_steps: tuple[int, int] = (4, 12)
    """A rollout begins this many control steps before the contact or failure (range to draw from)."""
    margin_steps: int = 15
    """Control steps that a key frame at least lies before the success of its episode."""
    remaining_steps: int = 30
    """Control steps that at least remain after a key frame before time runs out."""
    per_episode: int = 3
    """Key frames of one episode at most."""
    most: int = 400
    """Key frames in all at most, half of them from failures, if there are as many."""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise ValueError(f"share is {self.share}; expected 0 (no key frames) to less than 1")
        if not 0 <= self.lead_steps[0] <= self.lead_steps[1]:
            raise ValueError(f"lead_steps is {self.lead_steps}; expected (low, high) with 0 <= low <= high")
        if min(self.margin_steps, self.remaining_steps, self.per_episode, self.most) < 1:
            raise ValueError("margin_steps, remaining_steps, per_episode and most must be at least 1")


@dataclass(frozen=True, kw_only=True)
class WovrConfig:
    """Reinforcement inside a learned video world model (WoVR, arXiv 2602.13977).

    Raises:
        ValueError: a value is out of range.
    """

    imitation_rollouts: int = 0
    """Real episodes of the base policy, without further noise. Those that succeed are demonstrations, too: before any
    reinforcement a policy is trained anew on all demonstrations (filtered behaviour cloning). WoVR has no such stage; 0
    leaves it out."""
    imitation: TrainerConfig = field(default_factory=lambda: TrainerConfig(steps=2400, batch_size=32))
    """That training. Where the base policy learned from more samples, its steps and batch size are taken instead, so
    that what takes its place has not learned less."""
    imitation_filter: str | None = None
    """Imitate only the steps that this filter keeps (simtoreal data filter), in the folders of demonstrations that have
    it."""
    rollouts: int = 150
    """Real episodes that the world model learns from, beside the demonstrations and those above, of the policy that
    reinforcement begins with."""
    refreshes: int = 1
    """How often the improved policy collects, and model and classifier are trained on (PACE); 0 keeps the first."""
    refresh_rollouts: int = 100
    """Real episodes of the improved policy per refresh."""
    iterations: int = 30
    """Iterations of reinforcement with each world model; 0 trains no world model and imitates only."""
    ranked_starts: int = 0
    """Initial conditions, the first of the measurement and no more than it has, from which the policy acts eight times
    in the real world, with the noise of reinforcement, before it practises in a world model: does the model rank these
    rollouts as reality does? 0 leaves it out. These real episodes are counted as evaluation."""
    calibrated_episodes: int = 0
    """Real episodes of the policy that practises, at most, whose beginnings it begins in once more, in imagination: the
    classifier's threshold rises until it succeeds no more often there than it really did. 0 keeps the one that is best
    for held-out episodes under their real actions, which says little about a policy that acts in imagination."""
    graded: bool = False
    """Reward not only success but how close to it a rollout came (log-odds of the classifier): of rollouts that all
    fail, some are better than others, and a classifier that errs near its threshold still orders rollouts well."""
    explore: bool = True
    """Collect for the world model with the noise of reinforcement, so that it knows what that does."""
    first_seed: int = 50_000_000
    """First initial condition of the real episodes to learn from; the others follow."""
    keyframes: KeyframeConfig = field(default_factory=KeyframeConfig)
    """Where imagined rollouts begin."""
    imagined_envs: int = 64
    """Episodes imagined together."""
    anchor_batch: int = 64
    """Windows of demonstrations per update, if ``reinforcement.anchor_weight`` is positive (WoVR has no anchor)."""
    world_model: WorldModelConfig = field(default_factory=WorldModelConfig)
    """Sizes of the world model."""
    world_model_trainer: WorldModelTrainerConfig = field(default_factory=WorldModelTrainerConfig)
    """Training of the world model; a refresh takes ``fine_tune_share`` of its steps."""

    def __post_init__(self) -> None:
        sizes = ("rollouts", "refresh_rollouts", "imagined_envs", "anchor_batch")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        counts = ("refreshes", "first_seed", "imitation_rollouts", "iterations", "ranked_starts", "calibrated_episodes")
        for name in counts:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 or more")
        if not self.iterations and not self.imitation_rollouts:
            raise ValueError("iterations is 0, which only imitates; that needs imitation_rollouts, e.g. 300")


@dataclass(frozen=True, kw_only=True)
class RlcoConfig:
    """Imitation of few real and many simulated demonstrations, then reinforcement with an anchor on the real ones
    (RL-Co, arXiv 2602.12628). The anchor's weight β is ``reinforcement.anchor_weight``; 0 leaves it out.

    Raises:
        ValueError: a value is out of range.
    """

    real_share: float = 0.5
    """Probability of drawing a window from the real demonstrations while imitating; 1 uses no simulated ones."""
    imitation: TrainerConfig = field(default_factory=TrainerConfig)
    """Training of the first stage."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    """Policy of the first stage."""
    world: Literal["simulation", "world_model"] = "simulation"
    """Where the second stage acts: in the simulation without the differences of --real, or in --world-model."""
    randomization: str | None = None
    """Domain randomisation of that simulation."""
    iterations: int = 40
    """Iterations of the second stage; 0 ends after imitation."""
    anchor_batch: int = 64
    """Windows of real demonstrations per update."""
    envs: int = 32
    """Episodes of the second stage run together."""

    def __post_init__(self) -> None:
        if not 0 < self.real_share <= 1:
            raise ValueError(f"real_share is {self.real_share}; expected a share in (0, 1]")
        if self.iterations < 0 or min(self.anchor_batch, self.envs) < 1:
            raise ValueError("iterations must not be negative, anchor_batch and envs at least 1")


@dataclass(frozen=True, kw_only=True)
class MeasurementConfig:
    """How success is measured: always from the same initial conditions, so that everything is paired.

    Raises:
        ValueError: a value is out of range.
    """

    episodes: int = 200
    """Initial conditions."""
    first_seed: int = 100_000
    """The first of them; the others follow. Nothing may have been learned from them."""
    every: int | None = None
    """Iterations of reinforcement between measurements; None measures only where a stage ends."""
    videos: int = 2
    """Videos of successes, and of failures, per measurement; also of real and imagined episodes side by side."""

    def __post_init__(self) -> None:
        if self.episodes < 1 or min(self.first_seed, self.videos) < 0:
            raise ValueError("episodes must be at least 1, first_seed and videos not negative")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every is {self.every}; expected at least 1, or none")
