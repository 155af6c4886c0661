"""mergekit's YAML, read as a merge of ours."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from elmwood.errors import BadInput
from elmwood.merge.layer_weights import weight_of
from elmwood.merge.mergekit import METHODS, gradients_over, read
from elmwood.merge.rules.table import RULES, settle
from elmwood.records import Share

TWO = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]\n"
BARE = "models: [{model: a}, {model: b}]\n"
# as mergekit 0.1.5 has them (mergekit/merge_methods): whether sums are divided by the weights, and the policy of a base
NORMALISED = {"linear": 1, "ties": 1, "della": 1} | dict.fromkeys(
    ("task_arithmetic", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della_linear"), 0
)
WITHOUT_BASE, EITHER = {"linear", "karcher"}, {"nuslerp", "multislerp"}
WITHOUT_WEIGHTS = {"sce", "model_stock", "karcher"}


def based(method):
    return "" if method in WITHOUT_BASE else "base_model: s\n"


def test_every_method_names_a_rule_and_settings_it_has():
    for method in METHODS.values():
        assert method.ours in RULES
        assert set(method.defaults) <= {*RULES[method.ours].begins, *RULES[method.ours].ends}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"slerp"}))
def test_defaults_are_mergekits(method):
    answer = read(f"merge_method: {method}\n{based(method)}{TWO}").answer
    settle(*answer)
    if "density" in RULES[answer.method].begins:
        assert answer.settings["density"] == 1
    assert answer.settings.get("normalise") == NORMALISED.get(method)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"slerp"}))
def test_a_base_and_weights_are_needed_where_mergekit_needs_them(method):
    if method in WITHOUT_BASE:
        with pytest.raises(BadInput, match="base_model"):
            read(f"merge_method: {method}\nbase_model: s\n{TWO}")
    elif method not in EITHER:
        with pytest.raises(BadInput, match="needs a base_model"):
            read(f"merge_method: {method}\n{TWO}")
    if method in WITHOUT_WEIGHTS:  # they are left out, as mergekit does
        given = read(f"merge_method: {method}\n{based(method)}models: [{{model: a, parameters: {{weight: 0.3}}}}, {{model: b}}]").members
        assert given == {"a": (Share(values=(1.0,)),), "b": (Share(values=(1.0,)),)}
    else:
        with pytest.raises(BadInput, match="has no weight"):
            read(f"merge_method: {method}\n{based(method)}{BARE}")


# ---- weights, by a second spelling of mergekit's own resolution (mergekit/config.py: evaluate_setting)

NAMES = ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight",
         "model.layers.2.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"]  # fmt: skip
PLACES = [0.0, 0.0, 0.5, 1.0, 0.0, 0.0]  # what follows the layers has t = 0 (mergekit/plan.py: post_weights)


def evaluate(name, setting, t):
    if isinstance(setting, dict):
        setting = [setting]
    if isinstance(setting, (int, float, str)):
        return float(setting)
    if not isinstance(setting[0], dict):
        scaled = t * (len(setting) - 1)
        low, high = int(scaled), min(len(setting) - 1, int(scaled) + 1)
        return (1 - scaled + low) * setting[low] + (scaled - low) * setting[high]
    for row in setting:
        if row.get("filter") in (None, "*") or row["filter"] in name:
            return evaluate(name, row["value"], t)
    return None


def theirs(scopes, name, t):
    return next((value for scope in scopes if scope is not None and (value := evaluate(name, scope, t)) is not None), None)


values = st.one_of(st.sampled_from([0.25, 1, 2, "1e-1"]), st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=4))
parts = st.sampled_from(["mlp", "self_attn", "layers", "embed", "norm", "*", None])
rows = st.lists(st.builds(lambda part, value: {"value": value} | ({"filter": part} if part else {}), parts, values), min_size=1, max_size=3)
settings_of = st.one_of(st.none(), values, rows, rows.map(lambda some: some[0]))


@given(settings_of, settings_of)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_weights_are_looked_up_as_mergekit_does(own, common):
    """A model's own weight, then that at the top; a list of filters that does not fit leaves a tensor to the next."""
    wanted = [theirs([own, common], name, t) for name, t in zip(NAMES, PLACES, strict=True)]
    text = yaml.safe_dump({
        "merge_method": "task_arithmetic", "base_model": "s", "parameters": {"weight": common},
        "models": [{"model": "a", "parameters": {"weight": own}}, {"model": "b", "parameters": {"weight": 1}}],
    })  # fmt: skip
    try:
        found = gradients_over(read(text).members["a"], 3)
    except BadInput:  # mergekit refuses too, or would where a seed has tensors that no filter fits
        scopes = [scope if isinstance(scope, list) else [scope] for scope in (own, common) if scope is not None]
        assert not any(not isinstance(row, dict) or row.get("filter") in (None, "*") for scope in scopes for row in scope)
        return
    assert [weight_of(found, name, 3) for name in NAMES] == pytest.approx(wanted)


