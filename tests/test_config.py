"""config.py: what a configuration may say, and the words in which it is refused.

    pytest tests/test_config.py             (a second)

Each test says which mistake it would catch.
"""
import re
import shlex

import pytest
import yaml

import config
from config import (HERE, check_value, dump_config, in_reach, read_config, read_yaml,
                    resolve_group)


def write(folder, text):
    """A configuration file -> its path."""
    path = folder / "mine.yaml"
    path.write_text(text, "utf-8")
    return path


# ---- The default configuration ----

def test_the_recipe_of_the_paper():
    """Catches: a default that moved away from the paper while the file was edited."""
    settings = read_config()
    train = settings["train"]
    assert settings["sources"] == "joshi5"
    assert settings["backbone"]["name"] == "FacebookAI/xlm-roberta-large"
    assert settings["data"]["max_length"] == 164
    assert (settings["prompt"]["length"], settings["prompt"]["layers"]) == (20, 2)
    assert (train["steps"], train["batch_size"], train["optimizer"]) == (24000, 32, "adafactor")
    assert (train["rate"], train["weight_decay"]) == (5e-5, 0.01)
    assert (train["standard_rate"], train["standard_weight_decay"]) == (5e-3, 0.0)
    assert (train["encoded_rate"], train["encoded_weight_decay"]) == (5e-5, 0.01)
    assert (train["schedule"], train["cycles"], train["warmup"]) == ("cosine", 2, 0.1)
    assert (train["patience"], train["patience_after"], train["clip"]) == (20, 0.5, 1.0)
    assert (train["amp"], settings["backbone"]["attention"]) == ("auto", "auto")
    assert (settings["adapt"]["steps"], settings["adapt"]["patience"]) == (6000, 30)
    assert (settings["full"]["optimizer"], settings["full"]["rate"]) == ("adamw", 1e-5)


@pytest.mark.parametrize("group, size", [
    ("enarzho", 3), ("joshi5", 7), ("seen", 92), ("unseen", 113), ("low_performing", 46),
    ("seen_without_joshi5", 85), ("all_without_joshi5", 198), ("all", 205), ("diverse_seen", 23),
    ("diverse_unseen", 24)])
def test_groups_of_the_paper(group, size):
    """Catches: a code lost or doubled in a list; two codes run together for want of a comma."""
    settings = read_config()
    codes = resolve_group(settings, group)
    assert len(codes) == size
    assert len(set(codes)) == size
    assert all(re.fullmatch("[a-z]{3}_[A-Z][a-z]{3}", code) for code in codes)
    assert set(codes) <= set(resolve_group(settings, "all"))


def test_every_line_can_be_read_on_a_screen():
    """Catches: comments of config.yaml that run out of the window."""
    lines = (config.HERE / "config.yaml").read_text("utf-8").splitlines()
    assert max(len(line) for line in lines) <= 100


def test_both_readings_of_the_rates_of_dual_can_be_set():
    """Catches: the rates of the paper-era code, which config.yaml names, out of reach."""
    reverse = {"encoded_rate": 5e-3, "encoded_weight_decay": 0.0, "standard_rate": 5e-5,
               "standard_weight_decay": 0.01}
    settings = ["train.encoded_rate=5.0e-3", "train.encoded_weight_decay=0.0",
                "train.standard_rate=5.0e-5", "train.standard_weight_decay=0.01"]
    train = read_config(None, settings)["train"]
    assert {key: train[key] for key in reverse} == reverse


# ---- Layers ----

def test_a_file_lies_over_the_default_and_settings_over_both(tmp_path):
    """Catches: layers in the wrong order, a layer that is lost, defaults that a reading changes."""
    before = read_config()
    path = write(tmp_path, "train: {rate: 1, steps: 7}\nadapt: {batch_size: 4}\n"
                           "groups: {mine: [aaa_Latn]}\nbackbone: {name: here}\n")
    settings = read_config(path, ["train.steps=9", "full.cycles=3", "prompt.reads=mean",
                                  "groups.yours=[bbb_Latn, mine]", "sources=mine"])
    assert (settings["train"]["rate"], settings["train"]["steps"]) == (1.0, 9)
    assert type(settings["train"]["rate"]) is float
    assert settings["adapt"]["batch_size"] == 4         # a key of `train` that `adapt` has not
    assert settings["full"]["cycles"] == 3
    assert settings["prompt"]["reads"] == "mean"
    assert settings["backbone"]["name"] == "here"
    assert settings["backbone"]["dropout"] is True
    assert settings["sources"] == "mine"
    assert resolve_group(settings, "yours") == ["bbb_Latn", "aaa_Latn"]
    assert resolve_group(settings, "joshi5") == resolve_group(before, "joshi5")
    assert read_config() == before
    assert read_config(config.HERE / "config.yaml") == before


