import json
from typing import Any

import pytest

from lorafleet.serve.body import InvalidBody, MalformedBody, parse_body
from lorafleet.serve.schemas import GenerateBody, ImagesBody


def faults(body: dict[str, Any], model: type[Any] = GenerateBody) -> list[tuple[str, str | None]]:
    with pytest.raises(InvalidBody) as error:
        parse_body(json.dumps(body).encode(), model)
    assert (error.value.message, error.value.param) == error.value.faults[0]
    return error.value.faults


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"prompt": NaN}',
        b'{"prompt": "x", "guidance_scale": Infinity}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 5_000,
        b'{"prompt": "x"} trailing',
    ],
)
def test_what_is_no_json_object_is_malformed(raw: bytes) -> None:
    with pytest.raises(MalformedBody) as error:
        parse_body(raw, GenerateBody)
    assert len(error.value.message) < 200


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps must be an integer from 1 to 150, got 0"),
        ("steps", 151, "steps must be an integer from 1 to 150, got 151"),
        ("steps", "20", "steps must be an integer from 1 to 150, got '20'"),
        ("steps", 20.5, "steps must be an integer from 1 to 150, got 20.5"),
        ("steps", True, "steps must be an integer from 1 to 150, got True"),
        ("steps", None, "steps must be an integer from 1 to 150, got None"),
        ("seed", -1, "seed must be an integer from 0 to 4294967295, got -1"),
        ("seed", 2**32, "seed must be an integer from 0 to 4294967295, got 4294967296"),
        ("seed", 10**4000, "seed must be an integer from 0 to 4294967295, got 1000"),
        ("num_images", 9, "num_images must be an integer from 1 to 8, got 9"),
        ("width", 63, "width must be an integer from 64 to 2048, got 63"),
        ("step_reuse", 6, "step_reuse must be an integer from 1 to 5, got 6"),
        ("guidance_scale", 30.5, "guidance_scale must be a number from 0 to 30, got 30.5"),
        ("guidance_scale", "5", "guidance_scale must be a number from 0 to 30, got '5'"),
        ("scheduler", "eulr", "scheduler must be one of euler, euler_a, ddim"),
        ("prompt", "", "prompt must be text of 1 to 2000 characters, not blank, got ''"),
        ("prompt", " \n", "prompt must be text of 1 to 2000 characters, not blank"),
        ("prompt", "x" * 2001, "prompt must be text of 1 to 2000 characters, not blank, got 'xxx"),
        ("prompt", ["x"], "prompt must be text of 1 to 2000 characters"),
        ("negative_prompt", "x" * 2001, "negative_prompt must be text of at most 2000 characters"),
        ("step", 5, "unknown field 'step': did you mean 'steps'?"),
        ("qqq", 5, "unknown field 'qqq': known are prompt, negative_prompt"),
    ],
)
def test_a_fault_names_field_and_range(field: str, value: object, message: str) -> None:
    ((found, param),) = faults({"prompt": "x", field: value})
    assert found.startswith(message)
    assert param == field
    assert len(found) < 300


def test_infinity_in_disguise_is_out_of_range() -> None:
    with pytest.raises(InvalidBody, match="guidance_scale must be a number from 0 to 30, got inf"):
        parse_body(b'{"prompt": "x", "guidance_scale": 1e999}', GenerateBody)


def test_a_whole_number_is_an_integer_however_it_is_written() -> None:
    assert parse_body(b'{"prompt": "x", "steps": 2e1, "guidance_scale": 4}', GenerateBody).steps == 20


def test_a_missing_prompt_is_named() -> None:
    assert faults({})[0] == ("prompt is missing: it must be text of 1 to 2000 characters, not blank", "prompt")


def test_all_faults_are_listed() -> None:
    assert [param for _, param in faults({"prompt": "", "steps": 0, "nope": 1})] == ["prompt", "steps", "nope"]


def test_faults_inside_a_recipe_are_named_by_their_path() -> None:
    (message, param), *_ = faults({"prompt": "x", "base": {"id": 3, "fingerprint": "f"}})
    assert param == "base.id"
    assert message == "base.id must be text of at most 1000 characters, got 3"
    assert faults({"prompt": "x", "versions": {"torch": 2}})[0][1] == "versions.torch"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("stream", 1, "stream must be true or false, got 1"),
        ("partial_images", 4, "partial_images must be an integer from 0 to 3, got 4"),
        ("response_format", "url", "response_format must be b64_json, got 'url'"),
        ("output_format", "jpeg", "output_format must be png"),
        ("background", "transparent", "background must be one of auto, opaque"),
        ("n", 0, "n must be an integer from 1 to 8, got 0"),
        ("size", "big", "size must be text"),
        ("num_steps", 3, "unknown field 'num_steps': did you mean 'num_inference_steps'?"),
    ],
)
def test_openai_fields_have_ranges_too(field: str, value: object, message: str) -> None:
    assert faults({"prompt": "x", field: value}, ImagesBody)[0][0].startswith(message)


def test_openai_fields_become_ours() -> None:
    body = {
        "prompt": "x",
        "n": 2,
        "size": "96x128",
        "num_inference_steps": 3,
        "scheduler": "ddim",
        "seed": 4,
        "step_reuse": 2,
    }
    request = parse_body(json.dumps(body).encode(), ImagesBody).request()
    assert (request.width, request.height, request.num_images) == (96, 128, 2)
    assert (request.steps, request.scheduler, request.seed, request.guidance_scale) == (3, "ddim", 4, 5.0)
    assert request.step_reuse == 2
    assert parse_body(b'{"prompt": "x", "size": "auto", "n": null}', ImagesBody).request().width is None
