"""What a chat server complains of, sorted by what is to be done: ask again later, note a refusal, change a setting."""

import re
from typing import Any, NamedTuple

from vp_rl.interfaces import Rejected, Unanswered
from vp_rl.types import Answer

_PASSING = {408, 409, 425, 429}  # and all from 500
_MODERATED = {  # codes of what is not answered whatever is changed
    "content_filter",  # Azure, vLLM behind a filter
    "content_policy_violation",
    "moderation_blocked",
    "invalid_prompt",
    "image_content_policy_violation",
    "data_inspection_failed",  # Alibaba
    "datainspectionfailed",
}
_MODERATION = re.compile(
    r"moderat|flagged|content.?(management.?)?polic|content.?filter|safety (system|filter|polic)|prohibited.?content"
    r"|inappropriate|sensitive (content|information)|data.?inspection|responsible.?ai|violat\w+ .*polic"
)
_FIREWALL = re.compile(
    r"\bwaf\b|firewall|cloudflare|request (was |has been )?blocked|incident id|support id|mod_security"
)
_CONTEXT = re.compile(
    r"context.?(length|size|window)|maximum context|prompt is too long|input is too long|too many (input )?tokens"
    r"|max_model_len|longer than the maximum|(exceed|over)\w* .*tokens|token (limit|count).* exceed"
)
_TOO_MANY_IMAGES = re.compile(
    r"at most \d+ image|too many images|number of images|only (one|a single|1) image"
    r"|(more than|max\w*) \d+ images?\b(?! size)"
    r"|limit.mm.per.prompt|single.image|multiple images"
)
_DATA_URL = re.compile(r"data.?ur[il]|absolute uri|valid ur[il]|url.*too long")
_SIZE = re.compile(
    r"exceed|too (large|big|small)|larger than|at least \d+|maximum (\w+ )?(size|dimension|pixels)|dimensions|entity"
    r"|payload"
)
_NO_EYES = re.compile(
    r"(image|vision|multi-?modal|mmproj)\w*\b.*(\bnot\b|n't|un|only )\W?(be )?(support|accept|allow|enabled|available)"
    r"|(not|n't|un)\W?support\w*\b.*(image|vision|multi-?modal)|support image input|mmproj|image_url is only"
    r"|unmarshal array|content must be (a )?string|(text-only|not a (vision|multi-?modal)) "
)
_UNREADABLE_IMAGE = re.compile(
    r"(fail\w*|could not|cannot|can't|unable) (to )?(load|decode|process|open|read|identify|parse)|corrupt"
    r"|(invalid|unsupported|unknown|bad) (\w+ )?(image|media|mime)|(image|media).*(format|mime|type|parse)"
    r"|not a valid image"
)
_NO_SUCH_MODEL = re.compile(
    r"(no such|unknown|invalid|not a valid) model|(model|deployment)\b.*\b(not found|does not exist)|no endpoints found"
)
_KEY = re.compile(r"\bapi.?key\b")
_HINTS = {  # what servers and models do not know of, and how to do without
    "response_format": "chat servers without JSON schemas: structured=json_object, or structured=none",
    "json_schema": "chat servers without JSON schemas: structured=json_object, or structured=none",
    "temperature": "chat.temperature=null leaves it to the model",
    "max_completion_tokens": "chat.max_output_tokens=null with chat.extra_body={max_tokens: 1024} is the older way",
    "system role": "its chat template takes no system message: choose another model or template",
    "seed": "chat.seed=null does without",
}
_SMALLER = "lower annotator.longest_side or annotator.max_image_bytes, or set builder.images_per_call=1"
_SHORTER = f"raise the server's context (vLLM: --max-model-len), or {_SMALLER}"


class Server(NamedTuple):
    """Who complains."""

    base_url: str
    model: str
    key_name: str | None
    """The environment variable that holds the key."""


def complaint(body: Any) -> tuple[str, str]:
    """The code (or type) and the text in the body of an error, whichever of the usual forms it has."""
    if isinstance(body, list) and body:  # Google's
        body = body[0]
    found = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(found, dict):
        return "", str(found or "")
    code, kind = str(found.get("code") or ""), str(found.get("type") or "")
    return (kind or code) if not code or code.isdigit() else code, str(found.get("message") or found)


