"""`python -m fsteer_lens.serving check MODEL FOLDER`: does this installation say what `generate` says?

Each steering of the folder, and none, is put on the same prompts in an engine of vLLM and in `generate`; the greedy
tokens and the gates are compared.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from fsteer_lens.errors import FsteerError, MissingDependencyError
from fsteer_lens.ground.files import read_text
from fsteer_lens.ground.tables import markdown
from fsteer_lens.ground.terminal import printable
from fsteer_lens.serving.artefacts import FOLDER, Artefact, read_artefacts
from fsteer_lens.serving.client import arguments, record_of
from fsteer_lens.serving.patches import WORKER

PROMPTS: Final = (
    "The library opens at nine and",
    "Water boils at one hundred degrees, which means that",
    "Three friends walk along the river. The first one says:",
    "Please write a short letter to a neighbour about the noise.",
)
TOLERANCE: Final = {"float32": 1e-4, "bfloat16": 5e-2}
"""How far a gate may lie from that of `generate`."""


class Checked(NamedTuple):
    """What was found of one steering.

    Attributes:
        name: of the steering; None is no steering.
        same: number of prompts whose tokens are the same.
        distance: the largest distance between gates; None where there are none.
    """

    name: str | None
    same: int
    distance: float | None


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; 0 where all is the same, 1 where something differs, 2 where it cannot be run."""
    args = _parser().parse_args(given)
    try:
        prompts = read_text(args.prompts).splitlines() if args.prompts else list(PROMPTS)
        found = check(args.model, args.folder, [line for line in prompts if line.strip()], args.tokens, args.dtype)
    except (FsteerError, OSError) as error:
        sys.stderr.write(printable(f"error: {error}\n"))
        return 2
    head = ["steering", f"same tokens, of {len(prompts)}", "largest distance of gates"]
    rows = [[one.name or "none", str(one.same), "" if one.distance is None else f"{one.distance:.1e}"] for one in found]
    sys.stdout.write(markdown(head, rows) + "\n")
    differ = [one for one in found if one.same < len(prompts) or (one.distance or 0.0) > TOLERANCE[args.dtype]]
    sys.stdout.write("They differ.\n" if differ else "They are the same.\n")
    return bool(differ)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fsteer_lens.serving", description="Steering inside vLLM.")
    command = parser.add_subparsers(required=True).add_parser("check", help="compare an engine with generate")
    command.add_argument("model", help="a folder or a name on the hub, as vLLM takes it")
    command.add_argument("folder", help="the folder of steerings")
    command.add_argument("--prompts", help="a file with a prompt on every line; default: four plain sentences")
    command.add_argument("--tokens", type=int, default=16, help="tokens to generate for each prompt")
    command.add_argument("--dtype", choices=list(TOLERANCE), default="float32", help="of the weights, on both sides")
    return parser


def check(model: str, folder: str, prompts: Sequence[str], n_tokens: int, dtype: str) -> list[Checked]:
    """Compare an engine that this starts with `generate`, without steering and under each steering of a folder.

    Raises:
        MissingDependencyError: vLLM is not installed.
        FsteerError: a steering, or the model, that cannot be read.
    """
    artefacts = read_artefacts(folder)
    os.environ[FOLDER] = str(folder)
    try:
        from vllm import LLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError("serving needs vLLM", fix="pip install 'fsteer-lens[vllm]'") from error
    import torch

    from fsteer_lens.models.loading import load

    bridge = load(model, kind="bridge", dtype=getattr(torch, dtype))
    engine = LLM(
        model, dtype=dtype, enforce_eager=True, enable_chunked_prefill=False, worker_cls=WORKER, max_model_len=512
    )
    return [_checked(engine, bridge, one, prompts, n_tokens) for one in (None, *artefacts.values())]


def _checked(engine: Any, bridge: Any, artefact: Artefact | None, prompts: Sequence[str], n_tokens: int) -> Checked:
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    from fsteer_lens.prompts.tokens import prompt_ids
    from fsteer_lens.run.generation import generate

    steering = None if artefact is None else artefact.steering
    live = "live" if steering is not None and len(steering.points) > 1 else None
    asked = {} if artefact is None else arguments(artefact.name, read=live)
    rows = [prompt_ids(bridge, prompt) for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=n_tokens, extra_args=asked or None)
    answers = engine.generate([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
    expected = generate(bridge, rows, steering, max_new_tokens=n_tokens, read=live, progress=False)
    pairs = list(zip(answers, expected, strict=True))
    same = sum(tuple(answer.outputs[0].token_ids) == one.tokens for answer, one in pairs)
    if artefact is None:
        return Checked(None, same, None)
    gates = [(record_of(answer).trace, one.trace) for answer, one in pairs]
    apart = [
        float((ours.gate[layer] - gate).abs().max())
        for found, told in gates
        for ours, theirs in [(found, told), *zip(found.parts, told.parts, strict=True)]
        for layer, gate in theirs.gate.items()
    ]
    return Checked(artefact.name, same, max(apart, default=None))


if __name__ == "__main__":
    raise SystemExit(main())
