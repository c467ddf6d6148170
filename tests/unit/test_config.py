"""Configuration: the sketch loads unchanged, sources have their order, and every mistake is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from consilium.config import Config, load_config, split_endpoint
from consilium.errors import ConfigError

SKETCH = """
experts:
  vision:
    endpoint: "grpc://vision-expert:50051"
    max_batch: 32
  language:
    endpoint: "grpc://language-expert:50051"
    timeout: 500ms
"""

Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Load YAML text, with an environment and overrides of the test's own."""

    def load(
        text: str = "", environ: Mapping[str, str] | None = None, overrides: Mapping[str, object] | None = None
    ) -> Config:
        file = tmp_path / "consilium.yaml"
        file.write_text(text)
        return load_config(file, environ or {}, overrides)

    return load


def test_the_sketch_loads_unchanged(load: Load) -> None:
    config = load(SKETCH)
    assert config.experts["vision"].endpoints == ("grpc://vision-expert:50051",)
    assert (config.experts["vision"].max_batch, config.experts["language"].timeout) == (32, 0.5)
    assert config.model_copy(update={"experts": {}}) == Config()


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "gateway:\nexperts:\n", "---\n"])
def test_what_is_empty_is_all_defaults(load: Load, text: str) -> None:
    assert load(text) == load_config(environ={}) == Config()


def test_order_of_precedence(load: Load) -> None:
    text, environ = "gateway: {port: 1, host: a, max_running: 7}", {"CONSILIUM_GATEWAY__PORT": "2"}
    environ["CONSILIUM_GATEWAY__HOST"] = "b"
    config = load(text, environ, {"gateway.port": 3, "gateway.max_running": None, "model": None})
    assert (config.gateway.port, config.gateway.host, config.gateway.max_running) == (3, "b", 7)
    assert config.gateway.max_waiting == Config().gateway.max_waiting


