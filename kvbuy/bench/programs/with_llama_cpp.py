"""A program of its own: prefill, save, restore and continue with llama.cpp's slot file. Needs only `xllamacpp`.

Reads a request as JSON from stdin ({model, document, prompt, repeats, threads}, document and prompt token ids) and
prints the times, in seconds, as JSON.
"""

import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

SLOT = "document.slot"


class Server:
    """llama.cpp's server in this process, with one slot."""

    def __init__(self, request: dict[str, Any], folder: str) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = request["model"]
        parameters.n_ctx = -(-(len(request["document"]) + len(request["prompt"]) + 64) // 256) * 256
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = request["threads"]
        parameters.cpuparams_batch.n_threads = request["threads"]
        parameters.endpoint_slots = True
        parameters.slot_save_path = folder + "/"
        self.server = xllamacpp.Server(parameters)

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        """Ask the server, and wait."""
        data = json.dumps(fields).encode()
        request = urllib.request.Request(
            self.server.listening_address + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def complete(self, ids: list[int]) -> float:
        """Seconds to one token after the ids; what the slot holds of them is not computed again."""
        started = time.perf_counter()
        self.post("/completion", prompt=ids, n_predict=1, temperature=0, cache_prompt=True, id_slot=0)
        return time.perf_counter() - started

    def slot(self, action: str) -> float:
        """Seconds to save, restore or erase the slot."""
        started = time.perf_counter()
        self.post(f"/slots/0?action={action}", filename=SLOT)
        return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    request = json.load(sys.stdin)
    document, whole = request["document"], request["document"] + request["prompt"]
    with tempfile.TemporaryDirectory() as folder:
        server = Server(request, folder)
        server.complete(document[:16])
        server.slot("erase")
        prefill = server.complete(document)
        server.slot("save")
        load, reuse = [], []
        for _ in range(request["repeats"]):
            server.slot("erase")
            load.append(server.slot("restore"))
            reuse.append(load[-1] + server.complete(whole))
        size = (Path(folder) / SLOT).stat().st_size
    print(json.dumps({"bytes": size, "prefill": prefill, "load": sorted(load), "reuse": sorted(reuse)}), flush=True)


if __name__ == "__main__":
    main()