def test_targets_of_a_file_replace_the_default_ones(tmp_path):
    """Catches: columns of 205 languages beside those of a corpus that has three."""
    path = write(tmp_path, "targets: {Mine: mine}\ngroups: {mine: [aaa_Latn]}")
    assert read_config(path)["targets"] == {"Mine": "mine"}
    added = read_config(path, ["targets.Yours=[bbb_Latn]"])["targets"]
    assert added == {"Mine": "mine", "Yours": ["bbb_Latn"]}
    other = write(tmp_path, "groups: {mine: [aaa_Latn]}")
    assert read_config(other)["targets"] == read_config()["targets"]


def test_a_configuration_comes_back_as_it_was_written(tmp_path):
    """Catches: a value that YAML reads otherwise than it was: off, no, 011 as text, 1e-07."""
    settings = read_config(None, ["train.amp=off", "train.rate=1.0e-07", "targets.Überall=all",
                                  "groups.no=[no, yes, '011']", "backbone.revision='12345'"])
    path = tmp_path / "config.yaml"
    path.write_bytes(dump_config(settings))
    assert settings["train"]["amp"] == "off"
    assert settings["groups"]["no"] == ["no", "yes", "011"]
    assert read_yaml(path) == settings
    assert read_config(path) == settings


def test_a_group_that_stands_twice_in_memory_is_written_twice(tmp_path):
    """Catches: an alias (*id001) in a saved configuration, which reading it again would refuse."""
    shared = ["aaa_Latn"]
    (tmp_path / "c.yaml").write_bytes(dump_config({"groups": {"a": shared, "b": shared}}))
    assert read_yaml(tmp_path / "c.yaml") == {"groups": {"a": ["aaa_Latn"], "b": ["aaa_Latn"]}}


# ---- What is refused ----

@pytest.mark.parametrize("text, message", [
    ("train: {rates: 1.0}", r"unknown setting 'train.rates' \(did you mean rate\?\)"),
    ("trian: {rate: 1.0}", r"unknown setting 'trian' \(did you mean train\?\)"),
    ("7: 1", "unknown setting '7'"),
    ("adapt: {prompt_droput: 0.1}", r"'adapt.prompt_droput' \(did you mean prompt_dropout\?\)"),
    ("train: {rate: 5e-5}", "train.rate must be a number, not '5e-5'; YAML .* write 5.0e-5"),
    ("train: {steps: 1.5}", "train.steps must be a whole number, not 1.5"),
    ("train: {steps: true}", "train.steps must be a whole number, not True"),
    ("train: {steps: }", "train.steps must be a whole number, not None"),
    ("train: {rate: -1}", "train.rate cannot be -1.0"),
    ("train: {rate: .nan}", "train.rate cannot be nan"),
    ("train: {rate: .inf}", "train.rate cannot be inf"),
    ("train: {batch_size: 0}", "train.batch_size must be at least 1, not 0"),
    ("adapt: {warmup: 1.5}", "adapt.warmup is a share between 0 and 1, not 1.5"),
    ("train: 3", "train is a section of settings, not the value 3"),
    ("sources: [aaa_Latn]", r"sources must be text, not \['aaa_Latn'\]"),
    ("backbone: {dropout: 0.1}", "backbone.dropout must be true or false, not 0.1"),
    ("backbone: {dropout: no}", "backbone.dropout must be true or false, not 'no'"),
    ("backbone: {revision: 1234567}", "backbone.revision must be text, .*; write it in quotes"),
    ("prompt: {encoder: mpl}", "prompt.encoder cannot be 'mpl', only mlp, lstm, attention, none"),
    ("adapt: {optimizer: sgd}", "adapt.optimizer cannot be 'sgd', only adafactor, adamw"),
    ("train: {amp: half}", "train.amp cannot be 'half', only auto, bf16, fp16, off"),
    ("groups: {mine: [1, 2]}", "groups.mine must be a list of language codes"),
    ("groups: {mine: {a: b}}", "groups.mine must be a list of language codes"),
    ("targets: {3: [aaa_Latn]}", "targets.3 must be a list of language codes"),
    ("targets: {Sources: [aaa_Latn]}", "targets.Sources: this column is always there"),
    ("- a\n- b", "holds no mapping"), ("", "holds no mapping"), ("just words", "holds no mapping"),
])
def test_a_wrong_setting_is_refused_by_name(tmp_path, text, message):
    """Catches: a misspelt or mistyped setting that is silently ignored; no file in the message."""
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line, text, message", [
    (3, "train:\n  steps: 7\ntrain: {rate: 1.0e-3}", "key 'train' is given again, first in line 1"),
    (4, "train:\n  steps: 9\n  rate: 1.0e-3\n  steps: 5",
     "'steps' is given again, first in line 2"),
    (2, "groups:\n  {a: [x], 'a': [y]}", "the key 'a' is given again"),
    (2, "train:\n  steps: 011", "011 in its own way; write 11, or '011' for text"),
    (1, "train: {steps: 1:30}", "1:30 in its own way"),
    (1, "train: {rate: 1:30.5}", "1:30.5 in its own way"),
    (1, "train: {steps: 1_000}", "1_000 in its own way; write 1000,"),
    (1, "train: {rate: 1_0.5}", "1_0.5 in its own way"),
    (1, "train: {steps: 0x1f}", "0x1f in its own way"),
    (1, "train: {steps: 0b11}", "0b11 in its own way"),
    (1, "train: {steps: 99999999999999999999}", "99999999999999999999 in its own way"),
    (1, "backbone: {revision: 2025-01-31}", "'2025-01-31' is read as timestamp.*quotes"),
    (1, "train: {steps: !!int seven}", "seven in its own way"),
    (2, "groups:\n  mine: !!set {a, b}", "the tag .*set is not read"),
    (1, "groups: {mine: !!binary YWFh}", "is read as binary"),
    (1, "sources: !!python/object/apply:os.system [ls]", "the tag .*os.system is not read"),
    (2, "a: &x 1\nb: *x", r"an alias \(\*name\) is not read"),
    (2, "train:\n  <<: {steps: 1}", "'<<' is read as merge"),
    (2, "groups:\n  {[a, b]: c}", "a key must be a single word"),
    (2, "train:\n  steps: [1", "expected ',' or ']'"),
    (2, "train:\n\tsteps: 1", "cannot start any token"),
    (3, "a: 1\nb: 2\nc: \x07", "special characters are not allowed"),
    (1, "a: " + 30 * "[" + 30 * "]", "more than 20 nested levels"),
])
def test_a_line_of_yaml_that_reads_otherwise_than_it_looks(tmp_path, line, text, message):
    """Catches: 24,000 steps instead of 7, 9 instead of 11: YAML reads on without a word."""
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=message) as error:
        read_config(path)
    assert str(error.value).startswith(f"{path}:{line}: not readable as YAML: ")
    assert "\n" not in str(error.value)


