"""The part of a model runner that has its model in two halves, where that can be done."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_propd.config import ProPDConfig
from vllm_propd.engine.pruning.pruned_forward import PrunedForward
from vllm_propd.engine.pruning.split_model import UnsplittableError

logger = init_logger("vllm.propd.pruning")


class Splitting(GPUModelRunner):
    """The hooks of ``ProPDRunner`` that split its model, and try the halves.

    Attributes:
        propd: the settings; ``auto`` pruning is off in them once it has failed.
    """

    propd: ProPDConfig
    _pruned_forward: PrunedForward | None = None
    _cuts: dict[int, PrunedForward]

    def __init__(self, vllm_config: VllmConfig, device: torch.device):
        super().__init__(vllm_config, device)
        self._cuts = {}

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Loads the model, and splits it in two where trees are pruned early."""
        super().load_model(*args, **kwargs)
        self.propd, self._pruned_forward = self._split(self.propd)

    def _split(self, config: ProPDConfig) -> tuple[ProPDConfig, PrunedForward | None]:
        """Returns the model in two; by ``auto`` what cannot be split is not pruned."""
        layer = config.early_layer
        if not config.prunes or layer is None:
            return config, None
        if layer in self._cuts:
            return config, PrunedForward(config, self, self._cuts[layer])
        try:
            self._cuts[layer] = pruned_forward = PrunedForward(config, self)
        except UnsplittableError as error:
            return self._unpruned(config, error), None
        return config, pruned_forward

    def _unpruned(self, config: ProPDConfig, error: UnsplittableError) -> ProPDConfig:
        """Returns ``auto`` settings without pruning; raises the error for others."""
        if config.pruning != "auto":
            raise error
        # Not the error itself, which would be kept, with all that it has seen.
        logger.warning_once("ProPD: early pruning is off: %s", str(error))
        return config.without_pruning()

    def profile_run(self, *args: Any, **kwargs: Any) -> None:
        """Compiles the halves where vLLM compiles the model."""
        super().profile_run(*args, **kwargs)
        self.warm_up_halves()

    def try_halves(self) -> None:
        """Runs halves that have not run yet: on CPUs vLLM profiles compiled models only."""
        if self._pruned_forward is not None and not self._pruned_forward.halves.have_run:
            self.warm_up_halves()

    def warm_up_halves(self) -> None:
        """Compiles what a step with pruned trees runs, and sees that it can run at all.

        What a model keeps from layer to layer in another way than pipeline stages do shows
        here, and not in a request; on all ranks alike. Memory may be short on one alone,
        which stops the engine.

        Raises:
            UnsplittableError: the halves do not run, and pruning is not ``auto``.
        """
        if self._pruned_forward is None:
            return
        try:
            self._pruned_forward.warm_up()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            layer = self.propd.early_layer
            assert layer is not None
            self._cuts.pop(layer, None)
            unsplittable = UnsplittableError(
                f"early pruning cannot split {type(self.get_model()).__name__} after layer "
                f"{layer}: its halves fail with {type(error).__name__}: {error}; set "
                "pruning to 'off'"
            )
            unsplittable.__cause__ = error
            self._pruned_forward = None
            self.propd = self._unpruned(self.propd, unsplittable)
