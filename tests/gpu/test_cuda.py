"""The same code on a CUDA device; skipped, saying so, where there is none."""

import copy

import pytest
import torch
from tiny import MAX_CONTEXT, T0, T1, request, stage_models, whole_model
from tiny_drafters import eagle_drafter

from flowspec.admission import Admission
from flowspec.cluster.base import generate
from flowspec.drafters.eagle import EagleDrafter
from flowspec.head import Head
from flowspec.simulate.cluster import SimulatedCluster
from flowspec.stage import Stage
from flowspec.strategies import STRATEGIES
from flowspec.targets.local import LocalTarget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sampling", [T0, T1])
def test_cuda_equals_the_target_alone_on_cuda(strategy, sampling):
    """Stages, drafter and reference on the device: no tensor may be left behind on the CPU."""
    whole = copy.deepcopy(whole_model()).to("cuda")
    net = copy.deepcopy(eagle_drafter().net).to("cuda")
    assert whole.lm_head is not None
    spec = STRATEGIES[strategy]
    drafter = EagleDrafter(net, whole.lm_head.weight)
    head = Head(3, spec, spec.defaults, drafter, admission=Admission(max_context=MAX_CONTEXT))
    models = [copy.deepcopy(model).to("cuda") for model in stage_models(3)]
    stages = [Stage(rank, 3, model) for rank, model in enumerate(models, start=1)]
    asked = request(sampling=sampling)
    completion = generate(SimulatedCluster(head, stages), asked)
    assert list(completion.tokens) == LocalTarget(whole, MAX_CONTEXT).generate(asked)[0]
