"""What every test needs: the scripts can be imported, and torch uses one thread."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

torch.set_num_threads(1)        # tiny tensors: more threads only wait for each other
