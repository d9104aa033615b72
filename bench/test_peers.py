"""Tests that the rules of other libraries, with which decoders are compared, agree with their definitions.

pip install ".[bench]" && pytest bench/test_peers.py
"""

from __future__ import annotations

import pytest

from draco_ext.cli.bench.peers import PEERS

# Three steps towards the geometric median, where others go on until nothing changes.
ROUGH = {"byzfl GeometricMedian": 1e-3}


@pytest.mark.parametrize("peer", PEERS, ids=[peer.name.replace(" ", "-") for peer in PEERS])
@pytest.mark.parametrize("workers", [7, 15, 45])
def test_definition(peer, workers):
    if peer.missing():
        pytest.skip(peer.missing())
    assert peer.distance(workers) < ROUGH.get(peer.name, 1e-5)