def sort_out(status: int, code: str, text: str, server: Server) -> Answer | Unanswered | ValueError:
    """What an error response means: a refusal of this question, or what to raise.

    Args:
        status: 300 to 599.
        code: the server's word for it, or "".
        text: what it says, free of secrets.
        server: which.
    """
    said = f"{status}, {code + ': ' if code else ''}{text[:300]!r}"
    words = f"{code.replace('_', ' ')} {code} {text}".lower()
    if code.lower() in _MODERATED or (status in (400, 403, 422, 451) and _MODERATION.search(words)):
        return Answer(f"{code or status}: {text[:1000]}", refused=True)
    if status == 402 or "insufficient_quota" in words:
        return ValueError(f"No quota is left at {server.base_url} ({said}). Add credit or raise the limit, and go on.")
    if status >= 500 and _NO_EYES.search(words):
        return _without_eyes(said, server)
    if status in _PASSING or status >= 500:
        return Unanswered(f"{server.base_url} fails ({said})")
    if status == 403 and _FIREWALL.search(words):
        return Rejected(f"What stands before {server.base_url} blocks the request ({said}).")
    if status in (401, 403) or (status == 400 and _KEY.search(words)):
        return ValueError(_refused_key(said, server))
    if status in (400, 413, 422, 431) and (found := _about_size(status, words, said, text, code)):
        return found
    if _NO_EYES.search(words):
        return _without_eyes(said, server)
    if code == "model_not_found" or _NO_SUCH_MODEL.search(words):
        return ValueError(
            f"{server.base_url} has no model {server.model!r} ({said}): correct chat.model, "
            f"or see what there is: curl {server.base_url.rstrip('/')}/models"
        )
    if status in (404, 405) or status < 400:
        return ValueError(
            f"There is no chat-completions API at {server.base_url} ({said}): correct chat.base_url, which "
            f"mostly ends in /v1, without /chat/completions."
        )
    if "image" in words:
        return Rejected(f"{server.base_url} refuses the request or its images ({said}): {_SMALLER}.")
    hints = dict.fromkeys(hint for word, hint in _HINTS.items() if word in words)
    return Rejected(f"{server.base_url} refuses the request ({said}). {'; '.join(hints)}".strip(), all=bool(hints))


def hopeless(status: int, content: bytes) -> bool:
    """Whether an error that mostly passes will not: trying again would be in vain."""
    if status == 429:
        return b"insufficient_quota" in content
    return status >= 500 and _NO_EYES.search(content[: 2**16].decode(errors="replace").lower()) is not None


def _about_size(status: int, words: str, said: str, text: str, code: str) -> Answer | ValueError | None:
    """One question's images or words are too large, too many or broken: the next one's need not be."""
    refusal = f"{code or status}: {text[:1000]}"
    if _TOO_MANY_IMAGES.search(words):
        return Rejected(
            f"The server takes fewer images in a question ({said}): set builder.images_per_call=1, or allow more "
            "(vLLM: --limit-mm-per-prompt).",
            all=True,
        )
    if _CONTEXT.search(words):
        return Answer(refusal, refused=True, hint=f"Questions are too long for the model ({said}): {_SHORTER}.")
    if _DATA_URL.search(words):
        return Rejected(
            f"The server takes no image of that size as a data URL ({said}): {_SMALLER}, or put images where it finds "
            "them (annotator.image_address)."
        )
    if _NO_EYES.search(words):
        return None
    if status == 413 or ("image" in words and _SIZE.search(words)) or re.search(r"too large|payload", words):
        return Answer(refusal, refused=True, hint=f"Questions are too large for the server ({said}): {_SMALLER}.")
    if ("image" in words or "media" in words) and _UNREADABLE_IMAGE.search(words):
        return Answer(
            refusal,
            refused=True,
            hint=f"The server cannot read such images ({said}): give them as PNG or JPEG, which all servers read.",
        )
    return None


def _without_eyes(said: str, server: Server) -> ValueError:
    return Rejected(
        f"The model {server.model!r} takes no images ({said}): choose one with vision (chat.model), or start its "
        "server with it (llama.cpp: --mmproj).",
        all=True,
    )


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
