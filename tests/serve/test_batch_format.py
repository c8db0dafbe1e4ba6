"""Lines of batch files: both formats in, their answers out, and a bad line named by its number."""

from __future__ import annotations

import io
import json

import pytest

from gemmakit.serve import batch_format
from gemmakit.serve.batch_format import (
    BadRow,
    Row,
    dump_line,
    error_line,
    parse_row,
    read_lines,
    read_rows,
    result_line,
)

OPENAI = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}


def line(**changes):
    return json.dumps({k: v for k, v in {**OPENAI, **changes}.items() if v is not ...}).encode()


def test_a_line_of_openai_is_its_id_url_and_body():
    assert parse_row(line(), 3) == Row(3, "a", "/v1/chat/completions", {"messages": []})


@pytest.mark.parametrize(
    ("asked", "url"),
    [
        ({"prompt": "x", "max_tokens": 3}, "/v1/completions"),
        ({"messages": [{"role": "user", "content": "x"}], "seed": 1}, "/v1/chat/completions"),
        ({"input": "x"}, "/v1/embeddings"),
    ],
)
def test_a_short_line_goes_where_its_field_says_with_the_settings_beside_it(asked, url):
    assert parse_row(json.dumps(asked).encode(), 7) == Row(7, "row-7", url, asked, True)
    assert parse_row(json.dumps({**asked, "custom_id": "mine"}).encode(), 7) == Row(7, "mine", url, asked, True)


@pytest.mark.parametrize(
    ("bad", "code", "said"),
    [
        (b"{", "invalid_json_line", "not valid JSON"),
        (b"\xff\xfe{}", "invalid_json_line", "not valid JSON"),
        (b"[" * 100_000, "invalid_json_line", "not valid JSON"),
        (b"[]", "invalid_json_line", "list"),
        (b'{"prompt": "x", "temperature": NaN}', "invalid_json_line", "NaN"),
        (b'{"prompt": "x", "messages": []}', "invalid_request", "messages and prompt"),
        (b'{"text": "x"}', "invalid_request", "'text'"),
        (b"{}", "invalid_request", "nothing"),
        (line(method="GET"), "invalid_method", "'GET'"),
        (line(url="/v1/../admin"), "invalid_url", "/v1/../admin"),
        (line(url="http://example.com/v1/completions"), "invalid_url", "must be"),
        (line(body=3), "missing_required_parameter", "3"),
        (line(body=...), "missing_required_parameter", "None"),
        (line(custom_id=""), "invalid_custom_id", "1 to 512"),
        (line(custom_id=5), "invalid_custom_id", "5"),
        (line(custom_id=...), "invalid_custom_id", "None"),
        (line(body={"stream": True}), "invalid_request", "stream"),
    ],
)
def test_a_bad_line_says_its_number_its_code_and_what_is_wrong(bad, code, said):
    row = parse_row(bad, 12)
    assert isinstance(row, BadRow)
    assert row.code == code
    assert row.message.startswith("line 12: ")
    assert said in row.message
    told = error_line(row)
    assert (told["line"], told["response"], told["error"]["code"]) == (12, None, code)


def test_a_bad_line_keeps_the_id_it_has():
    assert error_line(parse_row(line(method="PUT"), 1))["custom_id"] == "a"


def test_an_id_that_stood_before_costs_the_second_row_alone():
    first, second, third = read_rows([line(), line(), line(custom_id="b")])
    assert isinstance(first, Row)
    assert (second.code, second.line) == ("duplicate_custom_id", 2)
    assert third.custom_id == "b"


def test_empty_lines_count_but_ask_nothing():
    assert [row.line for row in read_rows([b"\n", line(), b"  \r\n", line(custom_id="b")])] == [2, 4]


def test_a_batch_of_one_endpoint_takes_no_other():
    assert parse_row(line(), 1, "/v1/embeddings").code == "invalid_url"


def test_a_line_without_end_is_read_in_bounded_pieces_and_costs_itself(monkeypatch):
    monkeypatch.setattr(batch_format, "MAX_LINE_BYTES", 64)
    file = io.BytesIO(b'{"prompt": "' + b"x" * 1000 + b'"}\n' + b'{"prompt": "y"}\n')
    lines = list(read_lines(file))
    assert [len(x) for x in lines] == [65, 16]
    assert [type(row) for row in read_rows(lines)] == [BadRow, Row]


CHAT = {
    "id": "x",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "92"}, "finish_reason": "stop"}],
    "usage": {"completion_tokens": 2},
}


def test_an_answer_to_a_line_of_openai_is_openais():
    found = result_line(parse_row(line(), 1), 200, CHAT)
    assert (found["custom_id"], found["error"]) == ("a", None)
    assert found["response"] == {"status_code": 200, "request_id": found["id"], "body": CHAT}


def test_an_answer_to_a_short_line_is_its_text():
    row = parse_row(b'{"messages": [], "custom_id": "q"}', 1)
    expected = {"custom_id": "q", "usage": CHAT["usage"], "text": "92", "finish_reason": "stop"}
    assert result_line(row, 200, CHAT) == expected
    completion = {**CHAT, "choices": [{"index": 0, "text": "92", "finish_reason": "stop", "logprobs": None}]}
    assert result_line(row, 200, completion) == expected
    thinking = [{**CHAT["choices"][0], "message": {**CHAT["choices"][0]["message"], "reasoning": "Hm."}}]
    assert result_line(row, 200, {**CHAT, "choices": thinking}) == {**expected, "reasoning": "Hm."}


def test_what_a_short_answer_has_no_word_for_is_given_whole():
    row = parse_row(b'{"prompt": "x"}', 1)
    several = [{"text": "1", "finish_reason": "stop"}, {"text": "2", "finish_reason": "stop"}]
    assert result_line(row, 200, {"choices": several})["choices"] == several
    scored = [{"text": "1", "finish_reason": "stop", "logprobs": {"tokens": ["1"]}}]
    assert result_line(row, 200, {"choices": scored})["choices"] == scored
    embedded = result_line(row, 200, {"data": [{"embedding": [1.0]}], "usage": {}})
    assert embedded["embedding"] == [1.0]


def test_a_refused_answer_has_the_lines_number_and_the_servers_words():
    body = {"error": {"message": "too long", "code": None}}
    for row in (parse_row(line(), 4), parse_row(b'{"prompt": "x"}', 4)):
        found = result_line(row, 400, body)
        assert (found["line"], found["response"]["status_code"], found["response"]["body"]) == (4, 400, body)


def test_a_result_is_one_line_whatever_its_text_holds():
    found = dump_line({"text": "a\nb\r\x85\u2028\ud800é"})
    assert found.count(b"\n") == 1
    assert json.loads(found)["text"].startswith("a\nb")