def test_words_that_yaml_takes_for_truth_values_are_words(tmp_path):
    """Catches: `amp: off` read as false; Norwegian, whose code is `no`, read as false."""
    path = write(tmp_path, "train: {amp: off}\ngroups: {nordic: [no, da, on]}\n"
                           "evaluate: {after_training: False}")
    settings = read_config(path)
    assert settings["train"]["amp"] == "off"
    assert settings["groups"]["nordic"] == ["no", "da", "on"]
    assert settings["evaluate"]["after_training"] is False


def test_plain_numbers_are_numbers(tmp_path):
    """Catches: a strict reader that refuses what everybody writes."""
    text = "train: {steps: 0, epochs: 3, rate: 1.0E-3, clip: 2, warmup: .5, patience_after: 0.}"
    train = read_config(write(tmp_path, text))["train"]
    assert (train["steps"], train["epochs"], train["rate"]) == (0, 3, 1e-3)
    assert (train["clip"], train["warmup"], train["patience_after"]) == (2.0, 0.5, 0.0)


def test_files_that_are_no_configuration(tmp_path):
    """Catches: a traceback, or minutes of waiting, for the wrong file."""
    with pytest.raises(FileNotFoundError, match="none.yaml: no such configuration file"):
        read_config(tmp_path / "none.yaml")
    with pytest.raises(OSError):
        read_config(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ValueError, match="mine.yaml:2: no UTF-8 text"):
        read_config(path)
    path.write_bytes(b"x" * (config.MAX_BYTES + 1))
    with pytest.raises(ValueError, match="mine.yaml: larger than 256 kB"):
        read_config(path)
    path.write_bytes(100_000 * b"[")
    with pytest.raises(ValueError, match="more than 20 nested levels"):
        read_config(path)
    path.write_bytes("\ufefftrain: {steps: 5}".encode())       # a BOM, as Windows writes it
    assert read_config(path)["train"]["steps"] == 5


@pytest.mark.parametrize("setting, message", [
    ("train.rate", "write section.key=value"),
    ("=3", "write section.key=value"),
    ("rate=1", "unknown setting 'rate'"),
    ("train.stepz=5", r"unknown setting 'train.stepz' \(did you mean steps\?\)"),
    ("train.rate=5e-5", "write 5.0e-5"),
    ("train=1", "train is a section"),
    ("train.rate=[1", "not readable as YAML"),
    ("train.steps=011", "write 11, or '011' for text"),
    ("train.steps=1:30", "1:30 in its own way"),
    ("train={steps: 1, steps: 2}", "the key 'steps' is given again"),
    ("train.amp=*x", "an alias"),
    ("train.rate.more=1", "unknown setting 'train.rate.more'"),
])
def test_a_wrong_setting_on_the_command_line(setting, message):
    """Catches: --set more lenient than a file; a message that does not name the setting."""
    with pytest.raises(ValueError, match=message) as error:
        read_config(None, ["train.steps=3", setting])
    assert str(error.value).startswith(f"--set {setting}: ")


