"""Folders of other programs: the authors' released prompts in, stock peft out; and our format 1.

The rest of the project works without this file. It is used by

    python evaluate.py FOLDER_OF_THE_AUTHORS             # score a released prompt
    python evaluate.py RUN --export peft NEW_FOLDER      # write a folder that stock peft loads

and by whoever scores a run folder that the version before wrote (`"format": 1` in prompt.json).
In all of them the tensors are the paper's; only their names differ.
"""
import json
import os
import re
from pathlib import Path

import xpe

HERE = Path(__file__).resolve().parent


# ---- The authors' folders ------------------------------------------------------------------------

# Their names of encoder_reparameterization_type, and ours of prompt.encoder.
ENCODERS_OF_THE_AUTHORS = {"MLP": "mlp", "LSTM": "lstm", "ATTN": "attention", "NONE": "none"}

# How a name of theirs begins, and how ours does. Inside the encoder all names are equal.
NAMES_OF_THE_AUTHORS = {
    "base_model.classifier.": "head.",
    "prompt_encoder.embedding.weight": "prompt.standard",
    "prompt_encoder.xpe_embedding.weight": "prompt.encoded",
    "prompt_encoder.xpe_head.": "prompt.encoder.",
}


def read_authors(folder):
    """Read a prompt of the authors' release or of their toolkit, as `xpe.load_prompt` reads ours.

    -> (SoftPrompt, ClassificationHead, meta). The folder holds adapter_config.json and
    adapter_model.safetensors. Their files name no labels: these are called "0", "1", ...
    Raises FileNotFoundError for a missing file, ValueError with the path for anything else.
    """
    path = Path(folder) / "adapter_config.json"
    config = xpe.read_json(path)
    peft_type = config.get("peft_type")
    if peft_type not in ("XPE", "P_TUNING") or "encoder_ratio" not in config:
        raise ValueError(f"{path}: not by the authors' toolkit: peft_type is {peft_type!r}")

    tensors = {}
    for name, tensor in read_adapter_tensors(folder).items():
        # these two names are longer in the state of a PeftModel than in the files it saves
        name = name.replace("base_model.model.", "base_model.")
        name = name.replace("prompt_encoder.default.", "prompt_encoder.")
        name = rename(name, NAMES_OF_THE_AUTHORS)
        if name in tensors:
            raise ValueError(f"{path}: adapter_model.safetensors holds two tensors for {name!r}")
        tensors[name] = tensor

    # authors' code: in the files that came with the paper, `embedding` of an XPE is what is encoded
    ratio = config["encoder_ratio"]
    if ratio == 1 and "prompt.encoded" not in tensors and "prompt.standard" in tensors:
        tensors["prompt.encoded"] = tensors.pop("prompt.standard")

    try:
        meta = meta_of_the_authors(config, tensors)
        prompt, head = xpe.restore_prompt(meta, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return prompt, head, meta


def read_adapter_tensors(folder):
    """The tensors of adapter_model.safetensors, or an error that says what is there instead."""
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        pickled = path.with_suffix(".bin")
        if pickled.is_file():
            raise FileNotFoundError(
                f"{path} is missing. {pickled.name} beside it is a pickle file, which can run any "
                f"code when it is opened and is not read here. If you trust it, write its tensors "
                f"anew: safetensors.torch.save_file(torch.load(..., weights_only=True), ...)")
        raise FileNotFoundError(f"{path} is missing: the folder holds settings, but no tensors")
    return xpe.read_tensors(path)


def meta_of_the_authors(config, tensors):
    """What our prompt.json would say, from their adapter_config.json. ValueError without a head."""
    out_proj = tensors.get("head.out_proj.weight")
    if out_proj is None or out_proj.dim() != 2:
        raise ValueError("adapter_model.safetensors holds no classification head (classifier)")
    classes, width = out_proj.shape

    encoder = config.get("encoder_reparameterization_type")
    ratio = config["encoder_ratio"]
    # a plain soft prompt may leave out what it has no encoder for
    prompt = {
        "width": config.get("token_dim") or width,
        "length": config.get("num_virtual_tokens"),
        "ratio": ratio,
        "encoder": ENCODERS_OF_THE_AUTHORS.get(str(encoder), encoder),
    }
    prompt["hidden"] = config.get("encoder_hidden_size") or 0
    prompt["layers"] = config.get("encoder_num_layers") or 2
    prompt["dropout"] = config.get("encoder_dropout") or 0.0
    prompt["heads"] = config.get("encoder_num_heads") or 8

    backbone = {
        "name": str(config.get("base_model_name_or_path") or "unnamed backbone"),
        "revision": str(config.get("revision") or "main"),
        "type": "xlm-roberta",
    }
    kind = "dual"
    if ratio == 0:
        kind = "spt"
    elif ratio == 1:
        kind = "xpe"
    return {
        "kind": kind,
        "reads": "prompt",
        "prompt": prompt,
        "head": {"width": width, "classes": classes, "dropout": 0.1},
        "labels": [str(number) for number in range(classes)],
        "max_length": 164,      # authors' code: their setting for SIB-200; the files do not say it
        "backbone": backbone,
        "training": {},
    }


def rename(name, beginnings):
    """`name` with the first of the `beginnings` (old: new) that fits replaced."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name[len(old):]
    return name


# ---- Run folders of the version before -----------------------------------------------------------

# It had layers of its own. How its names began, and how those of torch's layers do.
NAMES_OF_FORMAT_1 = {
    "head.out.": "head.out_proj.",
    # mlp
    "prompt.encoder.linears.": "prompt.encoder.",
    # lstm
    "prompt.encoder.weight_": "prompt.encoder.lstm.weight_",
    "prompt.encoder.bias_": "prompt.encoder.lstm.bias_",
    # attention
    "prompt.encoder.qkv.": "prompt.encoder.0.self_attn.in_proj_",
    "prompt.encoder.merge.": "prompt.encoder.0.self_attn.out_proj.",
    "prompt.encoder.norm_": "prompt.encoder.0.layernorm.",
    "prompt.encoder.project.": "prompt.encoder.0.out_proj.",
}


def read_format_1(folder):
    """Read a prompt folder of `"format": 1` as `xpe.load_prompt` reads one of format 2.

    -> (SoftPrompt or None, ClassificationHead, meta). Raises FileNotFoundError, or ValueError with
    the file and what is wrong in it.
    """
    path = Path(folder) / "prompt.json"
    meta = xpe.read_json(path)
    if meta.get("format") != 1:
        raise ValueError(f"{path}: format is {meta.get('format')!r}, expected 1")
    saved = xpe.read_tensors(path.with_name("prompt.safetensors"))

    # attention has its MLP in a Sequential, lstm as an attribute
    names = dict(NAMES_OF_FORMAT_1)
    if "prompt.encoder.qkv.weight" in saved:
        names["prompt.encoder.mlp."] = "prompt.encoder.1."
    tensors = {}
    for name, tensor in saved.items():
        # the Linears 0, 1, 2 of its MLPs are 0, 3, 6 in a Sequential with ReLU and dropout
        number = re.search(r"linears\.(\d{1,2})\.", name)
        if number:
            name = name.replace(number[0], f"linears.{3 * int(number[1])}.")
        name = rename(name, names)
        tensors[name.replace("mlp.linears.", "mlp.").replace(".linears.", ".")] = tensor

    try:
        prompt, head = xpe.restore_prompt(meta, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return prompt, head, meta


# ---- Out to stock peft ---------------------------------------------------------------------------

def export_peft(folder, prompt, head, meta):
    """Write a new folder that *stock* peft loads as prompt tuning, with head and label names:

        from peft import AutoPeftModelForSequenceClassification as AutoPeft
        labels = dict(enumerate(json.load(open("FOLDER/labels.json"))))
        model = AutoPeft.from_pretrained("FOLDER", id2label=labels, dtype=torch.float32).eval()
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        names = [model.config.id2label[number] for number in logits.argmax(dim=1).tolist()]

    peft has no place for label names, and transformers takes them from the backbone's config: so
    labels.json, a list in the order of the logits, is a file of its own. Raises ValueError for a
    head that does not read the first prompt row, or a backbone whose own head is not RoBERTa's;
    FileExistsError for a folder that is not empty.
    """
    from safetensors.torch import save
    if prompt is None or meta["reads"] != "prompt":
        raise ValueError(f"peft has no form for a {meta['kind']!r} run whose head reads "
                         f"{meta['reads']!r}")
    backbone_type = str(meta["backbone"].get("type"))
    if "roberta" not in backbone_type and backbone_type != "camembert":
        raise ValueError(f"peft would put this head into that of a {backbone_type!r} model, which "
                         f"is not built like it")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder}: is not empty; name a new folder")

    tensors = {"prompt_embeddings": prompt.collapse().standard}     # (P, H)
    for name, tensor in head.state_dict().items():
        tensors[f"base_model.classifier.{name}"] = tensor
    for name, tensor in tensors.items():
        tensors[name] = tensor.detach().float().cpu().contiguous()

    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": absolute_if_local(meta["backbone"]["name"]),
        "revision": commit_of(meta["backbone"]),
        "prompt_tuning_init": "RANDOM",
        "num_virtual_tokens": prompt.length,
        "num_transformer_submodules": 1,
        "token_dim": prompt.config["width"],
        "modules_to_save": ["classifier"],
        "inference_mode": True,
    }
    xpe.write_atomically(folder / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
    xpe.write_atomically(folder / "labels.json", json_bytes(meta["labels"]))
    xpe.write_atomically(folder / "adapter_config.json", json_bytes(config))


def commit_of(backbone):
    """The commit or branch of a backbone on the hub; None for a folder, or if it is not known."""
    revision = backbone.get("revision")
    return None if revision == "local" else revision


def absolute_if_local(name):
    """A backbone's name as it can be used from everywhere: a folder's path becomes absolute."""
    for place in (Path(os.path.expanduser(name)), HERE / name):
        if place.is_dir():
            return str(place.resolve())
    return name


def json_bytes(value):
    """`value` as the bytes of a JSON file, in UTF-8."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
