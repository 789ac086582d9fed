"""What a chat server complains of, sorted by what is to be done: ask again later, note a refusal, change a setting."""

import re
from typing import Any, NamedTuple

from vp_rl.interfaces import Unanswered
from vp_rl.types import Answer

_PASSING = {408, 409, 425, 429}  # and all from 500
_THIS_ONE_ONLY = {  # codes of errors that another question would not meet
    "content_filter",  # Azure, vLLM behind a filter
    "content_policy_violation",
    "moderation_blocked",
    "invalid_prompt",
    "context_length_exceeded",
    "image_parse_error",
    "invalid_image",
    "invalid_image_format",
    "image_too_large",
    "image_too_small",
    "image_content_policy_violation",
}
_NO_SUCH_MODEL = re.compile(
    r"(no such|unknown|invalid|not a valid) model|(model|deployment)\b.*\b(not found|does not exist)|no endpoints found"
)
_HINTS = {  # what servers and models do not know of, and how to do without
    "response_format": "chat servers without JSON schemas: structured=json_object, or structured=none",
    "json_schema": "chat servers without JSON schemas: structured=json_object, or structured=none",
    "temperature": "chat.temperature=null leaves it to the model",
    "max_completion_tokens": "chat.max_output_tokens=null with chat.extra_body={max_tokens: 1024} is the older way",
    "seed": "chat.seed=null does without",
}


class Server(NamedTuple):
    """Who complains."""

    base_url: str
    model: str
    key_name: str | None
    """The environment variable that holds the key."""


def complaint(body: Any) -> tuple[str, str]:
    """The code (or type) and the text in the body of an error, whichever of the usual forms it has."""
    found = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(found, dict):
        return "", str(found or "")
    code = str(found.get("code") or found.get("type") or "")
    return code, str(found.get("message") or found)


def sort_out(status: int, code: str, text: str, server: Server) -> Answer | Unanswered | ValueError:
    """What an error response means: a refusal of this question, or what to raise.

    Args:
        status: 300 to 599.
        code: the server's word for it, or "".
        text: what it says, free of secrets.
        server: which.
    """
    said = f"{status}, {code + ': ' if code else ''}{text[:300]!r}"
    lowered = text.lower()
    if code in _THIS_ONE_ONLY or (status == 403 and ("moderation" in lowered or "flagged" in lowered)):
        return Answer(f"{code or status}: {text[:1000]}", refused=True)
    if status == 402 or "insufficient_quota" in f"{code} {lowered}":
        return ValueError(f"No quota is left at {server.base_url} ({said}). Add credit or raise the limit, and go on.")
    if status in _PASSING or status >= 500:
        return Unanswered(f"{server.base_url} fails ({said})")
    if status in (401, 403):
        return ValueError(_refused_key(said, server))
    if "image" in lowered:
        return ValueError(
            f"The model {server.model!r} takes no images, or not these ({said}): choose one with vision (chat.model)."
        )
    if code == "model_not_found" or _NO_SUCH_MODEL.search(lowered):
        return ValueError(
            f"{server.base_url} has no model {server.model!r} ({said}): correct chat.model, "
            f"or see what there is: curl {server.base_url.rstrip('/')}/models"
        )
    if status in (404, 405) or status < 400:
        return ValueError(
            f"There is no chat-completions API at {server.base_url} ({said}): correct chat.base_url, which "
            f"mostly ends in /v1, without /chat/completions."
        )
    hints = dict.fromkeys(hint for word, hint in _HINTS.items() if word in lowered)
    return ValueError(f"{server.base_url} refuses the request ({said}). {'; '.join(hints)}".strip())


def unreachable(base_url: str, detail: str) -> ValueError:
    """Nobody was ever there."""
    return ValueError(f"No server can be reached at {base_url} ({detail}): start it, or correct chat.base_url.")


def missing_key(key_name: str) -> ValueError:
    """Before anything is sent."""
    return ValueError(
        f"No API key: set the environment variable {key_name} to it, or name another variable with "
        f"chat.api_key_env (null: the server wants no key)."
    )


def _refused_key(said: str, server: Server) -> str:
    if server.key_name is None:
        return f"{server.base_url} wants a key ({said}): name the environment variable that holds it, chat.api_key_env."
    return (
        f"{server.base_url} refuses the key in the environment variable {server.key_name} ({said}): set it to one "
        f"that may use {server.model!r}."
    )
