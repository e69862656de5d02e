from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import write_tiny_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as far as the server reads it: a byte-level tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(path, 320)
    return path
