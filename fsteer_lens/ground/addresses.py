"""Addresses on the Hugging Face hub: what a repository holds, fetched into its cache and read as a file from there."""

import os
import re
from pathlib import Path

from fsteer_lens.errors import InputError
from fsteer_lens.ground.files import path_of
from fsteer_lens.ground.foreign import told

NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
ADDRESS = re.compile(rf"hf://(?P<name>{NAME})(@(?P<revision>[A-Za-z0-9](?:(?!\.\.)[\w./-])*))?", re.ASCII)
FILES = {
    "steering": "steering.safetensors",
    "activations": "activations.safetensors",
    "trace": "trace.jsonl",
}
"""What a repository's one value is called there, by what it is."""
READERS = {"steering": "fsteer_lens.load", "activations": "Activations.load", "trace": "Trace.from_jsonl"}
"""What reads each of them."""


def local_path(path: str | os.PathLike[str], kind: str) -> Path:
    """The file that a path or an address on the hub stands for; a path is given back as it is.

    What an address stands for is fetched where the hub's cache lacks it, and with HF_HUB_OFFLINE=1 only looked up
    there. The commit that was found is printed, as an address that gives the same file again.

    Args:
        path: a file, "hf://owner/name" or "hf://owner/name@revision": a branch, a tag or a commit.
        kind: what should be there, one of `FILES`.

    Raises:
        InputError: another address, or the hub, or its cache, does not give the file; says why.
    """
    given, text = path_of(path), os.fspath(path)
    if not isinstance(text, str) or not text.startswith(("hf:/", "hf:\\")):
        return given
    match = ADDRESS.fullmatch(text)
    if match is None:
        expected = "hf://owner/name or hf://owner/name@revision"
        fix = "Give it as text: a pathlib.Path takes one of the slashes away." if text[4:5] != "/" else None
        raise InputError("address on the hub", expected=expected, got=repr(text), fix=fix)
    from huggingface_hub import hf_hub_download

    name, revision = match["name"], match["revision"]
    try:
        found = Path(hf_hub_download(name, FILES[kind], revision=revision))
    except Exception as error:  # a dozen classes of its own, and those of two libraries for HTTP
        raise _not_fetched(text, kind, error) from error
    announce(name, found.parent.name)  # the cache keeps a folder for each commit
    return found


def announce(name: str, commit: str) -> str:
    """Print and return the address of what a commit of a repository holds."""
    from fsteer_lens.ground.terminal import Terminal

    address = f"hf://{name}@{commit}"
    Terminal(stderr=True).say(address)
    return address


def refused(problem: str, expected: str, error: Exception) -> InputError:
    """What is raised where the hub, or its client, gives an error."""
    from huggingface_hub import errors

    known = {
        errors.GatedRepoError: ("a gated repository", "Ask for access on its page, and log in: hf auth login."),
        errors.RepositoryNotFoundError: ("none, or a private one", "Check the name, and log in: hf auth login."),
        errors.RevisionNotFoundError: ("no such revision", "Give a branch, a tag or a whole commit of it."),
        errors.OfflineModeIsEnabled: ("HF_HUB_OFFLINE=1", "Unset it."),
        errors.LocalEntryNotFoundError: (
            "no hub in reach, and nothing in its cache",
            "Look at the network and at HF_HUB_OFFLINE.",
        ),
    }
    for kind, (got, fix) in known.items():
        if isinstance(error, kind):
            return InputError(problem, expected=expected, got=got, fix=fix)
    status = getattr(getattr(error, "response", None), "status_code", None)
    fix = "Log in with a token that may do this: hf auth login." if status in (401, 403) else "Try again later."
    return InputError(problem, expected=expected, got=told(error), fix=fix)


def _not_fetched(address: str, kind: str, error: Exception) -> InputError:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    problem, expected = f"cannot read {address}", f"a repository of the hub with {FILES[kind]}"
    if isinstance(error, RemoteEntryNotFoundError):
        others = ", ".join(f"{file} with {READERS[other]}" for other, file in FILES.items() if other != kind)
        return InputError(problem, expected=expected, got="one without it", fix=f"Read {others}.")
    return refused(problem, expected, error)
