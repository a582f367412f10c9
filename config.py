"""Settings: config.yaml, a file laid over it, and `--set section.key=value` over both.

config.yaml is the recipe of the paper and the one home of every default. YAML is read as text, and
each value is converted by the type of its default: 5e-5 is a number where a number is wanted, `off`
a word where a word is.

    from config import read_config, resolve_group
    config = read_config("sample/config.yaml", ["train.steps=100"])     # a dict of sections
    config["train"]["steps"]                                            # 100
    resolve_group(config, "all_without_joshi5")                         # 198 language codes
"""
import os
import shlex

import yaml

from data import HERE, check, nearest, read_text, reading, tidy

# The words that a setting may be, by the name of its key.
CHOICES = {
    "encoder": ("mlp", "lstm", "attention", "none"),
    "reads": ("prompt", "first", "mean", "last"),
    "attention": ("auto", "sdpa", "eager"),
    "optimizer": ("adafactor", "adamw"),
    "schedule": ("cosine", "linear"),
    "amp": ("auto", "bf16", "fp16", "off"),
    "frozen_weights": ("amp", "float32"),
    "class_weights": ("none", "balanced"),
}
# Numbers that cannot be zero. All others may: 0 epochs or 0 hidden have a meaning of their own.
AT_LEAST_ONE = ("batch_size", "accumulate", "cycles", "learners_at_once", "length", "tokens",
                "layers", "heads")
# Shares of a whole: of the prompt rows, of the steps, of the values that dropout clears.
SHARES = ("ratio", "warmup", "patience_after", "dropout", "prompt_dropout")
# What other programs call a setting
ALSO_CALLED = {"lr": "rate", "learning_rate": "rate", "batch": "batch_size"}


def in_reach(script):
    """A script of this repository as one has to write it in the working directory."""
    return shlex.quote(os.path.relpath(HERE / script))


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
        try:
            return yaml.load(text, TextLoader)
        except yaml.MarkedYAMLError as error:
            raise ValueError(f"line {error.problem_mark.line + 1}: {error.problem}") from None


def dump_config(config):
    """A configuration as YAML -> bytes; read_config gives the same dict back."""
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode()


# ---- Layers --------------------------------------------------------------------------------------

def read_config(path=None, settings=()):
    """config.yaml, the file at `path` laid over it, then the `section.key=value` settings -> dict.

    A section `targets` in the file replaces the default columns; all other sections add to or
    change the default ones. A setting has the last word: `train.rate=...` also replaces the rate
    of the sections `adapt` and `full`, and `steps` sets `epochs` to 0. Raises ValueError that says
    where, which key, and what is possible.
    """
    recipe = load_yaml(read_text(HERE / "config.yaml"), "config.yaml")
    kinds = {section: {key: kind_of(text) for key, text in values.items()}
             for section, values in recipe.items() if isinstance(values, dict)}
    # `adapt` and `full` hold what differs from `train`, so any key of `train` may stand there
    kinds["full"] = kinds["train"]
    kinds["adapt"] = {**kinds["train"], "prompt_dropout": float}
    config = {section: {} for section in recipe}
    lay_over(config, recipe, kinds, "config.yaml")
    if path is not None:
        layer = load_yaml(read_text(path), path)
        check(isinstance(layer, dict), f"{path}: must be a mapping, section: {{key: value}}")
        if "targets" in layer:
            config["targets"] = {}
        lay_over(config, layer, kinds, path)
    for setting in settings:
        name, equals, text = setting.partition("=")
        section, _, key = name.strip().partition(".")
        value = load_yaml(text, f"--set {setting}")
        check(equals and (key or isinstance(value, str)),
              f"--set {setting}: write section.key=value")
        lay_over(config, {section: {key: value} if key else value}, kinds, f"--set {setting}")
        for own in ("adapt", "full"):
            if section == "train" and key in config[own]:
                config[own][key] = config[section][key]
        if key == "steps":
            for part in ("train", "adapt", "full"):
                config[part]["epochs"] = 0
    return config


def kind_of(text):
    """The type of a setting, by its default in config.yaml."""
    if text in ("true", "false"):
        return bool
    for kind in (int, float):
        try:
            kind(text)
            return kind
        except (ValueError, TypeError):
            continue
    return str


def lay_over(config, layer, kinds, where):
    """Change `config` by what `layer` says, checked against the types of the defaults."""
    for section, values in layer.items():
        if section not in config:
            raise ValueError(f"{where}: unknown setting {section!r}{suggest(section, kinds)}")
        if section == "sources":
            check(values and isinstance(values, str), f"{where}: sources must name a group")
            config[section] = values
            continue
        check(isinstance(values, dict), f"{where}: {section} is a section of settings, not a value")
        for key, value in values.items():
            name = f"{section}.{key}"
            if section in ("groups", "targets"):
                config[section][tidy(key)] = check_group(value, f"{where}: {name}")
                continue
            if key not in kinds[section]:
                raise ValueError(f"{where}: unknown setting {name!r}{suggest(name, kinds)}")
            config[section][key] = convert(value, kinds[section][key], key, f"{where}: {name}")
    check("Sources" not in config["targets"],
          f"{where}: targets.Sources: this column is always there, with the run's own sources")


def suggest(name, kinds):
    """' (did you mean section.key?)' for an unknown name, or ''."""
    section, _, key = name.rpartition(".")
    key = ALSO_CALLED.get(key, key)
    names = [f"{part}.{known}" for part in kinds for known in kinds[part]]
    same_key = [known for known in names if known.endswith(f".{key}")]
    if same_key:
        return f" (did you mean {same_key[0]}?)"
    return nearest(name, [*names, *kinds, "sources"])


def check_group(members, name):
    """-> a group's members, a name or a list of names; ValueError for anything else."""
    if members and isinstance(members, str):
        return tidy(members)
    check(isinstance(members, list) and all(code and isinstance(code, str) for code in members),
          f"{name} must be a list of language codes and group names")
    return [tidy(code) for code in members]


def convert(text, kind, key, name):
    """A setting's text -> its value of type `kind`; ValueError for another, or out of range."""
    what = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    wrong = f"{name} must be {what}, not {text!r}"
    check(isinstance(text, str), wrong)
    if kind is str:
        choices = CHOICES.get(key, (text,))
        check(text in choices, f"{name} cannot be {text!r}, only {', '.join(choices)}")
        return text
    if kind is bool:
        check(text.lower() in ("true", "false"), wrong)
        return text.lower() == "true"
    try:
        number = kind(text)
    except ValueError:
        raise ValueError(wrong) from None
    check(0 <= number < 1e12, f"{name} must be from 0 up to 1e12, not {text}")
    check(number >= 1 or key not in AT_LEAST_ONE, f"{name} must be at least 1, not {text}")
    check(number <= 1 or key not in SHARES, f"{name} is a share between 0 and 1, not {text}")
    return number


# ---- Groups of languages -------------------------------------------------------------------------

def resolve_group(config, names, inside=()):
    """A group's name, or a list of codes, groups and -exclusions -> codes, in order, no duplicates.

    A name that is not a group is a language code. Raises ValueError for a group that contains
    itself, and for an exclusion that excludes nothing. inside: the groups being resolved.
    """
    groups = config["groups"]
    codes = []
    for name in [names] if isinstance(names, str) else names:
        bare = name.removeprefix("-")
        members = [bare]
        if bare in groups and groups[bare] != [bare]:
            check(bare not in inside, f"groups.{bare} contains itself: a group cannot have the "
                                      f"name of a language that it lists")
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
