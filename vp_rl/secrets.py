"""What must not be given away, masked wherever text leaves this process: keys, tokens, passwords in addresses.

A secret is what `read` has read or `register` was given; what an environment variable holds whose name says so
(WANDB_API_KEY, HF_TOKEN); and what looks like a provider's key. It is found whatever wraps it: any of its characters
may be escaped, by Python, JSON, URLs, HTML or a shell and several times over, and the whole may be base64 or hex.
"""

import base64
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from functools import lru_cache
from html.entities import codepoint2name
from typing import Any

HIDDEN = "***"

_NAME = re.compile(
    r"(?i)(?:^|[_.])(?:(?:api|access|secret|private|auth)?_?key|\w*token|secret|password|passwd|credentials?)$"
)
"""Of an environment variable or a setting that holds a secret."""
_PROXY = re.compile(r"(?i)_proxy$")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_USER = re.compile(r"(?<=://)[^\s/?#'\"<>]+@")
_QUERY = re.compile(r"(?i)(?<=[?&])((?:\w*[_-])?(?:key|token|secret|password|signature|sig)=)[^&#\s'\"<>]+")
_PROVIDERS = re.compile(r"\b(?:sk-[\w-]{16,}|(?:hf|ghp|gho|github_pat)_\w{16,}|xox[abp]-[\w-]{12,}|AKIA[A-Z0-9]{16})")
_PICTURE = re.compile(r"(data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+)")  # megabytes in a page
_BACKSLASHES = r"(?:\\+x5[cC]|\\|%(?:25)*5[cC]|&(?:amp;)*#(?:92|[xX]5[cC]);)+"
_WORDS = {"none", "null", "true", "false", "empty"}  # what servers without a key are given
_ANYWHERE = 8  # characters: shorter ones are masked where they stand as a word of their own
_AS_WORD = 4  # and still shorter ones only where they are sent: as letters they are everywhere

_known: set[str] = set()


def read(name: str) -> str:
    """The secret in an environment variable, without spaces around it; from now on it is masked. "" if there is none.

    Raises:
        ValueError: it cannot be sent in a header. It is not shown.
    """
    whole = os.environ.get(name, "")
    secret = whole.strip()
    register(secret)
    if not (secret.isascii() and secret.isprintable()) or " " in secret:
        raise ValueError(
            f"What the environment variable {name} holds is no API key or token: it has spaces, line breaks or other "
            "characters than ASCII's, which cannot be sent. Set it anew."
        )
    return secret


def register(secret: str) -> None:
    """Has it masked from now on."""
    if secret.strip() and secret.strip().casefold() not in _WORDS:
        _known.update({secret, secret.strip()})


def register_address(url: str) -> None:
    """The same for the user and the password in an address, whatever is wrong with it."""
    user = url.rpartition("@")[0].rpartition("//")[2]
    register(user)
    register(user.partition(":")[2])


def mask(text: str) -> str:
    """The text without secrets. Mask before you cut: half of one is not known again."""
    pattern = _pattern(frozenset(_known | _in_environment()))
    parts = _PICTURE.split(text) if len(text) > 10_000 else [text]
    return "".join(part if place % 2 else _mask(part, pattern) for place, part in enumerate(parts))


def masked(value: Any) -> Any:
    """Settings, nested as they are, without secrets; also what a setting holds whose name is a secret's."""
    if isinstance(value, dict):
        return {key: HIDDEN if _is_literal(str(key), item) else masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item) for item in value]
    return mask(value) if isinstance(value, str) else value


def guard(arguments: Sequence[str] | None = None) -> None:
    """From now on nothing that is logged, printed or raised in this process shows a secret.

    Call it first in a program. A key that was given literally, in a setting, ends the program before anything is
    written: its settings are written down.

    Args:
        arguments: of the command line; None: this process's.
    """
    if not isinstance(logging.getLogRecordFactory(), _Records):
        logging.setLogRecordFactory(_Records(logging.getLogRecordFactory()))
    if not isinstance(sys.stdout, _Masked):
        sys.stdout = _Masked(sys.stdout)
    if not isinstance(sys.stderr, _Masked):
        sys.stderr = _Masked(sys.stderr)
    for argument in sys.argv[1:] if arguments is None else arguments:
        name, _, value = argument.partition("=")
        try:
            refuse_literal(name.lstrip("+~"), value)
        except ValueError as error:
            sys.exit(f"error: {error}")


