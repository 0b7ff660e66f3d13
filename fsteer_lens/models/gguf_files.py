"""Models in GGUF files, llama.cpp's format: read by transformers, with the package gguf."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fsteer_lens.errors import InputError, MissingDependencyError


def read_gguf(path: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The Hugging Face model and tokenizer of a GGUF file, its weights in `dtype`.

    transformers takes it for a quantised model, although the weights are plain by then, and refuses to save it. So it
    is made anew, as an ordinary model.

    Raises:
        MissingDependencyError: gguf is not installed.
        InputError: no such file.
    """
    if find_spec("gguf") is None:
        raise MissingDependencyError(
            f"{path.name} is a GGUF file",
            expected="the package gguf",
            got="not installed",
            fix='pip install "fsteer-lens[gguf]"',
        )
    if not path.is_file():
        raise InputError("no such file", expected="a .gguf file", got=str(path))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    with _parsed_once():
        read = AutoModelForCausalLM.from_pretrained(**where, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):  # no weights are drawn that would only be replaced
        model = type(read)(type(read.config).from_dict(settings))
    weights = {name: weight.to(dtype) for name, weight in read.state_dict().items()}
    model.load_state_dict(weights, assign=True)
    for name, buffer in read.named_buffers():  # those that no file holds, such as rotary frequencies
        holder, _, own = name.rpartition(".")
        setattr(model.get_submodule(holder), own, buffer)
    model.tie_weights()
    model.generation_config = read.generation_config
    return model.eval(), tokenizer


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Let gguf parse a file once, and make the names of an architecture's tensors once.

    transformers asks for the one three times, for configuration, weights and tokenizer, and for the other at every
    module of the model: together more than half of the time that reading takes.
    """
    import gguf

    made = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
    for name, make in made.items():
        setattr(gguf, name, cache(make))
    try:
        yield
    finally:
        for name, make in made.items():
            setattr(gguf, name, make)