def test_the_environment_states_units_lists_and_groups(load: Load) -> None:
    config = load(
        SKETCH,
        {
            "CONSILIUM_GATEWAY__KV_CACHE_MEMORY": "64MiB",
            "CONSILIUM_GATEWAY__LAYER_TIMEOUT": "3",
            "CONSILIUM_GATEWAY__MICRO_BATCHES": "2",
            "CONSILIUM_GATEWAY__API_KEYS": "[one, two]",
            "CONSILIUM_EXPERTS__VISION__TIMEOUT": "2m",
            "CONSILIUM_EXPERTS__AUDIO__ENDPOINT": '["grpc://a:1", "grpc://[::1]:2"]',
            "CONSILIUM_CACHE": "where models are kept, no configuration",
            "PATH": "of no concern",
        },
    )
    assert (config.gateway.kv_cache_memory, config.gateway.layer_timeout) == (2**26, 3.0)
    assert config.gateway.micro_batches == 2
    assert [key.get_secret_value() for key in config.gateway.api_keys] == ["one", "two"]
    assert (config.experts["vision"].timeout, config.experts["vision"].max_batch) == (120.0, 32)
    assert config.experts["audio"].endpoints == ("grpc://a:1", "grpc://[::1]:2")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gatway: {}", "unknown key 'gatway': did you mean 'gateway'?"),
        ("gateway: {prot: 1}", "unknown key 'gateway.prot': did you mean 'port'?"),
        ("experts: {a: {endpoint: 'grpc://a:1', tiemout: 1}}", "key 'experts.a.tiemout': did you mean 'timeout'?"),
        ("log: {zzz: 1}", "unknown key 'log.zzz': known keys: level"),
        ("experts: {a: {}}", "experts.a.endpoint: Field required"),
        ("experts: {a: {endpoint: 'http://a:1'}}", "experts.a.endpoint: 'http://a:1' is not an endpoint; write grpc"),
        ("experts: {a: {endpoint: ['grpc://a:1', 'b:1']}}", "experts.a.endpoint: 'b:1' is not an endpoint"),
        ("experts: {a: {endpoint: []}}", "experts.a.endpoint: expected grpc://HOST:PORT, or a list of them"),
        ("experts: {a: {endpoint: 5}}", "experts.a.endpoint: expected grpc://HOST:PORT, or a list of them"),
        ("experts: {a: {endpoint: 'grpc://a:1', timeout: soon}}", "experts.a.timeout: expected a number with a unit"),
        ("experts: {a: {endpoint: 'grpc://a:1', timeout: 0}}", "experts.a.timeout: Input should be greater than 0"),
        ("experts: [a]", "experts: Input should be a valid dictionary"),
        ("gateway: {port: 65536}", "gateway.port: Input should be less than or equal to 65535 (got 65536)"),
        ("gateway: {port: yes}", "gateway.port: true and false mean nothing here (got True)"),
        ("gateway: {host: 5}", "gateway.host: Input should be a valid string (got 5)"),
        ("gateway: {kv_cache_memory: 1KiB}", "gateway.kv_cache_memory: Input should be greater than or equal"),
        ("gateway: {layer_timeout: 25h}", "gateway.layer_timeout: Input should be less than or equal to 86400"),
        ("quantization: int3", "Input should be 'none', 'int8', 'int8-weight-only' or 'int4' (got 'int3')"),
        ("log: {level: loud}", "log.level: Input should be"),
        ("8000: {}", "8000: Keys should be strings"),
    ],
)  # fmt: skip
def test_mistakes_are_named(load: Load, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_all_mistakes_are_told_at_once(load: Load) -> None:
    with pytest.raises(ConfigError) as caught:
        load("gateway: {port: x, prot: 1}\nmodell: y")
    assert len(caught.value.message.splitlines()) == 3


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({"CONSILIUM_LGO__LEVEL": "info"}, "unknown key 'lgo' (from CONSILIUM_LGO__LEVEL): did you mean 'log'?"),
        ({"CONSILIUM_LOG__LEVLE": "info"}, "key 'log.levle' (from CONSILIUM_LOG__LEVLE): did you mean 'level'?"),
        ({"CONSILIUM_GATEWAY__PORT": "x"}, "gateway.port (from CONSILIUM_GATEWAY__PORT): Input should be a valid int"),
        ({"CONSILIUM_GATEWAY__API_KEYS": "[a"}, "CONSILIUM_GATEWAY__API_KEYS is not valid YAML: line 1"),
        ({"CONSILIUM_LOG": "5", "CONSILIUM_LOG__LEVEL": "info"}, "log: must be a mapping, because log.level is set"),
        ({"CONSILIUM_": "1"}, "unknown key '' (from CONSILIUM_)"),
    ],
)  # fmt: skip
def test_variables_with_our_prefix_must_mean_something(load: Load, environ: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load("", environ)
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- gateway", "must hold a mapping at the top"),
        ("text", "must hold a mapping at the top"),
        ("gateway: {port: 1}\nmodel: x\ngateway: {}\n", "line 3, column 1: 'gateway' stands twice"),
        ("gateway:\n  port: 1\n  host: x\n  port: 2\n", "line 4, column 3: 'port' stands twice"),
        ("gateway: [", "line 1"),
        ("a: 1\n--- \nb: 2", "is not valid YAML"),
        ("model: !!python/object:os.system x", "could not determine a constructor"),
        ("model: \x00", "characters that YAML does not allow"),
        ("[" * 1000, "nested too deeply"),
    ],
)
def test_a_file_that_is_not_one_mapping(load: Load, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"consilium\.yaml ") as caught:
        load(text)
    assert said in caught.value.message


def test_anchors_and_merges_are_no_duplicates(load: Load) -> None:
    text = (
        "experts:\n"
        "  a: &a {endpoint: 'grpc://a:1', timeout: 1}\n"
        "  b: {<<: *a, <<: {max_batch: 5}, endpoint: 'grpc://b:1'}\n"
        "  c: *a\n"
    )
    experts = load(text, {"CONSILIUM_EXPERTS__A__TIMEOUT": "2"}).experts
    assert {name: group.timeout for name, group in experts.items()} == {"a": 2.0, "b": 1.0, "c": 1.0}
    assert (experts["b"].endpoint, experts["b"].max_batch) == ("grpc://b:1", 5)


