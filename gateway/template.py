"""The model's chat template: fixed at load, rendered in a sandbox whose fuel bounds time and whose output is bounded.

Only the model's own template is ever rendered, never one from a client. No Python object is reachable from it but
strings, and the one function `raise_exception`.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

import minijinja

from staffetta.errors import TemplateError

MAX_RENDERED_CHARS: Final = 8 * 2**20
_FUEL_BASE: Final = 1_000_000
_FUEL_PER_MESSAGE: Final = 10_000
"""Instructions a render may execute: published templates use some hundreds for each message."""
_NAME: Final = "chat"
_MAX_REFUSAL_CHARS: Final = 200


class Message(NamedTuple):
    """One message of a chat; roles and sizes were validated."""

    role: str
    content: str


class ChatTemplate:
    """Renders chats with one template. Immutable after construction; any thread may render."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Raises ValueError when `source` is not a template."""
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._source = source
        try:
            self._environment(num_messages=0)
        except minijinja.TemplateError as error:
            raise ValueError(f"the model's chat template does not parse: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """The chat as text, the generation prompt added. Raises TemplateError, which is the request's fault."""
        environment = self._environment(num_messages=len(messages))
        refusals: list[str] = []

        def raise_exception(message: str) -> NoReturn:
            refusals.append(str(message)[:_MAX_REFUSAL_CHARS])
            raise TemplateError(refusals[0], param="messages")

        environment.add_global("raise_exception", raise_exception)
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = environment.render_template(_NAME, messages=chat, add_generation_prompt=True, **self._tokens)
        except (minijinja.TemplateError, TemplateError) as error:
            if refusals:
                raise TemplateError(f"the model's chat template refused: {refusals[0]}", param="messages") from None
            raise TemplateError(
                "the model's chat template cannot render these messages; check the order of roles and their number",
                param="messages",
            ) from error
        if len(text) > MAX_RENDERED_CHARS:
            raise TemplateError(
                f"the rendered chat has {len(text)} characters, the limit is {MAX_RENDERED_CHARS}; shorten it",
                param="messages",
            )
        return text

    def _environment(self, *, num_messages: int) -> minijinja.Environment:
        """A fresh environment: one render may not see another's refusal, and fuel grows with the chat."""
        environment = minijinja.Environment(
            debug=False,
            fuel=_FUEL_BASE + _FUEL_PER_MESSAGE * num_messages,
            auto_escape_callback=lambda _name: False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.add_template(_NAME, self._source)
        return environment
