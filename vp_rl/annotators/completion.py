"""Chat completions as servers really send them: the text, how it ended, and what it cost, wherever they stand."""

import json
import math
import re
from typing import Any, NamedTuple

_FILTERED = re.compile(
    r"content.?filter|safety|prohibited|blocklist|block.?reason|moderation|recitation|refus|spii", re.I
)
_CUT = ("length", "max_tokens", "max_output_tokens", "model_length")
_MOST_TOKENS = 10**9  # more is no number of tokens
LONGEST = 1_000_000  # characters of an answer; ours have some thousand


class Completion(NamedTuple):
    """What a server says that a model answered."""

    text: str
    thought: str
    """What it thought aloud before, where the server tells that apart."""
    refusal: str
    """Why there is no answer; "" where there is one."""
    cut: bool
    """It was too long."""
    input_tokens: int | None
    """None: the server does not say, or nothing that could be true."""
    output_tokens: int | None


def read_body(content: bytes, text: str) -> Any:
    """The JSON in a response, whatever its encoding: `text` is the content as the response's own charset has it.

    Raises:
        ValueError: there is none.
    """
    try:
        return json.loads(content)  # UTF-8, 16 or 32, with a mark or without
    except UnicodeDecodeError:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested without end") from error


def completion(body: Any) -> Completion:
    """The first choice.

    Raises:
        ValueError: there is none; what was sent is something else.
    """
    if not isinstance(body, dict):
        raise ValueError("no object")
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    finish = str(choice.get("finish_reason") or choice.get("native_finish_reason") or "").lower()
    message = choice.get("message")
    if not isinstance(message, dict):
        message = {"content": choice.get("text")}
    text, thought, refusal = _parts(message.get("content"))
    text = text or _arguments(message.get("tool_calls"))
    thought = thought or _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    refusal = _text(message.get("refusal")).strip() or refusal.strip()
    if not refusal and _FILTERED.search(finish):
        refusal = text.strip() or finish
    if not choice and _FILTERED.search(json.dumps(body)):  # Gemini's promptFeedback
        refusal = json.dumps(body, ensure_ascii=False)
    if not (choice or refusal) or not (refusal or "message" in choice or text):
        raise ValueError("no choice with a message")
    used = body.get("usage")
    used = used if isinstance(used, dict) else {}
    asked = _tokens(used.get("prompt_tokens", used.get("input_tokens")))
    told = _tokens(used.get("completion_tokens", used.get("output_tokens")))
    if told == 0 and (text or thought):
        told = None
    return Completion(
        text.strip()[:LONGEST], thought.strip()[:LONGEST], refusal[:LONGEST], finish in _CUT, asked or None, told
    )


def hidden_error(content: bytes) -> tuple[int, bytes] | None:
    """The status and the body of an error that was sent as a success, as gateways do when those behind them fail."""
    if b'"error"' not in content[: 2**20]:
        return None
    try:
        body = read_body(content, "")
    except ValueError:
        return None
    if isinstance(body, list) and body and isinstance(body[0], dict):
        body = body[0]
    if not isinstance(body, dict):
        return None
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = choice.get("error") or (None if choice else body.get("error"))
    return (_status(error), json.dumps({"error": error}).encode()) if error else None


def retry_delay(content: bytes) -> str | None:
    """Seconds that a Google error asks to wait, which it says in its body."""
    found = re.search(rb'"retryDelay":\s*"(\d+(?:\.\d+)?)s"', content[: 2**16])
    return found[1].decode() if found else None


def _status(error: Any) -> int:
    said = error if isinstance(error, dict) else {"message": error}
    for name in ("code", "status", "status_code"):
        code = str(said.get(name) or "")
        if re.fullmatch(r"[45]\d\d", code):
            return int(code)
    words = json.dumps(said).lower()
    return 429 if re.search(r"rate.?limit|too many requests|resource_exhausted", words) else 502


def _parts(content: Any) -> tuple[str, str, str]:
    """Text, thought and refusal of a message's content: a text, a list of parts, or the object that was asked for."""
    if isinstance(content, dict) and "type" not in content:
        return json.dumps(content), "", ""
    parts = content if isinstance(content, list) else [content]
    found: dict[str, list[str]] = {"text": [], "thought": [], "refusal": []}
    for part in parts:
        kind = str(part.get("type") or "text") if isinstance(part, dict) else "text"
        where = "refusal" if kind == "refusal" else "thought" if re.search("think|reason|thought", kind) else "text"
        found[where].append(_text(part))
    return "".join(found["text"]), "".join(found["thought"]), "".join(found["refusal"])


def _text(part: Any) -> str:
    if isinstance(part, list):
        return "".join(map(_text, part))
    if isinstance(part, dict):
        return next(
            (_text(part[key]) for key in ("text", "value", "content", "thinking", "refusal") if key in part), ""
        )
    return part if isinstance(part, str) else ""


def _arguments(calls: Any) -> str:
    """Some servers hold answers to their form by a function, whose arguments are the answer."""
    call = calls[0] if isinstance(calls, list) and calls else None
    function = call.get("function") if isinstance(call, dict) else None
    given = function.get("arguments") if isinstance(function, dict) else None
    return json.dumps(given) if isinstance(given, dict) else _text(given)


def _tokens(said: Any) -> int | None:
    if isinstance(said, str) and re.fullmatch(r"\d{1,12}(\.\d+)?", said.strip(), re.ASCII):
        said = float(said)
    if isinstance(said, bool) or not isinstance(said, int | float):
        return None
    return math.ceil(said) if 0 <= said <= _MOST_TOKENS else None  # not a number is neither
