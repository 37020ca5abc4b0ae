"""Checks the wire contract: `python -m tests.proto_check` exits 1 and says where, unless

1. the committed generated code is, byte for byte, what the recipe of `make proto` makes of the .proto files, and
2. every service, method, message, field, oneof, enum and enum value has a leading comment.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)

REPOSITORY = Path(__file__).resolve().parent.parent
PROTO_ROOT = REPOSITORY / "proto"
PACKAGE = Path("staffetta") / "v1"
GENERATED_SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def generation_command(makefile: str, protos: list[str]) -> list[str]:
    """The command of the Makefile's `proto` recipe, for this interpreter and to be run in the proto root."""
    found = re.search(r"^proto:.*\n\t@cd proto && ((?:.*\\\n)*.*)$", makefile, re.MULTILINE)
    if found is None:
        raise ValueError("the Makefile has no target `proto` whose recipe begins with `@cd proto &&`")
    recipe = found.group(1).replace("\\\n", " ")
    recipe = recipe.replace("$(PROTOS:proto/%=%)", " ".join(protos))
    recipe = recipe.replace("../$(BIN)/", f"{Path(sys.executable).parent}/")
    if "$(" in recipe:
        raise ValueError(f"the recipe of `make proto` has a variable that this check does not know: {recipe}")
    return shlex.split(recipe)


def generate(proto_root: Path, destination: Path) -> None:
    """Runs the recipe on a copy of the .proto files under `destination`, where its results then lie."""
    shutil.copytree(proto_root / PACKAGE, destination / PACKAGE, ignore=shutil.ignore_patterns("*.py", "*.pyi", "__*"))
    protos = sorted(os.fspath(path.relative_to(destination)) for path in destination.rglob("*.proto"))
    command = generation_command((REPOSITORY / "Makefile").read_text(), protos)
    subprocess.run(command, cwd=destination, check=True)


def differences(committed_root: Path, generated_root: Path) -> list[str]:
    """One line for each generated file that is missing, left over or different, with the first line that differs."""
    committed, generated = _generated_files(committed_root), _generated_files(generated_root)
    found = []
    for name in sorted(committed | generated):
        where = f"proto/{name}"
        if name not in committed:
            found.append(f"{where}: is not committed")
        elif name not in generated:
            found.append(f"{where}: no .proto file makes it")
        elif (committed_root / name).read_bytes() != (generated_root / name).read_bytes():
            found.append(f"{where}:{_first_difference(committed_root / name, generated_root / name)}")
    return found


def _generated_files(root: Path) -> set[str]:
    return {
        os.fspath(path.relative_to(root))
        for path in (root / PACKAGE).rglob("*")
        if path.name.endswith(GENERATED_SUFFIXES)
    }


def _first_difference(committed: Path, generated: Path) -> str:
    pairs = zip_longest(committed.read_text().splitlines(), generated.read_text().splitlines())
    for number, (ours, theirs) in enumerate(pairs, start=1):
        if ours != theirs:
            return f"{number}: committed {_shorten(ours)}, generated {_shorten(theirs)}"
    return " line endings differ"


def _shorten(line: str | None) -> str:
    return "nothing" if line is None else repr(line if len(line) <= 80 else line[:77] + "...")


def uncommented(proto_root: Path) -> list[str]:
    """One line for each part of a .proto file under `proto_root` that has no leading comment."""
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder) / "descriptors"
        protos = sorted(os.fspath(path.relative_to(proto_root)) for path in proto_root.rglob("*.proto"))
        command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--include_source_info"]
        subprocess.run([*command, f"--descriptor_set_out={described}", *protos], cwd=proto_root, check=True)
        files = FileDescriptorSet.FromString(described.read_bytes())
    found = []
    for file in files.file:
        locations = {tuple(location.path): location for location in file.source_code_info.location}
        for path, name in _parts(file):
            if not locations[path].leading_comments.strip():
                line = locations[path].span[0] + 1
                found.append(f"proto/{file.name}:{line}: {name} has no comment")
    return found


# A part's path in a descriptor is a sequence of (field number, index); the numbers are those of descriptor.proto.
_Path = tuple[int, ...]


def _parts(file: FileDescriptorProto) -> Iterator[tuple[_Path, str]]:
    for index, message in enumerate(file.message_type):
        yield from _message_parts(message, (FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, index), "")
    for index, enum in enumerate(file.enum_type):
        yield from _enum_parts(enum, (FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER, index), "")
    for index, service in enumerate(file.service):
        path = (FileDescriptorProto.SERVICE_FIELD_NUMBER, index)
        yield path, service.name
        for number, method in enumerate(service.method):
            yield (*path, ServiceDescriptorProto.METHOD_FIELD_NUMBER, number), f"{service.name}.{method.name}"


def _message_parts(message: DescriptorProto, path: _Path, scope: str) -> Iterator[tuple[_Path, str]]:
    if message.options.map_entry:  # made by protoc, written by nobody
        return
    name = f"{scope}{message.name}"
    yield path, name
    for index, field in enumerate(message.field):
        yield (*path, DescriptorProto.FIELD_FIELD_NUMBER, index), f"{name}.{field.name}"
    made_by_protoc = {field.oneof_index for field in message.field if field.proto3_optional}
    for index, oneof in enumerate(message.oneof_decl):
        if index not in made_by_protoc:
            yield (*path, DescriptorProto.ONEOF_DECL_FIELD_NUMBER, index), f"{name}.{oneof.name}"
    for index, nested in enumerate(message.nested_type):
        yield from _message_parts(nested, (*path, DescriptorProto.NESTED_TYPE_FIELD_NUMBER, index), f"{name}.")
    for index, enum in enumerate(message.enum_type):
        yield from _enum_parts(enum, (*path, DescriptorProto.ENUM_TYPE_FIELD_NUMBER, index), f"{name}.")


def _enum_parts(enum: EnumDescriptorProto, path: _Path, scope: str) -> Iterator[tuple[_Path, str]]:
    name = f"{scope}{enum.name}"
    yield path, name
    for index, value in enumerate(enum.value):
        yield (*path, EnumDescriptorProto.VALUE_FIELD_NUMBER, index), f"{name}.{value.name}"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        generate(PROTO_ROOT, Path(folder))
        stale = differences(PROTO_ROOT, Path(folder))
    bare = uncommented(PROTO_ROOT)
    for line in (*stale, *bare):
        print(line, file=sys.stderr)
    if stale:
        print("fix: make proto, and commit what it made", file=sys.stderr)
    return 1 if stale or bare else 0


if __name__ == "__main__":
    sys.exit(main())
