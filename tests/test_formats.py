"""formats.py: the authors' folders, run folders of the version before, the export to stock peft.

    python -m pytest -q tests/test_formats.py       (about 10 s)

The tests against other people's packages run where these are installed: `micm_nlp`, the authors'
toolkit (logits, and 60 training steps against our loop), and `peft`. The equations of the encoders
and the tiny backbone are test_xpe.py's.
"""
import copy
import json
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import config
import formats
import train
import xpe
from test_xpe import (H, assert_close, collate, encode_by_hand, fill, make_head, prompt_by_hand,
                      random_texts, tiny_backbone)

P, D, HEADS, CLASSES = 10, 6, 4, 7
KINDS = [(0, "mlp", 2), (0.3, "mlp", 2), (0.7, "mlp", 2), (1, "mlp", 2), (1, "mlp", 1),
         (0.7, "mlp", 3), (1, "lstm", 1), (0.7, "lstm", 2), (1, "attention", 2),
         (0.3, "attention", 2), (0.7, "none", 2)]
THEIR_ENCODERS = {"mlp": "MLP", "lstm": "LSTM", "attention": "ATTN", "none": "NONE"}


# ---- What the tests share ------------------------------------------------------------------------

def linear_shapes(beginning, sizes):
    """Names and shapes of the Linears 0, 3, 6 ... of a Sequential with ReLU and dropout between."""
    shapes = {}
    for i, (n_in, n_out) in enumerate(zip(sizes, sizes[1:])):
        shapes[f"{beginning}{3 * i}.weight"] = (n_out, n_in)
        shapes[f"{beginning}{3 * i}.bias"] = (n_out,)
    return shapes


def encoder_shapes(encoder, layers):
    """Names and shapes of an encoder's parameters, as the authors' files have them."""
    if encoder == "mlp":
        return linear_shapes("", [H] + [D] * layers + [H])
    if encoder == "lstm":
        shapes = linear_shapes("mlp.", [2 * D, D, H])
        for layer in range(layers):
            for suffix in (f"l{layer}", f"l{layer}_reverse"):
                shapes[f"lstm.weight_ih_{suffix}"] = (4 * D, 2 * D if layer else H)
                shapes[f"lstm.weight_hh_{suffix}"] = (4 * D, D)
                shapes[f"lstm.bias_ih_{suffix}"] = shapes[f"lstm.bias_hh_{suffix}"] = (4 * D,)
        return shapes
    if encoder == "attention":
        shapes = linear_shapes("1.", [H, D, H])
        shapes["0.self_attn.in_proj_weight"] = (3 * H, H)
        shapes["0.self_attn.in_proj_bias"] = (3 * H,)
        for name in ("0.self_attn.out_proj", "0.out_proj"):
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (H, H), (H,)
        shapes["0.layernorm.weight"] = shapes["0.layernorm.bias"] = (H,)
        return shapes
    return {}


def random_tensors(ratio, encoder, layers):
    """-> (standard rows, embedding of the encoded rows, encoder's tensors by authors' names)."""
    generator = torch.Generator().manual_seed(7)
    encoded = int(P * ratio)
    standard = torch.randn(P - encoded, H, generator=generator)
    embedding = torch.randn(encoded, H, generator=generator)
    weights = {}
    if encoded:
        for name, shape in encoder_shapes(encoder, layers).items():
            weights[name] = torch.randn(shape, generator=generator) * 0.3
    return standard, embedding, weights


def matrix_by_hand(ratio, encoder, layers):
    """The prompt (P, H) that these random tensors mean."""
    standard, embedding, weights = random_tensors(ratio, encoder, layers)
    if not len(embedding):
        return standard
    return torch.cat((standard, encode_by_hand(encoder, weights, embedding, layers, HEADS)))


def random_head():
    """The head's tensors, by RoBERTa's names."""
    return make_head(8).state_dict()


def assert_reads(prompt, head, ratio, encoder, layers):
    """Check a prompt and head that were read against what was written."""
    assert_close(prompt.eval()(1)[0], matrix_by_hand(ratio, encoder, layers))
    for name, tensor in random_head().items():
        assert torch.equal(head.state_dict()[name], tensor)
    expected = xpe.SoftPrompt(H, P, ratio, encoder, D, layers, 0.1, HEADS).config
    assert prompt.config == expected
    assert all(parameter.requires_grad for parameter in prompt.parameters())


