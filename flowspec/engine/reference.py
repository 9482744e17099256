"""The target model alone, in this process: the reference every strategy must equal."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flowspec.model.attention_metadata import run_rows
from flowspec.model.kv_cache import COMMITTED
from flowspec.model.stage_model import StageModel
from flowspec.request import FinishReason, Request, check_token_ids
from flowspec.speculation.acceptance import choose
from flowspec.speculation.processors import begin_path
from flowspec.system import signals
from flowspec.tokenizer import TextStream


@dataclass(slots=True)
class LocalTarget:
    """A whole model; `prefill_chunk` prompt tokens per forward, then one token per forward."""

    model: StageModel
    max_context: int
    prefill_chunk: int = 64
    shape_stable: bool = False

    def stream(self, request: Request) -> Iterator[tuple[int, Tensor]]:
        """Each next token with the logits [V] that chose it, without end: stop rules are above.

        The logits are those that the processors with a state have left; filters come after them.

        Raises ValueError where the prompt has a token that the model has not.
        """
        prompt = request.prompt
        check_token_ids(prompt, self.model.config.vocab_size)
        context = min(len(prompt) + request.max_new_tokens, self.max_context)
        stable_context = context if self.shape_stable else None
        cache = self.model.new_cache(context + 1, stable_context=stable_context)
        for start in range(0, len(prompt), self.prefill_chunk):
            signals.check()
            ids = torch.tensor(prompt[start : start + self.prefill_chunk])
            where = range(start, start + len(ids))
            hidden, _ = run_rows(self.model, cache, ids, where, parents=None)
        position = len(prompt)
        state = begin_path(request.sampling, prompt)
        while True:
            signals.check()
            logits = self.model.logits(hidden[-1:], shape_stable=self.shape_stable)
            if state is not None:
                logits = state.apply(logits[0])[None]
            token = choose(logits, [position], request.sampling)[0]
            yield token, logits[0]
            hidden, _ = run_rows(
                self.model, cache, torch.tensor([token]), [position], parents=[COMMITTED]
            )
            cache.reroot([0], [])
            state = None if state is None else state.fork(token)
            position += 1

    def generate(
        self,
        request: Request,
        new_text: Callable[[Request], TextStream] = lambda request: TextStream(None),
    ) -> tuple[list[int], FinishReason, str]:
        """Tokens, reason and text under the same stop rules as the head's.

        Raises ValueError where the prompt fills the context.
        """
        limit = min(request.max_new_tokens, self.max_context - len(request.prompt))
        if limit < 1:
            raise ValueError(f"the prompt fills the context of {self.max_context} tokens")
        text = new_text(request)
        tokens: list[int] = []
        reason = FinishReason.LENGTH
        for token, _ in self.stream(request):
            tokens.append(token)
            text.push([token])
            if text.stopped or token in request.eos_token_ids:
                reason = FinishReason.STOP
                break
            if len(tokens) == limit:
                break
        text.flush()
        return tokens, reason, text.text
