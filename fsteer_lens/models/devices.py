"""Where token ids go: the device of a model, which is none that its weights wait on."""

from typing import Any

import torch

from fsteer_lens.models.classes import SteerableModel


def device_of(model: SteerableModel) -> torch.device:
    """The device on which a model takes its token ids.

    TransformerLens gives that of the first parameter, which is "meta" where accelerate fetches this one from disk.
    """
    device = torch.device(model.cfg.device or "meta")
    network = getattr(model, "original_model", model)
    return device_of_weights(network) if device.type == "meta" else device


def device_of_weights(network: Any) -> torch.device:
    """The device of the first weight that is in memory; the CPU where all are elsewhere."""
    return next((one.device for one in network.parameters() if not one.is_meta), torch.device("cpu"))
