"""Answers and complaints as servers were seen to send them: what is read, what is a refusal, and whose fault it is."""

import json
from typing import Any

import pytest

from vp_rl.annotators.complaints import Server, complaint, hopeless, sort_out
from vp_rl.annotators.completion import completion, hidden_error, read_body, retry_delay
from vp_rl.interfaces import Rejected, Unanswered
from vp_rl.types import Answer

SERVER = Server("http://localhost/v1", "m", "KEY")
TEXT = '{"ratings": []}'


def sent(content: Any = TEXT, finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish}]}


@pytest.mark.parametrize(
    "body",
    [
        sent(),
        sent([{"type": "text", "text": TEXT[:5]}, {"type": "text", "text": TEXT[5:]}]),
        sent([{"type": "thinking", "thinking": [{"type": "text", "text": "hm {"}]}, {"type": "text", "text": TEXT}]),
        sent([{"type": "output_text", "text": {"value": TEXT}}]),
        sent(json.loads(TEXT)),
        sent(TEXT + " " * 100_000),
        sent(None, tool_calls=[{"function": {"name": "rate", "arguments": TEXT}}]),
        sent(TEXT, refusal=""),
        {"choices": [{"text": TEXT, "finish_reason": None}]},
    ],
    ids=["text", "parts", "thinking part", "value", "object", "blanks", "function", "no refusal", "old protocol"],
)
def test_the_text_of_an_answer_is_found_wherever_it_stands(body: dict[str, Any]) -> None:
    assert completion(body)[:4] == (TEXT, completion(body).thought, "", False)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_what_was_thought_is_told_from_the_answer(name: str) -> None:
    found = completion(sent("", **{name: TEXT}))
    assert (found.text, found.thought) == ("", TEXT)


@pytest.mark.parametrize("finish", ["length", "max_tokens", "MAX_TOKENS"])
def test_an_answer_that_was_cut_off_is_known(finish: str) -> None:
    assert completion(sent(None, finish)).cut


@pytest.mark.parametrize(
    "body",
    [
        sent(None, "stop", refusal="I cannot."),
        sent([{"type": "refusal", "refusal": "I cannot."}]),
        sent("", "content_filter"),
        sent(None, "content_filter: PROHIBITED_CONTENT"),
        sent(None, "SAFETY"),
        {"choices": [{"finish_reason": "content_filter", "index": 0}]},
        {"choices": [], "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
    ],
)
def test_a_refusal_is_known_with_or_without_a_message(body: dict[str, Any]) -> None:
    assert completion(body).refusal


@pytest.mark.parametrize("body", [[1, 2], "hello", None, {}, {"choices": None}, {"choices": [{}]}, {"choices": [3]}])
def test_what_is_no_completion_is_told(body: Any) -> None:
    with pytest.raises(ValueError, match="no "):
        completion(body)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
def test_a_body_is_read_in_its_own_encoding(encoding: str) -> None:
    data = json.dumps({"a": "schön"}, ensure_ascii=False).encode(encoding)
    assert read_body(data, data.decode(encoding)) == {"a": "schön"}


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"error": {"code": 429, "message": "slow down"}}, 429),
        ({"error": {"code": "503", "message": "busy"}}, 503),
        ({"error": {"message": "m is temporarily rate-limited upstream"}}, 429),
        ({"error": "upstream failed", "choices": []}, 502),
        ([{"error": {"code": 400, "message": "bad"}}], 400),
        ({"choices": [{"finish_reason": "error", "error": {"code": 502}, "message": {"content": "{"}}]}, 502),
    ],
)
def test_an_error_that_was_sent_as_a_success_has_its_status(body: Any, status: int) -> None:
    found = hidden_error(json.dumps(body).encode())
    assert found is not None
    assert found[0] == status


@pytest.mark.parametrize("body", [sent(), {**sent(), "error": None}, {**sent(), "error": {"code": 1}}, sent('"error"')])
def test_an_answer_is_no_error(body: Any) -> None:
    assert hidden_error(json.dumps(body).encode()) is None


def test_the_pause_in_the_body_of_an_error_is_found() -> None:
    assert retry_delay(b'[{"error": {"details": [{"retryDelay": "2.5s"}]}}]') == "2.5"
    assert retry_delay(b"{}") is None


