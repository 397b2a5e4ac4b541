"""Random things for a folder of models that somebody serves."""

import contextlib
import os
import shutil
import socket

BAD_METADATA = ["[]", "{", '{"loss": NaN}', "[" * 10**5, "1" * 5000]
BAD_METADATA += ['{"batch_sizes": [1000000000]}', '{"name": 1, "batch_sizes": {}, "examples": 3}']
BAD_METADATA += [r'{"description": "a\u0000\n\ud800"}']


class Litter:
    """Drops random things into a folder of models, of which `good` must stay as it is.

    Args:
        draw: random.Random.
        root: the folder.
        export: a whole one, to be damaged.
    """

    def __init__(self, draw, root, export):
        self.draw, self.root, self.export = draw, root, export
        self.dropped = []
        self.number = 100

    def step(self):
        """Does one thing; returns what."""
        what = self.draw.choice(
            [self.put_version, self.put_version, self.put_version, self.put_model, self.put_thing]
            + [self.remove, self.rename, self.touch]
        )
        with contextlib.suppress(OSError):  # such as a name that is taken
            what()
        return what.__name__

    def thing(self, path):
        """Something that is no file with the right content."""
        kind = self.draw.choice(
            ["pipe", "socket", "dangling", "loop", "zeros", "root", "up", "bytes", "empty", "huge"]
            + ["folder", "deep", "json", "closed"]
        )
        if os.path.lexists(path):  # written to, a pipe would not return
            raise FileExistsError
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as listener, short_path(path) as short:
                listener.bind(short)
        elif kind in ("dangling", "loop", "zeros", "root", "up"):
            targets = {"dangling": "user@host.1", "loop": path.name, "zeros": "/dev/zero"}
            path.symlink_to({**targets, "root": "/", "up": "../.."}[kind])
        elif kind in ("bytes", "empty", "json"):
            json_text = self.draw.choice(BAD_METADATA).encode()
            random_bytes = self.draw.randbytes(self.draw.randrange(3000))
            path.write_bytes({"bytes": random_bytes, "empty": b"", "json": json_text}[kind])
        elif kind == "huge":
            path.touch()
            os.truncate(path, 2**40)
        else:
            (path / "/".join("a" * (50 if kind == "deep" else 1))).mkdir(parents=True)
            if kind == "closed":
                path.chmod(0)
        self.dropped.append(path)

    def name(self):
        odd = ["a b", "a\nb", "é", "%2e", "..a", "-", "good ", "1", "00", "a:b", "x" * 255]
        return self.draw.choice([*odd, os.fsdecode(b"\xff"), f"m{self.draw.randrange(5)}"])

    def version(self):
        self.number += 1
        odd = ["9" * 40, str(2**63), "-1", "01", "²", "1.0", "", " 7", str(2**63 - 1 - self.number)]
        return self.draw.choice([*odd, *[str(self.number)] * 9])

    def put_version(self):
        """A copy of the good export, in most cases with a damage."""
        model = self.draw.choice(["good", "good", "good", self.name()])
        path = self.root / model / (self.version() or "v")
        kind = self.draw.randrange(4)
        if kind == 0:
            self.thing(path)
            return
        self.dropped.append(path)
        shutil.copytree(self.export, path)
        if kind > 1:
            files = [p for p in path.rglob("*") if p.is_file()]
            file = self.draw.choice([*files, path / ".#lock", path / "metadata.json"])
            file.unlink(missing_ok=True)
            self.thing(file)

    def put_model(self):
        path = self.root / self.name()
        shutil.copytree(self.export, path / "1")
        self.dropped.append(path)

    def put_thing(self):
        self.thing(self.draw.choice([self.root, self.root / "good"]) / self.name())

    def remove(self):
        path = self.draw.choice(self.dropped) if self.dropped else self.root / "none"
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def rename(self):
        self.draw.choice(self.dropped or [self.root / "none"]).rename(self.root / self.name())

    def touch(self):
        """The good version is written to while it is served."""
        thing = self.root / "good/1" / self.draw.choice([".#lock", "other", "variables/other"])
        if not thing.is_symlink() and not thing.exists():
            self.thing(thing)
            self.dropped.remove(thing)
        elif thing.is_dir() and not thing.is_symlink():
            shutil.rmtree(thing)
        else:
            thing.unlink()


@contextlib.contextmanager
def short_path(path):
    """Names of sockets have at most 107 bytes."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
