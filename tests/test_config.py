"""config.py: the paper's recipe, the layers over it, and the words in which a setting is refused.

    python -m pytest -q tests/test_config.py        (about 5 s)
"""
import re
import shlex

import pytest

import train
from data import HERE
from config import dump_config, read_config, read_default, resolve_group, resolve_targets


def write(folder, text):
    """A configuration file -> its path; "\\udcff" stands for the byte 0xff."""
    path = folder / "mine.yaml"
    path.write_bytes(text.encode(errors="surrogateescape"))
    return path


# ---- The recipe ----------------------------------------------------------------------------------

# What the paper, its run tables, and for `full` SIB-200's own script say.
PAPER = """
sources: joshi5
backbone: {name: FacebookAI/xlm-roberta-large, dropout: true}
data: {name: Davlan/sib200, max_length: 164}
prompt: {length: 20, ratio: 0.7, encoder: mlp, hidden: 0, layers: 2, dropout: 0.1, heads: 8,
         reads: prompt}
train: {steps: 24000, epochs: 0, batch_size: 32, accumulate: 1, optimizer: adafactor, rate: 5e-5,
        weight_decay: 0.01, standard_rate: 5e-3, standard_weight_decay: 0, encoded_rate: 5e-5,
        encoded_weight_decay: 0.01, schedule: cosine, cycles: 2, warmup: 0.1, clip: 1.0,
        class_weights: none, evaluate_every: 0, patience: 20, patience_after: 0.5}
adapt: {steps: 6000, epochs: 0, warmup: 0.05, patience: 30, prompt_dropout: 0}
full: {epochs: 10, accumulate: 2, optimizer: adamw, rate: 1e-5}
"""


def test_the_recipe_is_the_papers(tmp_path):
    """Catches: a default that moved away from the paper while the file was edited."""
    assert read_config(write(tmp_path, PAPER)) == read_config()


def test_what_an_edited_default_is():
    """Catches: a number in config.yaml that becomes text, and with it all that is laid over it."""
    texts = ["5e-5", ".5", "1.", "010", "true", "off"]
    assert list(map(read_default, texts)) == [5e-5, 0.5, 1.0, 10, True, "off"]


def test_groups_of_the_paper():
    """Catches: a code lost or doubled in a list; two codes run together for want of a comma; a
    column of another group."""
    settings = read_config()
    groups = {name: resolve_group(settings, name) for name in settings["groups"]}
    assert {name: len(codes) for name, codes in groups.items()} == dict(
        enarzho=3, joshi5=7, seen=92, unseen=113, low_performing=46, seen_without_joshi5=85,
        all_without_joshi5=198, all=205, diverse_seen=23, diverse_unseen=24)
    for codes in groups.values():
        assert len(codes) == len(set(codes)) and set(codes) <= set(groups["all"])
        assert all(re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", code) for code in codes)
    assert [len(codes) for codes in resolve_targets(settings).values()] == [46, 113, 85, 198]


# ---- Layers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, settings, expected", [
    ("train: {steps: 7}", "", "train['steps'] == 7"),
    ("train: {steps: 7}", "train.steps=8 train.steps=9", "train['steps'] == 9"),
    ("train: {rate: 7}", "", "full['rate'] == 1e-5"),
    ("train: {rate: 7}", "train.rate=9", "full['rate'] == 9"),        # --set has the last word
    ("adapt: {warmup: 1}", "train.warmup=0", "adapt['warmup'] == 0"),
    ("", "train.rate=9 full.rate=8", "full['rate'] == 8"),
    ("adapt: {batch_size: 4}", "", "adapt['batch_size'] == 4"),       # a key that adapt lacks
    ("full: {epochs: 3}", "full.steps=9", "full['epochs'] == train['epochs'] == 0"),
    ("", "full.steps=9 full.epochs=2", "full['epochs'] == 2"),
    ("", "adapt.steps=9", "full['epochs'] == 10"),
    # a text becomes what the default is
    ("train: {rate: 5e-5}", "train.clip=1", "(train['rate'], str(train['clip'])) == (5e-5, '1.0')"),
    ("train: {steps: 011}", "", "train['steps'] == 11"),
    ("train: {amp: off}", "", "train['amp'] == 'off'"),
    ("backbone: {dropout: false}", "", "backbone['dropout'] is False"),
    ("backbone: {revision: 1234567}", "", "backbone['revision'] == '1234567'"),
    ("groups: {x: [no, 3, e\u0301 ]}", "", "groups['x'] == ['no', '3', '\u00e9']"),
    ("sources: seen", "", "sources == 'seen' and len(groups['seen']) == 92"),
    # only the columns of a file are not added to the default ones
    ("targets: {A: seen}", "targets.B=[x]", "targets == {'A': 'seen', 'B': ['x']}")])
