"""The check of the wire contract passes here, and fails for each thing it is there to find."""

import shutil
from pathlib import Path

import pytest

from tests.proto_check import (
    PACKAGE,
    PROTO_ROOT,
    REPOSITORY,
    differences,
    generate,
    generation_command,
    main,
    uncommented,
)

BARE_PROTO = """syntax = "proto3";
package staffetta.v1;
service Bare {
  rpc Call(Request) returns (Request);
}
message Request {
  string bare_field = 1;
  optional uint32 bare_optional = 2;
  map<string, string> bare_map = 3;
  // Has a comment.
  string commented = 4;
  oneof bare_oneof {
    // Has a comment.
    string choice = 5;
  }
  enum Inner {
    INNER_UNSPECIFIED = 0;
  }
  message Nested {}
}
enum Outer {
  // Has a comment.
  OUTER_UNSPECIFIED = 0;
  OUTER_BARE = 1;  // Trailing comments do not count.
}
"""


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated")
    generate(PROTO_ROOT, folder)
    return folder


def copy_committed(folder: Path) -> Path:
    shutil.copytree(PROTO_ROOT / PACKAGE, folder / PACKAGE)
    return folder


def test_the_committed_wire_contract_passes() -> None:
    assert main() == 0


def test_one_changed_line_is_found_and_shown(generated: Path, tmp_path: Path) -> None:
    committed = copy_committed(tmp_path)
    path = committed / PACKAGE / "common_pb2.py"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(["# changed\n", *lines[1:]]))
    assert differences(committed, generated) == [
        f"proto/staffetta/v1/common_pb2.py:1: committed '# changed', generated {lines[0].rstrip()!r}"
    ]


def test_a_missing_and_a_left_over_file_are_found(generated: Path, tmp_path: Path) -> None:
    committed = copy_committed(tmp_path)
    (committed / PACKAGE / "decode_pb2_grpc.pyi").unlink()
    (committed / PACKAGE / "gone_pb2.py").touch()
    assert differences(committed, generated) == [
        "proto/staffetta/v1/decode_pb2_grpc.pyi: is not committed",
        "proto/staffetta/v1/gone_pb2.py: no .proto file makes it",
    ]


def test_a_truncated_file_is_found(generated: Path, tmp_path: Path) -> None:
    committed = copy_committed(tmp_path)
    path = committed / PACKAGE / "common_pb2.pyi"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    (line,) = differences(committed, generated)
    assert line.startswith(f"proto/staffetta/v1/common_pb2.pyi:{len(lines)}: committed nothing, generated ")


def test_every_part_without_a_leading_comment_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bare.proto").write_text(BARE_PROTO)
    assert sorted(uncommented(tmp_path), key=lambda line: int(line.split(":")[1])) == [
        "proto/bare.proto:3: Bare has no comment",
        "proto/bare.proto:4: Bare.Call has no comment",
        "proto/bare.proto:6: Request has no comment",
        "proto/bare.proto:7: Request.bare_field has no comment",
        "proto/bare.proto:8: Request.bare_optional has no comment",
        "proto/bare.proto:9: Request.bare_map has no comment",
        "proto/bare.proto:12: Request.bare_oneof has no comment",
        "proto/bare.proto:16: Request.Inner has no comment",
        "proto/bare.proto:17: Request.Inner.INNER_UNSPECIFIED has no comment",
        "proto/bare.proto:19: Request.Nested has no comment",
        "proto/bare.proto:21: Outer has no comment",
        "proto/bare.proto:24: Outer.OUTER_BARE has no comment",
    ]


def test_the_command_is_the_recipe_of_make_proto() -> None:
    command = generation_command((REPOSITORY / "Makefile").read_text(), ["a.proto", "b.proto"])
    assert command[1:4] == ["-m", "grpc_tools.protoc", "-I."]
    assert command[-2:] == ["a.proto", "b.proto"]
    assert "--mypy_grpc_out=quiet:." in command


def test_a_recipe_that_cannot_be_followed_is_an_error() -> None:
    with pytest.raises(ValueError, match="no target `proto`"):
        generation_command("test:\n\tpytest\n", [])
    with pytest.raises(ValueError, match="a variable that this check does not know"):
        generation_command("proto: setup\n\t@cd proto && $(PROTOC) -I.\n", [])
