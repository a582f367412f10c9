"""The README is run as it stands: its own-data example, its commands' options, its files."""
import json
import re
import shlex
from pathlib import Path

import pytest

import evaluate
import train
import xpe
from helpers import run

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_example_of_own_data_learns(tmp_path):
    """Catches: an example that stays at the majority class, as one with the paper's rates does."""
    yaml, = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(yaml)
    status, out, err = run(train.main, "--mode", "xpe", "--sources", tmp_path / "mine.yaml",
                           "--steps", "60", "--out", tmp_path)
    assert status == 0 and "warning" not in err
    scores = json.loads((tmp_path / "xpe-mine-s11" / "test.json").read_text())["groups"]
    assert scores["Sources"][0] > 45 and scores["Others"][0] > 30       # of 14.3


@pytest.mark.parametrize("command", re.findall(r"^python (?:train|evaluate)\.py .*|"
                                               r"(?<=`)python (?:train|evaluate)\.py [^`]*",
                                               README, re.MULTILINE))
def test_the_commands_have_these_options(command):
    """Catches: an option in the README that a script no longer has."""
    words = shlex.split(command.partition("#")[0])
    _, known, _ = run({"train.py": train.main, "evaluate.py": evaluate.main}[words[1]], "--help")
    assert {word for word in words if word.startswith("--")} <= set(known.split())


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.(?:py|yaml|md|txt))`", README))))
def test_the_files_exist(name):
    """Catches: a file that the README names and nobody finds."""
    assert (ROOT / name).is_file() or name == "labels.txt"


def test_the_training_step_is_that_of_xpe():
    """Catches: a step in the README that is not the one that test_xpe.py runs."""
    step = re.search(r"```python\n(backbone = .*?)```", README, re.DOTALL)[1]
    assert step.split() == re.search(r"backbone = .*?zero_grad\(\)", xpe.__doc__, re.DOTALL)[0].split()
