"""The server over HTTP, and the command that checks an installation."""

import http.client
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from socket import socket
from typing import Any

import pytest

from fsteer_lens import Trace
from fsteer_lens.errors import HookError
from fsteer_lens.serving import arguments, record_of
from tests.vllm.engines import NEW, WORKER, Served, compare, prompts

if find_spec("vllm") is None:
    pytest.skip("needs vLLM: make test-vllm", allow_module_level=True)

LIMIT_S = 600
"""More than a server needs to start on a machine that is busy with other tests."""


class Server:
    """A vLLM server on loopback."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def ask(self, method: str, address: str, body: Any = None) -> tuple[int, Any]:
        """Status and body of an answer; a stream's body is its last line that is no JSON but the end."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)) as connection:
            told = None if body is None else json.dumps(body)
            connection.request(method, address, told, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read().decode()
        try:
            return answer.status, json.loads(text) if text else None
        except ValueError:
            return answer.status, text

    def wait(self) -> None:
        for _ in range(LIMIT_S):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            try:
                if self.ask("GET", "/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(1)
        raise TimeoutError(self.log.read_text()[-3000:])


@pytest.fixture(scope="module")
def server(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    # what `vllm serve` runs; that asks for the version of a package that is called otherwise on the CPU
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", str(served.folder), "--port", str(port)]
    command += ["--worker-cls", WORKER, "--enforce-eager", "--no-enable-chunked-prefill", "--dtype", "float32"]
    command += ["--max-model-len", "256", "--served-model-name", "smollm2", "--host", "127.0.0.1"]
    environment = {**os.environ, "FSTEER_STEERINGS": str(served.artefacts), "VLLM_PLUGINS": "fsteer"}
    with log.open("wb") as file, subprocess.Popen(command, env=environment, stdout=file, stderr=file) as process:
        made = Server(process, port, log)
        try:
            made.wait()
            yield made
        finally:
            process.terminate()


def completion(ids: list[int], **more: Any) -> dict[str, Any]:
    shared = {"model": "smollm2", "max_tokens": NEW, "temperature": 0, "return_token_ids": True}
    return {**shared, "prompt": ids, **more}


class Answer:
    """An answer over HTTP with the attributes of vLLM's own, for `compare`."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.outputs = [
            type("Output", (), {"token_ids": one["token_ids"], "text": one["text"]}) for one in body["choices"]
        ]
        self.kv_transfer_params = body.get("kv_transfer_params")


def test_requests_over_http_are_steered_and_bring_their_records(served: Served, server: Server) -> None:
    ids = prompts(served.model)[0]
    for name in ("late", "all", None):
        more = {} if name is None else {"vllm_xargs": arguments(name)}
        status, body = server.ask("POST", "/v1/completions", completion(ids, **more))
        assert status == 200, body
        compare(served, Answer(body), ids, name)
        if name is None:
            with pytest.raises(HookError, match="no record"):
                record_of(body)


def test_a_chat_is_steered(served: Served, server: Server) -> None:
    asked = {"model": "smollm2", "max_tokens": NEW, "temperature": 0, "vllm_xargs": arguments("late", strength=0.5)}
    asked["messages"] = [{"role": "user", "content": "What is the capital of France?"}]
    status, body = server.ask("POST", "/v1/chat/completions", asked)
    assert status == 200 and record_of(body).strength == (0.5,)


def test_the_trace_of_a_stream_can_be_asked_for(served: Served, server: Server) -> None:
    ids = prompts(served.model)[0]
    asked = completion(ids, stream=True, vllm_xargs=arguments("late", key="my stream"))
    status, text = server.ask("POST", "/v1/completions", asked)
    assert status == 200 and "data: [DONE]" in text
    status, records = server.ask("GET", "/fsteer/traces/my%20stream")
    assert status == 200
    expected = served.expected(ids, "late").trace
    (layer,) = expected.gate
    assert float((Trace.from_records(records).gate[layer] - expected.gate[layer]).abs()) < 1e-4
    assert server.ask("GET", "/fsteer/traces/yours")[0] == 404


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"vllm_xargs": {"fsteer": "nobody"}}, "one of"),
        ({"vllm_xargs": {"fsteer_strength": 1.0}}, "without it"),
        ({"vllm_xargs": {"fsteer": "late"}, "use_beam_search": True, "n": 2}, "beam search"),
    ],
)
def test_what_cannot_be_steered_is_a_bad_request(
    served: Served, server: Server, more: dict[str, Any], told: str
) -> None:
    status, body = server.ask("POST", "/v1/completions", completion(prompts(served.model)[0], **more))
    assert status == 400 and told in json.dumps(body)


def test_the_command_checks_an_installation(served: Served, tmp_path: Path) -> None:
    for name in ("all", "chain"):
        shutil.copy(served.artefacts / f"{name}.safetensors", tmp_path)

    def run(*given: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fsteer_lens.serving", "check", str(served.folder), *given]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = run(str(tmp_path), "--tokens", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| all | 4 |" in done.stdout and "| chain | 4 |" in done.stdout and "They are the same." in done.stdout
    wrong = run(str(tmp_path / "nowhere"))
    assert wrong.returncode == 2 and "which is none" in wrong.stderr