def test_slerp_goes_from_its_base_to_the_other():
    plain = read(f"merge_method: slerp\nbase_model: b\n{BARE}parameters: {{t: 0.3}}")
    assert plain.members == {"a": (Share(values=(0.3,)),), "b": (Share(values=(0.7,)),)}
    assert plain.base is None
    assert plain.answer.settings == {"deltas": 0.0}
    layered = read("""
merge_method: slerp
base_model: a
slices: [{sources: [{model: a, layer_range: [0, 4]}, {model: b, layer_range: [0, 4]}]}]
parameters: {t: [{filter: mlp, value: [0, 1]}, {value: 0.25}]}
""")
    assert [share.values for share in layered.members["b"]] == [(0.0, 1.0), (0.25,)]
    assert [share.values for share in layered.members["a"]] == [(1.0, 0.0), (0.75,)]
    for wrong in (f"base_model: c\n{BARE}parameters: {{t: 0.3}}", f"base_model: a\n{BARE}"):
        with pytest.raises(BadInput, match="parameter t"):
            read(f"merge_method: slerp\n{wrong}")


def test_without_a_base_the_sphere_is_of_whole_weights():
    for method in ("nuslerp", "multislerp"):
        assert read(f"merge_method: {method}\n{TWO}").answer.settings["deltas"] == 0
        assert read(f"merge_method: {method}\nbase_model: s\n{TWO}").answer.settings["deltas"] == 1


def test_sce_selects_where_it_is_asked_to():
    for text, method in (("", "sce"), ("parameters: {select_topk: 1}", "sce"), ("parameters: {select_topk: 0.2}", "sce_select")):
        assert read(f"merge_method: sce\nbase_model: s\n{TWO}{text}").answer.method == method


REFUSED = {
    "passthrough": "merge_method: passthrough\n" + TWO,
    "tokenizer": "merge_method: linear\ntokenizer_source: union\n" + TWO,
    "dtypes that differ": "merge_method: linear\ndtype: float32\nout_dtype: float16\n" + TWO,
    "unknown dtype": "merge_method: linear\ndtype: int8\n" + TWO,
    "no such parameter": "merge_method: linear\nparameters: {density: 0.5}\n" + TWO,
    "another sphere": "merge_method: nuslerp\nparameters: {nuslerp_row_wise: true}\n" + TWO,
    "models and slices": "merge_method: linear\nslices: []\n" + TWO,
    "nothing": "",
    "a list": "- model: a\n- model: b\n",
    "not YAML": "models: [",
    "nested without end": "[" * 10_000,
    "nested in lines": "- " * 10_000,
    "a number of many digits": TWO.replace("weight: 1", "weight: " + "9" * 5000) + "merge_method: linear\n",
    "a number too large for a float": TWO.replace("weight: 1", "weight: 0x" + "f" * 500) + "merge_method: linear\n",
    "a date that is none": TWO.replace("weight: 1", "weight: 2020-99-99") + "merge_method: linear\n",
    "a float that is none": TWO.replace("weight: 1", "weight: !!float x") + "merge_method: linear\n",
    "a switch that is none": TWO.replace("weight: 1", "weight: !!bool x") + "merge_method: linear\n",
    "a time that is none": TWO.replace("weight: 1", "weight: !!timestamp x") + "merge_method: linear\n",
    "layers without end": "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}, layer_range: [0, 0x" + "f" * 5000 + "]}]\n",
    "a text too long": "#" * (1 << 19),
    "names alone": "merge_method: linear\nmodels: [a, b]\n",
    "a model without a name": "merge_method: linear\nmodels: [{name: a}]\n",
    "two methods": "merge_method: [ties]\nbase_model: s\n" + TWO,
    "an unknown key": "merge_method: linear\nmodules: {}\n" + TWO,
    "a word for a weight": TWO.replace("weight: 1", "weight: half") + "merge_method: linear\n",
    "a switch for a weight": TWO.replace("weight: 1", "weight: true") + "merge_method: linear\n",
    "a weight that is not finite": TWO.replace("weight: 1", "weight: .nan") + "merge_method: linear\n",
    "no weights in the list": TWO.replace("weight: 1", "weight: []") + "merge_method: linear\n",
    "a filter without a value": TWO.replace("weight: 1", "weight: [{filter: mlp}]") + "merge_method: linear\n",
    "scaled models": "merge_method: linear\nparameters: {normalize: false}\n" + TWO,
    "a shared parameter at a model": TWO.replace("weight: 1", "weight: 1, normalize: true") + "merge_method: ties\nbase_model: s\n",
    "density of one model alone": TWO.replace("weight: 1", "weight: 1, density: 0.5", 1) + "merge_method: ties\nbase_model: s\n",
    "a gradient of densities": TWO.replace("weight: 1", "weight: 1, density: [0.5, 1]") + "merge_method: ties\nbase_model: s\n",
    "rescaled trimming": "merge_method: ties\nbase_model: s\nparameters: {rescale: true}\n" + TWO,
    "dropping without rescaling": "merge_method: dare_ties\nbase_model: s\nparameters: {rescale: false}\n" + TWO,
    "a model twice": "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: a, parameters: {weight: 1}}]\n",
    "no layers": "merge_method: linear\nparameters: {weight: 1}\n"
    "slices: [{sources: [{model: a, layer_range: [0, 0]}, {model: b, layer_range: [0, 0]}]}]\n",
    "layers backwards": "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: [2, 0]}]}]\n",
    "layers as text": "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: 0-2}]}]\n",
    "stacked layers": "merge_method: linear\nparameters: {weight: 1}\nslices: [{sources: [{model: a, layer_range: [1, 2]}]}]\n",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_supported_is_refused(what):
    with pytest.raises(BadInput, match=r"support|needs|no mergekit|has no|named|give one|takes|YAML|no weight"):
        read(REFUSED[what])
