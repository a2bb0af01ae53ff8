"""python little.py FLAGS: train.py with a little network as the default, grids of few steps."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import run                          # noqa: E402
import train                        # noqa: E402
import uvit                         # noqa: E402
from tests.helpers import LITTLE    # noqa: E402

uvit.PRESETS["laptop"] = uvit.PRESETS["tiny"] | dict(network=LITTLE)
run.REPORT_STEPS = 3

if __name__ == "__main__":
    run.run_command(train.main)
