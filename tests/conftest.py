"""The repository and its benchmarks can be imported from anywhere; fixtures of test_all.py."""
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "benchmarks")]
pytest.register_assert_rewrite("helpers", "test_all")

from helpers import unbroken                # noqa: E402, F401
from test_all import little, same_random_numbers, trained_run    # noqa: E402, F401