REFUSED = "refused, and the next question may be taken"
COMPLAINTS: list[tuple[int, Any, Any, str]] = [  # status, body, what is made of it, what is said
    (400, {"error": {"message": "filtered", "code": "content_filter"}}, Answer, "filtered"),
    (400, {"error": {"message": "triggering Azure OpenAI's content management policy"}}, Answer, "policy"),
    (400, {"error": {"message": "Input data may contain inappropriate content", "code": "x"}}, Answer, "inappropriate"),
    (403, {"error": {"message": "Your input was flagged by moderation", "code": 403}}, Answer, "flagged"),
    (400, {"error": {"message": "image exceeds 5 MB maximum: 5327908 bytes", "type": "x"}}, REFUSED, "longest_side"),
    (400, {"message": "This model's maximum context length is 4096 tokens.", "code": 400}, REFUSED, "max-model-len"),
    (400, {"error": {"message": "exceeds the available context size", "code": 400}}, REFUSED, "longest_side"),
    (400, {"error": {"message": "prompt is too long: 9000 tokens > 8000 maximum"}}, REFUSED, "too long"),
    (400, {"error": {"message": "", "code": "context_length_exceeded"}}, REFUSED, "too long"),
    (400, {"error": {"message": "", "code": "image_too_large"}}, REFUSED, "max_image_bytes"),
    (413, "<html><title>413 Request Entity Too Large</title></html>", REFUSED, "images_per_call=1"),
    (400, {"error": {"message": "Failed to load image or audio file"}}, REFUSED, "PNG or JPEG"),
    (400, {"error": {"message": "", "code": "invalid_image_format"}}, REFUSED, "PNG or JPEG"),
    (400, {"message": "At most 1 image(s) may be provided in one request."}, "all", "builder.images_per_call=1"),
    (400, {"error": {"message": "'data:image/jpeg;base64' is not a valid absolute URI"}}, "one", "image_address"),
    (400, {"error": {"message": "image_url is only supported by certain models."}}, "all", "chat.model"),
    (404, {"error": {"message": "No endpoints found that support image input"}}, "all", "chat.model"),
    (400, {"error": {"message": "json: cannot unmarshal array into Go struct"}}, "all", "chat.model"),
    (500, {"error": {"message": "image input is not supported - hint: mmproj"}}, "all", "--mmproj"),
    (400, {"error": {"message": "Invalid parameter: 'response_format' of type 'json_schema'"}}, "all", "json_object"),
    (422, {"detail": [{"loc": ["body", "max_completion_tokens"]}]}, "all", "max_output_tokens=null"),
    (400, {"error": {"message": "something new"}}, "one", "something new"),
    (403, "<html>Attention Required! | Cloudflare</html>", "one", "blocks"),
    (404, {"error": {"message": "model 'my-image-model' not found"}}, "never", "no model"),
    (400, [{"error": {"code": 400, "message": "Please pass a valid API key."}}], "never", "environment variable KEY"),
    (403, {"error": {"message": "Country not supported"}}, "never", "environment variable KEY"),
    (402, {"error": {"message": "Insufficient credits"}}, "never", "Add credit"),
    (529, {"error": {"message": "Overloaded"}}, Unanswered, "Overloaded"),
]


@pytest.mark.parametrize(("status", "body", "kind", "said"), COMPLAINTS, ids=[str(each[1])[:60] for each in COMPLAINTS])
def test_a_complaint_is_sorted_by_whose_fault_it_is_with_the_way_out(
    status: int, body: Any, kind: Any, said: str
) -> None:
    found = sort_out(status, *complaint(body), SERVER)
    if kind is REFUSED:
        assert isinstance(found, Answer)
        assert found.refused
        assert said in found.hint
        assert "vision" not in found.hint
    elif isinstance(kind, type):
        assert type(found) is kind
        assert said in str(found)
        assert not (isinstance(found, Answer) and found.hint)
    else:
        assert said in str(found)
        assert {"all": True, "one": False}.get(kind) is (found.all if isinstance(found, Rejected) else None)


def test_an_error_that_will_not_pass_is_not_waited_for() -> None:
    assert hopeless(500, b'{"error": {"message": "image input is not supported"}}')
    assert hopeless(429, b'{"error": {"code": "insufficient_quota"}}')
    assert not hopeless(429, b'{"error": {"code": "rate_limit_exceeded"}}')
    assert not hopeless(500, b"oops")