def test_a_variable_that_was_overridden_is_not_blamed(load: Load) -> None:
    with pytest.raises(ConfigError, match=r"^log\.level: "):
        load("", {"CONSILIUM_LOG__LEVEL": "info"}, {"log.level": "loud"})


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    for file in (tmp_path / "absent.yaml", tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(ConfigError, match=str(file)):
            load_config(file, {})


@pytest.mark.parametrize(
    ("endpoint", "host", "port"),
    [("grpc://a.b-c_d:1", "a.b-c_d", 1), ("grpc://127.0.0.1:65535", "127.0.0.1", 65535), ("grpc://[::1]:2", "::1", 2)],
)
def test_endpoints(endpoint: str, host: str, port: int) -> None:
    assert split_endpoint(endpoint) == (host, port)


@pytest.mark.parametrize(
    "endpoint",
    ["", "a:1", "grpc://a", "grpc://a:", "grpc://:1", "grpc://a:0", "grpc://a:65536", "grpc://a:²", "grpc://a:1/",
     "grpc://::1:2", "grpc://u@a:1", "grpc://a b:1", "GRPC://a:1"],
)  # fmt: skip
def test_bad_endpoints(endpoint: str) -> None:
    with pytest.raises(ValueError, match=r"write grpc://HOST:PORT"):
        split_endpoint(endpoint)


def test_what_is_written_out_loads_again_without_secrets(load: Load) -> None:
    config = load(SKETCH + "gateway: {api_keys: [hush], layer_timeout: 1.25s}\n")
    written = json.dumps(config.model_dump(mode="json"))
    assert "hush" not in written + repr(config)
    again = Config.model_validate(json.loads(written))
    assert again.experts == config.experts
    assert again.gateway.model_copy(update={"api_keys": ()}) == config.gateway.model_copy(update={"api_keys": ()})


@pytest.mark.parametrize(
    "text",
    ["gateway: {api_keys: hush}", "gateway: {api_keys: [{k: hush}]}", "gateway: {api_keys: [hush, 5], prot: hush}",
     "gateway: [hush]", "gateway: {api_keys: [hush]", "gateway:\n  api_keys: hush: x\n",
     "cache: 'redis://:hush@there'", "cache: {redis: 'http://:hush@there'}", "cache: {redis: [hush]}",
     "cache: {redis: 'redis://:hush@there:70000'}", "cache: {redis: 'redis://[:hush'}", "cache: {salt: [hush]}",
     "cache: {redis: 'unix://hush'}", "{cache: {redis: 'redis://:hush@there'}, quantization: none}"],
)  # fmt: skip
def test_no_error_quotes_a_secret(load: Load, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert "hush" not in caught.value.message


@pytest.mark.parametrize("mode", ["validation", "serialization"])
def test_the_json_schema_describes_units(mode: str) -> None:
    schema = Config.model_json_schema(mode="validation" if mode == "validation" else "serialization")
    timeout = schema["$defs"]["ExpertGroupConfig"]["properties"]["timeout"]
    assert [each["type"] for each in timeout["anyOf"]] == ["number", "string"]
    assert "ms" in timeout["anyOf"][1]["pattern"]
    assert "most time" in timeout["description"]
    assert "MiB" in schema["$defs"]["GatewayConfig"]["properties"]["kv_cache_memory"]["anyOf"][1]["pattern"]
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("url", ["redis://there:6379/0", "rediss://me:hush@there", "unix:///run/redis.sock?db=1"])
def test_a_cache_is_there_where_it_is_configured(load: Load, url: str) -> None:
    assert load("").cache is None
    assert load("cache:\n").cache is None
    cache = load(f"cache: {{redis: '{url}', salt: hush, timeout: 20ms, ttl: 1h}}").cache
    assert cache is not None
    assert cache.redis is not None
    assert cache.redis.get_secret_value() == url
    assert (cache.memory, cache.timeout, cache.ttl) == (256 * 2**20, 0.02, 3600.0)
    assert "hush" not in repr(cache) + json.dumps(cache.model_dump(mode="json"))
    by_environment = load_config(None, {"CONSILIUM_CACHE__REDIS": url, "CONSILIUM_CACHE": "/a/folder"}).cache
    assert by_environment is not None
    assert by_environment.redis == cache.redis


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{cache: {}, quantization: none}", "cache: works with `quantization: int8` and `int4` only"),
        ("cache: {redis: 'there:6379'}", "cache.redis: write redis://HOST:PORT"),
        ("cache: {timeout: 2s}", "cache.timeout: Input should be less than or equal to 1"),
        ("cache: {tme: 1}", "unknown key 'cache.tme': did you mean 'timeout'?"),
    ],
)
def test_a_cache_that_cannot_be(load: Load, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert caught.value.message.startswith(message)
