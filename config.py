"""Settings: config.yaml, a file laid over it, and `--set section.key=value` over both.

config.yaml is the recipe of the paper and the one home of every default. This file reads it and
checks what is laid over it: every key, type and range, against config.yaml itself.

    from config import read_config, resolve_group
    config = read_config("sample/config.yaml", ["train.steps=100"])     # a dict of sections
    config["train"]["steps"]                                            # 100
    resolve_group(config, "all_without_joshi5")                         # 198 language codes
"""
import copy
import os
import re
import shlex
import sys
from pathlib import Path

import yaml

from data import nearest

HERE = Path(__file__).resolve().parent

# A configuration is written by hand and has about 10 kB. Larger or deeper files are accidents, or
# made to hurt: PyYAML needs minutes for 100 kB of opening brackets.
MAX_BYTES = 256 * 1024
MAX_DEPTH = 20

# A group may name groups that name groups; nobody needs as many as this.
MAX_GROUP_DEPTH = 20

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
AT_LEAST_ONE = ("batch_size", "accumulate", "cycles", "learners_at_once", "length", "tokens")
# Shares of a whole: of the prompt rows, of the steps, of the values that dropout clears.
SHARES = ("ratio", "warmup", "patience_after", "dropout", "prompt_dropout")
# Larger numbers are typing errors, and integers beyond 2**53 are no longer exact as floats.
MAX_NUMBER = 1e12

