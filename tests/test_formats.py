"""formats.py: the authors' folders in, stock peft out.

    python -m pytest -q tests/test_formats.py

The tests against other people's packages run where these are installed: `micm-nlp`, the authors'
toolkit (-k toolkit: logits of all encoders, 60 training steps of SPT, DUAL and XPE), and `peft`
(-k peft).
"""
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import formats
import train
from data import LABELS, Corpus, collate
from helpers import close, corpus, tiny, tiny_backbone
from runs import load_prompt, read_json
from xpe import ClassificationHead, PromptedClassifier, SoftPrompt

KINDS = [(0, "mlp", 2), (0.3, "mlp", 2), (1, "mlp", 1), (0.7, "lstm", 2), (1, "attention", 2),
         (0.7, "none", 2)]
# Settings of a prompt, as the authors call them
SETTINGS = {"token_dim": "width", "num_virtual_tokens": "length", "encoder_ratio": "ratio",
            "encoder_reparameterization_type": "encoder", "encoder_hidden_size": "hidden",
            "encoder_num_layers": "layers", "encoder_dropout": "dropout",
            "encoder_num_heads": "heads"}
ENCODERS = {"mlp": "MLP", "lstm": "LSTM", "attention": "ATTN", "none": "NONE"}
TENSORS = {"head.": "base_model.classifier.", "prompt.encoder.": "prompt_encoder.xpe_head.",
           "prompt.encoded": "prompt_encoder.xpe_embedding.weight",
           "prompt.standard": "prompt_encoder.embedding.weight"}
# How the names of tensors differ: in the files that came with the paper (only those of an XPE), in
# the toolkit's, and in the state of a PeftModel
FORMS = [{"xpe_embedding": "embedding"}, {},
         {"_encoder.": "_encoder.default.", "base_model.": "base_model.model."}]


def make(ratio=0.7, encoder="mlp", layers=2):
    """-> a prompt and head as train.py makes them from seed 1, without dropout."""
    torch.manual_seed(1)
    return (SoftPrompt(16, 10, ratio, encoder, layers=layers, dropout=0.0),
            ClassificationHead(16, 7, 0.0))


def tensors_of(prompt, head):
    """All tensors of both, by our names."""
    return dict(nn.ModuleDict({"prompt": prompt, "head": head}).state_dict())


def assert_same_logits(theirs, prompt, head):
    """A model of another package must say to three texts what prompt and head do."""
    input_ids, attention_mask = collate([range(5, 14), range(20, 24), [7]], 1)
    ours = PromptedClassifier(tiny(), prompt, head).eval()
    close(theirs.eval()(input_ids=input_ids, attention_mask=attention_mask).logits,
          ours(input_ids, attention_mask))


# ---- The authors' folders in ---------------------------------------------------------------------

def write_authors(folder, prompt, head, form=FORMS[1], **changes):
    """A folder in one of the authors' forms; changes: settings or tensors, None for one to lack."""
    config = dict(prompt.config, encoder=ENCODERS[prompt.config["encoder"]])
    content = {theirs: config[ours] for theirs, ours in SETTINGS.items()}
    for name, tensor in tensors_of(prompt, head).items():
        for ours, theirs in {**TENSORS, **form}.items():
            name = name.replace(ours, theirs)
        content[name] = tensor
    content.update(peft_type="XPE", task_type="SEQ_CLS", **changes)
    tensors = {name: value for name, value in content.items() if torch.is_tensor(value)}
    settings = {name: value for name, value in content.items() if name not in tensors}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("ratio, encoder, layers", KINDS)
def test_folders_of_the_authors(tmp_path, ratio, encoder, layers):
    """Catches: a tensor of theirs in the wrong place, E taken for standard rows in the files that
    came with the paper, a plain soft prompt refused because it says nothing of an encoder."""
    lacks = [] if ratio else ["token_dim", "encoder_hidden_size", "encoder_num_heads"]
    written = make(ratio, encoder, layers)
    for form in FORMS if ratio == 1 else FORMS[1:]:
        write_authors(tmp_path, *written, form, **dict.fromkeys(lacks))
        read, meta = formats.read_authors(tmp_path, "xpe-seen@seed-03")
        assert read["prompt"].config == written[0].config
        torch.testing.assert_close(dict(read.state_dict()), tensors_of(*written), rtol=0, atol=0)
        assert meta["kind"] == {0: "spt", 1: "xpe"}.get(ratio, "dual")
        assert meta["seed"] == 3 and len(meta["sources"]) == 92


@pytest.mark.parametrize("name, value, message", [
    ("encoder_ratio", 1, "prompt.encoded"),
    ("encoder_reparameterization_type", ["GRU"], ""),
    ("base_model.classifier.out_proj.weight", None, "lacks 'head.out_proj.weight'"),
    ("prompt_encoder.embedding.weight", torch.full((3, 16), torch.nan), "finite"),
    ("lora.A", torch.ones(2), "lora.A"),
])
def test_hostile_folders(tmp_path, name, value, message):
    """Catches: lenient reading of a hostile or foreign adapter; tensors that are dropped silently;
    errors without the file, or of several lines."""
    write_authors(tmp_path, *make(), **{name: value})
    with pytest.raises(ValueError, match=rf"adapter_config.json: [^\n]*{message}[^\n]*\Z"):
        formats.read_authors(tmp_path, "-joshi5")