def test_layers(tmp_path, text, settings, expected):
    """Catches: layers in the wrong order; a setting of the command overruled in silence; YAML's own
    ideas of numbers and truth; a configuration that a run saves and cannot read again."""
    found = read_config(write(tmp_path, f"\ufeff{text or '{}'}"), settings.split())
    assert eval(expected, dict(found))
    assert read_config(write(tmp_path, dump_config(found).decode())) == found


# ---- What is refused -----------------------------------------------------------------------------

@pytest.mark.parametrize("text, message", [
    ("train: {rates: 1.0}", r"train.rates is unknown \(did you mean rate\?\)"),
    ("train: {prompt_dropout: 1}", "train.prompt_dropout is unknown"),
    ("epochs: 1", "unknown section 'epochs'"),
    ("trian: {rate: 1}", r"unknown section 'trian' \(did you mean train\?\)"),
    ("train: {steps: 1.5}", "train.steps must be a whole number, not '1.5'"),
    ("train: {steps: 1:30}", "train.steps must be a whole number, not '1:30'"),
    ("train: {rate: }", "train.rate must be a number, not ''"),
    ("train: {rate: [1]}", r"train.rate must be a number, not \['1'\]"),
    ("train: {rate: -1}", "train.rate must be at least 0, not -1"),
    ("train: {rate: nan}", "train.rate must be at least 0, not nan"),
    ("train: {batch_size: 0}", "train.batch_size must be at least 1, not 0"),
    ("backbone: {dropout: no}", "backbone.dropout must be true or false, not 'no'"),
    ("prompt: {encoder: mpl}", "prompt.encoder cannot be 'mpl', only mlp, lstm, attention, none"),
    ("adapt: {warmup: 5}", "adapt.warmup is a share from 0 to 1, not 5"),
    ("train: 3", "train is a section of settings, not a value"),
    ("sources: [x]", "sources must name a group"),
    ("train:\n  steps: 1\n  steps: 1", "the key 'steps' is given twice .* line 3"),
    ("train:\n  steps: [1", "line 2"), ("just words", "must be a mapping"), ("", "must be a map"),
    ("a: \udcff", ":1: not valid UTF-8")])
def test_what_a_file_may_not_say(tmp_path, text, message):
    """Catches: a misspelt or mistyped setting that is ignored; an error that does not say where."""
    with pytest.raises(ValueError, match=f"^{tmp_path}/mine.yaml.*{message}"):
        read_config(write(tmp_path, text))


@pytest.mark.parametrize("setting, message", [
    ("train.rate", "write section.key=value"), ("rate=1", "write section.key=value"),
    ("train.rate.more=1", "train.rate.more is unknown"), ("train=1", "write section.key=value"),
    ("train.rate=x", "must be a number"), ("groups.x={a: 1, a: 2}", "'a' is given twice")])
def test_what_a_command_may_not_say(setting, message):
    """Catches: --set more lenient than a file; a message that does not name the setting."""
    with pytest.raises(ValueError, match=f"^--set {setting}: .*{message}"):
        read_config(None, ["train.steps=3", setting])


# ---- Groups --------------------------------------------------------------------------------------

@pytest.mark.parametrize("names, expected", [
    ("[b]", "x z w"), ("[w, b, x]", "w x z"), ("[a, -one]", "y z"), ("[a, -b, -a]", ""),
    ("x", "x"), ("[v]", "v"), ("[-q, a]", "-q excludes nothing"),
    ("[-a, b]", "-a excludes nothing"),
    ("[a, -aa]", "-aa excludes nothing: no such language before it (did you mean a?)"),
    ("[new, x]", "new x"), ("[loop]", "x z w loop")])
def test_groups(names, expected):
    """Catches: a code twice; an exclusion that comes too early, or excludes nothing for a typing
    error; endless recursion; a group that cannot have the name of a language in it."""
    settings = read_config(None, ["groups.a=[x, y, z]", "groups.b=[a, w, -y]", "groups.one=x",
                                  "groups.x=[x]", "groups.loop=[b, back]", "groups.back=loop",
                                  f"groups.new={names}"])
    try:
        assert resolve_group(settings, "new") == expected.split()
    except ValueError as error:
        assert str(error).startswith(expected)


def test_hints_name_scripts_as_they_are_written_from_here(tmp_path, monkeypatch):
    """Catches: a hint that can be pasted in the repository's own folder alone."""
    monkeypatch.chdir(tmp_path)
    path, = shlex.split(train.in_reach("report.py"))
    assert (tmp_path / path).resolve() == HERE / "report.py"
