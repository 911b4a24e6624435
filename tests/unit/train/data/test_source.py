"""Every kind of source gives the same items; what is wrong with one is one sentence that names the file."""

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lorafleet.core.errors import DataNotFound, DataUnreadable, LorafleetError
from lorafleet.train.data import Item, open_source

NAMES = ("a.png", "b.jpg", "sub/c.webp")
CAPTIONS = {"a.png": ("an apple",), "b.jpg": ("a boat", "a ship"), "sub/c.webp": ("a cat, sitting",)}


def png(shade: int = 0, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


DATA = {"a.png": png(1), "b.jpg": png(2, "JPEG"), "sub/c.webp": png(3, "WEBP")}


def put(folder: Path, name: str, data: bytes | str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def pictures(folder: Path) -> None:
    for name, data in DATA.items():
        put(folder, name, data)
    put(folder, "LICENSE", "words")
    put(folder, ".hidden/d.png", b"no picture")


def jsonl(folder: Path) -> None:
    pictures(folder)
    rows = [
        {"file_name": "a.png", "text": "an apple"},
        {"file_name": "./b.jpg", "caption": ["a boat", "a ship"]},
        {"file_name": "sub/c.webp", "prompt": "a cat, sitting", "else": 1},
    ]
    put(folder, "metadata.jsonl", "\n\n".join(json.dumps(row) for row in rows))


def csv(folder: Path) -> None:
    pictures(folder)
    rows = 'file_name,text\na.png,an apple\nb.jpg,a boat\nb.jpg,a ship\nsub/c.webp,"a cat, sitting"\n'
    put(folder, "metadata.csv", "\ufeff" + rows)


def sidecars(folder: Path) -> None:
    pictures(folder)
    for name, captions in CAPTIONS.items():
        put(folder, str(Path(name).with_suffix(".txt")), "\r\n".join(captions) + "\n")


def parquet(folder: Path) -> None:
    folder.mkdir()
    images = [{"bytes": data, "path": name} for name, data in DATA.items()]
    table = pa.table({"image": images, "text": [list(CAPTIONS[name]) for name in NAMES]})
    pq.write_table(table.slice(0, 2), folder / "0.parquet", row_group_size=1)
    pq.write_table(table.slice(2), folder / "1.parquet")


def parquet_of_bytes(folder: Path) -> None:
    folder.mkdir()
    texts = pa.array([list(CAPTIONS[name]) for name in NAMES])
    pq.write_table(pa.table({"jpg": list(DATA.values()), "caption": texts}), folder / "0.parquet")


def tars(folder: Path) -> None:
    folder.mkdir()
    for number, names in enumerate((NAMES[:2], NAMES[2:])):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for name in names:
                stem = name.partition(".")[0]
                members = {f"{stem}.json": json.dumps({"caption": CAPTIONS[name]}), name: DATA[name]}
                if name == "a.png":
                    members = {name: DATA[name], "a.txt": "an apple"}
                for member, data in members.items():
                    content = data if isinstance(data, bytes) else data.encode()
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))


@pytest.mark.parametrize("write", [jsonl, csv, sidecars, parquet, parquet_of_bytes, tars], ids=lambda f: f.__name__)
def test_every_kind_of_source_gives_the_same_items(write: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path / "data")
    source = open_source(str(tmp_path / "data"))
    items: list[Item] = list(source.items())
    assert [item.captions for item in items] == [CAPTIONS[name] for name in NAMES]
    assert [item.read() for item in items] == list(DATA.values())
    assert [item.read() for item in pickle.loads(pickle.dumps(items))] == list(DATA.values())
    again = pickle.loads(pickle.dumps(source)).items()
    assert [item.key for item in again] == [item.key for item in items]


