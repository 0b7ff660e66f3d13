"""Settings that hold for every test."""

import gc
import os
from pathlib import Path

# Nothing is ever fetched: a test that would ask a hub fails here, not on the day that the hub is slow.
# Set before anything imports huggingface_hub, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# The models are tiny: one thread is as fast, and processes side by side do not fight for cores. This is for those that
# tests start; the tests' own has read it already where a plugin imported torch.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from hypothesis import settings

from fsteer_lens import Activations, FineSteer, collect, fit, models, tutor
from fsteer_lens.models import SteerableModel
from tests import checked_models  # noqa: F401
from tests.running import HAS_SMOLLM2, NO_SMOLLM2

torch.set_num_threads(1)


settings.register_profile("fsteer_lens", deadline=None)  # the first example pays for torch's start
settings.load_profile("fsteer_lens")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Start every test from the same random state, whatever ran before it."""
    torch.manual_seed(0)


MODEL_FIXTURES = {"hooked", "bridge", "model", "tutor_model", "stories", "family", "trained", "steering"}

BROWSER = Path(__file__).parent / "browser"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what runs a model as `model`, or `smollm2`, and what stands in browser/ so; skip `gpu` without one."""
    for item in items:
        if BROWSER in item.path.parents:
            item.add_marker(pytest.mark.browser)
        if MODEL_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.model)
        if "smollm2" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.smollm2)
            item.add_marker(pytest.mark.slow)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported up to here: it stays, and a look at it all takes half a second."""
    gc.collect()
    gc.freeze()


STORIES = Path(__file__).parents[2] / "shared" / "models" / "stories260K"


@pytest.fixture(scope="session")
def tutor_model() -> SteerableModel:
    """The tutor as whichever class is preferred here."""
    return tutor.load()


@pytest.fixture(scope="session")
def hooked() -> SteerableModel:
    """The tutor as HookedTransformer, for what is about that class."""
    if "hooked" not in models.available_kinds():
        pytest.skip("this TransformerLens has no HookedTransformer")
    return tutor.load("hooked")


@pytest.fixture(scope="session")
def bridge() -> SteerableModel:
    """The tutor as TransformerBridge."""
    return tutor.load("bridge")


@pytest.fixture(scope="session", params=models.available_kinds())
def model(request: pytest.FixtureRequest) -> SteerableModel:
    """The tutor as every class that there is."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def stories() -> SteerableModel:
    """A real pretrained model, where it lies beside the checkout."""
    if not STORIES.is_dir():
        pytest.skip(f"{STORIES.name} is not here: it is test data beside the checkout, not part of the package")
    return models.load(STORIES)


@pytest.fixture(scope="session")
def smollm2() -> SteerableModel:
    """A real chat model, where its package is installed."""
    if not HAS_SMOLLM2:
        pytest.skip(NO_SMOLLM2)
    return models.load("smollm2")


@pytest.fixture(scope="session")
def trained(tutor_model: SteerableModel) -> dict[int, Activations]:
    """A part of the tutor's training contrasts, read at three layers."""
    train = tutor.data("safe").train
    return collect(tutor_model, train[::4], layer=[2, 3, 4], shift="last_prompt", batch_size=64, progress=False)


@pytest.fixture(scope="session")
def steering(trained: dict[int, Activations]) -> FineSteer:
    """A FineSteer at one layer of the tutor, quickly fitted."""
    return fit(trained[4])


@pytest.fixture(scope="session")
def prompts() -> list[str]:
    """Prompts of several lengths: harmful ones, which open the gate, and others, which do not."""
    told = tutor.data("safe")
    return [str(p) for p in told.valid.prompts[:3]] + [task.prompt for task in told.general_valid[::90]]
