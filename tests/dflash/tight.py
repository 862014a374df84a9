"""A DFlashLlama under a real limit on the memory of its process; what comes of it, a line of JSON each.

    python -m dflash.tight TARGET DRAFT SETTINGS...      (in tests/)

Settings are JSON: ``limit`` (RLIMIT_AS: known to the package; RLIMIT_DATA: only to the allocator), ``room`` (bytes left when draft and
mirror are made; null: no limit), and what else is given to the DFlashLlama.
"""

from __future__ import annotations

import json
import resource
import sys
from typing import Any

from resident import resident

from ggml_mirror.capture import Hook
from ggml_mirror.dflash import DFlashLlama
from ggml_mirror.errors import MirrorMemoryError

_TAKEN = {"RLIMIT_AS": "VmSize:", "RLIMIT_DATA": "VmData:"}


class Limited(DFlashLlama):
    """Limited from the moment at which the target is there."""

    limit: str
    room: int | None

    def _start_drafting(self, *arguments: Any) -> None:
        Hook.of(self)
        if self.room is not None:
            status = open("/proc/self/status").read()
            taken = 1024 * int(status.split(_TAKEN[self.limit])[1].split()[0])
            resource.setrlimit(getattr(resource, self.limit), (taken + self.room, resource.RLIM_INFINITY))
        super()._start_drafting(*arguments)


def outcome(target: str, draft: str, *, limit: str, room: int | None, **options: Any) -> dict[str, Any]:
    Limited.limit, Limited.room = limit, room
    try:
        llm = Limited(
            target, draft_path=draft, n_ctx=32768, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False, **options
        )
    except MirrorMemoryError as error:
        return {"error": str(error), **vars(error)}
    finally:
        resource.setrlimit(getattr(resource, limit), (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    try:
        text = llm("Once upon a time", max_tokens=12, temperature=0)["choices"][0]["text"]
        return {
            "text": text,
            "drafted": llm.stats.draft_steps,
            "draft": llm.draft.bytes.total,
            "mirror": llm.mirror.nbytes,
        }
    finally:
        llm.close()


def main() -> None:
    target, draft, *settings = sys.argv[1:]
    outcome(target, draft, limit="RLIMIT_AS", room=None)
    before = resident()
    for line in settings:
        found = outcome(target, draft, **json.loads(line))
        print(json.dumps({**found, "grown": resident() - before}), flush=True)


if __name__ == "__main__":
    main()
