"""One command for two hosts: each is reached as its address says, whatever the other's is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hsmvisor.cli.context import CommandError, Context
from hsmvisor.client.channel import TlsFiles
from support.certificates import Authority


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Of a command that was given a unix socket and a CA."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(Authority().root_pem)
    return Context("unix:/here", 1.0, False, tmp_path, None, TlsFiles(ca), None)


def test_tls_is_of_the_host_that_is_reached_by_tcp(context: Context) -> None:
    with pytest.raises(CommandError, match="TLS is for TCP"):
        _ = context.channel
    for address in ("unix:/here", "there:8470"):
        there = context.at(address)
        assert there.host == address
        there.channel.close()
    assert context.at("there:8470").at("unix:/here").tls is None


def test_tcp_without_tls_is_refused_all_the_same(context: Context) -> None:
    context.tls = None
    with pytest.raises(CommandError, match="TCP needs TLS"):
        _ = context.at("there:8470").channel
