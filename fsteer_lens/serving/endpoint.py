"""GET /fsteer/traces/{key} of vLLM's server, for the records of streams, which bring none; see the how-to page."""

from typing import Any


class Endpoint:
    """The entry point in "vllm.endpoint_plugins"; vLLM loads it where VLLM_PLUGINS names it."""

    name = "fsteer"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Add the address."""
        from fastapi import HTTPException, Request  # pyright: ignore[reportMissingImports]

        async def trace(key: str, request: Request) -> Any:
            workers = await request.app.state.fsteer_engine.collective_rpc("fsteer_trace", args=(key,))
            found = [one for one in workers if one is not None]
            if not found:
                raise HTTPException(404, f"no trace of {key!r}: it was not steered, failed, or is too long ago")
            return found[0]

        app.get("/fsteer/traces/{key}")(trace)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Keep the engine."""
        state.fsteer_engine = engine_client
