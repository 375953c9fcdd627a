"""What the version of transformers that is here has to have, and what it has that nobody named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from helpers.hf_models import FAMILIES, PROMISED, VERSION, build, retrofitted, tokens

from sleepkern.integrations import transformers as integration
from sleepkern.integrations.transformers import patch
from sleepkern.sleep import SleepSession

FUNCTIONS = re.compile(r"\b(torch_chunk_gated_delta_rule|chunk_kimi_delta_attention|mamba2_chunk_scan)\b")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_promised_family_is_here(family: str) -> None:
    with patch(family) as patched:
        assert f"modeling_{family}" in repr(patched)


def test_each_family_is_promised_from_some_version_on() -> None:
    named = [family for families in PROMISED.values() for family in families]
    assert sorted(named) == sorted(integration.FAMILIES)


def test_no_family_of_this_version_is_unknown() -> None:
    """A release that brings models with these functions is to be seen."""
    files = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    found = {path.parent.name for path in files if FUNCTIONS.search(path.read_text(encoding="utf-8"))}
    assert {*FAMILIES} <= found <= {*integration.FAMILIES}


def test_sleep_says_if_the_caches_are_too_old() -> None:
    if VERSION >= (5, 20):
        assert SleepSession(build("qwen3_next"), 16).memory.recurrent == [0, 1, 2]
        return
    message = (
        rf"transformers: got {re.escape(transformers.__version__)}, whose caches hold no fast weights; expected 5.20"
    )
    with pytest.raises(ImportError, match=message):
        SleepSession(build("qwen3_next"), 16)
    with pytest.raises(ImportError, match=message):
        retrofitted()(tokens(1, 3))


@pytest.mark.since("5.23")
@pytest.mark.parametrize("family", ["qwen4_exp", "glm5_next"])
def test_models_that_keep_more_than_a_session_are_refused(family: str) -> None:
    """Keys of an indexer, which a session would lose."""
    with pytest.raises(ValueError, match="model: got a .*; expected"):
        SleepSession(build(family), 16)
