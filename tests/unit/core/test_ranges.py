import pytest
from pydantic import BaseModel, Field, ValidationError, field_validator

from lorafleet.core.generation import GenerationRequest
from lorafleet.core.ranges import accepts, allowed, invalid_request, names, short


class Part(BaseModel):
    name: str = Field(min_length=1, pattern=r"^[a-z]+$")
    weight: float = Field(default=1.0, ge=0)


class Whole(BaseModel):
    parts: list[Part] = []
    by_name: dict[str, Part] = {}
    either: int | str = 1
    even: int = 2
    on: bool = True

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("only even numbers work")
        return value


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("prompt", "text of 1 to 2000 characters, not blank"),
        ("negative_prompt", "text of at most 2000 characters"),
        ("width", "an integer from 64 to 2048"),
        ("steps", "an integer from 1 to 150"),
        ("guidance_scale", "a number from 0 to 30"),
        ("seed", "an integer from 0 to 4294967295"),
        ("nonsense", None),
    ],
)
def test_the_fields_of_a_request_in_words(field: str, words: str | None) -> None:
    assert allowed(GenerationRequest, [field]) == words


def test_nested_fields_in_words() -> None:
    assert allowed(Whole, ["parts", 0, "name"]) == "text, not empty, matching ^[a-z]+$"
    assert allowed(Whole, ["by_name", "x", "weight"]) == "a number of at least 0"
    assert allowed(Whole, ["either"]) == "an integer or text"
    assert allowed(Whole, ["on"]) == "true or false"
    assert allowed(Whole, ["parts"]) == "a list"
    assert accepts(Whole, ["either"]) == {"integer", "string"}
    assert names(Whole, ["parts", 0]) == ["name", "weight"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"prompt": "x", "steps": 0}, "steps", "steps must be an integer from 1 to 150, not 0."),
        ({"prompt": "x", "steps": "9"}, "steps", "steps must be an integer from 1 to 150, not '9'."),
        ({"prompt": "x", "seed": 2**32}, "seed", "seed must be an integer from 0 to 4294967295, not 4294967296."),
        ({"prompt": "x", "scheduler": "pndm"}, "scheduler", "scheduler must be one of euler, euler_a, ddim"),
        ({"prompt": " "}, "prompt", "prompt must be text of 1 to 2000 characters, not blank, not ' '."),
        ({}, "prompt", "prompt is missing."),
        ({"prompt": "x", "stepz": 1}, "stepz", "stepz is not a known field."),
        ([], None, "Input should be a valid dictionary"),
    ],
)
def test_a_wrong_request_is_one_sentence(body: object, param: str | None, message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        GenerationRequest.model_validate(body)
    error = invalid_request(raised.value, GenerationRequest)
    assert error.message.startswith(message)
    assert error.param == param


def test_a_validator_speaks_for_itself() -> None:
    with pytest.raises(ValidationError) as raised:
        Whole(even=3)
    assert invalid_request(raised.value, Whole).message == "even: only even numbers work."


def test_long_values_are_cut() -> None:
    assert short("x" * 5000) == "'" + "x" * 59 + "... (5002 characters)"
