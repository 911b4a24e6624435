import pickle

import pytest

from lorafleet.core import errors
from lorafleet.core.errors import AdapterBusy, LorafleetError, Overloaded, by_code


def test_an_error_crosses_process_borders_whole() -> None:
    sent = Overloaded("the queue is full.", param="num_images", retry_after_s=7.5)
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is Overloaded
    assert (received.message, received.param, received.retry_after_s) == (sent.message, "num_images", 7.5)
    assert str(received) == "the queue is full."


@pytest.mark.parametrize("kind", by_code().values(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_of_its_own_and_stands_in_the_tree(kind: type[LorafleetError]) -> None:
    assert "code" in vars(kind)
    assert f"{kind.__name__} " in (errors.__doc__ or "").replace("\n", " ")


def test_codes_are_those_of_the_classes() -> None:
    assert by_code()["adapter_busy"] is AdapterBusy  # a class below a class
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, LorafleetError)]
    assert len(by_code()) == len(classes)
