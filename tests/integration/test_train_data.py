"""Pictures on an S3 API over HTTP (moto's server), encoded by Ray Data beside the session's service."""

import json
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from lorafleet.core.errors import BaseNotFound, DataNotFound, DataUnreadable, LorafleetError
from lorafleet.sdxl.base import load_base
from lorafleet.sdxl.config import BaseConfig
from lorafleet.train.data import DataConfig, encode_set, open_source
from lorafleet.train.data.precompute import encode_with_ray

COUNT = 12
CONFIG = DataConfig(crops=2, flip=True, caption_variants=2)
BASE = BaseConfig(device="cpu")


@pytest.fixture(scope="module")
def bucket(aws_credentials: None, repo: Path) -> Iterator[tuple[str, str]]:
    """(URL of a folder with twelve of the sample pictures, the server's address)"""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    s3 = boto3.client("s3", endpoint_url=endpoint)
    s3.create_bucket(Bucket="data")
    samples = repo / "samples" / "noto-spotlight" / "train"
    rows = (samples / "metadata.jsonl").read_text().splitlines()[:COUNT]
    for row in rows:
        name = json.loads(row)["file_name"]
        s3.upload_file(str(samples / name), "data", f"styles/light/{name}")
    s3.put_object(Bucket="data", Key="styles/light/metadata.jsonl", Body="\n".join(rows))
    whole = (samples / name).read_bytes()
    s3.put_object(Bucket="data", Key="styles/bad/a.png", Body=whole[: len(whole) // 2])
    s3.put_object(Bucket="data", Key="styles/bad/a.txt", Body="half of it")
    yield "s3://data/styles", endpoint
    server.stop()


@pytest.mark.nightly
def test_ray_writes_the_bytes_that_one_process_writes(
    service_url: str, bucket: tuple[str, str], tmp_path: Path
) -> None:
    """And what is wrong with a picture, on a worker, is the sentence that it is here."""
    url, endpoint = bucket
    source = open_source(f"{url}/light", endpoint_url=endpoint)
    by_ray = encode_with_ray(source, BASE, CONFIG, tmp_path / "ray", cpus_per_actor=0.5)
    alone = encode_set(source, load_base(BASE), CONFIG, tmp_path / "alone")
    assert len(alone.items) == COUNT
    files = {file.name: file.read_bytes() for file in alone.path.iterdir()}
    assert {file.name: file.read_bytes() for file in by_ray.path.iterdir()} == files
    bad = open_source(f"{url}/bad", endpoint_url=endpoint)
    with pytest.raises(
        DataUnreadable, match=r"the picture a\.png must be a whole PNG, JPEG or WebP picture: replace it"
    ):
        encode_with_ray(bad, BASE, DataConfig(validation_share=0), tmp_path / "ray", cpus_per_actor=0.5)
    with pytest.raises(BaseNotFound, match="no base model folder /nowhere"):
        encode_with_ray(source, BaseConfig(id="/nowhere"), CONFIG, tmp_path / "ray", cpus_per_actor=0.5)
    assert [path.name for path in (tmp_path / "ray").iterdir()] == [by_ray.fingerprint]


def test_what_is_not_there_is_one_sentence(bucket: tuple[str, str]) -> None:
    url, endpoint = bucket
    with pytest.raises(DataNotFound, match="there is no folder or file s3://data/styles/nowhere: check the path"):
        open_source(f"{url}/nowhere", endpoint_url=endpoint)
    with pytest.raises(LorafleetError, match="s3://elsewhere"):
        open_source("s3://elsewhere/folder", endpoint_url=endpoint)
