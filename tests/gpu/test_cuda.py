"""The same code on a CUDA device; skipped with a message without one."""

import copy

import pytest
import torch

from flowspec.engine.engine import generate
from flowspec.engine.reference import LocalTarget
from flowspec.engine.simulated import SimulatedEngine
from flowspec.head.head import Head
from flowspec.head.scheduler import Scheduler
from flowspec.speculation.drafters.eagle.drafter import EagleDrafter
from flowspec.speculation.strategies import STRATEGIES
from flowspec.stage.stage import Stage
from tests.support.tiny import MAX_CONTEXT, T0, T1, request, stage_models, whole_model
from tests.support.tiny_drafters import eagle_drafter

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sampling", [T0, T1])
def test_cuda_equals_the_target_alone_on_cuda(strategy, sampling):
    """Stages, drafter and reference are on the device, so no tensor may stay on the CPU."""
    whole = copy.deepcopy(whole_model()).to("cuda")
    net = copy.deepcopy(eagle_drafter().net).to("cuda")
    assert whole.lm_head is not None
    spec = STRATEGIES[strategy]
    drafter = EagleDrafter(net, whole.lm_head.weight)
    head = Head(3, spec, spec.defaults, drafter, admission=Scheduler(max_context=MAX_CONTEXT))
    models = [copy.deepcopy(model).to("cuda") for model in stage_models(3)]
    stages = [Stage(rank, 3, model) for rank, model in enumerate(models, start=1)]
    asked = request(sampling=sampling)
    completion = generate(SimulatedEngine(head, stages), asked)
    assert list(completion.tokens) == LocalTarget(whole, MAX_CONTEXT).generate(asked)[0]
