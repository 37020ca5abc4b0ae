"""The tokenizer of the served model: text and chats to token ids, ids to text and bytes.

What a client writes never becomes a control token: special-token strings inside a text or a message are encoded as the
characters they are. For text without them the ids are exactly those of the plain rendering. Nothing here is awaited;
the journey calls it from a thread pool, and the tokenizer releases the interpreter lock.
"""

import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel

from gateway.detokenize import ByteDetokenizer, Detokenizer, WindowDetokenizer
from gateway.template import ChatTemplate, Message

_BYTE_FALLBACK: Final = re.compile(r"<0x([0-9A-F]{2})>")
_WORD_START: Final = "\N{LOWER ONE EIGHTH BLOCK}"
"""How tokenizers without a byte alphabet spell a space at a word's beginning."""


class _Occurrence(NamedTuple):
    """A special token in a text: text[start:stop], with the blanks that the token swallows."""

    start: int
    stop: int
    token: str


class Text:
    """One model's tokenizer and chat template. Any thread may call: all that changes is what it remembers of tokens."""

    def __init__(self, tokenizer_path: Path, template: ChatTemplate | None) -> None:
        """`template` None: the model has no chat. Raises whatever the tokenizer raises for a file that is not one."""
        self._tokenizer = Tokenizer.from_file(str(tokenizer_path))
        # The same tokenizer, but special tokens in its input are text like any other.
        self._plain = Tokenizer.from_file(str(tokenizer_path))
        self._plain.encode_special_tokens = True
        self._template = template
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self._silent_ids = frozenset(self._special_ids.values())
        self._special_pattern = _pattern([token for token in added.values() if token.special])
        self._bytes_of_char = byte_alphabet() if _has_byte_alphabet(self._tokenizer) else None
        self._output_bytes: dict[int, bytes] = {}
        self._output_texts: dict[int, str] = {}

    @property
    def has_chat(self) -> bool:
        """Whether the model has a chat template."""
        return self._template is not None

    def encode(self, text: str) -> list[int]:
        """A plain text's ids, with the tokens that the tokenizer itself adds around a text."""
        return list(self._plain.encode(text, add_special_tokens=True).ids)

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """A chat's ids, rendered by the template with the generation prompt added. Raises TemplateError."""
        if self._template is None:
            raise LookupError("the model has no chat template")
        guard = _Guard(self._special_pattern, tuple(self._special_ids))
        rendered = self._template.render([Message(role, guard.hide(content)) for role, content in messages])
        pieces = self._split(rendered, guard)
        text = "".join(piece.text for piece in pieces)
        # Where the template's special tokens are the only ones, plain encoding of the whole is right by definition.
        if [found.start for found in self._find(text)] == [
            piece.start for piece in pieces if piece.special is not None
        ]:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        ids: list[int] = []
        for piece in pieces:
            if piece.special is not None:
                ids.append(self._special_ids[piece.special])
            elif piece.text:
                ids.extend(self._plain.encode(piece.text, add_special_tokens=False).ids)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`; special tokens have none, incomplete characters become U+FFFD."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    def detokenizer(self) -> Detokenizer:
        """A decoder for one choice's tokens as they come."""
        # This decoder joins the bytes of the tokens and knows nothing of their neighbours; others do.
        if self._bytes_of_char is not None and isinstance(self._tokenizer.decoder, ByteLevel):
            return ByteDetokenizer(self._bytes_in_output, self._output_texts)
        return WindowDetokenizer(self.decode, self.is_special)

    def is_special(self, token_id: int) -> bool:
        """Whether an id has no text of its own where it stands between others."""
        return token_id in self._silent_ids or self._tokenizer.id_to_token(token_id) is None

    def token_text(self, token_id: int) -> str:
        """One token on its own, special tokens by their names; incomplete characters become U+FFFD."""
        if token_id in self._silent_ids:
            return str(self._tokenizer.id_to_token(token_id))
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for; none for an id without a token."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._bytes_of_char is not None and token_id not in self._silent_ids:
            if all(char in self._bytes_of_char for char in token):
                return bytes(self._bytes_of_char[char] for char in token)
            return token.encode()
        if match := _BYTE_FALLBACK.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace(_WORD_START, " ").encode()

    def _bytes_in_output(self, token_id: int) -> bytes:
        """What a token adds to an output: nothing where it is special."""
        found = self._output_bytes.get(token_id)
        if found is None:
            found = b"" if self.is_special(token_id) else self.token_bytes(token_id)
            self._output_bytes[token_id] = found
        return found

    def _find(self, text: str) -> list[_Occurrence]:
        if self._special_pattern is None:
            return []
        return [_Occurrence(m.start(), m.end(), m[0].strip()) for m in self._special_pattern.finditer(text)]

    def _split(self, rendered: str, guard: "_Guard") -> list["_Piece"]:
        """Cuts at the special tokens that the template wrote; restores what the messages said in between."""
        pieces: list[_Piece] = []
        length = at = 0
        for found in (*self._find(rendered), _Occurrence(len(rendered), len(rendered), "")):
            text = guard.restore(rendered[at : found.start])
            pieces.append(_Piece(length, text, None))
            length += len(text)
            at = found.stop
            if found.token:
                pieces.append(_Piece(length, rendered[found.start : found.stop], found.token))
                length += found.stop - found.start
        return pieces


class _Piece(NamedTuple):
    """A run of a rendered chat that begins at `start`: a special token of the template's, or text."""

    start: int
    text: str
    special: str | None


class _Guard:
    """Hides from the template's reader what only looks like a special token, for one rendering.

    Whole special tokens inside a message become placeholders that nobody can guess. So does a beginning of one at a
    message's end, or an end of one at its beginning, which the template's own text might complete. Blanks at the edges
    stay as they are, so a template that trims still trims.
    """

    def __init__(self, pattern: re.Pattern[str] | None, specials: Sequence[str]) -> None:
        self._pattern = pattern
        self._specials = specials
        self._nonce = secrets.token_hex(16)
        self._hidden: list[str] = []

    def hide(self, content: str) -> str:
        """`content` with placeholders. Most messages come back as they are."""
        if self._pattern is None:
            return content
        content = self._pattern.sub(lambda match: self._placeholder(match[0]), content)
        core = content.strip()
        if not core:
            return content
        start = content.index(core)
        head = max((_overlap(special, core) for special in self._specials), default=0)
        tail = max((_overlap(core, special) for special in self._specials), default=0)
        if head + tail >= len(core):
            return content[:start] + self._placeholder(core) + content[start + len(core) :] if head or tail else content
        middle = core[head : len(core) - tail]
        return "".join(
            (
                content[:start],
                self._placeholder(core[:head]) if head else "",
                middle,
                self._placeholder(core[len(core) - tail :]) if tail else "",
                content[start + len(core) :],
            )
        )

    def restore(self, text: str) -> str:
        """`text` with what the placeholders stand for; the last hidden first, since it may hold earlier ones."""
        if self._nonce in text:
            for index in reversed(range(len(self._hidden))):
                text = text.replace(self._name(index), self._hidden[index])
        return text

    def _placeholder(self, hidden: str) -> str:
        self._hidden.append(hidden)
        return self._name(len(self._hidden) - 1)

    def _name(self, index: int) -> str:
        return f"x{self._nonce}.{index}x"


def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for.

    Bytes that print in Latin-1 stand for themselves; the others, in order, are written from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + rank): byte for rank, byte in enumerate(others)}


def _has_byte_alphabet(tokenizer: Tokenizer) -> bool:
    """Whether the vocabulary spells bytes: the decoding of U+0120 alone, a space in that alphabet, tells."""
    token_id: int | None = tokenizer.token_to_id("\u0120")
    return token_id is not None and tokenizer.decode([token_id]) == " "


def _pattern(specials: Sequence[AddedToken]) -> re.Pattern[str] | None:
    """Finds special tokens as the tokenizer does: leftmost, then longest, with the blanks that a token swallows."""
    if not specials:
        return None
    ordered = sorted(specials, key=lambda token: len(token.content), reverse=True)
    return re.compile(
        "|".join(
            (r"\s*" if token.lstrip else "") + re.escape(token.content) + (r"\s*" if token.rstrip else "")
            for token in ordered
        )
    )


def _overlap(left: str, right: str) -> int:
    """The length of the longest proper end of `left` that `right` begins with."""
    for length in range(min(len(left), len(right)), 0, -1):
        if left.endswith(right[:length]) and length < max(len(left), len(right)):
            return length
    return 0
