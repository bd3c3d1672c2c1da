"""Training configs, good and bad, that the Python client and the page have to read alike."""

from __future__ import annotations

from typing import Any, Final

from chromarpc.replay.config_file import MAX_DEPTH

CHANGES: Final[dict[str, dict[str, Any]]] = {
    "as it is": {},
    "flags": {
        "sample": {
            "prompts": [
                "a cat --w 320 --h 200 --seed 7 --s 9 --cfg 3.5 --m 0.5 --n blurry, bad ",
                "a cat --d 8 --steps 3 --l 2 --network_multiplier -0.25",
                "a cat --n", "a --w\n320 --h 128", "well--known, --w 64", " a  cat  ", "--w 64",
                "a cat --p2 x --gr 0.7 --", "a --s 8.5", "a --cfg much", "a --w 1_0_0 --cfg 1_0.5e1",
                "a --seed -1", "a --seed 99999999999999999999",
                "a --constructor 3", "",
            ]
        }
    },
    "walking seeds": {"sample": {"samples": [{"prompt": "a"}, {"prompt": "b", "seed": 7}, {"prompt": "c"}]}},
    "seeds that stick": {
        "sample": {
            "walk_seed": False,
            "samples": [{"prompt": "a"}, {"prompt": "b", "seed": 7}, {"prompt": "c --seed 9"}, {"prompt": "d"}],
        }
    },
    "a drawn seed": {"sample": {"seed": -1, "prompts": ["a", "b", "c --seed -5"]}},
    "a large seed": {"sample": {"seed": 18446744073709551615}},
    "a seed that is none": {"sample": {"seed": "some"}},
    "a seed in a text": {"sample": {"seed": " 12 "}},
    "a trigger word": {
        "process": {"trigger_word": "sks"},
        "sample": {"neg": "[trigger]", "prompts": ["a [trigger] cat, [name] --n no [trigger]", "$& [trigger]"]},
    },
    "an empty trigger word": {"process": {"trigger_word": ""}, "sample": {"prompts": ["a [trigger] cat"]}},
    "no trigger word": {"sample": {"prompts": ["a [trigger] cat"]}},
    "a name": {"name": "my [name] $& job", "sample": {"prompts": ["by [name]"], "neg": "[name]"}},
    "a name that is a number": {"name": 7, "sample": {"prompts": ["by [name]"]}},
    "no quantization": {"model": {"quantize": False}, "train": {"dtype": "float32"}},
    "another quantizer": {"model": {"qtype": "uint4|some/adapter", "quantize_te": False, "qtype_te": "qint8"}},
    "layer offloading": {"model": {"layer_offloading": True}},
    "automatic memory": {"model": {"auto_memory": True, "layer_offloading": False}},
    "multipliers": {
        "sample": {
            "samples": [
                {"prompt": "a", "network_multiplier": one}
                for one in ("0.8", "much", 0.5, 1, None, True, [], "1e-3")
            ]
        }
    },
    "what is no number": {
        "sample": {
            "samples": [
                {"prompt": "a", "width": "wide"}, {"prompt": "b", "guidance_scale": None},
                {"prompt": "c", "sample_steps": 2.5},
                {"prompt": "d", "height": {"it's": [1, 2.0, None, True, "\n"]}},
                {"prompt": "e", "width": 64.0, "guidance_scale": "3"}, {"prompt": "f", "width": 1e22},
                {"prompt": "g", "sample_steps": True},
            ]
        }
    },
    "prompts that are null": {
        "sample": {
            "samples": [
                {"prompt": "a", "width": 64}, {"prompt": None, "width": 128}, {"prompt": "c", "width": 256},
            ]
        }
    },
    "prompts that are no texts": {"sample": {"prompts": [1, 2.5, 1e20, 1e-7, True, ["a"], {"prompt": "b"}]}},
    "a negative text that is false": {"sample": {"neg": False}},
    "a negative text of spaces": {"sample": {"neg": "  bad  "}},
    "first samples": {"process": {"first_sample": {"neg": "", "prompts": ["x", "y", "z"]}}},
    "first samples alone": {
        "process": {"first_sample": {"neg": "", "prompts": ["x"]}}, "train": {"skip_first_sample": True}
    },
    "variables": {"sample": {"prompts": ["a ${THING} by ${WHO}, ${THING}"], "seed": "${SEED}"}},
    "another adapter": {"network": {"type": "LoKr", "pretrained_lora_path": "/x"}},
    "no adapter": {"network": None},
    "what cannot be honoured": {
        "model": {"lora_path": "x", "assistant_lora_path": "y", "quantize_kwargs": {"exclude": ["*"]}},
        "process": {"embedding": {"trigger": "x"}}, "train": {"train_text_encoder": True},
    },
    "no type": {"train": {"dtype": None}},
    "another architecture": {"model": {"arch": "flux"}},
    "an architecture with a tag": {"model": {"arch": "chroma:hd"}},
    "an architecture of old": {"model": {"arch": "", "is_flux": True}},
    "no architecture": {"model": {"arch": None}},
}  # fmt: skip

