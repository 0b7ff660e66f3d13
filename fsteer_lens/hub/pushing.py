"""Pushing: one value into one repository, in one commit, with a card that says what is known of it."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fsteer_lens.errors import InputError
from fsteer_lens.evaluation.gate_reports import GateReport
from fsteer_lens.ground.addresses import FILES, NAME, announce, refused
from fsteer_lens.ground.checks import clean_text, instance, optional, require_unset, switch
from fsteer_lens.hooks.objects import HookObject
from fsteer_lens.hub.cards import Told, card
from fsteer_lens.reading.activations import Activations
from fsteer_lens.steering.storage import save
from fsteer_lens.trace.trace import Trace

LIBRARY = "fsteer_lens"
CARD, CONFIG = "README.md", "config.json"


def push(
    value: HookObject | Activations | Trace,
    name: str,
    *,
    base_model: str | None = None,
    about: str | None = None,
    gates: GateReport | None = None,
    private: bool = False,
) -> str:
    """Put a steering, activations or a trace on the Hugging Face hub, with a model card.

    The repository, which is made where there is none, holds this value alone: its file, as `save`, `Activations.save`
    or `Trace.to_jsonl` writes it, a `config.json` and the card. All three go there in one commit, so that nothing is
    ever half there; where that fails a new repository stays behind empty. Pushing again is another commit, and the card
    is written anew. Labels, names of experts, and the texts of a trace become readable to whoever may read the
    repository.

    Args:
        value: a FineSteer, a baseline, a probe, an ablation or a chain that knows its model; activations; a trace.
        name: "owner/name" of the repository.
        base_model: the model's name on the hub, for the card; the fingerprint does not know it.
        about: what the card should say of the data and the purpose, which the value does not know, as plain text.
        gates: what `gate_report` measured of a steering's gate, for the card.
        private: make the repository a private one.

    Returns:
        The address of this very commit, "hf://owner/name@commit", which is printed too.

    Raises:
        InputError: no name of a repository; a steering that does not know its model; a repository that holds
            something else, or is public where a private one was asked for; no hub in reach, or it refuses.
    """
    kind = _kind(value)
    repository = _name("name", name)
    told = Told(
        base_model=optional(_name, "base_model", base_model),
        about=optional(clean_text, "about", about),
        gates=optional(instance, "gates", gates, GateReport, "what gate_report returns, or None"),
    )
    if kind != "steering":
        require_unset(f"a push of {value!r}", gates=gates)
    private = switch("private", private)
    with TemporaryDirectory() as folder:
        file = Path(folder) / FILES[kind]
        _write(value, file)
        config = {"library_name": LIBRARY, "library_version": version(LIBRARY), "holds": kind}
        contents = {
            FILES[kind]: file,
            CONFIG: (json.dumps({**config, "class": type(value).__name__}, indent=2) + "\n").encode(),
            CARD: card(value, kind, repository, told).encode(),
        }
        return announce(repository, _commit(repository, kind, contents, private))


def _kind(value: Any) -> str:
    """What a value is called on the hub; raises `InputError` unless it can go there."""
    if isinstance(value, Trace):
        return "trace"
    if isinstance(value, Activations):
        return "activations"
    instance("push", value, HookObject, "a steering, probe, ablation or chain, activations or a trace")
    if any(link.fingerprint is None for link in value.links):
        fix = "Save it with its model, save(steering, path, model=model), and push load(path)."
        raise InputError(f"{value!r} does not know its model", expected="a fingerprint", got=None, fix=fix)
    return "steering"


def _name(what: str, name: Any) -> str:
    if not isinstance(name, str) or re.fullmatch(NAME, name, re.ASCII) is None:
        raise InputError(what, expected="a name on the hub, 'owner/name'", got=repr(name))
    return name


def _write(value: HookObject | Activations | Trace, file: Path) -> None:
    if isinstance(value, Trace):
        value.to_jsonl(file)
    elif isinstance(value, Activations):
        value.save(file)
    else:
        save(value, file)


def _commit(name: str, kind: str, contents: dict[str, Any], private: bool) -> str:
    """Put these contents into a repository; the hash of the commit."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name=LIBRARY, library_version=version(LIBRARY))
    try:
        api.create_repo(name, private=private, exist_ok=True)
        info = api.model_info(name)
        _require_own(name, kind, {one.rfilename for one in info.siblings or ()})
        if private and not info.private:
            fix = "Push to another name, or make it private on its page first."
            raise InputError(f"private=True for {name}", expected="a private repository", got="a public one", fix=fix)
        done = api.create_commit(
            name,
            [CommitOperationAdd(path, content) for path, content in contents.items()],
            commit_message=f"Put the {kind} here",
            parent_commit=info.sha,
        )
    except InputError:
        raise
    except Exception as error:  # a dozen classes of its own, and those of two libraries for HTTP
        raise refused(f"cannot push to {name}", "a repository of the hub that you may write to", error) from error
    return done.oid


def _require_own(name: str, kind: str, files: set[str]) -> None:
    """Raise `InputError` where a repository holds another value, or a model, whose card would be written over."""
    taken = (set(FILES.values()) | {CARD, CONFIG}) - {FILES[kind]}
    taken -= {CARD, CONFIG} if FILES[kind] in files else set()
    if taken & files:
        expected = f"an empty repository, or one with {FILES[kind]}"
        fix = "Push to another name: every value has a repository of its own."
        raise InputError(f"{name} holds something else", expected=expected, got=sorted(taken & files), fix=fix)
