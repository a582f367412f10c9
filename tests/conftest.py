"""What every test needs: importable scripts, and a small world that is made once."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

import helpers  # noqa: E402

torch.set_num_threads(1)        # tiny tensors: more threads only wait for each other
torch.cpu.get_capabilities = dict      # no bf16: the same figures on every CPU


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with backbone/, data/ and config.yaml, made once. Tests read it; they copy a part
    before they change it."""
    root = tmp_path_factory.mktemp("world")
    helpers.tiny_backbone(root / "backbone")
    helpers.corpus(root / "data", sizes=(14, 14, 7))
    helpers.config_file(root)
    return root


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    """kind -> the folder of a tiny backbone of this kind, written when it is first wanted."""
    root = tmp_path_factory.mktemp("backbones")

    def folder_of(kind):
        if not (root / kind).exists():
            helpers.tiny_backbone(root / kind, kind)
        return root / kind
    return folder_of
