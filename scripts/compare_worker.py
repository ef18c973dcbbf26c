"""One side of compare_peer.py in a process of its own: `python compare_worker.py peer|ours`.

Reads one JSON request a line on stdin and answers each with one JSON line on stdout. The peer's
interpreter needs llama-cpp-python only, so nothing else is imported before a side is chosen.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Ours:
    """This package, through its public interface."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        sys.path.append(str(Path(__file__).resolve().parent.parent))
        import runtime

        self.model = runtime.load(path, threads=threads, context=context)
        self.about = {"name": f"graph-runtime {runtime.__version__}", "details": []}

    def prompt(self, ids: list[int]) -> None:
        """All ids in one evaluation of a fresh session, logits of the last."""
        with self.model.session() as session:
            session.eval(ids, logits="last")

    def decode(self, ids: list[int]) -> None:
        """The ids one by one in a fresh session, logits of each."""
        with self.model.session() as session:
            for token in ids:
                session.eval([token], logits="last")


class Peer:
    """llama.cpp, called as its own llama-bench does."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        import llama_cpp as lib

        self.lib = lib
        self.log: list[str] = []
        # kept as an attribute: the library calls it for as long as it lives
        self.on_log = lib.llama_log_callback(lambda level, text, _: self.log.append(text.decode()))
        lib.llama_log_set(self.on_log, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError("cannot load the model: " + "".join(self.log[-3:]).strip())
        options = lib.llama_context_default_params()
        options.n_ctx = context
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = threads
        self.context = lib.llama_init_from_model(self.model, options)
        self.about = {
            "name": f"llama-cpp-python {lib.__version__}",
            "details": [line.split(":", 1)[1].strip() for line in self.log if "buffer size" in line]
            + [lib.llama_print_system_info().decode()],
        }

    def prompt(self, ids: list[int]) -> None:
        """All ids in one batch with an empty memory, logits of the last."""
        self._forget()
        self._run(ids)

    def decode(self, ids: list[int]) -> None:
        """The ids one by one with an empty memory, logits of each."""
        self._forget()
        for token in ids:
            self._run([token])

    def _forget(self) -> None:
        """Empty the KV cache and, of hybrid models, the recurrent state: it starts from zeros."""
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), False)

    def _run(self, ids: list[int]) -> None:
        tokens = (self.lib.llama_token * len(ids))(*ids)
        status = self.lib.llama_decode(self.context, self.lib.llama_batch_get_one(tokens, len(ids)))
        if status:
            raise RuntimeError(f"llama_decode gave {status}")
        self.lib.llama_synchronize(self.context)
        if not self.lib.llama_get_logits_ith(self.context, -1):
            raise RuntimeError("no logits")


def answer(side: Ours | Peer, request: dict[str, Any]) -> dict[str, Any]:
    """Run the test named in the request and time it."""
    start = time.perf_counter()
    getattr(side, request["test"])(request["ids"])
    return {"seconds": time.perf_counter() - start}


def main() -> None:
    """Serve requests until stdin closes."""
    # what libraries print must not get between the answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    side: Ours | Peer | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if side is None:
                start = time.perf_counter()
                side = Ours(**request) if sys.argv[1] == "ours" else Peer(**request)
                reply = {"seconds": time.perf_counter() - start, **side.about}
            else:
                reply = answer(side, request)
        except Exception as error:  # the parent shows it, whatever it is
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
