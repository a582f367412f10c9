"""Folders of other programs: the authors' released prompts in, stock peft out.

The rest of the project works without this file. It is used by

    python evaluate.py FOLDER_OF_THE_AUTHORS             # score a released prompt
    python evaluate.py RUN --export peft NEW_FOLDER      # write a folder that stock peft loads

The tensors are the paper's in all of them; only their names differ.
"""
import re
from pathlib import Path

from safetensors.torch import save

from config import read_config, resolve_group
from data import LABELS, check, locate, reading, warn
from runs import read_json, read_tensors, restore_prompt, write_atomically, write_json

# Their names of settings, and ours
SETTINGS_OF_THE_AUTHORS = {
    "num_virtual_tokens": "length",
    "encoder_ratio": "ratio",
    "encoder_hidden_size": "hidden",
    "encoder_num_layers": "layers",
    "encoder_dropout": "dropout",
    "encoder_num_heads": "heads",
}

# Their names of tensors, and ours. Inside the encoder all names are equal.
NAMES_OF_THE_AUTHORS = {
    # these two are longer in the state of a PeftModel than in the files that it saves
    "base_model.model.": "base_model.",
    "prompt_encoder.default.": "prompt_encoder.",

    "base_model.classifier.": "head.",
    "prompt_encoder.embedding.weight": "prompt.standard",
    "prompt_encoder.xpe_embedding.weight": "prompt.encoded",
    "prompt_encoder.xpe_head.": "prompt.encoder.",
}


def read_authors(folder, name):
    """Read a prompt of the authors' release or of their toolkit, as `runs.load_prompt` reads ours.

    -> (modules, meta). The folder holds adapter_config.json and adapter_model.safetensors. Their
    files name neither labels nor sources nor seed: seven labels are SIB-200's, others become "0",
    "1", ...; the rest is in `name`, of repository and branch. Raises FileNotFoundError for a
    missing file, ValueError with the path for anything else.
    """
    path = Path(folder) / "adapter_config.json"
    config = read_json(path)
    saved = read_tensors(path.with_name("adapter_model.safetensors"))
    group = re.search("-(seen|joshi5)", name)
    if not group:
        warn(f"{name}: no source group in this name; joshi5 is assumed")
    seed = re.search(r"seed-0*(\d+)", name)
    with reading(path):
        tensors = {}
        for key, tensor in saved.items():
            for theirs, ours in NAMES_OF_THE_AUTHORS.items():
                key = key.replace(theirs, ours)
            tensors[key] = tensor
        # authors' code: in the files that came with the paper, `embedding` of an XPE is encoded
        ratio = config["encoder_ratio"]
        if ratio == 1 and "prompt.encoded" not in tensors:
            tensors["prompt.encoded"] = tensors.pop("prompt.standard")

        classes, width = tensors["head.out_proj.weight"].shape       # (C, H)
        encoder = config["encoder_reparameterization_type"].lower()     # MLP, LSTM, ATTN or NONE
        prompt = {"width": width, "encoder": encoder.replace("attn", "attention")}
        for theirs, ours in SETTINGS_OF_THE_AUTHORS.items():
            # a plain soft prompt may leave out what it has no encoder for
            if config.get(theirs) is not None:
                prompt[ours] = config[theirs]
        meta = {
            "kind": {0: "spt", 1: "xpe"}.get(ratio, "dual"),
            "sources": resolve_group(read_config(), group[1] if group else "joshi5"),
            "seed": int(seed[1]) if seed else 1,
            "reads": "prompt",
            "prompt": prompt,
            "head": {"width": width, "classes": classes, "dropout": 0.1},
            "labels": list(LABELS) if classes == len(LABELS) else list(map(str, range(classes))),
            "max_length": 164,      # authors' code: their setting for SIB-200; no file says it
            "backbone": {
                "name": str(config.get("base_model_name_or_path")),
                "revision": config.get("revision") or "main",
                "type": "xlm-roberta",
            },
            "training": {},
        }
        return restore_prompt(meta, tensors), meta


def export_peft(folder, prompt, head, meta):
    """Write a new folder that *stock* peft loads as prompt tuning, with head and label names:

        from peft import AutoPeftModelForSequenceClassification as AutoPeft
        labels = dict(enumerate(json.load(open("FOLDER/labels.json"))))
        model = AutoPeft.from_pretrained("FOLDER", id2label=labels, dtype=torch.float32).eval()
        logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
        names = [model.config.id2label[number] for number in logits.argmax(dim=1).tolist()]

    peft has no place for label names, and transformers takes them from the backbone's config: so
    labels.json, a list in the order of the logits, is a file of its own. Raises ValueError for a
    head that does not read the first prompt row or a backbone whose own head is not RoBERTa's,
    FileExistsError for a folder that exists.
    """
    backbone = meta["backbone"]
    check(meta["reads"] == "prompt",        # so it has one
          f"peft has no form for a {meta['kind']} run whose head reads {meta['reads']!r}")
    check("roberta" in backbone["type"],
          f"peft would put this head into a {backbone['type']} model, whose head is different")
    name = backbone["name"]
    revision = backbone["revision"]
    if revision == "local":         # the export must load from any other folder, too
        name = str(locate(backbone)[0])
        revision = None
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True)

    tensors = {"prompt_embeddings": prompt.collapse().standard.data}    # (P, H)
    for key, tensor in head.state_dict().items():
        tensors[f"base_model.classifier.{key}"] = tensor
    write_atomically(folder / "adapter_model.safetensors", save(tensors))
    write_json(folder / "labels.json", meta["labels"])
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": name,
        "revision": revision,
        "num_virtual_tokens": prompt.length,
        "token_dim": prompt.config["width"],
    }
    write_json(folder / "adapter_config.json", config)
