"""Fixtures for every test: tiny models with random weights that matter, in fp32."""

import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from flowspec.model.architecture import ModelConfig
from flowspec.model.stage_model import StageModel
from flowspec.speculation.drafters.eagle.drafter import EagleDrafter
from tests.support.models import TINY, make_drafter, make_model

# The same examples every time: a red build means the code changed, not the dice.
settings.register_profile("flowspec", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("flowspec")
torch.set_num_threads(1)
# A shell starts a job in the background with SIGINT ignored, and commands leave it so.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of tests/simulator/test_message_traces.py."""
    group = parser.getgroup("flowspec")
    group.addoption("--update-golden", action="store_true", help="rewrite tests/golden")
    group.addoption("--write-traces", type=Path, help="folder to write every message trace to")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put tests of real processes first, because some measure this process while it is small."""
    items.sort(key=lambda item: "processes" not in item.path.parts)


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """Return a config of 4 layers with grouped-query attention."""
    return TINY


@pytest.fixture(scope="session")
def tiny_model() -> StageModel:
    """Return the whole tiny target in fp32."""
    return make_model()


@pytest.fixture(scope="session")
def tiny_drafter(tiny_model: StageModel) -> EagleDrafter:
    """Return a random EAGLE head for `tiny_model`."""
    return make_drafter(tiny_model)
