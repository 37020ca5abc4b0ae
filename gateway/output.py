"""One request's output on its way to the client: tokens checked for order, turned into text, cut at a stop string."""

from collections.abc import Sequence

from gateway.detokenize import StopScanner
from gateway.prepare import Prepared
from gateway.request import Delta
from gateway.text import Text
from staffetta.errors import InternalError
from staffetta.v1 import common_pb2


class Output:
    """What has been produced so far. Event loop only."""

    def __init__(self, text: Text, prepared: Prepared) -> None:
        self._detokenizer = text.detokenizer()
        self._scanner = StopScanner(prepared.stop)
        self._stop_token_ids = prepared.stop_token_ids
        self._min_tokens = prepared.sampling.min_tokens
        self.num_tokens = 0
        self.stop_string: str | None = None

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
            taken.append(token)
            if token.token_id not in self._stop_token_ids:
                text += self._scan(self._detokenizer.push(token.token_id))
        return Delta(text, tuple(taken))

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