def test_folders_that_are_not_theirs(tmp_path):
    """Catches: code run that comes with a prompt; an unclear error for another adapter."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="adapter_model.safetensors"):
        formats.read_authors(tmp_path, "-joshi5")
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="adapter_config.json: lacks 'encoder_ratio'"):
        formats.read_authors(tmp_path, "-joshi5")


# ---- Out to stock peft ---------------------------------------------------------------------------

BACKBONE = {"name": "backbone", "revision": "local", "type": "xlm-roberta"}
META = {"kind": "dual", "reads": "prompt", "labels": list(LABELS), "backbone": BACKBONE}


def test_stock_peft_loads_our_export(tmp_path, monkeypatch):
    """Catches: an export with the encoder's input instead of its output, without the head, the
    label names or the commit of its backbone, that only loads where it was made, or that peft turns
    into other logits; files written over. The loading code is that of export_peft's docstring."""
    monkeypatch.chdir(tmp_path)
    tiny().save_pretrained("backbone")
    prompt, head = make()
    on_hub = BACKBONE | {"name": "a/b", "revision": "c0ffee"}
    formats.export_peft("hub", prompt, head, META | {"backbone": on_hub})
    assert read_json(tmp_path / "hub/adapter_config.json")["revision"] == "c0ffee"
    close(load_file("hub/adapter_model.safetensors")["prompt_embeddings"], prompt(1)[0])
    with pytest.raises(FileExistsError):
        formats.export_peft(tmp_path, prompt, head, META)
    for changes, message in (({"reads": "mean"}, "head reads 'mean'"),
                             ({"backbone": BACKBONE | {"type": "bert"}}, "into a bert model")):
        with pytest.raises(ValueError, match=message):
            formats.export_peft(tmp_path, prompt, head, META | changes)

    peft = pytest.importorskip("peft")
    formats.export_peft("new", prompt, head, META)
    monkeypatch.chdir("/")
    labels = dict(enumerate(json.loads((tmp_path / "new" / "labels.json").read_bytes())))
    model = peft.AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "new", id2label=labels, dtype=torch.float32)
    assert_same_logits(model, prompt, head)
    assert model.config.id2label == dict(enumerate(LABELS))


# ---- The authors' toolkit ------------------------------------------------------------------------

class Settings(dict):
    """A dict with attributes, as the toolkit's Trainer takes its settings."""
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__


def train_theirs(folder, model, sentences):
    """60 steps by the toolkit's Trainer, the paper's recipe at rates that move a tiny model."""
    from micm_nlp.training.trainers import custom_trainer_class_factory
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    dataset = [{"input_ids": tokenizer(sentence.text).input_ids, "labels": sentence.label}
               for sentence in sentences]
    arguments = transformers.TrainingArguments(
        folder, max_steps=60, per_device_train_batch_size=40, optim="adafactor",
        learning_rate=5e-3, weight_decay=0.5, warmup_steps=6, save_strategy="no",
        lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2})
    standard_rows = Settings(param_name_parts=["default.embedding"], lr=5e-2, weight_decay=0.0)
    settings = Settings(optimizer_grouped_parameters=[standard_rows], usable_columns=[],
                        random_task_exclusion=False, train_force_sequential=True)
    collator = transformers.DataCollatorWithPadding(tokenizer)
    trainer = custom_trainer_class_factory(transformers.Trainer)
    trainer(model, arguments, collator, dataset, custom_args=settings).train()


@pytest.mark.parametrize("ratio, encoder, layers", KINDS)
def test_logits_and_sixty_steps_of_the_authors_toolkit(tmp_path, ratio, encoder, layers):
    """Catches: any difference between our code and the authors': in an encoder or the names of its
    tensors, in rates, decay, clipping, optimizer, schedule or gradient."""
    toolkit = pytest.importorskip("micm_nlp.models.xpe")
    written = make(ratio, encoder, layers)
    backbone = tiny_backbone(tmp_path / "b", hidden_dropout_prob=0.0,
                             attention_probs_dropout_prob=0.0)
    write_authors(tmp_path, *written)
    model = transformers.XLMRobertaForSequenceClassification.from_pretrained(backbone, num_labels=7)
    model = toolkit.load_xpe_pretrained(model, str(tmp_path))
    assert_same_logits(model, *written)
    if encoder != "mlp":
        return          # dropout cannot be turned off in all of them

    model.prompt_encoder.requires_grad_()
    model.base_model.classifier.requires_grad_()
    folder = corpus(tmp_path / "corpus", ["eng_Latn"])
    train_theirs(backbone, model, Corpus(folder).read("eng_Latn", "train"))
    model.save_pretrained(tmp_path / "end")
    theirs, meta = formats.read_authors(tmp_path / "end", "-joshi5")
    train.main(f"""--mode {meta["kind"]} --sources config.yaml --languages eng_Latn --seeds 1
        --backbone {backbone} --data {folder} --out {tmp_path}/runs --steps 60
        --set prompt.ratio={ratio} --set prompt.layers={layers} --set prompt.length=10
        --set prompt.dropout=0 --set train.batch_size=40 --set train.rate=0.005
        --set train.encoded_rate=0.005 --set train.standard_rate=0.05
        --set train.weight_decay=0.5 --set train.encoded_weight_decay=0.5 --set train.amp=off
        --set train.evaluate_every=60 --set evaluate.after_training=false""".split())
    run, = (tmp_path / "runs").iterdir()
    ours, _ = load_prompt(run)
    close(ours.state_dict(), theirs.state_dict(), 1e-3)
    assert ours["head"].dense.bias.abs().max() > 0.01        # it started from zero
