"""Requests to a cluster in network namespaces, compared with the target's own answers."""

import threading
import time
from dataclasses import dataclass, field

from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, load_head_parts
from flowspec.engine.reference import LocalTarget
from flowspec.engine.stream import Notice
from flowspec.request import ClusterError, Request, RequestOutput, SamplingParams, TokensOut
from flowspec.tokenizer import render_chat
from flowspec.weights.load import load_whole
from tests.stress.netns_cluster import NetnsCluster, count_others, wait_until

SENTENCE = "Give three tips for staying healthy, and say why each of them helps. "
SEED = 7
MAX_ANSWER_S = 90.0  # far beyond the delay of a fault and a slow machine


class Answer(threading.Thread):
    """One request to the head, followed in its own thread."""

    def __init__(self, cluster: NetnsCluster, words: int, count: int, temperature: float) -> None:
        super().__init__(daemon=True)
        self.prompt = SENTENCE * words
        self.count, self.temperature = count, temperature
        self.tokens: list[int] = []
        self.pieces: list[float] = []  # times of the pieces
        self.notes: list[tuple[float, str]] = []
        self.error: str | None = None  # None until the end
        self._client = cluster.client()
        self.start()

    def run(self) -> None:
        """Collect the events."""
        request = Request(
            prompt=[{"role": "user", "content": self.prompt}],
            sampling=SamplingParams(temperature=self.temperature, seed=SEED),
            max_new_tokens=self.count,
        )
        try:
            with self._client:
                for event in self._client.submit(request):
                    now = time.monotonic()
                    match event:
                        case TokensOut():
                            self.tokens += event.tokens
                            self.pieces.append(now)
                        case Notice():
                            self.notes.append((now, event.text))
                        case RequestOutput():
                            self.error = "" if event.error is None else str(event.error)
        except ClusterError as error:
            self.error = str(error)

    def wait_for(self, count: int) -> bool:
        """Wait for `count` tokens; return whether they came before the end."""
        wait_until(
            lambda: len(self.tokens) >= count or self.error is not None, MAX_ANSWER_S, poll_s=0.002
        )
        return self.error is None

    def end(self) -> bool:
        """Wait for the end; return whether it came in time."""
        self.join(MAX_ANSWER_S)
        return not self.is_alive()


class Alone:
    """The target's own answers, computed in this process."""

    def __init__(self, cluster: NetnsCluster) -> None:
        config = EngineConfig(model=str(cluster.split), draft=str(cluster.draft))
        self._parts: HeadParts = load_head_parts(config, cluster.split)
        whole = load_whole(cluster.split, dtype=config.numerics.dtype)  # as the stages compute
        self._target = LocalTarget(whole, self._parts.max_context)
        self._known: dict[tuple[str, int, float], list[int]] = {}

    def tokens(self, answer: Answer) -> list[int]:
        """Return the tokens for the same request."""
        key = (answer.prompt, answer.count, answer.temperature)
        if key not in self._known:
            turns = [{"role": "user", "content": answer.prompt}]
            request = Request(
                id=1,
                prompt=render_chat(self._parts.tokenizer, turns),
                sampling=SamplingParams(temperature=answer.temperature, seed=SEED),
                max_new_tokens=answer.count,
                eos_token_ids=self._parts.eos_token_ids,
            )
            self._known[key] = self._target.generate(request)[0]
        return self._known[key]


@dataclass(slots=True)
class Verdicts:
    """The failures, each with the place where it happened."""

    wrong_tokens: list[str] = field(default_factory=list)
    lost_requests: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    answers: int = 0

    def check(self, answer: Answer, alone: Alone, where: str) -> None:
        """Check that an answer ends, without error, with the target's tokens."""
        self.answers += 1
        if not answer.end():
            self.hangs.append(f"{where}: no end of an answer; notes {answer.notes}")
        elif answer.error:
            self.lost_requests.append(f"{where}: {answer.error}")
        elif answer.tokens != alone.tokens(answer):
            self.wrong_tokens.append(where)

    def check_cut(self, answer: Answer, alone: Alone, where: str) -> None:
        """Check a struck head's answer: it may end in an error, but its tokens must be right."""
        self.answers += 1
        if not answer.end():
            self.hangs.append(f"{where}: no end of an answer; notes {answer.notes}")
        elif answer.error and not answer.error.startswith("head"):
            self.lost_requests.append(f"{where}: {answer.error}")
        elif answer.tokens != alone.tokens(answer)[: len(answer.tokens)]:
            self.wrong_tokens.append(where)
        elif not answer.error and len(answer.tokens) != answer.count:
            self.lost_requests.append(f"{where}: {len(answer.tokens)} of {answer.count} tokens")

    def check_end(self, cluster: NetnsCluster) -> None:
        """Check that all processes end when they are told to."""
        self.orphans += [f"{name} did not end by SIGTERM" for name in cluster.stop()]
        if not wait_until(lambda: count_others() == 0, 10.0):
            self.orphans.append(f"{count_others()} processes are left")

    @property
    def bad(self) -> list[str]:
        """Return all failures."""
        return [*self.wrong_tokens, *self.lost_requests, *self.hangs, *self.orphans]

    def line(self) -> str:
        """Return the counts in one line."""
        return (
            f"{self.answers} answers checked: {len(self.wrong_tokens)} with wrong tokens, "
            f"{len(self.lost_requests)} lost, {len(self.hangs)} hangs, {len(self.orphans)} orphans"
        )
