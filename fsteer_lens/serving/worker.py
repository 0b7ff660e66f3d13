"""vLLM's worker with steering: `--worker-cls fsteer_lens.serving.Worker`."""

from typing import Any

from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]
from vllm.tokenizers import cached_tokenizer_from_config  # pyright: ignore[reportMissingImports]
from vllm.v1.outputs import AsyncModelRunnerOutput  # pyright: ignore[reportMissingImports]

from fsteer_lens.serving.artefacts import catalogue
from fsteer_lens.serving.engines import require_engine, require_fingerprints, require_runner
from fsteer_lens.serving.layers import Layers

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base  # pyright: ignore[reportMissingImports]
else:
    from vllm.v1.worker.gpu_worker import Worker as Base  # pyright: ignore[reportMissingImports]


class Worker(Base):  # pyright: ignore[reportUntypedBaseClass]
    """The platform's worker with hooks on its decoder layers, and the records of what they did on its outputs."""

    def load_model(self, *args: Any, **options: Any) -> None:
        """Load, and put the hooks on."""
        require_engine(self.vllm_config)
        super().load_model(*args, **options)
        require_runner(self.model_runner)
        self._layers = Layers(self, catalogue())

    def compile_or_warm_up_model(self) -> Any:
        """Warm up, and see that the model is the one that was fitted on."""
        times = super().compile_or_warm_up_model()
        require_fingerprints(self, self._layers, cached_tokenizer_from_config(self.vllm_config.model_config))
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step under the steerings of its requests."""
        self._layers.begin(scheduler_output)
        output = super().execute_model(scheduler_output)
        self._layers.end()
        return self._told(output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample, where that is a call of its own."""
        return self._told(super().sample_tokens(grammar_output))

    def _told(self, output: Any) -> Any:
        """The same output with the records of the step."""
        records = self._layers.records
        if isinstance(output, AsyncModelRunnerOutput):
            wait = output.get_output

            def get_output() -> Any:
                return _with(wait(), records)

            output.get_output = get_output
            return output
        return _with(output, records)

    def fsteer_trace(self, key: str) -> Any:
        """For `collective_rpc`: the trace of a request by its key, position by position."""
        return self._layers.trace_of(key)


def _with(output: Any, records: dict[str, Any]) -> Any:
    if output is not None and records:
        output.fsteer = records
    return output
