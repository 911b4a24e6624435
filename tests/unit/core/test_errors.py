import pickle

import pytest

from lorafleet.core import errors
from lorafleet.core.errors import LorafleetError, Overloaded


def test_an_error_crosses_process_borders_whole() -> None:
    sent = Overloaded("the queue is full.", param="num_images", retry_after_s=7.5)
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is Overloaded
    assert (received.message, received.param, received.retry_after_s) == (sent.message, "num_images", 7.5)
    assert str(received) == "the queue is full."


@pytest.mark.parametrize("kind", LorafleetError.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_error_has_a_code_of_its_own_and_stands_in_the_tree(kind: type[LorafleetError]) -> None:
    assert [other.code for other in LorafleetError.__subclasses__()].count(kind.code) == 1
    assert f"── {kind.__name__} " in (errors.__doc__ or "")
