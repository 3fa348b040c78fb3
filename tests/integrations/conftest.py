"""What shows that a model computed with our blocks."""

import pytest

from gptneo_fast.network import decoding, fused


@pytest.fixture
def fused_calls(monkeypatch):
    """The layer of every block that was computed fused."""
    calls, plain = [], fused.block
    monkeypatch.setattr(fused, "block", lambda *args, **kw: calls.append(kw["layer"]) or plain(*args, **kw))
    few = decoding.Few.run

    def run(self, span, *args):
        found = few(self, span, *args)
        calls.extend(range(span.first, span.end) if found is not None else ())
        return found

    monkeypatch.setattr(decoding.Few, "run", run)
    return calls
