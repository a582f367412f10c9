"""What every test needs: the scripts can be imported, and torch computes alike on all CPUs."""
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# `train.amp: auto` is float32 then on a CPU with bf16 instructions, too, as the tests expect: see
# backbone.cpu_multiplies_bf16. oneDNN reads it once, so it is set before torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")

import torch  # noqa: E402

torch.set_num_threads(1)        # tiny tensors: more threads only wait for each other
