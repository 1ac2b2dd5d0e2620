"""robomimic's own behaviour-cloning algorithms (Mandlekar et al. 2021) behind our policy interface.

Networks and losses are robomimic 0.3.0's; data, trainer, checkpoints and rollouts are ours, so its results stand
beside ours under equal conditions. The recurrent types run in robomimic's open-loop mode (``algo.rnn.open_loop``):
from the newest observation the network unrolls a chunk of actions, which is what a window holds and what keeps the
policy free of hidden state between calls.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, MissingDependencyError
from simtoreal.policies.base import Generators, Policy
from simtoreal.policies.config import PolicyConfig
from simtoreal.policies.normalization import ACTIONS, CLIP, Statistics

INSTALL = "pip install --no-deps -r requirements/robomimic.txt"

# Images are cropped at random to 76/84 of their size, robomimic's setting for its image datasets.
_CROP = 76 / 84
_RESNET_STRIDE = 32

# The registration lives as long as this reference.
_torchvision_operators: torch.library.Library | None = None


@dataclass(frozen=True, kw_only=True)
class RobomimicConfig(PolicyConfig):
    """Settings of robomimic's behaviour cloning; everything not named here has robomimic's default."""

    type: Literal["robomimic/bc", "robomimic/bc_rnn"] = "robomimic/bc_rnn"
    """``robomimic/bc``: one action per observation; ``robomimic/bc_rnn``: a chunk from an LSTM."""
    observation_steps: int = 1
    """Observations given to the policy; always 1."""
    horizon: int = 10
    """Actions predicted at once (control steps); 1 for ``robomimic/bc``."""
    execute_steps: int = 5
    """Actions of each prediction that are executed before the next one (control steps)."""
    hidden: int = 400
    """Width of the LSTM (its two layers)."""
    layers: tuple[int, ...] = (1024, 1024)
    """Widths of the perceptron between features and action."""
    action_reach: float = CLIP
    """Normalised action at which robomimic's tanh ends: that of our own policies, so that none learns cut targets that
    the other does not. Checkpoints that do not name it were trained with 1."""

    OLDER: ClassVar[Mapping[str, Any]] = {"action_reach": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.observation_steps != 1:
            raise ValueError(f"observation_steps is {self.observation_steps}; {self.type} reads 1")
        if not self.recurrent and self.horizon != 1:
            raise ValueError(f"horizon is {self.horizon}; {self.type} predicts 1 action (set execute_steps to 1 too)")
        if self.hidden < 1 or any(width < 1 for width in self.layers):
            raise ValueError("hidden and layers must be positive")
        if not 0 < self.action_reach <= CLIP:
            raise ValueError(f"action_reach is {self.action_reach}; expected more than 0 and at most {CLIP}")

    @property
    def recurrent(self) -> bool:
        """Whether an LSTM unrolls the chunk."""
        return self.type == "robomimic/bc_rnn"


@dataclass(frozen=True, kw_only=True)
class RobomimicBCConfig(RobomimicConfig):
    """The same for ``robomimic/bc``, which knows no chunks."""

    type: Literal["robomimic/bc"] = "robomimic/bc"
    """Regression of one action."""
    horizon: int = 1
    """Actions predicted at once; always 1."""
    execute_steps: int = 1
    """Always 1."""


def import_robomimic() -> None:
    """Import robomimic, working around what breaks it in a current environment.

    It needs torchvision, whose compiled operators do not load with another build of torch (the registry has the
    CUDA build only). robomimic uses none of them, so declaring the two that torchvision's Python code looks up is
    enough.

    Raises:
        MissingDependencyError: something is not installed; the message has the command.
    """
    global _torchvision_operators
    try:
        try:
            import torchvision
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
                del sys.modules[name]
            _torchvision_operators = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                _torchvision_operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            import torchvision  # noqa: F401
        with contextlib.redirect_stdout(io.StringIO()):  # it prints about a missing private macro file
            import robomimic.algo  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(f"robomimic cannot be imported ({error}). Install it with: {INSTALL}") from error


class RobomimicPolicy(Policy):
    """One of robomimic's behaviour-cloning algorithms.

    Args:
        config: see :class:`RobomimicConfig`.
        embodiment, statistics: see :class:`Policy`.

    Raises:
        MissingDependencyError: robomimic is not installed.
        ConfigError: the images are too small for robomimic's encoder.
    """

    config_type: ClassVar[type[PolicyConfig]] = RobomimicConfig
    config: RobomimicConfig

    def __init__(self, config: RobomimicConfig, embodiment: Embodiment, statistics: Mapping[str, Statistics]) -> None:
        super().__init__(config, embodiment, statistics)
        import_robomimic()
        self._algo: Any = _build(config, embodiment, {key: self.normalizer.dim(key) for key in config.state_keys})
        self.nets: nn.ModuleDict = self._algo.nets
        self._shared: _EncodeOnce | None = None
        if config.recurrent:
            self._shared = _EncodeOnce(self.nets["policy"].nets["encoder"])
            self.nets["policy"].nets["encoder"] = self._shared

    def loss(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """See :meth:`Policy.loss`."""
        reach = self.config.action_reach
        actions = self.normalizer.normalize(ACTIONS, batch["actions"], clip=reach) / reach
        prepared = self._prepare(batch["observation"], actions)
        predictions = self._algo._forward_training(prepared)
        if self.config.recurrent:
            # robomimic's losses know no mask: steps after the episode's end are given what was predicted.
            guessed = predictions["actions"].detach().to(actions.dtype)
            prepared["actions"] = torch.where(batch["action_mask"][..., None], prepared["actions"], guessed)
        losses = self._algo._compute_losses(predictions, prepared)
        return {"loss": losses["action_loss"], **{key: losses[key] for key in losses if key != "action_loss"}}

    def predict(self, observation: dict[str, Tensor], instruction: Sequence[str], generator: Generators) -> Tensor:
        """See :meth:`Policy.predict`; these policies are deterministic."""
        rows = next(iter(observation.values())).shape[0]
        placeholder = torch.zeros(rows, self.config.horizon, self._algo.ac_dim, device=self.device)
        inputs = self._prepare(observation, placeholder)["obs"]
        chunk: Tensor = self.nets["policy"](obs_dict=inputs) * self.config.action_reach
        return self.actions_from_normalized(chunk.reshape(rows, self.config.horizon, -1))

    def _prepare(self, observation: Mapping[str, Tensor], actions: Tensor) -> dict[str, Any]:
        """robomimic's training batch of the newest observations: images float (B, 1, 3, H, W) in [0, 1]."""
        inputs: dict[str, Tensor] = OrderedDict()
        for key in self.config.image_keys:
            inputs[key] = observation[key][:, -1:].permute(0, 1, 4, 2, 3).float() / 255
        for key in self.config.state_keys:
            inputs[key] = self.normalizer.normalize(key, observation[key][:, -1:])
        self._algo.device = actions.device
        if self._shared is not None:
            self._shared.repeats = actions.shape[1]
        prepared: dict[str, Any] = self._algo.process_batch_for_training({"obs": inputs, "actions": actions})
        return prepared


