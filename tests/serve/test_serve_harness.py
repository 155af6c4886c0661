"""lm-evaluation-harness over HTTP has the answers of this package in process, item by item."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from elmwood.ensemble.generate import generate
from elmwood.ensemble.mixture import open_model
from elmwood.evaluate import harness
from elmwood.lm.load import end_tokens, open_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::")  # the harness and what it imports
PAIRS = [
    ("the cat", " sat on the mat"), ("the cat ", "sat on"), ("what is", " the answer"), ("naïve café", " 海 and 猫"), ("", "the cat sat"),
    ("the", " cat"), ("the captain sailed", " over"), ("the sea", "\n\nand"), ("def path(open):", " return read"), ("a", "b"),
]  # fmt: skip


@pytest.fixture(scope="module")
def remote(address):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            patch.delenv(name, raising=False)
        yield LocalCompletionsAPI(
            base_url=f"{address}/v1/completions", model="auto", tokenizer_backend="remote", tokenized_requests=True, max_length=257,
            batch_size=2, max_retries=1,
        )  # fmt: skip


def test_harness_over_http_equals_in_process(remote, world):
    words = harness.Words(open_tokenizer(world.seed, world.store), world.seed.separator, frozenset(end_tokens(world.seed, world.store)))
    lm = open_model(world.ensemble, world.store)
    reader = harness.Reader(lm, words, harness.Answers(world.store, world.ensemble.digest), generate)
    mine = reader.loglikelihood(PAIRS)
    theirs = remote.loglikelihood([Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(PAIRS)], disable_tqdm=True)
    for pair, (loglik, greedy), (other, other_greedy) in zip(PAIRS, mine, theirs, strict=True):
        assert other == pytest.approx(loglik, abs=1e-4), pair
        assert other_greedy == greedy, pair
    asked = [("the cat sat", {"until": ["the", "zz"], "max_gen_toks": 12}), ("question: what", {"until": ["\n"], "max_gen_toks": 8})]
    made = remote.generate_until([Instance("generate_until", {}, one, n) for n, one in enumerate(asked)], disable_tqdm=True)
    assert made == reader.generate_until(asked)