TEXTS: Final = {
    "numbers": "a: [4e0, 1e-4, .5E1, +2.E+1, 1e, 4, 1_000, 0o17, 017, 08, 0x1F, 0b101, 1:30, 1:30.5]",
    "more numbers": "a: [-0, -0.0, 1., +.5, .inf, -.Inf]",
    "large and small numbers": "a: [1e16, 123456789012345680.0, 0.0001, 0.00001, 1e22, 12345678901234567890]",
    "words": "a: [yes, No, on, OFF, y, n, True, ~, null, Null, '', nUll, 'yes', \"on\"]",
    "words with tags": "a: [!!str yes, !!int '5', !!float 3]",
    "dates": "a: [2026-01-02, 2026-1-2, 2026-01-02 03:04:05, 2026-01-02T03:04:05.5Z]",
    "a date with a zone": "a: 2001-12-14 21:59:43.10 -05:30",
    "an equals sign": "a: =",
    "keys": "2: x\ntrue: y\nnull: z\n1.5: a\n2026-01-02: b\n2: again",
    "a list as a key": "? [1, 2]\n: x",
    "no value": "a:\nb: \nc: {d, e: }",
    "aliases": "a: &x {k: [1, 2]}\nb: *x\nc: [*x, *x]",
    "merged keys": "a: &a {k: 1, l: 2}\nb: &b {k: 3, m: 4}\nc: {<<: [*a, *b], l: 5}\nd: {k: 6, <<: *b}",
    "a key that merges nothing": "e: {'<<': 1}",
    "merging what is no mapping": "a: {<<: [1]}",
    "an alias of nothing": "a: *x",
    "an anchor twice": "a: &x 1\nb: &x 2",
    "folded texts": "a: one --w\n  320 --h\n\n  200\nb: >-\n  c\n  d\ne: |\n  f\n  g\n",
    "folded quotes": "h: 'i\n  j'\nk: \"l\\\n  m\\u00e9\\x41\"",
    "another tag": "a: !!python/object/apply:os.system [true]",
    "a tag of its own": "a: !thing 5",
    "cut off": "a: [1, 2",
    "two documents": "a: 1\n---\nb: 2",
    "a list": "- a",
    "nothing": "",
    "a bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "a bomb of merges": "b0: &b0 {k: 1}\n"
    + "".join(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}\n" for n in range(1, 60)),
    "itself": "a: &a [*a]",
    "too deep": "a: " + "{b: " * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1),
    "just deep enough": "a: " + "[" * (MAX_DEPTH - 2) + "1" + "]" * (MAX_DEPTH - 2),
    "a long number": "a: " + "9" * 5000,
    "a long time": "a: " + ":".join(["1"] * 1000),
    "other settings": "a: 1",
    "no process": "config: {name: x}",
    "no model": "config: {name: x, process: [{type: y}]}",
    "no name": "config: {process: [{model: {arch: chroma}}]}",
    "a date for a name": "config: {name: 2026-01-02, process: [{model: {arch: chroma}}]}",
    "no samples": "config: {name: x, process: [{model: {arch: chroma}}]}",
}  # fmt: skip

JSON_TEXTS: Final = {
    "JSON values": '{"a": [1, 1.0, -2.5e3, 12345678901234567890, null, "x\\u00e9\\n", {}, "1"], "b": {}}',
    "JSON, cut off": "{",
    "a JSON list": "[]",
    "deep JSON": '{"a":' * 60 + "1" + "}" * 60,
}
