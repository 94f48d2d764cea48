"""A reader and a writer of published weights made from docs/weights-format.md alone: nothing of Headwater."""

import json
import zlib

import numpy as np
import xxhash
import zstandard

_DTYPES = {"F32": "<f4", "BF16": "<u2", "U8": "u1", "I64": "<i8"}
_DIGESTS = {
    "xxh3-128": lambda data: xxhash.xxh3_128(data).hexdigest(),
    "adler32": lambda data: f"{zlib.adler32(data):08x}",
}


def read_file(path):
    """Tensor name → array, and the file's metadata."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, one in header.items():
        start, stop = one["data_offsets"]
        data = np.frombuffer(raw[8 + length + start : 8 + length + stop], _DTYPES[one["dtype"]])
        tensors[name] = data.reshape(one["shape"]).copy()
    return tensors, metadata


def write_file(path, tensors, metadata):
    """The inverse, for float32 and uint8 arrays."""
    header, data = {"__metadata__": metadata}, b""
    for name, array in tensors.items():
        kind = "U8" if array.dtype == np.uint8 else "F32"
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _number(text):
    return int(text.removeprefix("v"))


def read_chain(directory, number):
    """The tensors of a version: bits as uint16 where the dtype is bfloat16."""
    folder = directory / f"weight_v{number:06d}"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    said = index["metadata"]
    assert _number(said["version"]) == number
    base = said.get("base_version")
    tensors = {} if base is None else read_chain(directory, _number(base))
    for file in sorted(set(index["weight_map"].values())):
        carried, metadata = read_file(folder / file)
        for name, array in carried.items():
            if base is not None:
                assert said["delta_encoding"] == "xor"
                assert said["compression_format"] == "zstd"
                old = tensors[name]
                flat = old.reshape(-1).view(np.uint8)
                diff = zstandard.ZstdDecompressor().decompress(array.tobytes(), max_output_size=flat.nbytes)
                array = (flat ^ np.frombuffer(diff, np.uint8)).view(old.dtype).reshape(old.shape)
            key = name if name in metadata else f"mx.adler32:{name}"
            assert metadata[key] == _DIGESTS[said["checksum_format"]](array.tobytes())
            tensors[name] = array
    return tensors


def write_version(directory, number, tensors, *, base=None, dialect="sglang", encoding="xor"):
    """A version as an engine's trainer writes it; `base`: the tensors of the version before."""
    text = (lambda n: f"{n:06d}") if dialect == "sglang" else (lambda n: f"v{n}")
    checksum = "xxh3-128" if dialect == "sglang" else "adler32"
    folder = directory / f"weight_v{number:06d}"
    folder.mkdir(parents=True)
    metadata = {name: _DIGESTS[checksum](array.tobytes()) for name, array in tensors.items()}
    said = {"version": text(number), "checksum_format": checksum}
    carried = tensors
    if base is None:
        if dialect == "modelexpress":
            metadata = {f"mx.adler32:{name}": digest for name, digest in metadata.items()}
    else:
        said |= {"base_version": text(number - 1), "delta_encoding": encoding, "compression_format": "zstd"}
        carried = {}
        for name, array in tensors.items():
            new, old = array.reshape(-1).view(np.uint8), base[name].reshape(-1).view(np.uint8)
            diff = new ^ old
            if encoding == "overwrite":
                places = np.flatnonzero(diff).astype("<u4")
                count = np.array([len(places)], "<u4")
                diff = np.concatenate([count.view(np.uint8), places.view(np.uint8), new[places]])
            carried[name] = np.frombuffer(zstandard.ZstdCompressor(level=1).compress(diff), np.uint8)
    file = "model-00001-of-00001.safetensors"
    write_file(folder / file, carried, metadata)
    index = {"metadata": said, "weight_map": dict.fromkeys(carried, file)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
