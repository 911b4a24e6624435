"""The arena on the running service: what a rater's browser does."""

import io

import httpx
from PIL import Image

from lorafleet.core.arena.config import ArenaConfig
from lorafleet.core.arena.records import Entrant
from lorafleet.core.arena.store import open_store


def test_raters_vote_while_pairs_come_in(http: httpx.Client) -> None:
    def picture(system: str, seed: int) -> Entrant:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), "red" if system == "base" else "blue").save(buffer, "PNG")
        return Entrant(system, "a cat", seed, buffer.getvalue(), 20.0)

    store = open_store(ArenaConfig())  # the service's own: the same file, another process
    store.add("session", [picture(system, seed) for system in ("base", "plush") for seed in range(3)])
    session = None
    for voted in range(3):
        pair = http.get("/v1/arena/pair", params={"pool": "session", **({"session": session} if session else {})})
        shown = pair.raise_for_status().json()
        session = shown["session"]
        assert shown["remaining"] == 3 - voted
        ballot = {"session": session, "pair": shown["pair"], "choice": "tie" if voted else "left"}
        assert http.post("/v1/arena/votes", json=ballot).status_code == 201
        assert http.post("/v1/arena/votes", json=ballot).json()["error"]["code"] == "already_voted"
    gone = http.get("/v1/arena/pair", params={"pool": "session", "session": session})
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "pair_not_found")
    ratings = http.get("/v1/arena/ratings", params={"pool": "session"}).json()
    assert (ratings["votes"], sum(each["wins"] for each in ratings["systems"])) == (3, 1)
    assert [vote.winner is None for vote in store.votes("session")] == [False, True, True]
    store.close()