@pytest.mark.parametrize(("write", "name"), [(parquet, "0.parquet"), (tars, "0.tar")])
def test_one_file_is_a_source_too(write: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    write(tmp_path / "data")
    items = open_source(str(tmp_path / "data" / name)).items()
    assert [item.read() for item in items] == list(DATA.values())[:2]


def test_a_relative_path_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jsonl(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    assert len(open_source("data/").items()) == 3


BAD: dict[str, tuple[dict[str, bytes | str], str]] = {
    "empty": ({"LICENSE": "x"}, "holds no pictures: put PNG, JPEG or WebP files there with captions"),
    "mixed": ({"a.png": png(), "x.tar": b""}, "holds webdataset tars and pictures: keep one kind in it"),
    "no sidecar": ({"a.png": png()}, "a.png has no caption: give it one in a .txt file of the same name"),
    "no sidecars": ({"a.png": png(), "b.png": png(), "c.png": png()}, "a.png, like 2 others, has no caption"),
    "empty sidecar": ({"a.png": png(), "a.txt": " \n"}, "a.png has no caption: give it one in a .txt file"),
    "Latin-1": ({"a.png": png(), "a.txt": b"caf\xe9"}, "a.txt is not UTF-8 text"),
    "not in metadata": (
        {"a.png": png(), "b.png": png(), "metadata.jsonl": '{"file_name": "a.png", "text": "x"}'},
        "b.png has no caption: give it one in a row of metadata.jsonl",
    ),
    "row without a file": (
        {"a.png": png(), "metadata.jsonl": '\n{"file_name": "b.png", "text": "x"}'},
        "metadata.jsonl line 2 names b.png, which is not in",
    ),
    "row that leaves the folder": (
        {"a.png": png(), "metadata.jsonl": '{"file_name": "../a.png", "text": "x"}'},
        "metadata.jsonl line 1 names ../a.png, which is not in",
    ),
    "row without a name": ({"a.png": png(), "metadata.jsonl": '{"text": "x"}'}, "line 1 has no file_name"),
    "row without a caption": (
        {"a.png": png(), "metadata.jsonl": '{"file_name": "a.png", "label": "x"}'},
        "metadata.jsonl line 1, a.png, has no caption: give it one as text or prompt or caption",
    ),
    "no JSON": ({"a.png": png(), "metadata.jsonl": "a.png: x"}, "metadata.jsonl line 1 is no JSON object such as"),
    "both": ({"a.png": png(), "metadata.jsonl": "", "metadata.csv": ""}, "has both metadata.jsonl and metadata.csv"),
    "no header": ({"a.png": png(), "metadata.csv": "a.png,x\n"}, "must begin with a line of column names"),
    "broken CSV": ({"a.png": png(), "metadata.csv": 'file_name,text\na.png,"x\n'}, "metadata.csv is not CSV"),
    "no parquet": ({"a.parquet": b"PAR1 no"}, "a.parquet is not a whole parquet file"),
    "no tar": ({"a.tar": b"no tar" * 200}, "a.tar is not a whole, uncompressed tar"),
    "empty tar": ({"a.tar": bytes(10240)}, "has tars without a picture"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_sentence(case: str, tmp_path: Path) -> None:
    files, words = BAD[case]
    for name, data in files.items():
        put(tmp_path, name, data)
    with pytest.raises(LorafleetError) as caught:
        open_source(str(tmp_path)).items()
    assert isinstance(caught.value, DataNotFound | DataUnreadable)
    assert words in caught.value.message
    assert "\n" not in caught.value.message


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataNotFound, match=r"there is no folder or file .*nowhere: check the path"):
        open_source(str(tmp_path / "nowhere"))


def test_columns_and_captions_of_parquet_are_checked(tmp_path: Path) -> None:
    pq.write_table(pa.table({"picture": [b"x"], "text": ["x"]}), tmp_path / "0.parquet")
    with pytest.raises(DataUnreadable, match="needs a column image or img or jpg of bytes and a column text"):
        open_source(str(tmp_path)).items()
    pq.write_table(pa.table({"image": [b"x", None], "text": ["x", None]}), tmp_path / "0.parquet")
    with pytest.raises(DataUnreadable, match=r"0\.parquet row 1 has no caption: fill its text"):
        open_source(str(tmp_path)).items()
    pq.write_table(pa.table({"image": pa.array([None], pa.binary()), "text": ["x"]}), tmp_path / "0.parquet")
    (item,) = open_source(str(tmp_path)).items()
    with pytest.raises(DataUnreadable, match=r"0\.parquet row 0 holds no picture's bytes in image"):
        item.read()


def test_a_picture_of_a_tar_needs_its_caption(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("one.png")
        info.size = len(png())
        tar.addfile(info, io.BytesIO(png()))
    with pytest.raises(DataUnreadable, match=r"x\.tar/one\.png has no caption: add one\.txt or one\.json beside it"):
        open_source(str(tmp_path)).items()


def test_a_picture_that_vanished_is_named(tmp_path: Path) -> None:
    jsonl(tmp_path / "data")
    item = open_source(str(tmp_path / "data")).items()[0]
    (tmp_path / "data" / "a.png").unlink()
    with pytest.raises(DataUnreadable, match=r"a\.png is not in .* any more"):
        item.read()
