"""The prompts that ``probe`` runs: a small varied set, or the user's file."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import ArgumentError


@dataclass(frozen=True)
class Prompt:
    """A user's text before any chat template, and a short name for it."""

    name: str
    text: str


def read_prompts(path: str | Path) -> tuple[Prompt, ...]:
    """Prompts from a ``.txt`` file (one per line) or a ``.jsonl`` file (one object per line, key "prompt").

    Raises:
        ArgumentError: missing, empty, or not of either form; the message names the line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise ArgumentError(f'{path}: prompts come as .txt (one per line) or .jsonl (objects with "prompt")')
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise ArgumentError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: not UTF-8 text (byte {error.start})") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            text = _from_json(line, f"{path}:{number}") if path.suffix == ".jsonl" else line.rstrip("\r")
            prompts.append(Prompt(f"{path.name}:{number}", text))
    if not prompts:
        raise ArgumentError(f"{path}: holds no prompts")
    return tuple(prompts)


def _from_json(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ArgumentError(f"{where}: not JSON ({error})") from error
    text = value.get("prompt") if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ArgumentError(f'{where}: an object with a non-empty string "prompt" was expected')
    return text


_CODE = '''\
from collections import OrderedDict


class LRUCache:
    """Least-recently-used cache of bounded size."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.items = OrderedDict()

    def get(self, key):
        """Return the value of key and mark it as used, or None if it is absent."""
'''

_LOG = """\
2025-03-02T08:14:07.112Z INFO  ring.c:88    opened ring "features" cap=4096 width=25600 dtype=f32
2025-03-02T08:14:07.398Z INFO  sched.c:412  graph split: 5 taps, 936 nodes, backend CUDA0
2025-03-02T08:14:09.004Z WARN  ring.c:140   position 4096 overwrites slot 0 (position 0)
2025-03-02T08:14:09.005Z WARN  ring.c:140   position 4097 overwrites slot 1 (position 1)
2025-03-02T08:14:11.870Z ERROR alloc.c:57   cudaMalloc: out of memory, 26843545600 bytes asked, 11811160064 free
2025-03-02T08:14:11.871Z ERROR server.c:930 slot 0 stopped, 1290 tokens were generated
What went wrong here, in which order, and what would you change first?"""

_LONG = """\
The harbour at Velm had been built by people who distrusted the sea. Its outer wall was forty feet thick at the \
base, laid in courses of black stone that had been floated down the river on rafts, and behind it a second, \
lower wall curved round the basin like an arm around a sleeping child. Between the two ran a channel where the \
fishing boats waited for the tide. On the evening when this account begins there were eleven of them, tied in a \
row, and on the last one a woman named Ingrid Solheim was mending a net by the light of a lamp that smoked.

She had inherited the boat from her uncle, who had inherited it from a man to whom nobody in Velm was related. \
The papers said that it had been launched in 1871 under the name of Patience. It was slow, it leaked at the \
stern, and it steered like a cupboard, but it had come through the winter of the three storms when better boats \
had not, and Ingrid had given up arguing with people who told her to sell it. "A boat does not have to be good," \
she used to say. "It has to come back."

The harbour master came along the wall at half past nine with his dog and a notebook. He was a precise man. In \
the notebook he wrote, each evening, the height of the water against the iron rule by the steps, the direction \
of the wind, the number of boats in the channel and the number expected. For twenty-six years the two numbers \
had been the same by midnight on all but fourteen nights, and he could have named the fourteen. Tonight he wrote \
4.2 metres, south-west, eleven, twelve.

"Who is out?" Ingrid asked, without looking up.

"The Brandt boys. They went for the cod on the far bank. I told them about the glass." He meant the barometer in \
his office, which had been falling since noon, first slowly, as it does before rain, and then in a way that he \
had seen perhaps five times. "They said that they would be back by dark."

They both looked at the sky over the outer wall. It was the colour of slate, and quite still. To the north there \
was a line along the horizon, thin and pale, as though somebody had drawn it with a ruler. The dog sat down and \
put its ears back.

There are several ways to measure how fast bad weather approaches, and in Velm all of them were known to \
children. One counts the seconds between a flash and its thunder and divides by three for kilometres. One \
watches the gulls: when they come in from the bank and settle on the church roof, there are two hours; when they \
leave the roof for the lee of the hill, there is one. One listens to the channel, because the swell arrives \
before the wind does, and the boats begin to pull at their ropes with a sound like slow breathing. Ingrid put \
down her needle and listened. The ropes were breathing.

"How long would it take them from the far bank?" she asked.

"With this wind, three hours. With what is coming, they will not be able to hold a course at all. They would \
have to run before it, past the point, and there is nothing past the point but the skerries." He turned a page \
of his notebook and found that he had nothing to write on it. "The lifeboat is at Hestvik for its engine. I \
telephoned. They can have it in the water by morning."

Ingrid wound the twine round her needle, hung the net over the rail, and turned down the lamp until it stopped \
smoking. Then she went forward and began to untie the first of her two ropes.

Summarise this passage in three sentences, then continue the story from the moment at which she casts off."""

#: Code, prose, arithmetic, four other languages, structured text, a log and a long passage: enough to show the
#: outliers of a model's features, small enough for a laptop.
DEFAULT_PROMPTS = (
    Prompt("code", _CODE),
    Prompt("explain", "Explain in simple terms why the sky is blue at noon and red at sunset."),
    Prompt(
        "arithmetic", "A train leaves at 14:35 and arrives at 17:10 after 186 km. What was its average speed in km/h?"
    ),
    Prompt(
        "german-french",
        "Übersetze ins Französische: „Der Zug nach Marseille hat heute leider vierzig Minuten Verspätung.“",
    ),
    Prompt("chinese-arabic", "请用三句话介绍长城的历史。ثم اكتب جملة واحدة عن مدينة القاهرة."),
    Prompt(
        "json",
        '{"order": 8821, "items": [{"sku": "A-17", "qty": 3, "price": 4.25}, {"sku": "C-02", "qty": 1}], "note":',
    ),
    Prompt("log", _LOG),
    Prompt("story", _LONG),
)
