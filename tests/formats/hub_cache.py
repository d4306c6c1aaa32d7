"""The Hub's cache as Hugging Face's tools lay it out, made of a directory."""

import hashlib
from pathlib import Path


def put(cache, name, commit, directory, *, refs=("main",), without=()):
    """Puts the files of a directory into a cache as a commit of a model, as links to blobs; returns the snapshot."""
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for file in sorted(one for one in Path(directory).rglob("*") if one.is_file()):
        place = snapshot / file.relative_to(directory)
        if place.name in without:
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(file.read_bytes())
        up = "/".join([".."] * (len(place.relative_to(folder).parts) - 1))
        place.symlink_to(f"{up}/blobs/{blob.name}")
    for ref in refs:
        point(cache, name, ref, commit)
    return snapshot


def point(cache, name, ref, commit):
    """Lets a branch or tag of a model be a commit."""
    file = cache / f"models--{name.replace('/', '--')}" / "refs" / ref
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(commit)
