"""mergekit's YAML, read as a merge of ours."""

import pytest

from elmwood.errors import BadInput
from elmwood.merge.mergekit import METHODS, read
from elmwood.merge.rules.table import RULES, settle
from elmwood.records import Share

TWO = "models: [{model: a}, {model: b}]\n"


def test_every_method_names_a_rule_and_settings_it_has():
    for ours, defaults in METHODS.values():
        assert ours in RULES
        assert set(defaults) <= {*RULES[ours].begins, *RULES[ours].ends}


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"slerp"}))
def test_defaults_are_mergekits(method):
    answer = read(f"merge_method: {method}\nbase_model: s\n{TWO}").answer
    settle(*answer)
    if "density" in RULES[answer.method].begins:
        assert answer.settings["density"] == 1


def test_slerp_goes_from_its_base_to_the_other():
    plain = read(f"merge_method: slerp\nbase_model: b\n{TWO}parameters: {{t: 0.3}}")
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
    for wrong in (f"base_model: c\n{TWO}parameters: {{t: 0.3}}", f"base_model: a\n{TWO}"):
        with pytest.raises(BadInput, match="parameter t"):
            read(f"merge_method: slerp\n{wrong}")


def test_without_a_base_the_sphere_is_of_whole_weights():
    for method in ("nuslerp", "multislerp"):
        assert read(f"merge_method: {method}\n{TWO}").answer.settings["deltas"] == 0
        assert read(f"merge_method: {method}\nbase_model: s\n{TWO}").answer.settings["deltas"] == 1


def test_sce_selects_where_it_is_asked_to():
    for text, method in (("", "sce"), ("parameters: {select_topk: 1}", "sce"), ("parameters: {select_topk: 0.2}", "sce_select")):
        assert read(f"merge_method: sce\nbase_model: s\n{TWO}{text}").answer.method == method


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: passthrough\n", "merge_method: ties\ntokenizer_source: union\n", "merge_method: ties\nout_dtype: float16\n",
        "merge_method: linear\nparameters: {density: 0.5}\n", "merge_method: nuslerp\nparameters: {nuslerp_row_wise: true}\n",
        "merge_method: linear\nslices: []\n",
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(text):
    with pytest.raises(BadInput, match=r"supported|no parameter|one of them"):
        read(text + TWO)
