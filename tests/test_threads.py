"""What decides a digest is computed in one thread of linear algebra, whatever the machine has."""

import ast
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

import elmwood
from elmwood.domains import cluster, dense, embed
from elmwood.merge import adapters
from elmwood.merge.moe import gates
from elmwood.merge.rules import matrices
from elmwood.threads import one_thread

ROOT = Path(elmwood.__file__).parent
DECOMPOSITIONS = {"svd", "qr", "lstsq", "solve", "eigh", "pinv", "inv", "cholesky", "randomized_svd"}
SETTINGS = {"ridge": 0.0, "scale": 1.0, "alpha": 0.9, "rank": 0.0, "normalise": 0.0}


def threads() -> set[int]:
    return {one["num_threads"] for one in threadpool_info() if one["user_api"] == "blas"}


def test_a_function_has_one_thread_and_the_others_get_theirs_back():
    @one_thread
    def inside(fail: bool) -> set[int]:
        if fail:
            raise ValueError
        return threads()

    with threadpool_limits(3, user_api="blas"):
        assert inside(False) == {1}
        with pytest.raises(ValueError, match=r"^$"):
            inside(True)
        assert threads() == {3}


def test_functions_that_decide_digests_have_one_thread():
    """Every function of these rooms that decomposes a matrix is one of `one_thread`, or is called by those only."""
    modules = {"domains.cluster": cluster, "domains.dense": dense, "domains.embed": embed, "merge.adapters": adapters,
               "merge.moe.gates": gates, "merge.rules.matrices": matrices}  # fmt: skip
    within = {  # those that are called by one of `one_thread` in the same module
        "common", "balance_prices", "_orthogonal", "_nearest_orthogonal", "orthogonalise_cores", "flatten_cores", "similarity"
    }  # fmt: skip
    for path in sorted((ROOT / "merge").rglob("*.py")) + sorted((ROOT / "domains").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            called = {one.func.attr if isinstance(one.func, ast.Attribute) else getattr(one.func, "id", "")
                      for one in ast.walk(node) if isinstance(one, ast.Call)}  # fmt: skip
            if called & DECOMPOSITIONS and node.name not in within:
                assert name in modules, f"{name}.{node.name}"
                assert hasattr(getattr(modules[name], node.name), "__wrapped__"), f"{name}.{node.name}: @one_thread"


def test_threads_decide_no_bytes():
    """Without `one_thread`, two of these three arrays have other last bits with two threads of OpenBLAS than with one."""
    rng = np.random.default_rng(0)
    pairs = [(rng.standard_normal((400, 24)), rng.standard_normal((24, 300))) for _ in range(2)]
    root_II, right_IO = (rng.standard_normal((120, 120)) for _ in "ab")
    gram_II = root_II @ root_II.T

    def compute() -> list[bytes]:
        merged = adapters.merged_pair(pairs, [1.0, 0.5], adapters.LOW_RULES["svd"], SETTINGS)
        solved = matrices.solve((gram_II, right_IO), right_IO.T, None, SETTINGS | {"ridge": 0.1})
        return [np.ascontiguousarray(one).tobytes() for one in (*merged, solved)]

    with threadpool_limits(1, user_api="blas"):
        alone = compute()
    with threadpool_limits(2, user_api="blas"):
        assert compute() == alone