def edit_json(path, **changes):
    """Set keys of a JSON file; None removes one."""
    values = json.loads(path.read_text())
    values.update(changes)
    for key, value in changes.items():
        if value is None:
            del values[key]
    path.write_text(json.dumps(values))


def edit_tensors(path, **changes):
    """Set tensors of a safetensors file, "__" for "." in their names; None removes one."""
    tensors = load_file(path)
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        tensors[name] = tensor
        if tensor is None:
            del tensors[name]
    save_file(tensors, path)


# ---- The authors' folders ------------------------------------------------------------------------

def write_authors_folder(folder, ratio=0.7, encoder="mlp", layers=2):
    """A folder as the authors' toolkit writes it."""
    standard, embedding, weights = random_tensors(ratio, encoder, layers)
    tensors = {}
    if len(standard):
        tensors["prompt_encoder.embedding.weight"] = standard
    if len(embedding):
        tensors["prompt_encoder.xpe_embedding.weight"] = embedding
    for name, tensor in weights.items():
        tensors[f"prompt_encoder.xpe_head.{name}"] = tensor
    for name, tensor in random_head().items():
        tensors[f"base_model.classifier.{name}"] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "XPE", "num_virtual_tokens": P, "token_dim": H, "encoder_ratio": ratio,
        "encoder_reparameterization_type": THEIR_ENCODERS[encoder], "encoder_hidden_size": D,
        "encoder_num_layers": layers, "encoder_dropout": 0.1, "encoder_num_heads": HEADS,
        "base_model_name_or_path": "somewhere"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def as_in_the_papers_days(folder):
    """Rewrite a folder of the toolkit as those that came with the paper."""
    path = folder / "adapter_config.json"
    edit_json(path, peft_type="P_TUNING")
    if json.loads(path.read_text())["encoder_ratio"] == 1:
        tensors = load_file(folder / "adapter_model.safetensors")
        name = "prompt_encoder.embedding.weight"
        tensors[name] = tensors.pop("prompt_encoder.xpe_embedding.weight")
        save_file(tensors, folder / "adapter_model.safetensors")


def as_a_state_of_peft(folder):
    """Rewrite the names of its tensors as a PeftModel's own state has them."""
    tensors = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        name = name.replace("base_model.", "base_model.model.")
        name = name.replace("prompt_encoder.", "prompt_encoder.default.")
        tensors[name] = tensor
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("ratio, encoder, layers", KINDS)
def test_folders_of_the_authors(tmp_path, ratio, encoder, layers):
    """Catches: a tensor of theirs at the wrong place, E taken for standard rows in the files that
    came with the paper."""
    write_authors_folder(tmp_path, ratio, encoder, layers)
    for rewrite in (None, as_in_the_papers_days, as_a_state_of_peft):
        if rewrite is not None:
            rewrite(tmp_path)
        prompt, head, meta = formats.read_authors(tmp_path)
        assert_reads(prompt, head, ratio, encoder, layers)
        assert meta["kind"] == {0: "spt", 1: "xpe"}.get(ratio, "dual")
        assert (meta["reads"], meta["max_length"]) == ("prompt", 164)
        assert meta["backbone"]["name"] == "somewhere"
        assert meta["labels"] == ["0", "1", "2", "3", "4", "5", "6"]


def test_an_spt_of_theirs_needs_no_encoder_settings(tmp_path):
    """Catches: a plain soft prompt refused because it says nothing of an encoder."""
    write_authors_folder(tmp_path, ratio=0)
    edit_json(tmp_path / "adapter_config.json", encoder_hidden_size=None, encoder_num_layers=None,
              encoder_num_heads=None, token_dim=None)
    prompt, _, _ = formats.read_authors(tmp_path)
    assert_close(prompt(1)[0], matrix_by_hand(0, "mlp", 2))