def refuse_literal(name: str, value: Any) -> None:
    """A setting must not hold a secret, only the name of the environment variable that does.

    Raises:
        ValueError: it holds one. It is not shown.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            refuse_literal(f"{name}.{key}".lstrip("."), item)
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            refuse_literal(f"{name}[{place}]", item)
    elif isinstance(value, str):
        if not (_is_literal(name, value) or mask(value) != value):
            return
        register(value.strip("'\""))
        raise ValueError(
            f"{name}={HIDDEN} must not be a key or a password, nor have one in it: settings are written down. Set an "
            "environment variable to it, in capitals such as OPENAI_API_KEY, and give that one's name where a name is "
            "asked for (chat.api_key_env)."
        )


def _is_literal(name: str, value: Any) -> bool:
    if not isinstance(value, str) or value.strip("'\"").casefold() in ("", *_WORDS) or value.startswith("${"):
        return False
    if name.endswith("_env"):
        return not _VARIABLE.fullmatch(value.strip("'\""))
    return _NAME.search(name) is not None


def _mask(text: str, pattern: "re.Pattern[str] | None") -> str:
    if pattern is not None:
        text = pattern.sub(HIDDEN, text)
    return _PROVIDERS.sub(HIDDEN, _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(f"{HIDDEN}@", text)))


def _in_environment() -> set[str]:
    found: set[str] = set()
    for name, value in os.environ.items():
        if _names_secret(name) and len(value) >= _ANYWHERE:
            found.add(value)
        elif "@" in value and _PROXY.search(name):
            user = value.rpartition("@")[0].rpartition("://")[2]
            found.update(part for part in (user, user.partition(":")[2]) if len(part) >= _AS_WORD)
    return found


@lru_cache(maxsize=4096)
def _names_secret(name: str) -> bool:
    return _NAME.search(name) is not None


@lru_cache(maxsize=16)
def _pattern(secrets: frozenset[str]) -> "re.Pattern[str] | None":
    """Finds any of them, the longest first: one may be a part of another."""
    lines = {line.strip() for secret in secrets for line in secret.splitlines()}
    every = secrets | {line for line in lines if len(line) >= _ANYWHERE}
    forms = [form for secret in sorted(every, key=len, reverse=True) for form in _forms(secret)]
    return re.compile("|".join(forms)) if forms else None


def _forms(secret: str) -> list[str]:
    parts = re.findall(r"\\+|[^\\]+", secret)  # a run of backslashes is one, however often it was doubled
    plain = "".join(_BACKSLASHES if part[0] == "\\" else "".join(map(_character, part)) for part in parts)
    if len(secret) < _AS_WORD:
        return [rf"(?i:(?<=bearer )){plain}(?![A-Za-z0-9])"]
    if len(secret) < _ANYWHERE:
        return [rf"(?<![A-Za-z0-9]){plain}(?![A-Za-z0-9])"]
    data = secret.encode("utf-8", "surrogatepass")
    return [plain, *_base64(data), f"(?i:{data.hex()})"]


def _character(character: str) -> str:
    """A regular expression for it as it is, or escaped."""
    if character.isspace():
        return r"(?:\s|\+|%(?:25)*[\da-fA-F]{2}|\\+(?:[nrtvf]|[xu][\da-fA-F]{2,4})|&(?:amp;)*#?\w+;)+"
    data, number = character.encode("utf-8", "surrogatepass"), ord(character)
    units = character.encode("utf-16-be", "surrogatepass")
    forms = [
        re.escape(character) if character.isalnum() else rf"\\*{re.escape(character)}",
        "".join(rf"%(?:25)*(?i:{byte:02x})" for byte in data),
        "".join(rf"\\+x(?i:{byte:02x})" for byte in data),
        "".join(rf"\\+u(?i:{high:02x}{low:02x})" for high, low in zip(units[::2], units[1::2], strict=True)),
        rf"\\+U(?i:{number:08x})",
        rf"&(?:amp;)*#(?:0*{number}|[xX]0*(?i:{number:x}));",
    ]
    if number in codepoint2name:
        forms.append(rf"&(?:amp;)*{codepoint2name[number]};")
    if character == "'":
        forms += ["'\"'\"'", r"'\\''", "''", "&(?:amp;)*apos;"]
    if character == '"':
        forms.append('""')
    if not character.isascii():  # what other encodings make of it
        forms += [re.escape(data.decode("latin-1")), "\ufffd+", r"\?+", rf"\\+x(?i:{number:02x})"]
    return f"(?:{'|'.join(forms)})"


def _base64(data: bytes) -> list[str]:
    """Those characters that depend on nothing before or after it, for each place in a group of three bytes."""
    found = []
    for before in range(3):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            whole = encode(bytes(before) + data).decode().rstrip("=")
            first, last = -(-before * 8 // 6), (before + len(data)) * 8 // 6
            found.append(re.escape(whole[first:last]))
    return list(dict.fromkeys(found))


class _Records:
    """Makes log records without secrets, whatever handles them, tracebacks included."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, *given: Any, **named: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._make(*given, **named)
        try:
            said = record.getMessage()
        except Exception:  # a message that does not fit its arguments: logging itself says so
            return record
        if mask(said) != said:
            record.msg, record.args = mask(said), ()
        if record.exc_info and record.exc_info[0] is not None:
            record.exc_text = mask("".join(traceback.format_exception(*record.exc_info))).rstrip("\n")
        return record


class _Masked:
    """A stream that shows no secrets: what Python itself prints of an error goes through it, too."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
