"""The gates that come with fastlvm, a TOML file each. `fastlvm.evaluation.load_gate` reads them and says what may
stand in one.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the gates that come with fastlvm, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))
