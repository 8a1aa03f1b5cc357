"""Broken variants of experts.yaml and of what it names: each is refused with place and remedy.

The messages stand here as people read them; TMP is the registry's folder.
"""

# ruff: noqa: E501  (messages are one line each, as they are printed)

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from composer.errors import CatalogError
from composer.registry import load_catalog
from tests.registry.world import DEVICES, FAMILIES, FULL, PLACED, REGISTRY, write_world


@dataclass(frozen=True)
class Broken:
    """How the sound registry is broken, and all that is said of it.

    `edits` are (old, new) pieces of its text, each there exactly where it is replaced first;
    `text` replaces the whole, before the edits; `files` are written, or removed where None.
    """

    says: list[str]
    edits: list[tuple[str, str]] = field(default_factory=list)
    text: str | None = None
    files: dict[str, str | None] = field(default_factory=dict)


BROKEN: dict[str, Broken] = {
    "key_without_colon": Broken(
        edits=[("version: 1\n", "version: 1\n servers\n")],
        says=[
            "TMP/experts.yaml:1: version: it should be 1, not '1 servers'. Write 1.",
        ],
    ),
    "tab_for_indentation": Broken(
        edits=[("    engine: embedded\n", "\tengine: embedded\n")],
        says=[
            "TMP/experts.yaml:4: this is not YAML: while scanning for the next token found character that cannot start any token. Check indentation, quotes and brackets there and on the line before.",
        ],
    ),
    "unclosed_bracket": Broken(
        edits=[('experts: ["*"]', 'experts: ["*"')],
        says=[
            "TMP/experts.yaml:27: this is not YAML: while parsing a flow sequence did not find expected ',' or ']'. Check indentation, quotes and brackets there and on the line before.",
        ],
    ),
    "not_a_mapping": Broken(
        text="- version: 1\n",
        says=[
            "TMP/experts.yaml:1: it should have keys below it, not a list. Write its keys below it, indented, or between { and }.",
        ],
    ),
    "empty": Broken(
        text="# nothing yet\n",
        says=[
            "TMP/experts.yaml: the file is empty. Write `version`, `servers`, `experts` and `policies`; README.md shows how.",
        ],
    ),
    "duplicate_key": Broken(
        edits=[("  general:\n    server", "  fox:\n    server: far\n  general:\n    server")],
        says=[
            "TMP/experts.yaml:13: the key 'fox' stands here a second time (first on line 10). Remove one of the two, or rename it.",
        ],
    ),
    "undefined_alias": Broken(
        edits=[('experts: ["*"]', "experts: *")],
        says=[
            "TMP/experts.yaml:26: this is not YAML: while scanning an alias did not find expected alphabetic or numeric character. Check indentation, quotes and brackets there and on the line before.",
        ],
    ),
    "tag": Broken(
        edits=[("version: 1", "version: !!python/name:os.system 1")],
        says=[
            "TMP/experts.yaml:1: the tag tag:yaml.org,2002:python/name:os.system is not used here. Remove it.",
        ],
    ),
    "unknown_top_level_key": Broken(
        edits=[("experts:\n  fox", "expert:\n  fox")],
        says=[
            "TMP/experts.yaml:9: expert: unknown key. Did you mean `experts`?",
        ],
    ),
    "version_missing": Broken(
        edits=[("version: 1\n", "")],
        says=[
            "TMP/experts.yaml:1: version: it is missing. Add `version`: the version of this file's format, which is 1.",
        ],
    ),
    "version_of_the_future": Broken(
        edits=[("version: 1", "version: 2")],
        says=[
            "TMP/experts.yaml:1: version: it should be 1, not 2. Write 1.",
        ],
    ),
    "servers_missing": Broken(
        text="version: 1\nexperts:\n" + REGISTRY.partition("experts:\n")[2],
        says=[
            "TMP/experts.yaml:1: servers: it is missing. Add `servers`: processes that run models, by id.",
        ],
    ),
    "engine_missing": Broken(
        edits=[("    engine: embedded\n", "")],
        says=[
            "TMP/experts.yaml:3: servers.local.engine: it is missing. Add one of `embedded`, `remote`.",
        ],
    ),
    "engine_unknown": Broken(
        edits=[("engine: embedded", "engine: embeded")],
        says=[
            "TMP/experts.yaml:4: servers.local.engine: no engine is called 'embeded'. Did you mean `embedded`?",
        ],
    ),
    "engine_setting_unknown": Broken(
        edits=[("    model: ./b", "    modle: ./b")],
        says=[
            "TMP/experts.yaml:3: servers.local.model: it is missing. Add `model`: folder of the base model, or its hub name.",
            "TMP/experts.yaml:5: servers.local.modle: unknown key. Did you mean `model`?",
        ],
    ),
    "engine_setting_out_of_bounds": Broken(
        edits=[("engine: embedded\n", "engine: embedded\n    queue: -1\n")],
        says=[
            "TMP/experts.yaml:5: servers.local.queue: it should be greater than or equal to 0, not -1. Write 0 or more.",
        ],
    ),
    "model_folder_missing": Broken(
        edits=[("./bases/tiny", "./bases/tinny")],
        says=[
            "TMP/experts.yaml:5: servers.local.model: TMP/bases/tinny: there is no such folder. Name the base model's folder.",
        ],
    ),
    "model_without_config": Broken(
        files={"bases/tiny/config.json": None},
        says=[
            "TMP/experts.yaml:5: servers.local.model: TMP/bases/tiny: config.json is missing. Name a model saved with `save_pretrained`.",
        ],
    ),
    "model_neither_folder_nor_hub_name": Broken(
        edits=[("./bases/tiny", "tiny")],
        says=[
            "TMP/experts.yaml:5: servers.local.model: 'tiny' is neither a folder nor a name on the hub. Write ./folder, or org/name.",
        ],
    ),
    "expert_not_a_mapping": Broken(
        edits=[
            ("  fox:\n    server: local\n    adapter: ./adapters/fox\n", "  fox: ./adapters/fox\n")
        ],
        says=[
            "TMP/experts.yaml:10: experts.fox: it should have keys below it, not './adapters/fox'. Write its keys below it, indented, or between { and }.",
        ],
    ),
    "expert_key_unknown": Broken(
        edits=[("    adapter: ./adapters/fox", "    adaptor: ./adapters/fox")],
        says=[
            "TMP/experts.yaml:12: experts.fox.adaptor: unknown key. Did you mean `adapter`?",
        ],
    ),
    "expert_id_with_capitals": Broken(
        edits=[("  fox:\n", "  Fox One:\n"), ("[fox, owl]", '["*"]')],
        says=[
            "TMP/experts.yaml:10: experts.Fox One: 'Fox One' cannot be an id. Use lower-case letters, digits and . _ / - (64 at most), beginning with a letter or digit.",
        ],
    ),
    "expert_server_missing": Broken(
        edits=[("  fox:\n    server: local\n", "  fox:\n")],
        says=[
            "TMP/experts.yaml:10: experts.fox.server: it is missing. Add `server`: id of the server that runs it.",
        ],
    ),
    "expert_server_unknown": Broken(
        edits=[("  fox:\n    server: local\n", "  fox:\n    server: locla\n")],
        says=[
            "TMP/experts.yaml:11: experts.fox.server: no server is called 'locla'. Did you mean `local`?",
        ],
    ),
    "adapter_folder_missing": Broken(
        edits=[("./adapters/fox", "./adapters/foxy")],
        says=[
            "TMP/experts.yaml:12: experts.fox.adapter: TMP/adapters/foxy: there is no such folder. Name the folder that holds adapter_config.json and adapter_model.safetensors.",
        ],
    ),
    "adapter_empty": Broken(
        edits=[("./adapters/fox", '""')],
        says=[
            "TMP/experts.yaml:12: experts.fox.adapter: it is empty. Fill it in, or remove the key.",
        ],
    ),
    "adapter_without_hub_revision": Broken(
        edits=[("./adapters/fox", "{hub: acme/fox-lora}")],
        says=[
            "TMP/experts.yaml:12: experts.fox.adapter.revision: it is missing. Add `revision`: commit hash, tag or branch; a commit hash stays the same and is not asked for again.",
        ],
    ),
    "adapter_hub_name_malformed": Broken(
        edits=[("./adapters/fox", "{hub: fox-lora, revision: main}")],
        says=[
            "TMP/experts.yaml:12: experts.fox.adapter.hub: 'fox-lora' is not of the form wanted here. Correct `hub`: its name, as `org/name`.",
        ],
    ),
    "adapter_on_hub_not_cached": Broken(
        edits=[("./adapters/fox", "{hub: acme/fox-lora, revision: v1}")],
        says=[
            "TMP/experts.yaml:12: experts.fox.adapter: acme/fox-lora at v1 is not in the local hub cache and the hub cannot be reached. Connect, or fetch it before with `hf download acme/fox-lora --revision v1`.",
        ],
    ),
    "digest_malformed": Broken(
        edits=[
            ("    adapter: ./adapters/fox\n", "    adapter: ./adapters/fox\n    digest: sha1:abc\n")
        ],
        says=[
            "TMP/experts.yaml:13: experts.fox.digest: 'sha1:abc' is not of the form wanted here. Write `sha256:` and 64 hexadecimal digits, as `composer check` prints them.",
        ],
    ),
    "digest_without_adapter": Broken(
        edits=[
            (
                "    server: far\n",
                "    server: far\n    digest: sha256:0000000000000000000000000000000000000000000000000000000000000000\n",
            )
        ],
        says=[
            "TMP/experts.yaml:15: experts.general.digest: it pins an adapter, but the expert has none. Remove it, or add the `adapter` or `gate`.",
        ],
    ),
    "ability_engine_cannot_give": Broken(
        edits=[
            (
                "    adapter: ./adapters/fox\n",
                "    adapter: ./adapters/fox\n    abilities: [tools]\n",
            )
        ],
        says=[
            "TMP/experts.yaml:13: experts.fox.abilities: the engine 'embedded' cannot give 'tools'. Remove it; this engine's abilities: logprobs.",
        ],
    ),
    "ability_unknown": Broken(
        edits=[("[tools, json]", "[tool, json]")],
        says=[
            "TMP/experts.yaml:17: experts.general.abilities[0]: it should be 'tools', 'json', 'vision' or 'logprobs', not 'tool'. Write 'tools', 'json', 'vision' or 'logprobs'.",
        ],
    ),
    "context_window_above_the_base": Broken(
        edits=[
            (
                "    adapter: ./adapters/fox\n",
                "    adapter: ./adapters/fox\n    context_window: 4096\n",
            )
        ],
        says=[
            "TMP/experts.yaml:13: experts.fox.context_window: 4096 tokens exceed the server's 512. Write 512 or less.",
        ],
    ),
    "context_window_as_text": Broken(
        edits=[("8192", "8k")],
        says=[
            "TMP/experts.yaml:16: experts.general.context_window: it should be a whole number, not '8k'. Write a whole number, without quotes.",
        ],
    ),
    "context_window_unknown": Broken(
        edits=[("    context_window: 8192\n", "")],
        says=[
            "TMP/experts.yaml:13: experts.general.context_window: it is missing, and the server's model does not tell it. Add `context_window`, in tokens.",
        ],
    ),
    "description_is_a_number": Broken(
        edits=[("anything else", "2026")],
        says=[
            "TMP/experts.yaml:15: experts.general.description: it should be text, not 2026. Put the text in quotes.",
        ],
    ),
    "example_with_a_colon": Broken(
        edits=[
            (
                "    adapter: ./adapters/fox\n",
                "    adapter: ./adapters/fox\n    examples:\n      - fix this: fox\n",
            )
        ],
        says=[
            "TMP/experts.yaml:14: experts.fox.examples[0]: it should be text, not a mapping. Put the text in quotes.",
        ],
    ),
    "skills_not_a_list": Broken(
        edits=[
            ("    adapter: ./adapters/fox\n", "    adapter: ./adapters/fox\n    skills: writing\n")
        ],
        says=[
            "TMP/experts.yaml:13: experts.fox.skills: it should be a list, not 'writing'. Write a list: one `- ` item a line, or [a, b].",
        ],
    ),
    "examples_file_missing": Broken(
        edits=[
            (
                "    adapter: ./adapters/fox\n",
                "    adapter: ./adapters/fox\n    examples_from: fox.txt\n",
            )
        ],
        says=[
            "TMP/experts.yaml:13: experts.fox.examples_from: TMP/fox.txt: there is no such file. Correct the path.",
        ],
    ),
    "examples_file_broken": Broken(
        edits=[
            (
                "    adapter: ./adapters/fox\n",
                "    adapter: ./adapters/fox\n    examples_from: fox.jsonl\n",
            )
        ],
        files={"fox.jsonl": '"one"\n{"prompt": "two"}\n'},
        says=[
            'TMP/experts.yaml:13: experts.fox.examples_from: TMP/fox.jsonl:2: this line holds no example. Write "a query" or {"text": "a query"}.',
        ],
    ),
    "prompt_without_field": Broken(
        edits=[
            (
                "    adapter: ./adapters/fox\n",
                "    adapter: ./adapters/fox\n    prompt:\n      template: uppercase\n      extract: [{regex: '(?P<word>[a-z]+)'}]\n",
            )
        ],
        says=[
            "TMP/experts.yaml:14: experts.fox.prompt.template: the template 'uppercase' has no field. Write what is found as a named field, e.g. \"uppercase {word}\".",
        ],
    ),
    "prompt_key_unknown": Broken(
        edits=[
            (
                "    adapter: ./adapters/fox\n",
                "    adapter: ./adapters/fox\n    prompt:\n      template: '{word}'\n      extract: [{regex: '(?P<word>[a-z]+)', feild: word}]\n",
            )
        ],
        says=[
            "TMP/experts.yaml:15: experts.fox.prompt.extract[0].feild: unknown key. Did you mean `field`?",
        ],
    ),
    "cost_incomplete": Broken(
        edits=[("{input_per_1m: 0.5, output_per_1m: 1.5}", "{output_per_1m: -1}")],
        says=[
            "TMP/experts.yaml:18: experts.general.cost.input_per_1m: it is missing. Add `input_per_1m`: US dollars per million prompt tokens.",
            "TMP/experts.yaml:18: experts.general.cost.output_per_1m: it should be greater than or equal to 0, not -1. Write 0 or more.",
        ],
    ),
    "adapters_from_matches_nothing": Broken(
        edits=[("./scanned/*", "./scaned/*")],
        says=[
            "TMP/experts.yaml:20: adapters_from[0].path: no folder matches ./scaned/*. Correct the pattern; it is relative to the folder of this file.",
        ],
    ),
    "a_wrong_server_is_known_by_its_name": Broken(
        edits=[("engine: remote", "engine: remot"), ("    server: far", "    server: fra")],
        says=[
            "TMP/experts.yaml:7: servers.far.engine: no engine is called 'remot'. Did you mean `remote`?",
            "TMP/experts.yaml:14: experts.general.server: no server is called 'fra'. Did you mean `far`?",
        ],
    ),
    "an_adapter_on_a_wrong_server_is_looked_at_too": Broken(
        edits=[("    engine: embedded\n", "    engine: embeded\n")],
        files={"adapters/fox/adapter_model.safetensors": None},
        says=[
            "TMP/experts.yaml:4: servers.local.engine: no engine is called 'embeded'. Did you mean `embedded`?",
            "TMP/experts.yaml:12: experts.fox.adapter: TMP/adapters/fox: adapter_model.safetensors is missing. Save the adapter with peft's `save_pretrained(..., safe_serialization=True)`.",
        ],
    ),
    "adapters_from_without_server": Broken(
        edits=[("  - path: ./scanned/*\n    server: local\n", "  - ./scanned/*\n")],
        says=[
            "TMP/experts.yaml:20: adapters_from[0]: it does not say on which of 2 servers its adapters run. Write {path: …, server: …}.",
        ],
    ),
    "adapters_from_key_unknown": Broken(
        edits=[
            (
                "  - path: ./scanned/*\n    server: local\n",
                "  - path: ./scanned/*\n    server: local\n    prefix: a-\n",
            )
        ],
        says=[
            "TMP/experts.yaml:22: adapters_from[0].prefix: unknown key. Did you mean `id_prefix`?",
        ],
    ),
    "scanned_id_taken": Broken(
        edits=[("./scanned/*", "./adapters/*"), ("[fox, owl]", "[fox]")],
        says=[
            "TMP/experts.yaml:20: adapters_from[0].path: expert 'fox' is defined already, at TMP/experts.yaml:10. Rename one of the two; for scanned folders, by `id_prefix`.",
        ],
    ),
    "card_missing": Broken(
        files={"scanned/owl/README.md": None},
        says=[
            "TMP/experts.yaml:20: adapters_from[0].path: TMP/scanned/owl/README.md has no `composer:` block. Describe the expert there, or name it under `experts:` instead.",
        ],
    ),
    "card_key_unknown": Broken(
        files={
            "scanned/owl/README.md": "---\ncomposer:\n  description: owls\n  exmples: [hoot]\n---\n"
        },
        says=[
            "TMP/scanned/owl/README.md:4: composer.exmples: unknown key. Did you mean `examples`?",
        ],
    ),
    "card_key_twice": Broken(
        files={
            "scanned/owl/README.md": "---\ncomposer:\n  description: owls\n  description: hoot\n---\n"
        },
        says=[
            "TMP/scanned/owl/README.md:4: the key 'description' stands here a second time (first on line 3). Remove one of the two, or rename it.",
        ],
    ),
    "card_value_wrong": Broken(
        files={
            "scanned/owl/README.md": "---\nlicense: mit\ncomposer:\n  description: owls\n  chars_per_token: 0\n---\n"
        },
        says=[
            "TMP/scanned/owl/README.md:5: composer.chars_per_token: it should be greater than 0, not 0. Write more than 0.",
        ],
    ),
    "card_not_closed": Broken(
        files={"scanned/owl/README.md": "---\ncomposer:\n  description: owls\n"},
        says=[
            "TMP/scanned/owl/README.md:1: the front matter has no end. Close it with a line `---`.",
        ],
    ),
    "policies_empty": Broken(
        text=REGISTRY.partition("policies:")[0] + "policies: {}\n",
        says=[
            "TMP/experts.yaml:22: policies: there is no policy 'auto', for requests that name none. Call one of them `auto`, or name one as `default_policy`.",
        ],
    ),
    "router_missing": Broken(
        edits=[("    router: {name: centroid}\n", "")],
        says=[
            "TMP/experts.yaml:29: policies.twice.router: it is missing. Add `router: {name: …}`, with one of `neighbours`, `centroid`.",
        ],
    ),
    "router_unknown": Broken(
        edits=[("name: neighbours", "name: neighbors")],
        says=[
            "TMP/experts.yaml:24: policies.auto.router.name: no router is called 'neighbors'. Did you mean `neighbours`?",
        ],
    ),
    "router_not_a_mapping": Broken(
        edits=[("{name: centroid}", "centroid")],
        says=[
            "TMP/experts.yaml:30: policies.twice.router: it should have keys below it, not 'centroid'. Write its keys below it, indented, or between { and }.",
        ],
    ),
    "router_setting_unknown": Broken(
        edits=[("top: 3", "topp: 3")],
        says=[
            "TMP/experts.yaml:24: policies.auto.router.topp: unknown key. Did you mean `top`?",
        ],
    ),
    "router_setting_wrong": Broken(
        edits=[("top: 3", "top: 3, pooling: median")],
        says=[
            "TMP/experts.yaml:24: policies.auto.router.pooling: it should be 'max' or 'mean', not 'median'. Write 'max' or 'mean'.",
        ],
    ),
    "strategy_unknown": Broken(
        edits=[("{name: vote}", "{name: votes}")],
        says=[
            "TMP/experts.yaml:31: policies.twice.strategy.name: no strategy is called 'votes'. Did you mean `vote`?",
        ],
    ),
    "policy_key_unknown": Broken(
        edits=[("    threshold: 0.4", "    treshold: 0.4")],
        says=[
            "TMP/experts.yaml:28: policies.auto.treshold: unknown key. Did you mean `threshold`?",
        ],
    ),
    "policy_expert_unknown": Broken(
        edits=[("[fox, owl]", "[fox, owls]")],
        says=[
            "TMP/experts.yaml:32: policies.twice.experts[1]: no expert is called 'owls'. Did you mean `owl`?",
        ],
    ),
    "policy_pattern_matches_nothing": Broken(
        edits=[("[fox, owl]", "['math-*']")],
        says=[
            "TMP/experts.yaml:32: policies.twice.experts[0]: no expert's id matches 'math-*'. Known here: `fox`, `general`, `owl`.",
        ],
    ),
    "default_expert_unknown": Broken(
        edits=[("default_expert: general", "default_expert: generall")],
        says=[
            "TMP/experts.yaml:27: policies.auto.default_expert: no expert is called 'generall'. Did you mean `general`?",
        ],
    ),
    "default_expert_not_of_the_policy": Broken(
        edits=[("    k: 2", "    k: 2\n    default_expert: general")],
        says=[
            "TMP/experts.yaml:34: policies.twice.default_expert: 'general' is not among the policy's experts. Add 'general' to `experts`, or name one of those.",
        ],
    ),
    "threshold_without_default_expert": Broken(
        edits=[("    default_expert: general\n", "")],
        says=[
            "TMP/experts.yaml:27: policies.auto.threshold: below it the default expert answers, but the policy has none. Add `default_expert`, or remove the threshold.",
        ],
    ),
    "threshold_above_one": Broken(
        edits=[("threshold: 0.4", "threshold: 40")],
        says=[
            "TMP/experts.yaml:28: policies.auto.threshold: it should be less than or equal to 1, not 40. Write 1 or less.",
        ],
    ),
    "k_zero": Broken(
        edits=[("k: 2", "k: 0")],
        says=[
            "TMP/experts.yaml:33: policies.twice.k: it should be greater than or equal to 1, not 0. Write 1 or more.",
        ],
    ),
    "k_as_text": Broken(
        edits=[("k: 2", "k: '2'")],
        says=[
            "TMP/experts.yaml:33: policies.twice.k: it should be a whole number, not '2'. Write a whole number, without quotes.",
        ],
    ),
    "cost_weight_without_costs": Broken(
        edits=[("    k: 2", "    k: 2\n    cost_weight: 0.1")],
        says=[
            "TMP/experts.yaml:34: policies.twice.cost_weight: costs count here, but 'fox', 'owl' have no `cost`. Add `cost` there (0 where it is free), or remove `cost_weight`.",
        ],
    ),
    "policy_named_like_an_expert": Broken(
        edits=[("  twice:", "  owl:")],
        says=[
            "TMP/experts.yaml:29: policies.owl: 'owl' is an expert's id too, and a request names either by `model`. Rename one of the two.",
        ],
    ),
    "no_policy_auto": Broken(
        edits=[("  auto:", "  automatic:")],
        says=[
            "TMP/experts.yaml:22: policies: there is no policy 'auto', for requests that name none. Call one of them `auto`, or name one as `default_policy`.",
        ],
    ),
    "default_policy_unknown": Broken(
        edits=[("version: 1\n", "version: 1\ndefault_policy: thrice\n")],
        says=[
            "TMP/experts.yaml:2: default_policy: no policy is called 'thrice'. Did you mean `twice`?",
        ],
    ),
    "expert_that_no_router_can_find": Broken(
        edits=[
            ("    description: anything else\n", ""),
            ("    default_expert: general\n    threshold: 0.4\n", ""),
        ],
        says=[
            "TMP/experts.yaml:23: policies.auto.router: the router has nothing to find 'general' by. Add `examples` or a `description` there, or leave it out of this policy.",
        ],
    ),
    "several_at_once": Broken(
        edits=[
            ("engine: remote", "engine: remot"),
            ("  fox:\n    server: local\n", "  fox:\n    sever: local\n"),
            ("name: vote", "name: votes"),
            ("k: 2", "k: 0"),
        ],
        says=[
            "TMP/experts.yaml:7: servers.far.engine: no engine is called 'remot'. Did you mean `remote`?",
            "TMP/experts.yaml:10: experts.fox.server: it is missing. Add `server`: id of the server that runs it.",
            "TMP/experts.yaml:11: experts.fox.sever: unknown key. Did you mean `server`?",
            "TMP/experts.yaml:31: policies.twice.strategy.name: no strategy is called 'votes'. Did you mean `vote`?",
            "TMP/experts.yaml:33: policies.twice.k: it should be greater than or equal to 1, not 0. Write 1 or more.",
        ],
    ),
    "policy_leaves_everybody_out": Broken(
        edits=[("[fox, owl]", "['*', '!*']")],
        says=[
            "TMP/experts.yaml:32: policies.twice.experts: every expert is left out again. Narrow the patterns that begin with `!`.",
        ],
    ),
    "device_without_memory": Broken(
        text=FULL,
        edits=[("gpu: {memory_gb: 24}", "gpu: {}")],
        says=[
            "TMP/experts.yaml:3: devices.gpu.memory_gb: it is missing. Add `memory_gb`: memory for the servers placed on it, in GB.",
        ],
    ),
    "device_of_no_memory": Broken(
        text=FULL,
        edits=[("gpu: {memory_gb: 24}", "gpu: {memory_gb: 0}")],
        says=[
            "TMP/experts.yaml:3: devices.gpu.memory_gb: it should be greater than 0, not 0. Write more than 0.",
        ],
    ),
    "device_id_with_a_colon": Broken(
        text=FULL,
        edits=[("  spare:", '  "cuda:1":')],
        says=[
            "TMP/experts.yaml:4: devices.cuda:1: 'cuda:1' cannot be an id. Use lower-case letters, digits and . _ / - (64 at most), beginning with a letter or digit.",
        ],
    ),
    "device_not_a_mapping": Broken(
        text=FULL,
        edits=[("spare: {memory_gb: 8.5}", "spare: 8.5")],
        says=[
            "TMP/experts.yaml:4: devices.spare: it should have keys below it, not 8.5. Write its keys below it, indented, or between { and }.",
        ],
    ),
    "devices_not_a_mapping": Broken(
        edits=[("version: 1\n", "version: 1\ndevices: [gpu]\n")],
        says=[
            "TMP/experts.yaml:2: devices: it should be a mapping, not a list. Write its keys below it, indented, or between { and }.",
        ],
    ),
    "placement_on_an_unknown_device": Broken(
        text=FULL,
        edits=[("device: gpu,", "device: gpu0,")],
        says=[
            "TMP/experts.yaml:13: servers.far.placement.device: no device is called 'gpu0'. Did you mean `gpu`?",
        ],
    ),
    "placement_where_there_is_no_device": Broken(
        text=FULL.replace(DEVICES, ""),
        says=[
            "TMP/experts.yaml:10: servers.far.placement.device: no device is called 'gpu'. There is no device at all: add one.",
        ],
    ),
    "placement_without_memory": Broken(
        text=FULL,
        edits=[("memory_gb: 16, ", "")],
        says=[
            "TMP/experts.yaml:13: servers.far.placement.memory_gb: it is missing. Add `memory_gb`: what it takes there while it is loaded, caches included, in GB.",
        ],
    ),
    "placement_larger_than_its_device": Broken(
        text=FULL,
        edits=[("memory_gb: 16,", "memory_gb: 24.5,")],
        says=[
            "TMP/experts.yaml:13: servers.far.placement.memory_gb: 24.5 GB exceed the 24 GB of 'gpu'. Lower what the server takes, or name a larger device.",
        ],
    ),
    "placement_key_unknown": Broken(
        text=FULL,
        edits=[("start_s: 40", "starts: 40")],
        says=[
            "TMP/experts.yaml:13: servers.far.placement.starts: unknown key. Did you mean `start_s`?",
        ],
    ),
    "placement_of_an_unknown_sleep_level": Broken(
        text=FULL,
        edits=[("sleep_level: 1", "sleep_level: 3")],
        says=[
            "TMP/experts.yaml:13: servers.far.placement.sleep_level: it should be 1 or 2, not 3. Write 1 or 2.",
        ],
    ),
    "placement_misspelt": Broken(
        text=FULL,
        edits=[("    placement:", "    placment:")],
        says=[
            "TMP/experts.yaml:13: servers.far.placment: unknown key. Did you mean `placement`?",
        ],
    ),
    "placement_that_the_engine_refuses": Broken(
        text=FULL,
        edits=[("    launch: {python: ./venv/bin/python, log: logs/far.log}\n", "")],
        says=[
            "TMP/experts.yaml:12: servers.far.placement: this server is somebody else's to stop. Add `launch`, or remove it.",
        ],
    ),
    "settings_that_the_engine_refuses_as_a_whole": Broken(
        text=FULL,
        edits=[("log: logs/far.log", "log: /dev/tty")],
        says=[
            "TMP/experts.yaml:13: servers.far.placement: the log cannot be the terminal. Name a file.",
        ],
    ),
    "settings_refused_where_there_is_no_placement": Broken(
        text=FULL,
        edits=[("log: logs/far.log", "log: /dev/tty"), (PLACED.splitlines()[1] + "\n", "")],
        says=[
            "TMP/experts.yaml:9: servers.far: the log cannot be the terminal. Name a file.",
        ],
    ),
    "a_broken_device_is_told_once": Broken(
        text=FULL,
        edits=[("gpu: {memory_gb: 24}", "gpu: {memory_gb: -24}")],
        says=[
            "TMP/experts.yaml:3: devices.gpu.memory_gb: it should be greater than 0, not -24. Write more than 0.",
        ],
    ),
    "server_path_without_adapter": Broken(
        edits=[("    context_window: 8192", "    server_path: /mnt/x\n    context_window: 8192")],
        says=[
            "TMP/experts.yaml:16: experts.general.server_path: it is an adapter's folder, but the expert has none. Remove it, or add the `adapter`.",
        ],
    ),
    "server_path_that_is_relative": Broken(
        edits=[("adapter: ./adapters/fox", "adapter: ./adapters/fox\n    server_path: mnt/fox")],
        says=[
            "TMP/experts.yaml:13: experts.fox.server_path: 'mnt/fox' is not of the form wanted here. Write a path from the top, such as /mnt/adapters/….",
        ],
    ),
    "server_path_of_scanned_adapters_that_is_relative": Broken(
        text=FULL,
        edits=[("/mnt/owls", "mnt/owls")],
        says=[
            "TMP/experts.yaml:27: adapters_from[0].server_path: 'mnt/owls' is not of the form wanted here. Write a path from the top, such as /mnt/adapters/….",
        ],
    ),
    "max_wait_of_nothing": Broken(
        text=FULL,
        edits=[("max_wait_s: 30", "max_wait_s: 0")],
        says=[
            "TMP/experts.yaml:40: policies.twice.max_wait_s: it should be greater than 0, not 0. Write more than 0.",
        ],
    ),
    "parameter_unknown": Broken(
        text=FULL,
        edits=[("[top_k]", "[top_k, cashe_salt]")],
        says=[
            "TMP/experts.yaml:41: policies.twice.parameters[1]: no parameter is called 'cashe_salt'. Did you mean `cache_salt`?",
        ],
    ),
    "parameters_that_add_and_replace": Broken(
        text=FULL,
        edits=[("[top_k]", "[top_k, +cache_salt]")],
        says=[
            "TMP/experts.yaml:41: policies.twice.parameters: some names begin with `+` and some do not, so they both add and replace. Write `+` before all of them, or before none.",
        ],
    ),
    "parameter_that_is_no_name": Broken(
        text=FULL,
        edits=[("[top_k]", '["*"]')],
        says=[
            "TMP/experts.yaml:41: policies.twice.parameters[0]: '*' is not of the form wanted here. Write a field's name, such as `top_k`, or `+top_k` to add to the default.",
        ],
    ),
    "two_aims": Broken(
        text=FULL,
        edits=[("max_wait_s: 30", "quality: 0.9\n    max_cost: 0.001")],
        says=[
            "TMP/experts.yaml:41: policies.twice.max_cost: it stands beside 'quality', and both say what cost is to count for. Keep one of the two.",
        ],
    ),
    "null_expert_unknown": Broken(
        text=FULL,
        edits=[("max_wait_s: 30", "null_expert: generall")],
        says=[
            "TMP/experts.yaml:40: policies.twice.null_expert: no expert is called 'generall'. Did you mean `general`?",
        ],
    ),
    "unsure_without_a_floor": Broken(
        text=FULL,
        edits=[("max_wait_s: 30", "unsure: {do: ask_more}")],
        says=[
            "TMP/experts.yaml:40: policies.twice.unsure.below: it is missing. Add `below`: the floor of expected quality.",
        ],
    ),
    "stay_below_nothing": Broken(
        edits=[("    k: 2", "    k: 2\n    stay: -0.1")],
        says=[
            "TMP/experts.yaml:34: policies.twice.stay: it should be greater than or equal to 0, not -0.1. Write 0 or more.",
        ],
    ),
    "tolerance_above_one": Broken(
        edits=[("    k: 2", "    k: 2\n    tolerance: 2")],
        says=[
            "TMP/experts.yaml:34: policies.twice.tolerance: it should be less than or equal to 1, not 2. Write 1 or less.",
        ],
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_is_refused_with_place_and_remedy(name: str, tmp_path: Path) -> None:
    broken = BROKEN[name]
    file = write_world(tmp_path)
    text = broken.text if broken.text is not None else REGISTRY
    for old, new in broken.edits:
        assert old in text, f"the sound registry no longer holds {old!r}"
        text = text.replace(old, new, 1)
    file.write_text(text)
    for path, content in broken.files.items():
        if content is None:
            (tmp_path / path).unlink()
        else:
            (tmp_path / path).write_text(content)

    with pytest.raises(CatalogError) as refused:
        load_catalog(file, FAMILIES, version=1)
    said = [str(problem).replace(str(tmp_path), "TMP") for problem in refused.value.problems]
    assert said == broken.says
    assert str(refused.value).replace(str(tmp_path), "TMP") == "\n".join(said)


@pytest.mark.parametrize("text", [REGISTRY, FULL], ids=["small", "full"])
def test_the_registries_that_they_are_made_from_are_sound(text: str, tmp_path: Path) -> None:
    file = write_world(tmp_path)
    file.write_text(text)
    experts = load_catalog(file, FAMILIES, version=1).catalog.experts
    assert set(experts) == {"fox", "general", "owl"}
