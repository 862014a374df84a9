"""A process that answers prompts with the demo pair and a cache directory, as a server does between two restarts.

    python one_server.py TARGET DRAFT < work.json

Work: {"options": {...}, "directory": path or null, "prompts": [[ids], ...], "n_predict": n}. Prints a JSON object: per prompt the text,
accepted tokens of each step, reused tokens and a digest of the rows; and the cache's counters.
"""

from __future__ import annotations

import hashlib
import json
import sys

from ggml_mirror import DFlashLlama, PrefixCache


def main() -> None:
    target, draft = sys.argv[1:]
    work = json.load(sys.stdin)
    llm = DFlashLlama(target, draft_path=draft, verbose=False, **work["options"])
    cache = PrefixCache(llm, directory=work["directory"]) if work["directory"] else None
    llm.set_cache(cache)
    answers = []
    for prompt in work["prompts"]:
        if cache is None:
            llm.reset()
        text = llm.create_completion(prompt, max_tokens=work["n_predict"], temperature=0)["choices"][0]["text"]
        rows = llm.mirror.snapshot()
        seen = rows.positions >= llm.n_tokens - llm.draft_window
        digest = hashlib.sha256(rows.rows[seen].tobytes() + rows.positions[seen].tobytes()).hexdigest()
        answers.append({"text": text, "steps": llm.stats.steps, "reused": llm.stats.prefix_reused, "rows": digest})
    counters = cache.counters.to_dict() if cache is not None else None
    print(json.dumps({"answers": answers, "counters": counters}))  # the interpreter's end writes what waits


if __name__ == "__main__":
    main()
