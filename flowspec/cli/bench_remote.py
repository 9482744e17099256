"""`flowspec bench --real --head`: the plan of a benchmark on a cluster of devices that runs."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from flowspec.bench.answering_remote import MeasuredCluster
from flowspec.bench.experiment import Case, Plan
from flowspec.bench.prompts import Prompt
from flowspec.bench.provenance import code_hash, revision
from flowspec.bench.runner import RunOutcome
from flowspec.cli.chat import DEFAULT_PORT
from flowspec.cli.common import layerwise_folder
from flowspec.config import EngineConfig
from flowspec.engine.remote import RemoteEngine
from flowspec.speculation.drafters import current_drafter, parse_drafter
from flowspec.speculation.strategies import find_strategy
from flowspec.system.address import parse_address
from flowspec.transport.secure.token import derive_keys, read_token
from flowspec.weights.manifest import read_manifest


@contextmanager
def connected(head: str | None, token_file: Path | None) -> Iterator[MeasuredCluster | None]:
    """Connect to the cluster of `head`; without one yield None.

    Raises ClusterError if the cluster cannot be reached or is not healthy.
    """
    if head is None:
        yield None
        return
    keys = derive_keys(read_token(token_file))
    host, port = parse_address(head, default_port=DEFAULT_PORT)
    with RemoteEngine(host, port, keys) as engine:
        # rich redirects print, so that it does not write into a progress bar
        yield MeasuredCluster(engine, lambda text: print(text, file=sys.stderr, flush=True))


def cluster_drafters(
    given: Sequence[str], strategies: Sequence[str], cluster: MeasuredCluster
) -> Sequence[str]:
    """Return the drafters of `--drafter`, or the cluster's own one.

    Raises ValueError if the cluster was served with another drafter; its switches are free.
    """
    own = cluster.status.drafter
    names = tuple(map(current_drafter, given)) or (own,)
    for name in names:
        if own == "none" and any(find_strategy(strategy).drafts for strategy in strategies):
            raise ValueError(
                "this cluster was served without a drafter: --strategies ar needs none, for others "
                "serve it anew with: flowspec serve MODEL --drafter NAME --draft FOLDER"
            )
        if (wanted := parse_drafter(name)[0]) != own:
            raise ValueError(
                f"--drafter {name}: this cluster was served with {own}; give --drafter {own}, or "
                f"serve it anew with: flowspec serve MODEL --drafter {wanted} --draft FOLDER"
            )
    return names


def assemble_remote(
    cases: Sequence[Case],
    cluster: MeasuredCluster,
    *,
    head: str,
    datasets: Mapping[str, Sequence[Prompt]],
    temperatures: tuple[float, ...],
    seeds: tuple[int, ...],
    max_tokens: int,
    table: str,
    target: str | None,
) -> Plan:
    """Make a plan for the cluster as it is now; `target` computes the reference answers here.

    Raises ValueError if the cluster serves another model than `target`, or if its context is too
    short for such answers.
    """
    card, context = cluster.status.model, cluster.status.max_context
    if max_tokens >= context:
        raise ValueError(
            f"--max-tokens {max_tokens}: this cluster's context holds {context} tokens, prompt and "
            "answer together"
        )
    folder = None
    if target is not None:
        folder = layerwise_folder(EngineConfig(model=target))
        own = read_manifest(folder).model_hash
        if own != card.model_hash:
            raise ValueError(
                f"--model {target} is not the model of this cluster, {card.model_id}: its hash "
                f"is {own[:16]}, the cluster's {card.model_hash[:16]}; without --model the "
                "cluster's own plain decoding is what answers are compared with"
            )
    code = cluster.status.code_hash
    return Plan(
        cluster=str(parse_address(head, default_port=DEFAULT_PORT)),
        model=card.model_id,
        table=table,
        stages=cluster.num_stages,
        cases=tuple(cases),
        datasets=datasets,
        temperatures=temperatures,
        seeds=seeds,
        max_tokens=max_tokens,
        context=context,
        target=folder,
        real=True,
        num_kv_tokens=cluster.num_kv_tokens,
        remote={
            "devices": cluster.devices,
            "dtype": card.numerics.dtype,
            "stored_dtype": card.stored_dtype,
            "numerics": card.numerics.fingerprint,
            "truth": "ar" if folder is None else "target",
        },
        sources={
            "code": code,
            "target": card.model_hash,
            "revision": revision() if code == code_hash() else "",  # the head's is not known
            cluster.status.drafter: cluster.status.draft_hash,
        },
    )


def other_code(plan: Plan) -> str:
    """Return a sentence if the head runs other sources than this machine, else an empty string."""
    if plan.remote is None or (there := plan.sources["code"]) == (own := code_hash()):
        return ""
    return (
        f"the head runs other sources, {there or 'it does not say which'}, than this machine, "
        f"{own}: samples have the head's hash, and no revision"
    )


def disturbances(outcome: RunOutcome) -> Iterator[str]:
    """Yield a sentence for each thing that disturbed the measurement."""
    resumed = sum(sample.resumes > 0 for sample in outcome.samples)
    if resumed:
        yield (
            f"{resumed} of the answers continued after a device was lost; the outages are not part "
            "of the decode time"
        )
    waited = sum(sample.rebuilt and not sample.resumes for sample in outcome.samples)
    if waited:
        yield (
            f"{waited} of the answers waited for devices or for requests of other clients; tables "
            "leave out their times to the first token"
        )
    relearnt = sum(sample.relearnt for sample in outcome.samples)
    if relearnt:
        yield (
            f"before {relearnt} of the answers the head served requests of other clients; it may "
            "have learnt costs and scores from them too"
        )
