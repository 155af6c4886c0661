"""The gateway: elmwood routes each request, and an engine that a team runs already (vLLM, SGLang, other elmwood servers) answers it.

`pick.py` chooses the expert, `book.py` says which experts an engine holds, `upstream.py` speaks to one, `fleet.py` chooses among several,
and `answers.py` passes requests on.
"""

from elmwood.registry import require

require("httpx2", "gateway")
