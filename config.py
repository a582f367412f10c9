"""Settings: config.yaml, a file laid over it, and `--set section.key=value` over both.

config.yaml is the recipe of the paper and the one home of every default. YAML is read as text, and
each value is converted by the type of its default: 5e-5 is a number where a number is wanted, `off`
is a word where a word is wanted.

    from config import read_config, resolve_group
    config = read_config("sample/config.yaml", ["train.steps=100"])     # a dict of sections
    config["train"]["steps"]                                            # 100
    resolve_group(config, "all_without_joshi5")                         # 198 language codes
"""
import json
from contextlib import suppress

import yaml

import xpe
from data import HERE, check, nearest, read_text, reading, tidy

# The words that a setting may be, by the name of its key.
CHOICES = {
    "encoder": xpe.ENCODERS,
    "reads": xpe.READS,
    "attention": ("auto", "sdpa", "eager"),
    "optimizer": ("adafactor", "adamw"),
    "schedule": ("cosine", "linear"),
    "amp": ("auto", "bf16", "fp16", "off"),
    "frozen_weights": ("amp", "float32"),
    "class_weights": ("none", "balanced"),
}
# Settings that cannot be zero; in others, epochs for one, 0 has a meaning of its own.
AT_LEAST_ONE = ("batch_size", "accumulate", "learners_at_once")
SHARES = ("warmup", "patience_after")       # of the steps, not percent


# ---- YAML as text --------------------------------------------------------------------------------

class TextLoader(yaml.BaseLoader):
    """PyYAML's loader that leaves every value a text, and here refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        """A node of keys and values -> dict."""
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice",
                                           problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text, name):
    """YAML -> dicts, lists and texts; ValueError with name and line for what cannot be read."""
    with reading(name):
        return yaml.load(text, TextLoader)


def dump_config(config):
    """A configuration as YAML -> bytes; read_config gives the same dict back."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()


# ---- Layers --------------------------------------------------------------------------------------

def read_config(path=None, settings=()):
    """config.yaml, the file at `path` laid over it, then the `section.key=value` settings -> dict.

    A section `targets` in the file replaces the default columns; all other sections add to or
    change the default ones. A setting has the last word: `train.rate=...` also replaces the rate
    of the sections `adapt` and `full`, and `steps` sets `epochs` to 0 beside it. Raises ValueError
    that says where, which key, and what is possible.
    """
    config = read_default(load_yaml(read_text(HERE / "config.yaml"), "config.yaml"))
    if path is not None:
        layer = load_yaml(read_text(path), path)
        check(isinstance(layer, dict), f"{path}: must be a mapping, section: {{key: value}}")
        if "targets" in layer:
            config["targets"] = {}
        lay_over(config, layer, path)
    for setting in settings:
        name, equals, text = setting.partition("=")
        section, _, key = name.partition(".")
        where = f"--set {setting}"
        check(equals and (key or section == "sources"), f"{where}: write section.key=value")
        value = load_yaml(text, where)
        lay_over(config, {section: {key: value} if key else value}, where)
        for part in ("train", "adapt", "full"):
            if section == "train" and key in config[part]:
                config[part][key] = config["train"][key]
            if key == "steps" and section in ("train", part):
                config[part]["epochs"] = 0
    return config


def read_default(value):
    """A value of config.yaml, or a section of them: true or false, a whole number, a number, or
    else as it stands."""
    if isinstance(value, dict):
        return {key: read_default(part) for key, part in value.items()}
    for kind in (json.loads, int, float):
        with suppress(ValueError, TypeError):       # of a word, or a group's list
            return kind(value)
    return value


def lay_over(config, layer, where):
    """Change `config` by what `layer` says; each value becomes what its default is."""
    for section, values in layer.items():
        check(section in config, f"{where}: unknown section {section!r}{nearest(section, config)}")
        if section == "sources":
            check(isinstance(values, str), f"{where}: sources must name a group")
            config[section] = values
            continue
        check(isinstance(values, dict), f"{where}: {section} is a section of settings, not a value")
        known = config[section]
        if section in ("adapt", "full"):    # they hold what differs from `train`: any key of it
            known = {**config["train"], **known}
        for key, value in values.items():
            name = f"{where}: {section}.{key}"
            if section in ("groups", "targets"):
                config[section][tidy(key)] = read_members(value, name)
            else:
                check(key in known, f"{name} is unknown{nearest(key, known)}")
                config[section][key] = convert(value, type(known[key]), key, name)


def read_members(value, name):
    """A group's members, a name or a list of names; ValueError for anything else."""
    with reading(f"{name} must be a list of language codes and group names"):
        return tidy(value) if isinstance(value, str) else [tidy(code) for code in value]


def convert(text, kind, key, name):
    """A setting's text -> its value of type `kind`; ValueError for any other, or out of range."""
    what = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    wrong = f"{name} must be {what}, not {text!r}"
    check(isinstance(text, str), wrong)
    if kind is str:
        choices = CHOICES.get(key, [text])
        check(text in choices, f"{name} cannot be {text!r}, only {', '.join(choices)}")
        return text
    if kind is bool:
        check(text in ("true", "false"), wrong)
        return text == "true"
    try:
        number = kind(text)
    except ValueError:
        raise ValueError(wrong) from None
    least = 1 if key in AT_LEAST_ONE else 0
    check(number >= least, f"{name} must be at least {least}, not {text}")      # nan is not, either
    check(number <= 1 or key not in SHARES, f"{name} is a share from 0 to 1, not {text}")
    return number


# ---- Groups of languages -------------------------------------------------------------------------

def resolve_group(config, names, inside=()):
    """A group's name, or a list of codes, groups and -exclusions -> codes, in order, no duplicates.

    A name that is not a group is a language code, and so is the name of a group inside itself.
    Raises ValueError for an exclusion that excludes nothing. inside: the groups being resolved.
    """
    groups = config["groups"]
    codes = []
    for name in [names] if isinstance(names, str) else names:
        bare = name.removeprefix("-")
        members = [bare]
        if bare in groups and bare not in inside:
            members = resolve_group(config, groups[bare], (*inside, bare))
        if bare == name:
            codes += [code for code in members if code not in codes]
        else:
            check(any(code in codes for code in members),
                  f"{name} excludes nothing: no such language before it{nearest(bare, groups)}")
            codes = [code for code in codes if code not in members]
    return codes


def resolve_targets(config):
    """The columns of the tables -> {title: codes}."""
    return {title: resolve_group(config, names) for title, names in config["targets"].items()}
