"""Loading a model by name or from a folder."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from fsteer_lens.errors import InputError
from fsteer_lens.models.classes import Kind, SteerableModel
from fsteer_lens.models.conversion import from_hf


def load(
    name_or_folder: str | Path, kind: Kind | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> SteerableModel:
    """Load a Hugging Face model by its hub name or from a local folder, without processing its weights.

    Raises:
        InputError: no such folder, and no such name on the hub (or no hub in reach).
        MissingDependencyError: the installed TransformerLens lacks the class asked for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _no_bars() if Path(name_or_folder).is_dir() else nullcontext():
            hf_model = AutoModelForCausalLM.from_pretrained(name_or_folder, dtype=dtype)
            tokenizer = AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot load the model {str(name_or_folder)!r}",
            expected="a folder with config.json, weights and tokenizer, or a name on the Hugging Face hub",
            got=str(error).splitlines()[0],
            fix="Check the path; for a name, check the network and `huggingface-cli login` for gated models.",
        ) from error
    return from_hf(hf_model.to(device), tokenizer, kind=kind)  # pyright: ignore[reportArgumentType]


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which are for downloads: a folder is read in no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
