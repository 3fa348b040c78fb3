"""What shows that a model computed with our blocks."""

import pytest

from gptneo_fast.network import fused


@pytest.fixture
def fused_calls(monkeypatch):
    """The layer of every block that was computed fused."""
    calls, plain = [], fused.block
    monkeypatch.setattr(fused, "block", lambda *args, **kw: calls.append(kw["layer"]) or plain(*args, **kw))
    return calls
