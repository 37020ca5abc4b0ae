"""One request's output on its way to the client: tokens checked for order, turned into text, cut at a stop string."""

from collections.abc import Sequence

from gateway.detokenize import StopScanner
from gateway.prepare import Prepared
from gateway.request import Delta
from gateway.text import Text
from staffetta.errors import InternalError
from staffetta.v1 import common_pb2


class PromptOutput:
    """The log-probabilities of a request's prompt, each position once, from 1 on. Event loop only."""

    def __init__(self) -> None:
        self._next = 1

    @property
    def has_begun(self) -> bool:
        """Whether any was taken."""
        return self._next > 1

    def take(self, tokens: Sequence[common_pb2.Token]) -> tuple[common_pb2.Token, ...]:
        """Those of `tokens` that did not come before. Raises InternalError for a gap."""
        taken: list[common_pb2.Token] = []
        for token in tokens:
            if token.index > self._next:
                raise InternalError(f"the prompt's token {token.index} came where {self._next} was due")
            if token.index == self._next:
                self._next += 1
                taken.append(token)
        return tuple(taken)

    def check_whole(self, num_prompt_tokens: int) -> None:
        """Raises InternalError unless every position has come: what follows would look like all there is."""
        if self._next < num_prompt_tokens:
            raise InternalError(f"output came where the prompt's token {self._next} of {num_prompt_tokens} was due")


class Output:
    """What one choice has produced so far. Event loop only."""

    def __init__(self, text: Text, prepared: Prepared, *, choice_index: int) -> None:
        self._choice_index = choice_index
        self._detokenizer = text.detokenizer()
        self._scanner = StopScanner(prepared.stop)
        self._stop_token_ids = prepared.stop_token_ids
        self._asked_stop_ids = frozenset(prepared.sampling.stop_token_ids)
        self._min_tokens = prepared.sampling.min_tokens
        self._last_token_id: int | None = None
        self.num_tokens = 0
        self.stop_string: str | None = None

    @property
    def stop_token_id(self) -> int | None:
        """The last token when the request named it as one to stop at; it did when the choice ended by it."""
        return self._last_token_id if self._last_token_id in self._asked_stop_ids else None

    def take(self, tokens: Sequence[common_pb2.Token]) -> Delta:
        """The next tokens and the text that is certain by them; nothing after a stop string.

        A token that came before is dropped. Raises InternalError for a gap: the output could only be wrong.
        """
        taken: list[common_pb2.Token] = []
        text = ""
        for token in tokens:
            if self.stop_string is not None:
                break
            if token.index > self.num_tokens:
                raise InternalError(f"token {token.index} came where {self.num_tokens} was due")
            if token.index < self.num_tokens:
                continue
            self.num_tokens += 1
            self._last_token_id = token.token_id
            taken.append(token)
            if token.token_id not in self._stop_token_ids:
                text += self._scan(self._detokenizer.push(token.token_id))
        return Delta(self._choice_index, text, tuple(taken))

    def push(self, token_id: int) -> str:
        """The text that is certain by the next token, of a choice without stop strings."""
        self.num_tokens += 1
        self._last_token_id = token_id
        return "" if token_id in self._stop_token_ids else self._detokenizer.push(token_id)

    def flush(self) -> str:
        """The text that was held back, once no token follows."""
        if self.stop_string is not None:
            return ""
        text = self._scan(self._detokenizer.flush())
        return text if self.stop_string is not None else text + self._scanner.flush()

    def _scan(self, text: str) -> str:
        if self.num_tokens <= self._min_tokens:
            return self._scanner.skip(text)
        scan = self._scanner.push(text)
        self.stop_string = scan.stop
        return scan.text
