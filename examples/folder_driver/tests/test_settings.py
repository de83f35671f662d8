"""Options of the URL, and the refused ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from aiotaskq_folder import FolderBackend, FolderBroker, driver

from aiotaskq.contract.message import Envelope
from aiotaskq.errors import (
    BackendUnavailable,
    BrokerFull,
    BrokerUnavailable,
    ConfigError,
    Unsupported,
)


@pytest.mark.parametrize(
    "url",
    [
        "folder:",
        "folder://",
        "folder://relative/path",
        "folder://user:secret@host/path",
        "folder:///path?fsync=maybe",
        "folder:///path?token=secret",
        "folder:///path#secret",
        "folder://[secret/path",
        "file:///path",
    ],
)
def test_a_wrong_url_is_refused_and_not_shown(url: str) -> None:
    for create in (driver.broker, driver.backend):
        assert create is not None
        with pytest.raises(ConfigError) as caught:
            create(url, prefix="p")
        assert "secret" not in str(caught.value)


async def test_a_path_may_be_quoted(tmp_path: Path) -> None:
    broker = FolderBroker(f"folder://{tmp_path}/two%20words%3F", prefix="p")
    await broker.open()
    await broker.close()
    assert (tmp_path / "two words?" / "p" / "new").is_dir()


@pytest.mark.parametrize(("options", "flushed"), [("", True), ("?fsync=false", False)])
async def test_files_are_flushed_before_a_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, flushed: bool
) -> None:
    calls: list[int] = []
    broker = FolderBroker(f"folder://{tmp_path}{options}")
    await broker.open()
    monkeypatch.setattr(os, "fsync", calls.append)
    await broker.publish([Envelope(id="a", queue="q", body=b"")])
    await broker.close()
    assert bool(calls) is flushed


async def test_a_long_name_of_a_queue_is_refused_by_the_sender(tmp_path: Path) -> None:
    broker = FolderBroker(f"folder://{tmp_path}")
    await broker.open()
    with pytest.raises(Unsupported):
        await broker.publish([Envelope(id="a", queue="x" * 161, body=b"")])
    await broker.publish([Envelope(id="a", queue="x" * 160, body=b"", delay=1e300)])
    assert list(await broker.depth()) == ["x" * 160]
    await broker.close()


async def test_a_full_disk_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = FolderBroker(f"folder://{tmp_path}")
    backend = FolderBackend(f"folder://{tmp_path}")
    await broker.open()

    def full(*_: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BrokerFull):
        await broker.publish([Envelope(id="a", queue="q", body=b"")])
    assert await broker.depth() == {}
    assert not list((tmp_path / "aiotaskq/new").iterdir())
    monkeypatch.undo()
    await broker.publish([Envelope(id="a", queue="q", body=b"")])
    await broker.close()
    (tmp_path / "aiotaskq").rename(tmp_path / "away")
    with pytest.raises(BrokerUnavailable):
        await broker.depth()
    with pytest.raises(BackendUnavailable):
        await backend.load(["a"])
    await broker.close()
    await backend.close()
