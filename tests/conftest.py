"""Fixtures that several test files share: where the real data lies, and what this machine can run."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real trajectories and the real tokenizer, named by ENTROPO_REAL_DATA."""
    folder = os.environ.get("ENTROPO_REAL_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("ENTROPO_REAL_DATA names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def docker_daemon() -> None:
    """Skips where no Docker daemon answers; fails instead when ENTROPO_REQUIRE_DOCKER is set."""
    answers = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    if not answers:
        if os.environ.get("ENTROPO_REQUIRE_DOCKER"):
            pytest.fail("ENTROPO_REQUIRE_DOCKER is set, but no Docker daemon answers")
        pytest.skip("no Docker daemon answers")
