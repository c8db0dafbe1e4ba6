"""An argument that nobody knows is refused by its name, wherever more than the named ones are taken."""

import inspect

import pytest
import torch

import gemmakit
from gemmakit.errors import GemmakitError

TINY = dict(vocab_size=2048, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, max_position_embeddings=64)  # fmt: skip
# Where any name has a meaning.
MEANT = {
    "GemmaConfig.from_dict": "kept as data, as config.json's other keys",
    "GemmaConfig.from_pretrained": "kept as data",
    "GemmaConfig.preset": "fields, which the class refuses itself",
    "GemmaConfig.get_config_dict": "given back beside what the file holds",
    "GenerationConfig.update": "given back",
    "GemmaTokenizer.__init__": "kept, and written back by save_pretrained",
    "GemmaTokenizerFast.__init__": "kept, and written back by save_pretrained",
    "GemmaTokenizer.from_pretrained": "as its constructor",
    "GemmaTokenizer.apply_chat_template": "variables of the template",
    "GemmaForCausalLM.prepare_inputs_for_generation": "passed on to forward",
    "GemmaModel.to": "torch's, which refuses",
    "BatchEncoding.__init__": "columns",
    "Cache.from_batch_splits": "of the cache's class",
    "StoppingCriteria.__call__": "passed on",
    "StoppingCriteriaList.__call__": "passed on",
    "TextStreamer.__init__": "for tokenizer.decode, which refuses",
    "TextIteratorStreamer.__init__": "for tokenizer.decode, which refuses",
    "AsyncTextIteratorStreamer.__init__": "for tokenizer.decode, which refuses",
    "GemmaTokenizerFast.train_new_from_iterator": "always refused",
}


def taking_more():
    """Public functions and methods with arguments by any name, as the class that has them first calls them."""
    seen = set()
    for name in gemmakit.__all__:
        value = None if "Flax" in name or name == "__version__" else getattr(gemmakit, name)
        methods = [n for n in dir(value) if not n.startswith("_") or n in ("__init__", "__call__")]
        members = {f"{name}.{n}": getattr(value, n, None) for n in methods} if inspect.isclass(value) else {name: value}
        for where, member in members.items():
            function = getattr(member, "__func__", member)
            if not inspect.isroutine(member) or not str(getattr(function, "__module__", "")).startswith("gemmakit"):
                continue
            kinds = [p.kind for p in inspect.signature(member).parameters.values()]
            if function not in seen and inspect.Parameter.VAR_KEYWORD in kinds:
                seen.add(function)
                yield where


FOUND = [*taking_more()]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    torch.manual_seed(0)
    name = gemmakit.demo_model()
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(name)
    model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**TINY)).eval()
    classifier = gemmakit.GemmaForSequenceClassification(gemmakit.GemmaConfig(**TINY, num_labels=2)).eval()
    made = {
        "GemmaConfig": model.config,
        "GenerationConfig": model.generation_config,
        "GemmaTokenizer": tokenizer,
        "GemmaModel": model.model,
        "GemmaForCausalLM": model,
        "GemmaForSequenceClassification": classifier,
        "GemmaForTokenClassification": gemmakit.GemmaForTokenClassification(gemmakit.GemmaConfig(**TINY, num_labels=2)),
        "TextGenerationPipeline": gemmakit.pipeline(model=model, tokenizer=tokenizer),
        "TextClassificationPipeline": gemmakit.pipeline("text-classification", model=classifier, tokenizer=tokenizer),
        "FeatureExtractionPipeline": gemmakit.pipeline("feature-extraction", model=model, tokenizer=tokenizer),
    }
    return made, model, tokenizer, tmp_path_factory.mktemp("unknown")


def read(out):
    """A stream looks at what it was given when it is read."""
    return next(iter(out))


IDS = torch.tensor([[2, 5, 6]])


def first_arguments(where, model, tokenizer, folder):
    """What a call needs besides."""
    kind, _, method = where.rpartition(".")
    if method == "__init__":
        return (gemmakit.GemmaForSequenceClassification(model.config) if "Classi" in kind else model, tokenizer)
    if method in ("forward", "run", "preprocess", "__call__") and "Pipeline" in kind:
        inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "prompt_text": "a"}
        return (inputs if method == "forward" else ["a"] if method == "run" else "a",)
    given = {
        "from_pretrained": (gemmakit.demo_model(),), "save_pretrained": (folder,), "push_to_hub": ("no/where",),
        "forward": (IDS,), "generate": (IDS,), "stream": (IDS,), "stream_rows": (IDS,), "generate_batch": ([[2, 5]],),
        "from_dict": ({},), "encode": ("a",), "encode_plus": ("a",), "batch_encode_plus": (["a"],), "tokenize": ("a",),
        "batch_decode": ([[5]],), "prepare_for_model": ([5],), "load_adapter": (folder,),
        "quantize_checkpoint": (gemmakit.demo_model(), folder / "q"),
        "convert_tokenizer": (gemmakit.demo_model(), folder / "c"), "pipeline": (),
        "convert_checkpoint": (gemmakit.demo_model(), folder / "c"),
    }  # fmt: skip
    return given.get(method or where, ())


@pytest.mark.parametrize("where", [w for w in FOUND if w not in MEANT and not w.startswith(("Auto", "EmbeddingModel"))])
def test_an_unknown_argument_is_refused_by_name(where, objects):
    made, model, tokenizer, folder = objects
    kind, _, method = where.rpartition(".")
    owner = (
        getattr(gemmakit, kind) if kind and method == "__init__" else made.get(kind, getattr(gemmakit, kind or where))
    )
    owner = made.get("FeatureExtractionPipeline") if where == "Pipeline.__call__" else owner
    if where == "Pipeline.__init__":
        owner = gemmakit.FeatureExtractionPipeline
    call = owner if not kind or method in ("__init__", "__call__") else getattr(owner, method)
    with pytest.raises((GemmakitError, TypeError), match="no_such"):
        read(call(*first_arguments(where, model, tokenizer, folder), no_such=1))


def test_the_list_of_places_where_any_name_has_a_meaning_is_current():
    assert [*{*MEANT} - {*FOUND}] == []
