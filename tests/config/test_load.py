"""Precedence, types, names and secrets of the configuration loader."""

from pathlib import Path

import pytest

from staffetta.config.load import Loaded, load, load_role
from staffetta.config.origin import Origin, OriginKind
from staffetta.config.resolved import decode, encode
from staffetta.config.schema import ClientConfig, DecodeConfig, GatewayConfig, PrefillConfig, ServeConfig
from staffetta.config.settings import ROLES, settings_of
from staffetta.exits import ExitCode, UsageError

KEY = "00112233445566778899aabbccddeeff"


def load_prefill(*argv: str, **environ: str) -> Loaded[PrefillConfig]:
    return load(PrefillConfig, argv, environ=environ)


def refusal(*argv: str, **environ: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        load_prefill(*argv, **environ)
    assert caught.value.exit_code == ExitCode.USAGE
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "staffetta.yaml"


@pytest.mark.parametrize("schema", ROLES.values())
def test_without_any_source_every_setting_has_its_default(schema: type) -> None:
    loaded: Loaded[object] = load(schema, (), environ={"PATH": "/bin"})
    assert loaded.config == schema()
    assert {str(origin) for origin in loaded.origins.values()} == {"default"}


PRECEDENCE = [
    ((), {}, "", 512, "default"),
    ((), {}, "common: {max_batch_tokens: 1}", 1, "file FILE: common.max_batch_tokens"),
    (
        (),
        {},
        "{common: {max_batch_tokens: 1}, prefill: {max_batch_tokens: 2}}",
        2,
        "file FILE: prefill.max_batch_tokens",
    ),
    ((), {}, "{decode: {max_batch_tokens: 1}}", 512, "default"),
    (
        (),
        {"STAFFETTA_MAX_BATCH_TOKENS": "3"},
        "prefill: {max_batch_tokens: 2}",
        3,
        "environment STAFFETTA_MAX_BATCH_TOKENS",
    ),
    (
        (),
        {"STAFFETTA_MAX_BATCH_TOKENS": "3", "STAFFETTA_PREFILL_MAX_BATCH_TOKENS": "4"},
        "",
        4,
        "environment STAFFETTA_PREFILL_MAX_BATCH_TOKENS",
    ),
    ((), {"STAFFETTA_DECODE_MAX_BATCH_TOKENS": "4"}, "", 512, "default"),
    ((), {"STAFFETTA_MAX_BATCH_TOKENS": ""}, "", 512, "default"),
    (("--max-batch-tokens", "5"), {"STAFFETTA_PREFILL_MAX_BATCH_TOKENS": "4"}, "", 5, "flag --max-batch-tokens"),
    (("--max-batch-tokens=5", "--max-batch-tokens", "6"), {}, "", 6, "flag --max-batch-tokens"),
]


@pytest.mark.parametrize(("argv", "environ", "content", "value", "origin"), PRECEDENCE)
def test_the_strongest_source_wins_and_is_named(
    argv: tuple[str, ...], environ: dict[str, str], content: str, value: int, origin: str, file: Path
) -> None:
    file.write_text(content)
    loaded = load_prefill(*argv, STAFFETTA_CONFIG=str(file), **environ)
    assert loaded.config.max_batch_tokens == value
    assert str(loaded.origins["max_batch_tokens"]).replace(str(file), "FILE") == origin


def test_an_origin_knows_whether_it_was_meant_for_this_role_alone(file: Path) -> None:
    file.write_text("common: {block_size: 32}\nprefill: {drain_s: 1}")
    origins = load_prefill("--config", str(file), STAFFETTA_PREFILL_THREADS="1", STAFFETTA_DTYPE="float32").origins
    own = {name for name, origin in origins.items() if origin.is_own}
    assert own == {"drain_s", "threads"}
    assert origins["dtype"] == Origin(OriginKind.ENVIRONMENT, "STAFFETTA_DTYPE", is_own=False)


VALUES = [
    ("max_sequences", "7", 7),
    ("kv_memory", "64MiB", 64 * 2**20),
    ("kv_memory", "1 GiB", 2**30),
    ("kv_memory", "12", 12),
    ("drain_s", "2.5", 2.5),
    ("prefix_caching", "no", False),
    ("prefix_caching", "TRUE", True),
    ("dtype", "bfloat16", "bfloat16"),
    ("heartbeat_s", "0.01", 0.01),
    ("block_size", "1024", 1024),
    ("transports", "tcp, shm", ("tcp", "shm")),
    ("failpoints", "a.b:kill:1,c:on:2", ("a.b:kill:1", "c:on:2")),
    ("cpus", "0-3,8", ("0-3", "8")),
    ("gateways", "a:1,[::1]:2", ("a:1", "[::1]:2")),
    ("listen", "0.0.0.0:50051", "0.0.0.0:50051"),
    ("advertise", "prefill:50051", "prefill:50051"),
    ("cluster_key", KEY, KEY),
    ("worker_id", "a b", "a b"),
]


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_a_text_means_the_same_in_a_variable_a_flag_and_a_file(name: str, text: str, value: object, file: Path) -> None:
    file.write_text(f'prefill: {{{name}: "{text}"}}')
    loads = [load_prefill("--config", str(file)), load_prefill(**{f"STAFFETTA_{name}".upper(): text})]
    if not isinstance(value, bool):
        loads.append(load_prefill("--" + name.replace("_", "-"), text))
    assert [getattr(loaded.config, name) for loaded in loads] == [value] * len(loads)


@pytest.mark.parametrize(("name", "text", "value"), VALUES)
def test_the_shown_text_of_a_value_is_read_back_as_that_value(name: str, text: str, value: object) -> None:
    setting = settings_of(PrefillConfig)[name]
    assert setting.is_secret or setting.parse(setting.format(value)) == value


REFUSALS = [
    ("max_sequences", "x", "it must be a whole number"),
    ("max_sequences", "1.5", "it must be a whole number"),
    ("max_sequences", "0", "it must be at least 1"),
    ("num_blocks", "-1", "it must be at least 0"),
    ("heartbeat_s", "0", "it must be at least 0.01"),
    ("block_size", "1025", "it must be at most 1024"),
    ("transports", "shm,bogus", "it must be one of shm, tcp, loopback"),
    ("cpus", "3-0", "it must be a CPU's number or a range of them, such as 0-3"),
    ("failpoints", "foo", "it must be NAME:ACTION:NTH with ACTION one of kill, stop, raise, on"),
    ("failpoints", "a:kill:0", "it must be NAME:ACTION:NTH with ACTION one of kill, stop, raise, on"),
    ("drain_s", "inf", "it must be a finite number"),
    ("drain_s", "nan", "it must be a finite number"),
    ("drain_s", "soon", "it must be a number"),
    ("kv_memory", "64MB", "it must be bytes, such as 67108864, 64MiB or 2GiB"),
    ("kv_memory", "-1", "it must be bytes, such as 67108864, 64MiB or 2GiB"),
    ("dtype", "int4", "it must be one of auto, float32, bfloat16"),
    ("listen", "8000", "it must be host:port, such as 127.0.0.1:8000 or [::1]:8000"),
    ("listen", "a:65536", "it must be host:port, such as 127.0.0.1:8000 or [::1]:8000"),
    ("gateways", "a:1,b", "it must be host:port, such as 127.0.0.1:8000 or [::1]:8000"),
    ("prefix_caching", "maybe", "it must be true or false"),
]


@pytest.mark.parametrize(("name", "text", "why"), REFUSALS)
def test_a_text_that_is_no_value_is_refused_in_the_same_words_everywhere(
    name: str, text: str, why: str, file: Path
) -> None:
    variable = f"STAFFETTA_{name}".upper()
    error = refusal(**{variable: text})
    assert str(error).startswith(f"error[BAD_VALUE]: {variable}: {text!r} cannot be used for {name}\n")
    assert error.why.endswith(why)
    file.write_text(f'prefill: {{{name}: "{text}"}}')
    assert refusal("--config", str(file)).why == error.why
    if name != "prefix_caching":
        assert refusal(f"--{name.replace('_', '-')}={text}").why == error.why


def test_every_proposed_fix_of_a_bad_value_is_itself_accepted() -> None:
    for name, setting in settings_of(PrefillConfig).items():
        if setting.kind is str and setting.form == "plain" and not setting.choices:
            continue  # any text will do, so none is refused
        flag, _, example = refusal(**{f"STAFFETTA_{name}".upper(): "-"}).fix.partition(" ")
        assert flag == setting.flag
        assert example.startswith("$(openssl") or setting.parse(example) is not None


def test_bool_flags_come_in_pairs() -> None:
    assert load_prefill("--no-prefix-caching").config.prefix_caching is False
    assert load_prefill("--prefix-caching", STAFFETTA_PREFIX_CACHING="no").config.prefix_caching is True
    assert load(ServeConfig, ["--no-local-prefill"], environ={}).config.no_local_prefill is True
    assert load(ServeConfig, ["--local-prefill"], environ={}).config.no_local_prefill is False


def test_a_repeated_list_flag_adds_up() -> None:
    assert load_prefill("--gateways", "a:1,b:2", "--gateways=c:3").config.gateways == ("a:1", "b:2", "c:3")


def test_an_optional_setting_is_none_until_it_is_given() -> None:
    assert load(ClientConfig, (), environ={}).config.temperature is None
    assert load(ClientConfig, ("--temperature", "0", "--seed", "3"), environ={}).config == ClientConfig(
        temperature=0.0, seed=3
    )


UNKNOWN = [
    (("--max-batch-token", "1"), {}, "staffetta prefill --max-batch-tokens 512"),
    (("--max-batch-token=1",), {}, "staffetta prefill --max-batch-tokens 512"),
    (("--max-batch",), {}, "staffetta prefill --max-batch-tokens 512"),
    (("--gatewys", "h:1"), {}, "staffetta prefill --gateways 127.0.0.1:0"),
    (("--prefix-cachin",), {}, "staffetta prefill --prefix-caching"),
    (("--cluster-kei", "5ec2e7"), {}, "staffetta prefill --cluster-key $(openssl rand -hex 32)"),
    (("--qqq",), {}, "staffetta prefill --help"),
    ((), {"STAFFETTA_THREAD": "1"}, 'export STAFFETTA_THREADS="$STAFFETTA_THREAD"; unset STAFFETTA_THREAD'),
    (
        (),
        {"STAFFETTA_PREFIL_LISTEN": "1"},
        'export STAFFETTA_PREFILL_LISTEN="$STAFFETTA_PREFIL_LISTEN"; unset STAFFETTA_PREFIL_LISTEN',
    ),
    ((), {"STAFFETTA_{THREADS}": "1"}, 'export STAFFETTA_THREADS="$STAFFETTA_{THREADS}"; unset STAFFETTA_{THREADS}'),
    ((), {"STAFFETTA_QQQQQQQQQQQQQQ": "1"}, "unset STAFFETTA_QQQQQQQQQQQQQQ"),
]


@pytest.mark.parametrize(("argv", "environ", "fix"), UNKNOWN)
def test_an_unknown_name_is_refused_with_the_nearest_one(
    argv: tuple[str, ...], environ: dict[str, str], fix: str
) -> None:
    error = refusal(*argv, **environ)
    assert (error.name, error.fix) == ("UNKNOWN_SETTING", fix)


def test_a_variable_of_another_role_is_known() -> None:
    assert load(GatewayConfig, (), environ={"STAFFETTA_DECODE_LOCAL_PREFILL": "never"}).config == GatewayConfig()


FILES = [
    ("prefil: {threads: 1}", "UNKNOWN_SETTING", "no section is called prefil", "call it prefill"),
    ("threads: 1", "UNKNOWN_SETTING", "no section is called threads", "move threads into common:"),
    ("prefill: {thread: 1}", "UNKNOWN_SETTING", "prefill has no setting thread", "write prefill.threads instead"),
    ("prefill: {http: 'a:1'}", "UNKNOWN_SETTING", "prefill has no setting http", "remove prefill.http"),
    (
        "common: {local_prefil: never}",
        "UNKNOWN_SETTING",
        "common has no setting local_prefil",
        "write common.local_prefill instead",
    ),
    ("prefill: 3", "CONFIG_FILE", "section prefill is not a mapping", None),
    ("[1, 2]", "CONFIG_FILE", "is not a mapping", None),
    ("a: [", "CONFIG_FILE", "is not YAML", None),
    ("prefill: {threads: true}", "BAD_VALUE", "is read as true or false", "threads: 0"),
    ("prefill: {threads: }", "BAD_VALUE", "is read as nothing", "threads: 0"),
    ("prefill: {cluster_key: 1234}", "BAD_VALUE", "is read as a number", 'cluster_key: "$(openssl rand -hex 32)"'),
    ("prefill: {prefix_caching: 1}", "BAD_VALUE", "is read as a number", "prefix_caching: true"),
    ("prefill: {transports: [shm, 3]}", "BAD_VALUE", "is read as a number", 'transports: ["shm,tcp"]'),
    ("prefill: {threads: [1]}", "BAD_VALUE", "is read as a list", "threads: 0"),
    ("prefill: !!python/object/apply:os.getpid []", "CONFIG_FILE", "is not YAML", None),
]


@pytest.mark.parametrize(("content", "name", "what", "fix"), FILES)
def test_a_wrong_file_is_refused(content: str, name: str, what: str, fix: str | None, file: Path) -> None:
    file.write_text(content)
    error = refusal("--config", str(file))
    assert error.name == name
    assert what in error.what
    assert fix in (None, error.fix)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert refusal("--config", str(tmp_path / "none.yaml")).why.endswith(
        "No such file or directory: " + repr(str(tmp_path / "none.yaml"))
    )
    assert refusal("--config", str(tmp_path)).name == "CONFIG_FILE"


def test_one_file_drives_all_roles(file: Path) -> None:
    file.write_text(
        "common: {model: /m}\ngateway: {http: 'h:1'}\nprefill: {threads: 3}\ndecode: {transports: [tcp, shm]}\n"
    )
    argv = ("--config", str(file))
    assert load(GatewayConfig, argv, environ={}).config == GatewayConfig(model="/m", http="h:1")
    assert load(PrefillConfig, argv, environ={}).config == PrefillConfig(model="/m", threads=3)
    assert load(DecodeConfig, argv, environ={}).config == DecodeConfig(model="/m", transports=("tcp", "shm"))


def test_a_flag_names_the_file_before_the_variable(file: Path, tmp_path: Path) -> None:
    file.write_text("prefill: {threads: 3}")
    assert load_prefill("--config", str(file), STAFFETTA_CONFIG=str(tmp_path / "none")).config.threads == 3


@pytest.mark.parametrize("schema", [GatewayConfig, PrefillConfig, DecodeConfig, ServeConfig])
@pytest.mark.parametrize("key", ["xyz", "00", "00" * 15, "00" * 65, "0" * 33])
def test_a_cluster_key_is_checked_at_load_whatever_the_role(schema: type, key: str) -> None:
    with pytest.raises(UsageError, match="STAFFETTA_CLUSTER_KEY: its value cannot be used for cluster_key"):
        load(schema, (), environ={"STAFFETTA_CLUSTER_KEY": key})


@pytest.mark.parametrize("schema", [GatewayConfig, PrefillConfig, DecodeConfig])
def test_a_role_started_by_itself_needs_a_cluster_key(
    schema: "type[GatewayConfig] | type[PrefillConfig] | type[DecodeConfig]",
) -> None:
    with pytest.raises(UsageError) as caught:
        load_role(schema, (), environ={})
    assert caught.value.name == "CLUSTER_KEY_MISSING"
    assert caught.value.fix == "export STAFFETTA_CLUSTER_KEY=$(openssl rand -hex 32)"
    assert load_role(schema, (), environ={"STAFFETTA_CLUSTER_KEY": KEY}) == schema(cluster_key=KEY)


@pytest.mark.parametrize(("text", "is_taken"), [("600", True), ("0.01", True), ("600.1", False), ("0", False)])
def test_a_lease_is_what_a_prefill_worker_grants(text: str, is_taken: bool) -> None:
    if is_taken:
        assert load(DecodeConfig, ("--lease-s", text), environ={}).config.lease_s == float(text)
        return
    with pytest.raises(UsageError, match=r"'[0-9.]+' cannot be used for lease_s"):
        load(DecodeConfig, ("--lease-s", text), environ={})


@pytest.mark.parametrize("argv", [("--cluster-key", "5ec2e7"), ()])
def test_a_refused_secret_is_not_repeated(argv: tuple[str, ...]) -> None:
    error = refusal(*argv, **({} if argv else {"STAFFETTA_CLUSTER_KEY": "5ec2e7"}))
    assert error.name == "BAD_VALUE"
    assert "5ec2e7" not in str(error)


def test_a_bare_word_and_a_missing_value_are_usage_errors() -> None:
    assert refusal("word").what == "unexpected argument 'word'"
    assert refusal("--threads").what == "argument --threads: expected one argument"


def test_help_has_every_setting_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_prefill("--help")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in settings_of(PrefillConfig).values():
        assert f"{setting.flag}" in text
        assert setting.help in text
    assert "bytes for the KV pool when num_blocks is 0 (default: 64MiB)" in text


def test_a_resolved_configuration_crosses_a_pipe_unchanged() -> None:
    config = DecodeConfig(gateways=("a:1", "b:2"), cluster_key=KEY, lease_s=1.5, prefix_caching=False)
    assert decode(DecodeConfig, encode(config)) == config


@pytest.mark.parametrize("text", ["{}", "[]", encode(PrefillConfig())])
def test_a_configuration_of_another_schema_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a resolved DecodeConfig"):
        decode(DecodeConfig, text)
