"""Pictures without anything that says who made them."""

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.pictures import BadPicture, decode, on_white
from lorafleet.core.png import encode_png


def anonymous(data: bytes) -> bytes:
    """A PNG of the same pixels, transparent ones white, and nothing else: no chunk of the file's survives.

    Raises InvalidRequest for what is no picture.
    """
    try:
        return encode_png(on_white(decode(data)))
    except BadPicture as error:
        raise InvalidRequest(f"a picture for the arena {error}.", param="picture") from error
