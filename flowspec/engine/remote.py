"""A running cluster as a benchmark sees it: one question at a time, under a strategy it chooses."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from flowspec.engine.client import HeadClient
from flowspec.protocol.control import ClusterStatus, Decoding, Done, Figures, Note, Piece, stats_of
from flowspec.request import ClusterError, Completion, FinishReason, SamplingParams

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. Times of its statistics count from when it was asked for."""

    num_prompt: int
    completion: Completion
    figures: Figures
    rebuilt: bool = False  # the cluster was, since the answer before: the wait may be in its times


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """Prompt and answer exceed the context, or what `reason` says: nothing was computed."""

    num_prompt: int
    reason: str = ""  # why the devices' memory cannot hold them, or the conversation is refused
    refused: bool = False  # the latter


class RemoteCluster:
    """Asks over `client`; `say` hears why an answer waits. All answers are of the same devices.

    Raises ClusterError where the cluster is not healthy.
    """

    def __init__(self, client: HeadClient, say: Callable[[str], None] = lambda text: None) -> None:
        self._client, self._say = client, say
        self.status = client.status()
        if not self.status.healthy:
            raise ClusterError(client.where, f"not healthy: {self.status.why}")
        self._epoch = self.status.epoch  # the newest that is known to be of these devices

    @property
    def num_stages(self) -> int:
        """Devices that hold layers."""
        return len(self.devices)

    @property
    def devices(self) -> list[str]:
        """Which device holds what, in the order of the pipeline."""
        return _devices_of(self.status)

    @property
    def num_kv_tokens(self) -> int:
        """Rows of KV cache that the tightest device holds; 0: not known."""
        return min(
            (one.num_kv_tokens for one in self.status.devices if one.num_kv_tokens), default=0
        )

    def ask(
        self,
        messages: Messages,
        decoding: Decoding,
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
    ) -> Answer | LongPrompt:
        """The whole answer, or that there can be none.

        Raises ClusterError where it fails, or where other devices may have had a part in it.
        """
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
        if done.bad_prompt:
            return LongPrompt(0, done.error, refused=True)
        if done.error and done.prompt_tokens + max_new_tokens > self.status.max_context:
            return LongPrompt(done.prompt_tokens)
        if done.too_large:
            self._check_memory()
            return LongPrompt(done.prompt_tokens, done.error)
        if done.error or done.figures is None:
            why = done.error.removeprefix("head: ")  # it is named already
            raise ClusterError(self._client.where, why or "it has sent no figures")
        rebuilt = done.figures.epoch != self._epoch
        if rebuilt:
            self._check_devices(done.figures)
        completion = Completion(
            request=done.id,
            tokens=tuple(tokens),
            text=text,
            reason=FinishReason(done.reason),
            stats=stats_of(done.figures),
        )
        return Answer(done.prompt_tokens, completion, done.figures, rebuilt)

    def _check_memory(self) -> None:
        """What other devices cannot hold is none of these devices' limits."""
        now = self._client.status()
        if _devices_of(now) != self.devices:
            raise self._changed(now)

    def _check_devices(self, figures: Figures) -> None:
        """The cluster was built anew: go on if all of the answer is of the same devices."""
        now = self._client.status()
        # a status of another epoch does not tell which devices the answer ended on
        is_same = now.epoch == figures.epoch and _devices_of(now) == self.devices
        if not is_same or _has_seen_others(figures, self._epoch):
            raise self._changed(now)
        self._epoch = now.epoch

    def _changed(self, now: ClusterStatus) -> ClusterError:
        before, after = self.devices, _devices_of(now)
        if after != before:
            there = "; ".join(after) or f"none that hold all layers ({now.why})"
            change = f"other devices answer now, before: {'; '.join(before)}, now: {there}"
        else:
            change = "the cluster was built anew several times, perhaps of other devices meanwhile"
        return ClusterError(
            self._client.where,
            f"{change}; what was answered before is kept, and the same command measures the "
            "devices that are there now, whose samples have keys of their own",
        )


def _devices_of(status: ClusterStatus) -> list[str]:
    serving = [(one.rank, one.name, one.layers) for one in status.devices if one.rank]
    return [
        f"{name}: layers {layers[0]} to {layers[1] - 1}"
        for _, name, layers in sorted(serving)
        if layers is not None
    ]


def _has_seen_others(figures: Figures, known: int) -> bool:
    """Whether an epoch between `known` and the last, of devices nobody knows, may have served it.

    It was served in the last epoch, and in one more for each time it was resumed.
    """
    if not figures.num_resumes or figures.epoch == known + 1:
        return False
    began_before = figures.alone and figures.first_epoch == known  # it waited for nobody
    return figures.num_resumes > 1 or not began_before
