"""Pictures without anything that says who made them."""

import io

from lorafleet.core.errors import InvalidRequest
from lorafleet.core.pictures import BadPicture, decode, on_white
from lorafleet.core.recipe import COMPRESSION


def anonymous(data: bytes) -> bytes:
    """A PNG of the same pixels, transparent ones white, and nothing else: no chunk of the file's survives.

    Raises InvalidRequest for what is no picture.
    """
    try:
        pixels = on_white(decode(data))
    except BadPicture as error:
        raise InvalidRequest(f"a picture for the arena {error}.", param="picture") from error
    pixels.info = {}
    buffer = io.BytesIO()
    pixels.save(buffer, "PNG", **COMPRESSION)
    return buffer.getvalue()