@pytest.mark.parametrize("changes, message", [
    (dict(peft_type="LORA"), "json: not by the authors' toolkit: peft_type is 'LORA'"),
    (dict(peft_type=["XPE"]), "not by the authors' toolkit"),
    (dict(encoder_ratio=None), "not by the authors' toolkit"),
    (dict(encoder_ratio="0.7"), "adapter_config.json: prompt.ratio must be from 0"),
    (dict(encoder_ratio=0.5), r"'prompt.encoded' is \(7, 16\), expected \(5, 16\)"),
    (dict(encoder_ratio=1), r"'prompt.encoded' is \(7, 16\), expected \(10, 16\)"),
    (dict(num_virtual_tokens=11), r"adapter_config.json: tensor 'prompt.* is .* expected \("),
    (dict(num_virtual_tokens=None), "prompt.length must be a whole number .* not None"),
    (dict(num_virtual_tokens=10 ** 12), "prompt.length must be a whole number"),
    (dict(token_dim="16"), "prompt.width must be a whole number .* not '16'"),
    (dict(encoder_hidden_size=8), r"'prompt.encoder.0.bias' is \(6,\), expected \(8,\)"),
    (dict(encoder_num_layers=3), "the tensor 'prompt.encoder.9.weight' is missing"),
    (dict(encoder_dropout=[0.1]), "prompt.dropout must be at least 0"),
    (dict(encoder_reparameterization_type="GRU"), "prompt.encoder must be one of .* not 'GRU'"),
    (dict(encoder_reparameterization_type=["MLP"]), "prompt.encoder must be one of"),
    (dict(encoder_reparameterization_type=None), "prompt.encoder must be one of .* not None"),
])
def test_settings_of_theirs_that_cannot_be(tmp_path, changes, message):
    """Catches: lenient reading of a hostile or foreign adapter_config.json; tracebacks."""
    write_authors_folder(tmp_path)
    edit_json(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        formats.read_authors(tmp_path)


@pytest.mark.parametrize("changes, message", [
    (dict(base_model__classifier__dense__bias=None), "the tensor 'head.dense.bias' is missing"),
    (dict(base_model__classifier__out_proj__weight=None), "holds no classification head"),
    (dict(base_model__classifier__out_proj__weight=torch.ones(7)), "holds no classification head"),
    (dict(base_model__classifier__out_proj__weight=torch.ones(0, H)), "head.classes must be"),
    (dict(prompt_encoder__embedding__weight=torch.full((3, H), torch.nan)), "hold finite numbers"),
    (dict(prompt_encoder__xpe_head__0__self_attn__x=torch.ones(2)), "self_attn.x' is unknown"),
    (dict(lora_A=torch.ones(2)), "the tensor 'lora_A' is unknown"),
    (dict(base_model__model__classifier__dense__bias=torch.ones(H)), "two tensors for 'head.den"),
])
def test_tensors_of_theirs_that_cannot_be(tmp_path, changes, message):
    """Catches: a head that stays random, tensors that are dropped in silence."""
    write_authors_folder(tmp_path)
    edit_tensors(tmp_path / "adapter_model.safetensors", **changes)
    with pytest.raises(ValueError, match=f"adapter_config.json: .*{message}"):
        formats.read_authors(tmp_path)


def test_what_a_folder_of_theirs_lacks_is_told(tmp_path):
    """Catches: an error that does not say that a pickle file is no substitute; a file cut short."""
    with pytest.raises(FileNotFoundError, match="adapter_config.json"):
        formats.read_authors(tmp_path)
    write_authors_folder(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match="adapter_model.safetensors: cut short"):
        formats.read_authors(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors is missing: the folder"):
        formats.read_authors(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(FileNotFoundError, match=r"is missing. adapter_model.bin .* a pickle file"):
        formats.read_authors(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="adapter_config.json: holds no JSON object"):
        formats.read_authors(tmp_path)


# ---- Run folders of the version before -----------------------------------------------------------

# The names of the torch modules' parameters, and those of the version before, written out as its
# files have them (an encoder of two layers).
FORMAT_1_ENCODERS = {
    "mlp": {
        "0.weight": "linears.0.weight", "0.bias": "linears.0.bias",
        "3.weight": "linears.1.weight", "3.bias": "linears.1.bias",
        "6.weight": "linears.2.weight", "6.bias": "linears.2.bias"},
    "lstm": {
        "lstm.weight_ih_l0": "weight_ih_l0", "lstm.weight_ih_l0_reverse": "weight_ih_l0_reverse",
        "lstm.weight_hh_l0": "weight_hh_l0", "lstm.weight_hh_l0_reverse": "weight_hh_l0_reverse",
        "lstm.bias_ih_l0": "bias_ih_l0", "lstm.bias_ih_l0_reverse": "bias_ih_l0_reverse",
        "lstm.bias_hh_l0": "bias_hh_l0", "lstm.bias_hh_l0_reverse": "bias_hh_l0_reverse",
        "lstm.weight_ih_l1": "weight_ih_l1", "lstm.weight_ih_l1_reverse": "weight_ih_l1_reverse",
        "lstm.weight_hh_l1": "weight_hh_l1", "lstm.weight_hh_l1_reverse": "weight_hh_l1_reverse",
        "lstm.bias_ih_l1": "bias_ih_l1", "lstm.bias_ih_l1_reverse": "bias_ih_l1_reverse",
        "lstm.bias_hh_l1": "bias_hh_l1", "lstm.bias_hh_l1_reverse": "bias_hh_l1_reverse",
        "mlp.0.weight": "mlp.linears.0.weight", "mlp.0.bias": "mlp.linears.0.bias",
        "mlp.3.weight": "mlp.linears.1.weight", "mlp.3.bias": "mlp.linears.1.bias"},
    "attention": {
        "0.self_attn.in_proj_weight": "qkv.weight", "0.self_attn.in_proj_bias": "qkv.bias",
        "0.self_attn.out_proj.weight": "merge.weight", "0.self_attn.out_proj.bias": "merge.bias",
        "0.layernorm.weight": "norm_weight", "0.layernorm.bias": "norm_bias",
        "0.out_proj.weight": "project.weight", "0.out_proj.bias": "project.bias",
        "1.0.weight": "mlp.linears.0.weight", "1.0.bias": "mlp.linears.0.bias",
        "1.3.weight": "mlp.linears.1.weight", "1.3.bias": "mlp.linears.1.bias"},
    "none": {}}
FORMAT_1_HEAD = {"dense.weight": "dense.weight", "dense.bias": "dense.bias",
                 "out_proj.weight": "out.weight", "out_proj.bias": "out.bias"}


def write_format_1(folder, ratio=0.7, encoder="mlp"):
    """A run folder's two files as the version before wrote them -> its prompt.json."""
    standard, embedding, weights = random_tensors(ratio, encoder, layers=2)
    tensors = {}
    if len(standard):
        tensors["prompt.standard"] = standard
    if len(embedding):
        tensors["prompt.encoded"] = embedding
    for name, tensor in weights.items():
        tensors[f"prompt.encoder.{FORMAT_1_ENCODERS[encoder][name]}"] = tensor
    for name, tensor in random_head().items():
        tensors[f"head.{FORMAT_1_HEAD[name]}"] = tensor
    save_file(tensors, folder / "prompt.safetensors")
    meta = {
        "format": 1, "kind": "dual", "reads": "mean", "max_length": 164, "sources": ["eng_Latn"],
        "backbone": {"name": "b", "revision": "local", "type": "xlm-roberta", "fingerprint": "f"},
        "labels": list("abcdefg"), "training": {"settings": {"steps": 20}, "best_step": 20},
        "prompt": dict(width=H, length=P, ratio=ratio, encoder=encoder, hidden=D, layers=2,
                       dropout=0.1, heads=HEADS),
        "head": dict(width=H, classes=CLASSES, dropout=0.1)}
    (folder / "prompt.json").write_text(json.dumps(meta))
    return meta


@pytest.mark.parametrize("ratio, encoder", [(0, "mlp"), (0.3, "mlp"), (1, "mlp"), (0.7, "lstm"),
                                            (1, "attention"), (0.7, "attention"), (0.7, "none")])
def test_run_folders_of_the_version_before(tmp_path, ratio, encoder):
    """Catches: an old run that no longer loads, or loads with layers at each other's places."""
    written = write_format_1(tmp_path, ratio, encoder)
    prompt, head, meta = formats.read_format_1(tmp_path)
    assert_reads(prompt, head, ratio, encoder, 2)
    assert meta == written
    xpe.save_prompt(tmp_path, prompt, head, meta)           # written anew it is of format 2
    assert xpe.load_prompt(tmp_path)[2] == dict(meta, format=2)


def test_an_old_run_without_a_prompt(tmp_path):
    """Catches: an old run of full fine-tuning, which has a head alone, that no longer loads."""
    write_format_1(tmp_path, ratio=0)
    edit_json(tmp_path / "prompt.json", kind="full", prompt=None)
    edit_tensors(tmp_path / "prompt.safetensors", prompt__standard=None)
    prompt, head, _ = formats.read_format_1(tmp_path)
    assert prompt is None
    assert torch.equal(head.out_proj.bias, random_head()["out_proj.bias"])


@pytest.mark.parametrize("changes, message", [
    (dict(format=2), "prompt.json: format is 2, expected 1"),
    (dict(format=None), "prompt.json: format is None, expected 1"),
    (dict(prompt=None), "prompt.json: the tensor 'prompt.* is unknown"),
    (dict(labels=["a"]), "prompt.json: 1 labels, but 7 classes"),
    (dict(kind="lora"), "prompt.json: kind must be one of"),
    (dict(head=[7]), "prompt.json: head must be an object"),
])
def test_a_damaged_old_prompt_json(tmp_path, changes, message):
    """Catches: a check of format 2 that format 1 slips past."""
    write_format_1(tmp_path)
    edit_json(tmp_path / "prompt.json", **changes)
    with pytest.raises(ValueError, match=message):
        formats.read_format_1(tmp_path)


@pytest.mark.parametrize("changes, message", [
    (dict(head__out__weight=None), "the tensor 'head.out_proj.weight' is missing"),
    (dict(prompt__encoder__linears__1__bias=None), "the tensor 'prompt.encoder.3.bias' is missing"),
    (dict(prompt__encoder__linears__77__bias=torch.ones(2)), "encoder.231.bias' is unknown"),
    (dict(prompt__encoder__linears__x=torch.ones(2)), "the tensor 'prompt.encoder.x' is unknown"),
    (dict(prompt__encoder__qkv__weight=torch.ones(2)), "in_proj_weight' is unknown"),
    (dict(prompt__standard=torch.ones(1, 3, H)), r"'prompt.standard' is \(1, 3, 16\), expected"),
])
def test_damaged_old_tensors(tmp_path, changes, message):
    """Catches: tensors dropped or broadcast in silence."""
    write_format_1(tmp_path)
    edit_tensors(tmp_path / "prompt.safetensors", **changes)
    with pytest.raises(ValueError, match=f"prompt.json: .*{message}"):
        formats.read_format_1(tmp_path)


# ---- Out to stock peft ---------------------------------------------------------------------------

def example_to_export(backbone_name="b", backbone_type="xlm-roberta"):
    """-> meta of a run that can be exported."""
    return {"kind": "dual", "reads": "prompt", "labels": ["x/y", "\u00e9", "c", "d", "e", "f", "g"],
            "backbone": {"name": backbone_name, "type": backbone_type}}


@pytest.mark.parametrize("ratio", [0, 0.5, 1])
def test_what_is_exported(tmp_path, ratio):
    """Catches: an export with the encoder's input instead of its output, without the head or the
    label names; a prompt that the export leaves in another mode."""
    prompt, head = fill(xpe.SoftPrompt(H, 6, ratio, hidden=D), 1).train(), make_head()
    formats.export_peft(tmp_path / "new", prompt, head, example_to_export())
    tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
    assert_close(tensors.pop("prompt_embeddings"), prompt_by_hand(prompt))
    head_tensors = head.state_dict()
    assert tensors.keys() == {f"base_model.classifier.{name}" for name in head_tensors}
    for name, tensor in head_tensors.items():
        assert torch.equal(tensors[f"base_model.classifier.{name}"], tensor)
    settings = xpe.read_json(tmp_path / "new" / "adapter_config.json")
    assert (settings["num_virtual_tokens"], settings["token_dim"]) == (6, H)
    assert settings["base_model_name_or_path"] == "b" and settings["revision"] is None
    labels = json.loads((tmp_path / "new" / "labels.json").read_bytes())
    assert labels == example_to_export()["labels"]
    assert prompt.training


def test_a_local_backbone_is_exported_with_its_whole_path(tmp_path, monkeypatch):
    """Catches: an export that only loads from the folder in which it was made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    for name, path in (("models/mine", tmp_path / "models" / "mine"),
                       ("sample/backbone", formats.HERE / "sample" / "backbone")):
        folder = tmp_path / f"export-{path.name}"
        formats.export_peft(folder, xpe.SoftPrompt(H), make_head(), example_to_export(name))
        settings = xpe.read_json(folder / "adapter_config.json")
        assert settings["base_model_name_or_path"] == str(path.resolve())


@pytest.mark.parametrize("revision, exported", [("c0ffee", "c0ffee"), ("local", None)])
def test_an_export_names_the_commit_of_its_backbone(tmp_path, revision, exported):
    """Catches: a prompt made for one commit that peft puts before whatever main is today."""
    meta = example_to_export()
    meta["backbone"]["revision"] = revision
    formats.export_peft(tmp_path / "new", xpe.SoftPrompt(H), make_head(), meta)
    assert xpe.read_json(tmp_path / "new" / "adapter_config.json")["revision"] == exported


def test_what_cannot_be_exported(tmp_path):
    """Catches: an export that peft would load into other logits; files written over."""
    prompt, head, meta = xpe.SoftPrompt(H), make_head(), example_to_export()
    for wrong_prompt, reads in ((prompt, "mean"), (None, "prompt")):
        with pytest.raises(ValueError, match=f"no form for a 'dual' run .* reads '{reads}'"):
            formats.export_peft(tmp_path / "new", wrong_prompt, head, dict(meta, reads=reads))
    with pytest.raises(ValueError, match="into that of a 'bert' model"):
        formats.export_peft(tmp_path / "new", prompt, head, example_to_export("b", "bert"))
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty; name a new folder"):
        formats.export_peft(tmp_path, prompt, head, meta)


@pytest.mark.parametrize("ratio", [0, 0.3, 1])
def test_stock_peft_loads_our_export(tmp_path, monkeypatch, ratio):
    """Catches: an export that peft refuses, loads without the head or the label names, or turns
    into other logits. The loading code is that of export_peft's docstring."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    backbone = tiny_backbone()
    backbone.save_pretrained(tmp_path / "backbone")
    prompt, head = fill(xpe.SoftPrompt(H, P, ratio, hidden=D), 1), make_head()
    monkeypatch.chdir(tmp_path)
    formats.export_peft("new", prompt, head, example_to_export("backbone"))
    monkeypatch.chdir(tmp_path.parent)                      # it loads from elsewhere, too
    folder = tmp_path / "new"

    labels = dict(enumerate(json.loads((folder / "labels.json").read_bytes())))
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        folder, id2label=labels, dtype=torch.float32).eval()
    input_ids, attention_mask = collate(random_texts(9, 4, 1))
    expected = xpe.PromptedClassifier(backbone, prompt, head).eval()(input_ids, attention_mask)
    with torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    assert_close(logits, expected.detach())
    names = [model.config.id2label[number] for number in logits.argmax(dim=1).tolist()]
    wanted = [example_to_export()["labels"][number] for number in expected.argmax(dim=1)]
    assert names == wanted


# ---- The authors' toolkit: logits ----------------------------------------------------------------

def their_model(ratio, encoder="mlp", layers=2, **sizes):
    """-> (the toolkit's model, random; a copy of its backbone), or skip the test."""
    toolkit = pytest.importorskip("micm_nlp.models.xpe", reason="no toolkit of the authors")
    backbone = tiny_backbone(**sizes)
    backbone_config = copy.deepcopy(backbone.config)
    backbone_config.num_labels = CLASSES
    whole = transformers.XLMRobertaForSequenceClassification(backbone_config)
    whole.roberta = backbone
    model = toolkit.get_xpe_model(whole, dict(
        task_type="SEQ_CLS", num_virtual_tokens=P, encoder_ratio=ratio, encoder_hidden_size=D,
        encoder_num_layers=layers, encoder_dropout=sizes.get("hidden_dropout_prob", 0.1),
        encoder_reparameterization_type=THEIR_ENCODERS[encoder], encoder_num_heads=HEADS,
        encoder_freeze=False, encoder_embedding_freeze=False))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fill(nn.ParameterList(trainable), seed=9)
    return model, copy.deepcopy(backbone)


@pytest.mark.parametrize("ratio, encoder, layers", KINDS)
def test_logits_of_the_authors_toolkit(tmp_path, ratio, encoder, layers):
    """Catches: any difference between xpe.py and the authors' code, in evaluation."""
    model, backbone = their_model(ratio, encoder, layers)
    input_ids, attention_mask = collate(random_texts(9, 4, 1))
    with torch.no_grad():
        expected = model.eval()(input_ids=input_ids, attention_mask=attention_mask).logits
    model.save_pretrained(tmp_path)
    for rewrite in (None, as_in_the_papers_days):
        if rewrite is not None:
            rewrite(tmp_path)
        prompt, head, _ = formats.read_authors(tmp_path)
        classifier = xpe.PromptedClassifier(backbone, prompt, head).eval()
        logits = classifier(input_ids, attention_mask)
        print(f"{ratio} {encoder}: differs by {(logits - expected).abs().max():.1e}")
        assert_close(logits, expected)
        fill(prompt, 99)
        assert (classifier(input_ids, attention_mask) - expected).abs().max() > 1e-4


# ---- 60 training steps, ours against theirs ------------------------------------------------------

STEPS, BATCH, SENTENCES = 60, 8, 40
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def training_settings():
    """The paper's recipe, with 60 steps at rates that move a tiny model."""
    settings = train.settings_for(config.read_config(), "dual", None)
    settings.update(steps=STEPS, batch_size=BATCH, evaluate_every=STEPS, amp="off", rate=5e-3,
                    encoded_rate=5e-3,
                    standard_rate=5e-2)
    return settings


def training_sentences():
    """-> texts, labels."""
    lengths = torch.arange(SENTENCES) % 9 + 3
    labels = np.arange(SENTENCES) % CLASSES
    return random_texts(*lengths.tolist()), labels


def sequential_batches(lengths, batch_size, seed, epoch):
    """In place of data.length_batches: the order in which the other side trains."""
    return np.arange(len(lengths)).reshape(-1, batch_size)


def train_ours(folder, monkeypatch, backbone, prompts, heads):
    """Train prompts and heads by train.py's loop, all in one pass."""
    monkeypatch.setattr(train, "length_batches", sequential_batches)
    settings, device = training_settings(), torch.device("cpu")
    texts, labels = training_sentences()
    texts = [np.array(text, dtype=np.int32) for text in texts]
    split = {"train": texts, "dev": texts}
    learners = []
    for k, (prompt, head) in enumerate(zip(prompts, heads)):
        meta = {"kind": "dual", "reads": "prompt", "training": {"settings": settings}}
        learner = train.Learner(folder / f"run{k}", k, ["eng_Latn"], meta)
        learner.claim_folder(False)
        learner.prompt, learner.head, learner.backbone = prompt, head, None
        learner.task = SimpleNamespace(
            ids=split, labels={"train": labels, "dev": labels},
            lengths=np.array([len(text) for text in texts]), class_weights=torch.ones(CLASSES))
        learner.prepare(settings, STEPS, device)
        learners.append(learner)
    model = train.join_learners(learners, backbone, "prompt")
    assert train.train(learners, model, nullcontext, settings, 1, device, quiet=True)


def train_plainly(backbone, prompt, head):
    """The same 60 steps of one prompt alone: parts of transformers and torch, none of train.py."""
    settings = training_settings()
    texts, labels = training_sentences()
    model = xpe.PromptedClassifier(backbone, prompt, head)
    groups = {"standard": [prompt.standard], "decays": [prompt.encoded], "biases": []}
    for name, parameter in [*prompt.encoder.named_parameters(), *head.named_parameters()]:
        groups["biases" if name.endswith("bias") else "decays"].append(parameter)
    optimizer = transformers.Adafactor(
        [dict(params=groups["standard"], lr=5e-2, weight_decay=0.0),
         dict(params=groups["decays"], weight_decay=settings["weight_decay"]),
         dict(params=groups["biases"], weight_decay=0.0)],
        lr=5e-3, relative_step=False, scale_parameter=False)
    schedule = transformers.get_cosine_with_hard_restarts_schedule_with_warmup(
        optimizer, num_warmup_steps=6, num_training_steps=STEPS, num_cycles=2)
    for step in range(STEPS):
        first = step * BATCH % SENTENCES
        logits = model(*collate(texts[first:first + BATCH]))
        F.cross_entropy(logits, torch.from_numpy(labels[first:first + BATCH])).backward()
        nn.utils.clip_grad_norm_([*prompt.parameters(), *head.parameters()], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def assert_same_training(trained, expected, untrained):
    """Compare two modules' parameters after 60 steps, and check that these moved them."""
    before = dict(untrained.named_parameters())
    for (name, ours), theirs in zip(trained.named_parameters(), expected.parameters()):
        print(f"{name}: differs by {(ours - theirs).abs().max():.1e}")
        assert_close(ours, theirs, 2e-5)
        assert (theirs - before[name]).abs().max() > 0.01, name


def test_sixty_steps_of_two_learners_are_those_of_each_alone(tmp_path, monkeypatch):
    """Catches: gradients, clipping, moments or schedules that learners of one pass share; a loss
    that is a mean over all learners; other rates than the recipe's."""
    backbone = tiny_backbone(**NO_DROPOUT)
    prompts = [fill(xpe.SoftPrompt(H, P, 0.5, hidden=D, dropout=0.0), k) for k in (1, 2)]
    heads = [make_head(k, dropout=0.0) for k in (3, 4)]
    start = copy.deepcopy(list(zip(prompts, heads)))
    train_ours(tmp_path, monkeypatch, backbone, prompts, heads)
    for prompt, head, (first_prompt, first_head) in zip(prompts, heads, start):
        alone = copy.deepcopy((first_prompt, first_head))
        train_plainly(backbone, *alone)
        assert_same_training(prompt, alone[0], first_prompt)
        assert_same_training(head, alone[1], first_head)


class AsTheirSettings(dict):
    """A dict whose keys are attributes, too: what their trainer's settings are."""
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__


class PlainDataset(torch.utils.data.Dataset):
    """Sentences as transformers' Trainer takes them."""
    def __init__(self):
        self.texts, self.labels = training_sentences()

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, i):
        return self.texts[i], int(self.labels[i])

    @staticmethod
    def join(pairs):
        input_ids, attention_mask = collate([text for text, _ in pairs])
        labels = torch.tensor([label for _, label in pairs])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def train_theirs(folder, model):
    """60 steps by the toolkit's Trainer, with the paper's recipe."""
    trainers = pytest.importorskip("micm_nlp.training.trainers", reason="no toolkit of the authors")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=BATCH, use_cpu=True,
        optim="adafactor", learning_rate=5e-3, weight_decay=0.01, max_grad_norm=1.0,
        lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2},
        warmup_steps=6, save_strategy="no", logging_strategy="no", report_to="none",
        disable_tqdm=True, remove_unused_columns=False)
    standard_rows = AsTheirSettings(param_name_parts=["default.embedding"], lr=5e-2,
                                    weight_decay=0.0)
    their_settings = AsTheirSettings(
        optimizer_grouped_parameters=[standard_rows], random_task_exclusion=False,
        train_force_sequential=True, usable_columns=[])
    trainer_class = trainers.custom_trainer_class_factory(transformers.Trainer)
    trainer = trainer_class(model=model, args=arguments, train_dataset=PlainDataset(),
                            data_collator=PlainDataset.join, custom_args=their_settings)
    trainer.train()


@pytest.mark.parametrize("ratio", [0.5, 1])
def test_sixty_steps_of_the_authors_toolkit(tmp_path, monkeypatch, ratio):
    """Catches: any difference between our loop and the authors' in rates, decay, clipping,
    optimizer, schedule or gradient: 60 steps of both, from one start."""
    model, backbone = their_model(ratio, classifier_dropout=0.0, **NO_DROPOUT)
    model.save_pretrained(tmp_path / "start")
    start, start_head, _ = formats.read_authors(tmp_path / "start")
    train_theirs(tmp_path, model)
    model.save_pretrained(tmp_path / "end")
    expected, expected_head, _ = formats.read_authors(tmp_path / "end")

    prompt, head = copy.deepcopy(start), xpe.ClassificationHead(H, CLASSES, dropout=0.0)
    head.load_state_dict(start_head.state_dict())
    train_ours(tmp_path, monkeypatch, backbone, [prompt], [head])
    assert_same_training(prompt, expected, start)
    assert_same_training(head, expected_head, start_head)
