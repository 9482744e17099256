"""A running cluster as a benchmark sees it: one question at a time, under a strategy it chooses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from flowspec.cluster.client import HeadClient
from flowspec.cluster.measured import Decoding, Figures, stats_of
from flowspec.cluster.messages import ClusterStatus, Done, Note, Piece
from flowspec.request import ClusterError, Completion, FinishReason, SamplingParams

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. Times of its statistics count from when it was asked for."""

    num_prompt: int
    completion: Completion
    figures: Figures


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """Prompt and answer exceed the context: nothing was computed."""

    num_prompt: int


class RemoteCluster:
    """Asks over `client`; `say` hears why an answer waits.

    Raises ClusterError where the cluster is not healthy.
    """

    def __init__(self, client: HeadClient, say: Callable[[str], None] = lambda text: None) -> None:
        self._client, self._say = client, say
        self.status = client.status()
        if not self.status.healthy:
            raise ClusterError(client.where, f"not healthy: {self.status.why}")

    @property
    def num_stages(self) -> int:
        """Devices that hold layers now."""
        return len(self.devices)

    @property
    def devices(self) -> list[str]:
        """Which device holds what, in the order of the pipeline."""
        serving = [one for one in self.status.devices if one.rank and one.layers is not None]
        return [
            f"{one.name}: layers {one.layers[0]} to {one.layers[1] - 1}"
            for one in sorted(serving, key=lambda one: one.rank)
            if one.layers is not None
        ]

    def ask(
        self,
        messages: Messages,
        decoding: Decoding,
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
    ) -> Answer | LongPrompt:
        """The whole answer, or that there can be none. Raises ClusterError where it fails."""
        ask = self._client.new_ask(
            turns=[dict(one) for one in messages],
            max_new_tokens=max_new_tokens,
            decoding=decoding,
            **asdict(sampling),
        )
        tokens: list[int] = []
        text = ""
        for event in self._client.ask(ask):
            match event:
                case Piece():
                    tokens += event.tokens
                    text += event.text
                case Note():
                    self._say(event.text)
                case Done():
                    return self._end(event, tokens, text, max_new_tokens)
        raise AssertionError("an answer without an end")

    def _end(
        self, done: Done, tokens: Sequence[int], text: str, max_new_tokens: int
    ) -> Answer | LongPrompt:
        if done.error and done.prompt_tokens + max_new_tokens > self.status.max_context:
            return LongPrompt(done.prompt_tokens)
        if done.error or done.figures is None:
            raise ClusterError(self._client.where, done.error or "it has sent no figures")
        if done.figures.epoch != self.status.epoch:
            self._follow(self._client.status())
        completion = Completion(
            request=done.id,
            tokens=tuple(tokens),
            text=text,
            reason=FinishReason(done.reason),
            stats=stats_of(done.figures),
        )
        return Answer(done.prompt_tokens, completion, done.figures)

    def _follow(self, now: ClusterStatus) -> None:
        """The cluster was built anew, perhaps of other devices."""
        before, self.status = self.devices, now
        if self.devices != before:
            self._say(f"from here on other devices answer: {'; '.join(self.devices)}")
