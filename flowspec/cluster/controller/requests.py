"""What a client asks for: a request, and the strategy that answers, if not the cluster's own."""

from flowspec.config import DecodeConfig, EngineConfig, override
from flowspec.engine.build import HeadParts, decode_config
from flowspec.head.active import max_rows_alive
from flowspec.head.head import Head
from flowspec.protocol.control import MAX_TOKENS, Ask, Decoding
from flowspec.request import Request, SamplingParams
from flowspec.speculation.strategies import StrategySpec, check_runs_for_real, find_strategy

MIN_CHARACTERS, CHARACTERS_PER_TOKEN = 262_144, 32  # that a prompt may have, by the context
PUT_BACK_S = 8.0  # longer than a benchmark needs between two questions, shorter than until a probe

Wanted = tuple[StrategySpec, DecodeConfig]


class AskedDecoding:
    """Checks what clients ask for and knows what is in force: None is what `serve` was given."""

    def __init__(self, config: EngineConfig, *, drafter: str) -> None:
        """`drafter`: the one that is loaded."""
        self.config, self.drafter = config, drafter
        self.in_force: Decoding | None = None
        self.used_at = 0.0  # when somebody last asked for what is in force, or was answered
        self._is_fresh = False  # nobody has asked since the last change

    @property
    def strategy(self) -> str:
        """The one in force, by name."""
        return self.in_force.strategy if self.in_force is not None else self.config.strategy

    def find(self, wanted: Decoding | None) -> Wanted:
        """The strategy's row and parameters. Raises ValueError for what cannot be had here."""
        if wanted is None:
            return decode_config(self.config)
        check_runs_for_real(wanted.strategy)
        spec = find_strategy(wanted.strategy)
        if spec.drafts and self.drafter == "none":
            raise ValueError(
                f"strategy {wanted.strategy} needs a drafter, this cluster was served without "
                "one; serve it with --drafter, or ask for ar"
            )
        where = f"parameters of {wanted.strategy}"
        return spec, override(spec.defaults, wanted.parameters, where=where)

    def put_in_force(self, wanted: Decoding | None, head: Head) -> None:
        """What `find` has found good, from the next request on; nothing may be open."""
        head.configure(*self.find(wanted))
        self.in_force, self._is_fresh = wanted, True

    def use(self, now: float) -> bool:
        """A request asks for what is in force; whether it is the first one since the change."""
        is_first, self._is_fresh, self.used_at = self._is_fresh, False, now
        return is_first

    def is_left(self, now: float) -> bool:
        """Whether whoever asked for what is in force has asked nothing for some seconds."""
        return self.in_force is not None and now - self.used_at > PUT_BACK_S


def request_of(ask: Ask, number: int, parts: HeadParts) -> Request:
    """The conversation as tokens. Raises ValueError for what cannot be sampled so.

    Far more text than the context could hold is not made into tokens: others wait meanwhile.
    """
    most = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * parts.max_context)
    if (length := sum(len(turn.content) for turn in ask.turns)) > most:
        raise ValueError(
            f"the conversation has {length:,} characters, at most {most:,} are taken for the "
            f"model's context of {parts.max_context:,} tokens; shorten it"
        )
    return Request(
        id=number,
        prompt=parts.prompt_of([turn.model_dump() for turn in ask.turns]),
        sampling=SamplingParams(
            temperature=ask.temperature,
            top_k=ask.top_k,
            top_p=ask.top_p,
            min_p=ask.min_p,
            seed=ask.seed,
        ),
        max_new_tokens=ask.max_new_tokens,
        stop=ask.stop,
        eos_token_ids=parts.eos_token_ids,
    )


def check_measurable(request: Request, max_context: int) -> None:
    """Raises ValueError for an answer that the context would cut short, or one too long to tell."""
    num_prompt, num_new = len(request.prompt), request.max_new_tokens
    if num_new > MAX_TOKENS:
        raise ValueError(f"answers of at most {MAX_TOKENS} tokens are measured, not {num_new}")
    if num_prompt + num_new > max_context:
        raise ValueError(
            f"{num_prompt} prompt tokens and {num_new} more exceed the context of {max_context} "
            "tokens"
        )


def check_fits(request: Request, head: Head) -> None:
    """Raises TooLargeError where the stages' memory can never hold it under what is in force."""
    head.admission.rows_of(request, max_rows_alive(head.config))
