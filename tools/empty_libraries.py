"""Put empty libraries where torch looks for those of CUDA, so that a build for CUDA runs on CPUs without them.

The packages with those libraries are struck from what torch requires, so that pip does not ask for them either. Used by
oldest_torch.sh, in whose environment it writes beside torch's own libraries.
"""

import re
import subprocess
import sysconfig
import tempfile
from collections import defaultdict
from pathlib import Path

FOLDER = Path(sysconfig.get_path("purelib")) / "torch" / "lib"
OF_CUDA = re.compile(r"lib(cu|nv|nccl)\w*\.so[.\d]*")
PACKAGES_FOR_CUDA = re.compile(r"^Requires-Dist: (cuda|nvidia|triton).*\n", re.MULTILINE)
BODY = "mov $100, %eax\nret\n"  # of every function: cudaErrorNoDevice


def said(*command: object) -> str:
    """Return the output of a command."""
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Find out what torch asks those libraries for, and write them."""
    symbols: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))  # of a library, by version
    plain = set()  # without a version: of any of them
    for path in FOLDER.glob("*.so*"):
        for name in filter(OF_CUDA.fullmatch, re.findall(r"NEEDED.*\[(.*)\]", said("readelf", "-d", path))):
            symbols[name]  # also where none of its symbols has a version
        owners, file = {}, ""
        for file_named, version in re.findall(r"File: (\S+)|Name: (\S+) +Flags", said("readelf", "-V", path)):
            file = file_named or file
            if version:
                owners[version] = file
        for name, _, version in (s.partition("@") for s in re.findall(r" [Uw] (\S+)", said("nm", "-D", path))):
            if OF_CUDA.fullmatch(owners.get(version, "")):
                symbols[owners[version]][version].add(name)
            elif not version and re.match("cu|nccl|nv", name):
                plain.add(name)
    for library, versions in symbols.items():
        names = plain.union(*versions.values())
        with tempfile.TemporaryDirectory() as folder:
            code, script = Path(folder, "code.s"), Path(folder, "versions")
            code.write_text("".join(f".globl {name}\n{name}:\n" for name in sorted(names)) + BODY)
            blocks = (f"{version} {{ {'; '.join(sorted(of_it))}; }};\n" for version, of_it in versions.items())
            script.write_text("".join(blocks))
            command = ["c++", "-shared", "-nostdlib", code, f"-Wl,-soname={library}", "-o", FOLDER / library]
            said(*command, *([f"-Wl,--version-script={script}"] if versions else []))
    (metadata,) = FOLDER.parents[1].glob("torch-*.dist-info/METADATA")
    metadata.write_text(PACKAGES_FOR_CUDA.sub("", metadata.read_text()))


if __name__ == "__main__":
    main()