TYPE_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def warn(line):
    """Print one line on standard error; the program goes on."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def in_reach(script):
    """A script of this repository as one has to write it in the working directory."""
    return shlex.quote(os.path.relpath(HERE / script))


# ---- YAML, strictly: what a person wrote and what is read are the same ----

PLAIN_TAGS = ("str", "int", "float", "bool", "null", "map", "seq")
PLAIN_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
PLAIN_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)(e[-+][0-9]+)?|[-+]?\.inf|\.nan",
                         re.IGNORECASE)
PLAIN_BOOL = re.compile(r"true|false", re.IGNORECASE)


class StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader without the surprises of YAML 1.1.

    Refused, with the line: a key given twice (PyYAML drops the first in silence), 011 (read
    as 9), 1:30 (read as 90), 1_000, 0x1f, 0b11, dates, aliases, tags and deep nesting. The words
    yes, no, on and off are text: `amp: off` is the word off, [no, en] are two language codes.
    """

    def __init__(self, text):
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent, index):
        """Build a node from the parser's events: here depth and aliases are seen first."""
        if self.check_event(yaml.AliasEvent):
            refuse(self.peek_event(), "an alias (*name) is not read: write the value again")
        if self.depth > MAX_DEPTH:
            refuse(self.peek_event(), f"more than {MAX_DEPTH} nested levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor):
        """Build a single value; numbers must be written as they are read."""
        node = super().compose_scalar_node(anchor)
        kind = node.tag.rpartition(":")[2]
        if kind == "bool" and not PLAIN_BOOL.fullmatch(node.value):
            node.tag = "tag:yaml.org,2002:str"
        elif kind == "int" and not PLAIN_INT.fullmatch(node.value):
            refuse(node, number_advice(node.value))
        elif kind == "float" and not PLAIN_FLOAT.fullmatch(node.value):
            refuse(node, number_advice(node.value))
        elif kind not in PLAIN_TAGS:
            refuse(node, f"{node.value!r} is read as {kind}; text like this goes into quotes")
        return node

    def compose_sequence_node(self, anchor):
        """Build a list; tags such as !!python/object are refused."""
        node = super().compose_sequence_node(anchor)
        refuse_tag(node)
        return node

    def compose_mapping_node(self, anchor):
        """Build a mapping in which every key occurs once."""
        node = super().compose_mapping_node(anchor)
        refuse_tag(node)
        lines = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                refuse(key, "a key must be a single word")
            if key.value in lines:
                first = lines[key.value]
                refuse(key, f"the key {key.value!r} is given again, first in line {first}")
            lines[key.value] = key.start_mark.line + 1
        return node


def refuse(node, problem):
    """Raise YAML's own error, which carries the line of a node or event."""
    raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def refuse_tag(node):
    """Refuse a list or mapping that a tag makes something else."""
    if node.tag.rpartition(":")[2] not in PLAIN_TAGS:
        refuse(node, f"the tag {node.tag} is not read")


def number_advice(written):
    """What to write instead of 011, 1:30, 1_000 or 0x1f."""
    digits = written.lstrip("+-").replace("_", "")
    plain = "a decimal number"
    if digits.isdecimal() and len(digits) < 19:
        plain = str(int(digits))
    return f"YAML reads {written} in its own way; write {plain}, or '{written}' for text"


def explain_yaml_error(error, text):
    """-> (line, what is wrong there) of an error that PyYAML or StrictLoader raised over `text`."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text[:error.position].count("\n") + 1
        return line, f"not readable as YAML: {error.reason}"
    mark = error.problem_mark or error.context_mark
    return mark.line + 1, f"not readable as YAML: {error.problem or error.context}"


def read_yaml(path):
    """A YAML file -> the mapping that it holds.

    Raises FileNotFoundError, or ValueError with path and line for anything but a clean mapping.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such configuration file") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path}: larger than {MAX_BYTES // 1024} kB, so no configuration")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[:e.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: no UTF-8 text") from None
    try:
        value = yaml.load(text, StrictLoader)
    except yaml.YAMLError as e:
        line, problem = explain_yaml_error(e, text)
        raise ValueError(f"{path}:{line}: {problem}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds no mapping of settings (section: {{key: value}})")
    return value


class PlainDumper(yaml.SafeDumper):
    """PyYAML's safe dumper, which writes a list again where it stands a second time."""

    def ignore_aliases(self, data):
        """An alias (*name) would be refused when the file is read."""
        return True


def dump_config(config):
    """A configuration as YAML -> bytes; read_yaml gives the same dict back."""
    text = yaml.dump(config, Dumper=PlainDumper, sort_keys=False, allow_unicode=True)
    return text.encode()


# ---- reading and checking ----

def read_config(path=None, settings=()):
    """config.yaml, the file at `path` laid over it, then the `section.key=value` settings -> dict.

    A section `targets` in the file replaces the default columns; all other sections add to or
    change the default ones. Raises ValueError that says where, which key, and what is possible.
    """
    config = read_yaml(HERE / "config.yaml")
    defaults = copy.deepcopy(config)
    # `adapt` and `full` hold what differs from `train`, so any key of `train` may stand there
    defaults["full"] = defaults["train"]
    defaults["adapt"] = {**defaults["train"], "prompt_dropout": 0.0}
    if path is not None:
        layer = read_yaml(path)
        if "targets" in layer:
            config["targets"] = {}
        lay_over(config, layer, defaults, path)
    for setting in settings:
        lay_over(config, read_setting(setting), defaults, f"--set {setting}")
    return config


def read_setting(setting):
    """`section.key=value`, with the value in YAML -> {section: {key: value}}."""
    name, equals, text = setting.partition("=")
    section, _, key = name.strip().partition(".")
    if not equals or not section:
        raise ValueError(f"--set {setting}: write section.key=value")
    try:
        value = yaml.load(text, StrictLoader)
    except yaml.YAMLError as e:
        _, problem = explain_yaml_error(e, text)
        raise ValueError(f"--set {setting}: {problem}") from None
    return {section: {key: value}} if key else {section: value}


def lay_over(config, layer, defaults, where):
    """Change `config` by what `layer` says, checked against the keys and types of `defaults`."""
    try:
        for section, values in layer.items():
            if section not in defaults:
                suggestion = nearest(str(section), defaults)
                raise ValueError(f"unknown setting {str(section)!r}{suggestion}")
            if not isinstance(defaults[section], dict):
                config[section] = check_value(section, values, defaults[section])
            elif not isinstance(values, dict):
                raise ValueError(f"{section} is a section of settings, not the value {values!r}")
            elif section in ("groups", "targets"):
                lay_groups_over(config[section], values, section)
            else:
                lay_section_over(config[section], values, defaults[section], section)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def lay_section_over(section_config, values, defaults, section):
    """Change one section; its keys are those of config.yaml."""
    for key, value in values.items():
        name = f"{section}.{key}"
        if key not in defaults:
            raise ValueError(f"unknown setting {name!r}{nearest(str(key), defaults)}")
        section_config[key] = check_value(name, value, defaults[key])


def lay_groups_over(groups, values, section):
    """Change `groups` or `targets`; their keys are the user's own."""
    for title, members in values.items():
        names = members if isinstance(members, list) else [members]
        all_text = all(isinstance(name, str) for name in names)
        if not isinstance(title, str) or not all_text:
            raise ValueError(f"{section}.{title} must be a list of language codes and group names")
        if section == "targets" and title == "Sources":
            raise ValueError("targets.Sources: this column is always there, with the run's own "
                             "sources; choose another title")
        groups[title] = members


def check_value(name, value, default):
    """-> `value`, if it has the type of `default` and is in range; ValueError otherwise.

    name: section.key, as messages name it. A whole number may stand for a float.
    """
    key = name.rpartition(".")[2]
    if type(default) is float and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        wanted = TYPE_NAMES[type(default)]
        raise ValueError(f"{name} must be {wanted}, not {value!r}{type_advice(value, default)}")
    if key in CHOICES and value not in CHOICES[key]:
        raise ValueError(f"{name} cannot be {value!r}, only {', '.join(CHOICES[key])}")
    if isinstance(value, (int, float)):
        check_range(name, value, key)
    return value


def check_range(name, value, key):
    """Raise ValueError for a number that makes no sense for its key, NaN among them."""
    if not 0 <= value < MAX_NUMBER:
        raise ValueError(f"{name} cannot be {value}: a number from 0 up to {MAX_NUMBER:.0e}")
    if key in AT_LEAST_ONE and value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")
    if key in SHARES and value > 1:
        raise ValueError(f"{name} is a share between 0 and 1, not {value}")


def type_advice(value, default):
    """What to write instead of a value of the wrong type, where it can be guessed; else nothing."""
    if type(default) is float and isinstance(value, str):
        number = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{0,9})?)[eE]([+-]?[0-9]{1,2})", value)
        if number:
            written = f"{float(number[1])}e{int(number[2]):+d}"
            return f"; YAML takes it for text, write {written}"
    if type(default) is str and not isinstance(value, (dict, list)) and value is not None:
        return "; write it in quotes"
    return ""


