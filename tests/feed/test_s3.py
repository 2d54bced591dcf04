"""Shards in S3: read through Energon's multi-storage client from a real S3-compatible server on loopback."""

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer

from tests.feed import corpus
from tests.feed.test_replay import replay


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A moto server with an empty bucket ``shards``, and a client configuration with profile ``remote``."""
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_DEFAULT_REGION", "us-east-1"),
    ):
        monkeypatch.setenv(name, value)
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    moto.start()
    address = "http://{}:{}".format(*moto.get_host_and_port())
    client = boto3.client("s3", endpoint_url=address, region_name="us-east-1")
    client.create_bucket(Bucket="shards")
    options = {"base_path": "shards", "region_name": "us-east-1", "endpoint_url": address}
    profile = {
        "storage_provider": {"type": "s3", "options": options},
        "caching_enabled": True,
    }
    cache = {"location": str(tmp_path / "cache"), "size": "1G"}
    config = tmp_path / "msc.yaml"
    config.write_text(yaml.safe_dump({"profiles": {"remote": profile}, "cache": cache}))
    monkeypatch.setenv("MSC_CONFIG", str(config))
    yield client
    moto.stop()


def test_batches_from_s3_equal_local_ones_also_across_a_resume(make_loader, server, tmp_path):
    local = corpus.build(tmp_path / "all", {"text": 40, "image_text": 24})
    for file in local.parent.rglob("*"):
        if file.is_file():
            server.upload_file(str(file), "shards", str(file.relative_to(local.parent)))
    plan = [(2, 1), (1, 1)]
    assert replay(make_loader, "msc://remote/blend.yaml", plan) == replay(make_loader, local, plan)
