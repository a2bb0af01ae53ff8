"""python little.py FLAGS: train.py with the network that test_all.py calls little, and grids of few steps."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train                # noqa: E402
import uvit                 # noqa: E402
from test_all import LITTLE  # noqa: E402

uvit.PRESETS["tiny"] = LITTLE
train.REPORT_STEPS = 3

if __name__ == "__main__":
    train.command()