# ---- groups of languages ----

def resolve_group(config, names):
    """A group's name, or a list of codes, groups and -exclusions -> codes, each once, in order.

    A name that is no group is a language code. Raises ValueError for a group that contains itself.
    """
    if isinstance(names, str):
        names = [names]
    return expand_names(names, config["groups"], inside=(), known={})


def expand_names(names, groups, inside, known):
    """The codes of `names`; inside: the groups being expanded; known: those expanded before."""
    codes = []
    named = set()       # by the names so far, whether left out again or not
    for position, name in enumerate(names):
        members = expand_name(name.removeprefix("-"), groups, inside, known)
        if not name.startswith("-"):
            named.update(members)
            codes += [code for code in members if code not in codes]
            continue
        is_known = name[1:] in groups or name[1:] in named
        if position == 0 or not is_known:
            place = f"groups.{inside[-1]}: " if inside else ""
            raise ValueError(f"{place}{name} leaves nothing out: no such group or language stands "
                             f"before it{nearest(name[1:], [*groups, *named])}")
        codes = [code for code in codes if code not in members]
    return codes


def expand_name(name, groups, inside, known):
    """The codes of one group, or of one language."""
    if name not in groups or groups[name] == [name]:
        return [name]
    if inside and name == inside[-1]:
        raise ValueError(f"groups.{name} lists {name!r}, which is the group itself: a group cannot "
                         f"be called like a language; call it my_{name}, for example")
    if name in inside:
        raise ValueError(f"groups.{name} contains itself, by way of {', '.join(inside[1:])}")
    if len(inside) > MAX_GROUP_DEPTH:
        raise ValueError(f"groups.{name} is nested more than {MAX_GROUP_DEPTH} deep")
    if name not in known:       # each group once: groups of groups could double each time
        members = groups[name]
        if isinstance(members, str):
            members = [members]
        known[name] = expand_names(members, groups, (*inside, name), known)
    return known[name]


def resolve_targets(config):
    """The columns of the tables -> {title: codes}."""
    return {title: resolve_group(config, names) for title, names in config["targets"].items()}


def with_other_targets(paths, config):
    """Those config.yaml files of runs, of `paths`, whose columns hold other languages than those of
    `config`. Files that are missing or damaged do not count."""
    columns = {title: set(codes) for title, codes in resolve_targets(config).items()}
    differs = {}            # content -> verdict: seeds of one command have the same bytes
    others = []
    for path in paths:
        try:
            content = path.read_bytes()
            if content not in differs:
                saved = resolve_targets(read_config(path))
                saved = {title: set(codes) for title, codes in saved.items()}
                differs[content] = saved != columns
        except (ValueError, OSError):
            continue
        if differs[content]:
            others.append(path)
    return others
