"""Sealed files taken apart and put together again, as somebody would who means harm."""

import hashlib
import json
import struct
from typing import Any

KINDS = {
    "F16": "torch.float16",
    "F32": "torch.float32",
    "F64": "torch.float64",
    "I32": "torch.int32",
    "I64": "torch.int64",
    "U8": "torch.uint8",
}


def parts(content: bytes, name: str) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    """Index of the tensors, our own header, and the tensors' bytes, of a format of that name."""
    size = int.from_bytes(content[:8], "little")
    index = json.loads(content[8 : 8 + size])
    return index, json.loads(index.pop("__metadata__")[name]), content[8 + size :]


def assembled(index: dict[str, Any], own: Any, data: bytes, name: str, *, sealed: bool = True) -> bytes:
    """A file of these parts; sealed with a checksum that fits."""
    if sealed:
        digest = hashlib.sha256(json.dumps(own["tree"], sort_keys=True, separators=(",", ":")).encode())
        for tensor in sorted(index):
            entry = index[tensor]
            digest.update(f"{tensor}{KINDS.get(entry['dtype'], entry['dtype'])}{entry['shape']}".encode())
            digest.update(data[slice(*entry["data_offsets"])])
        own = {**own, "sha256": digest.hexdigest()}
    text = json.dumps({**index, "__metadata__": {name: json.dumps(own)}}).encode()
    return struct.pack("<Q", len(text)) + text + data
