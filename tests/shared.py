"""Where tests find the shared reference data, which is not part of the repository."""

import os
import pathlib

import pytest


def shared_path(*parts: str) -> pathlib.Path:
    """Path inside the shared data folder ($JAXRL_SHARED, default ../shared); skips the test if absent."""
    root = pathlib.Path(os.environ.get("JAXRL_SHARED", pathlib.Path(__file__).parents[1].parent / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"shared data not found: {path} (set JAXRL_SHARED)")
    return path