class RobomimicBCPolicy(RobomimicPolicy):
    """``robomimic/bc``, with settings that fit it."""

    config_type: ClassVar[type[PolicyConfig]] = RobomimicBCConfig


class _EncodeOnce(nn.Module):
    """Encodes an observation that robomimic's open-loop mode repeats for every action of the chunk only once."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.repeats = 1

    def forward(self, **inputs: Any) -> Tensor:
        """Features of ``(B * repeats, ...)`` inputs whose consecutive ``repeats`` rows are equal."""
        once = {
            group: {key: value[:: self.repeats] for key, value in content.items()} if content else content
            for group, content in inputs.items()
        }
        features: Tensor = self.encoder(**once)
        return features.repeat_interleave(self.repeats, dim=0)


def _build(config: RobomimicConfig, embodiment: Embodiment, dims: Mapping[str, int]) -> Any:
    """robomimic's algorithm object for our observations and actions."""
    from robomimic.algo import algo_factory
    from robomimic.config import config_factory
    from robomimic.utils import obs_utils

    settings = config_factory("bc")
    with settings.values_unlocked():
        settings.observation.modalities.obs.rgb = list(config.image_keys)
        settings.observation.modalities.obs.low_dim = list(config.state_keys)
        settings.algo.actor_layer_dims = tuple(config.layers)
        settings.algo.rnn.enabled = config.recurrent
        settings.algo.rnn.open_loop = config.recurrent
        settings.algo.rnn.horizon = config.horizon
        settings.algo.rnn.hidden_dim = config.hidden
    shapes: dict[str, list[int]] = OrderedDict()
    for camera in embodiment.cameras:
        if (key := f"{camera.name}_image") in config.image_keys:
            shapes[key] = [3, camera.height, camera.width]
    if shapes:
        height, width = (int(_CROP * min(shape[axis] for shape in shapes.values())) for axis in (1, 2))
        if min(height, width) <= _RESNET_STRIDE:
            raise ConfigError(
                f"images cropped to {height} x {width} pixels shrink to one cell in robomimic's ResNet-18, whose "
                f"spatial softmax then says nothing; {config.type} needs more than {_RESNET_STRIDE / _CROP:.0f} pixels."
            )
        rgb = settings.observation.encoder.rgb
        with settings.values_unlocked():
            rgb.obs_randomizer_class = "CropRandomizer"
            rgb.obs_randomizer_kwargs.crop_height = height
            rgb.obs_randomizer_kwargs.crop_width = width
            rgb.obs_randomizer_kwargs.num_crops = 1
            rgb.obs_randomizer_kwargs.pos_enc = False
    shapes.update({key: [dim] for key, dim in dims.items()})
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # It prints its configuration, and torchvision warns about the name of an argument that robomimic passes.
        warnings.simplefilter("ignore", UserWarning)
        obs_utils.initialize_obs_utils_with_config(settings)
        return algo_factory("bc", settings, shapes, embodiment.action.dim, torch.device("cpu"))