def test_a_value_from_elsewhere_is_checked_in_the_same_way():
    """Catches: a saved run's settings taken unchecked (evaluate.py reads prompt.json with this)."""
    assert check_value("train.amp", "bf16", "auto") == "bf16"
    assert check_value("train.clip", 1, 1.0) == 1.0
    with pytest.raises(ValueError, match="run: train.amp cannot be 'x', only auto"):
        check_value("run: train.amp", "x", "auto")
    with pytest.raises(ValueError, match="run: train.amp must be text, not None"):
        check_value("run: train.amp", None, "auto")


def test_choices_are_those_of_the_method():
    """Catches: an encoder or read-out that xpe.py has and a configuration may not name."""
    import xpe
    assert config.CHOICES["encoder"] == xpe.ENCODERS
    assert config.CHOICES["reads"] == xpe.READS


def test_every_word_of_the_default_configuration_is_checked():
    """Catches: a new setting whose words nobody checks; a checked name that no setting has."""
    settings = yaml.safe_load((config.HERE / "config.yaml").read_text("utf-8"))
    keys = set()
    for section, values in settings.items():
        if section not in ("sources", "groups", "targets"):
            keys |= set(values)
            words = {key for key, value in values.items() if isinstance(value, str)}
            assert words <= set(config.CHOICES) | {"name", "revision"}
    assert set(config.CHOICES) | set(config.AT_LEAST_ONE) | set(config.SHARES) <= keys


# ---- Groups ----

def test_groups_are_resolved_in_order_each_code_once():
    """Catches: a code twice, an exclusion that comes too early or not at all."""
    groups = {"a": ["x", "y", "z"], "b": ["a", "w", "-y"], "one": "x", "none": []}
    settings = {"groups": groups}
    assert resolve_group(settings, "b") == ["x", "z", "w"]
    assert resolve_group(settings, ["w", "b", "x"]) == ["w", "x", "z"]
    assert resolve_group(settings, ["a", "-one"]) == ["y", "z"]
    assert resolve_group(settings, ["a", "-b", "-a", "-x"]) == []
    assert resolve_group(settings, "v") == ["v"]
    assert resolve_group(settings, "none") == []


@pytest.mark.parametrize("names, message", [
    (["-y", "a"], "-y leaves nothing out"), (["-a", "a"], "-a leaves nothing out"),
    (["a", "-q"], "-q leaves nothing out: no such group or language stands before it"),
    (["a", "-aa"], r"-aa leaves nothing out: .*did you mean a\?")])
def test_an_exclusion_that_excludes_nothing(names, message):
    """Catches: a mistyped name that leaves all languages in."""
    with pytest.raises(ValueError, match=message):
        resolve_group({"groups": {"a": ["x", "y", "z"]}}, names)


def test_a_group_called_like_its_language():
    """Catches: endless recursion, or words that do not say what to do, for `deu: [deu, nld]`."""
    assert resolve_group({"groups": {"deu": ["deu"]}}, "deu") == ["deu"]    # `--languages deu`
    with pytest.raises(ValueError, match="groups.deu lists 'deu', .* the group itself: .*my_deu"):
        resolve_group({"groups": {"deu": ["deu", "nld"]}}, "deu")
    with pytest.raises(ValueError, match="groups.a contains itself, by way of b"):
        resolve_group({"groups": {"a": ["b"], "b": ["a"]}}, "a")


def test_groups_of_groups_do_not_explode():
    """Catches: 2**18 expansions of one group; a recursion error."""
    groups = {"g0": ["x"]}
    for i in range(1, 19):
        groups[f"g{i}"] = [f"g{i - 1}", f"g{i - 1}"]
    assert resolve_group({"groups": groups}, "g18") == ["x"]
    for i in range(19, 40):
        groups[f"g{i}"] = [f"g{i - 1}"]
    with pytest.raises(ValueError, match="nested more than 20 deep"):
        resolve_group({"groups": groups}, "g39")


def test_hints_name_scripts_as_they_are_written_from_here(tmp_path, monkeypatch):
    """Catches: a hint that can be pasted in the repository's own folder alone."""
    monkeypatch.chdir(HERE)
    assert in_reach("report.py") == "report.py"
    monkeypatch.chdir(tmp_path)
    path = shlex.split(in_reach("report.py"))[0]
    assert (tmp_path / path).resolve() == HERE / "report.py"
