"""The web page: what stands behind it, and the page itself as a server, a program and a browser meet it."""

import base64
import contextlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import numpy as np
import pytest
import torch
from hostile import Request, Upload
from PIL import Image
from small import build, pillow_picture, small

from unveil import page
from unveil.checkpoint import WEIGHTS, About, save_weights
from unveil.originals import Original, from_pillow, read_original
from unveil.page import Generating, Neighbours, Repainting, Run, Stopped, View, Work
from unveil.painting import named_hole, paint
from unveil.tasks import web as web_task
from unveil.tasks.inpaint import Inpaint, inpaint
from unveil.tasks.web import CENTER, DRAW, FILE, RANDOM, Web, application, stored, web
from unveil.uploads import Reader, Store, hole_for
from unveil.veil import FILES

pytest.importorskip("gradio", reason="the web page needs gradio")
ABOUT = About(step=1, images_seen=10, ema_decay=None, data="/home/somebody/secret/photos", command="none")
JSON = {"Content-Type": "application/json"}
REPO = Path(__file__).parent.parent


def save(folder: Path, name: str = "diffmae", **arguments: Any) -> Path:
    model = build(small(name, **arguments))
    save_weights(folder / WEIGHTS, model.recipe, model.state_dict(), ABOUT)
    return folder


def run_of(name: str = "diffmae", **arguments: Any) -> Run:
    return Run(name, build(small(name, **arguments)), ABOUT)


def deaf(view: View) -> None:
    """Does not listen."""


def as_png(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "PNG")
    return stream.getvalue()


def a_hole(height: int, width: int) -> torch.Tensor:
    hole = torch.zeros(height, width, dtype=torch.bool)
    hole[height // 3 : height // 2, width // 3 : width // 2 + 1] = True
    return hole


# What is uploaded


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    reader = Reader(300_000, 100_000)
    yield reader
    reader.close()


def test_an_upload_is_read_as_it_is(reader: Reader) -> None:
    for mode in ("L", "LA", "RGB", "RGBA", "I;16", "P", "F"):
        if mode == "F":
            stream = io.BytesIO()
            np.save(stream, np.random.default_rng(0).random((9, 7, 3), dtype=np.float32))
        else:
            pillow_picture(mode, (9, 7)).save(stream := io.BytesIO(), "PNG")
        here, there = read_original(stream.getvalue(), "x"), reader.picture(stream.getvalue())
        np.testing.assert_array_equal(here.pixels, there.pixels)
        assert (here.has_alpha, here.notes) == (there.has_alpha, there.notes)
    mask = np.zeros((9, 7), dtype=np.uint8)
    mask[2:5] = 255
    assert torch.equal(reader.hole(as_png(mask)), torch.from_numpy(mask > 0))


def test_an_upload_refuses(reader: Reader, tmp_path: Path) -> None:
    long = tmp_path / "long.png"
    long.write_bytes(bytes(300_001))
    for data, sentence in (
        (b"", "The picture is an empty file"),
        (b"text", "is no picture that can be read"),
        (long, "has more than 0.3 MB"),
        (bytes(300_001), "has more than 0.3 MB"),
        (hostile.png(500, 500), "has too many pixels: here up to 0.1 million"),
        (hostile.encoded()[:900], "its file is damaged or cut off"),
        (next(u.data for u in hostile.bombs() if u.what == "an array cut off"), "has 900 x 900 pixels"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            reader.picture(data)
        assert "0x" not in str(caught.value)
    with pytest.raises(ValueError, match="The mask is no picture"):
        reader.hole(b"text")
    with pytest.raises(ValueError, match="The mask has no white"):
        reader.hole(as_png(np.full((4, 4), 9, dtype=np.uint8)))


def test_a_file_that_ends_or_holds_its_reader_takes_nobody_along(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    for data, seconds, sentence in ((b"die", 20, "needs more memory"), (b"sleep", 0.5, "takes more than 0.5 s")):
        monkeypatch.setattr(reader, "max_seconds", seconds)
        with pytest.raises(ValueError, match=sentence):
            reader._run(hostile.decode, data, "The picture")
        monkeypatch.undo()
        begin = time.monotonic()
        assert reader.picture(hostile.encoded()).pixels.shape == (1, 24, 20, 3)
        assert time.monotonic() - begin < 30  # of a minute that the file would have


def test_a_drawn_mask_is_scaled_to_its_picture() -> None:
    drawn = torch.zeros(10, 20, dtype=torch.bool)
    drawn[5, 10] = True
    assert torch.equal(hole_for(drawn, 10, 20), drawn)
    large = hole_for(drawn, 50, 100)
    assert large.sum() == 25
    assert large[25:30, 50:55].all()


def test_the_store_throws_away_what_is_old_or_too_much() -> None:
    store = Store(max_age=100, max_bytes=2500)
    try:
        store.kept.mkdir()
        files = [store.kept / "example.png", *(store.new() / f"{i}.png" for i in range(4))]
        for i, file in enumerate(files):
            file.write_bytes(bytes(1000))
            os.utime(file, (time.time() - 50 + i, time.time() - 50 + i))
        os.utime(files[4], (0, 0))
        store.sweep()
        assert [file.exists() for file in files] == [True, False, True, True, False]
        assert not files[1].parent.exists()
    finally:
        store.close()
    assert not store.folder.exists()


# What the page does


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16"])
def test_the_page_paints_as_the_command_does(tmp_path: Path, mode: str) -> None:
    """The same bits for the same picture, mask and seed, and outside the mask the picture's own."""
    size = (21, 30)
    run_folder = save(tmp_path / "run")
    pillow_picture(mode, size).save(tmp_path / "photo.png")
    hole = a_hole(*size)
    (tmp_path / "mask.png").write_bytes(as_png(hole.numpy().astype(np.uint8) * 255))
    inpaint(
        Inpaint(
            run=run_folder, images=str(tmp_path / "photo.png"), mask=str(tmp_path / "mask.png"), out=tmp_path / "command",
            num_samples=2, num_steps=3, sampler="dpmpp", seed=5,
        )
    )  # fmt: skip
    original = read_original((tmp_path / "photo.png").read_bytes(), "x")
    run = page.open_runs([str(run_folder)], "cpu")[0]
    asked = Repainting(original=original, hole=hole, num_samples=2, num_steps=3, seed=5)
    (tmp_path / "page").mkdir()
    made = page.repaint(run, asked, "photo.png", tmp_path / "page", deaf)
    names = ["sample1", "sample2", "prediction", "disagreement"]
    assert [p.file and p.file.name for p in (*made.pictures, made.disagreement) if p] == [
        f"photo_{n}.png" for n in names
    ]
    for name in names:
        here, there = (
            read_original((tmp_path / folder / f"photo_{name}.png").read_bytes(), "x") for folder in ("page", "command")
        )
        np.testing.assert_array_equal(here.pixels, there.pixels)
        if name != "disagreement":
            assert here.pixels.dtype == original.pixels.dtype
            np.testing.assert_array_equal(here.pixels[0][~hole], original.pixels[0][~hole])
            assert (here.pixels[0][hole] != original.pixels[0][hole]).any()


def test_a_mask_by_name_hides_the_models_patches(tmp_path: Path) -> None:
    run, size = run_of(), (32, 48)
    original = from_pillow(pillow_picture("RGB", size))
    asked = Repainting(original=original, hole="center:0.25", num_samples=1, num_steps=1)
    made = page.repaint(run, asked, "a.png", tmp_path, deaf)
    assert made.disagreement is None
    changed = (np.array(Image.open(made.pictures[0].file)) != original.pixels[0]).any(-1)  # type: ignore[arg-type]
    hole = page.named_hole(run.model.recipe.clip, "center:0.25", 0, 0, (1, *size))[0][0].numpy()
    assert hole.mean() == 0.25
    assert not changed[~hole].any()
    assert changed[hole].mean() > 0.9


def test_a_repainting_tells_of_its_steps(tmp_path: Path) -> None:
    original = from_pillow(pillow_picture("RGB", (16, 16)))
    views: list[View] = []
    hole = torch.zeros(16, 16, dtype=torch.bool)
    hole[4:8, 4:12] = True  # whole patches: those of which it takes little are painted in steps of their own
    asked = Repainting(original=original, hole=hole, num_samples=3, num_steps=4)
    page.repaint(run_of(), asked, "a.png", tmp_path, views.append)
    steps = [view.text for view in views if view.text.startswith("Step")]
    assert steps == ["Step 1 of 4", "Step 2 of 4", "Step 3 of 4", "Step 4 of 4"]  # of all samples together
    pictures = [view.picture for view in views if view.picture is not None]
    assert len(pictures) >= 2
    assert pictures[0].size == (256, 256)
    assert pictures[0].tobytes() != pictures[-1].tobytes()


def test_a_repainting_that_goes_back_and_forth_tells_how_far_it_is(tmp_path: Path) -> None:
    views: list[View] = []
    asked = Repainting(
        original=from_pillow(pillow_picture("RGB", (16, 16))), hole=a_hole(16, 16), num_samples=1, num_steps=3
    )
    page.repaint(run_of("dit"), asked, "a.png", tmp_path, views.append)
    told = [view.text for view in views if "of the way from noise" in view.text]
    assert len(told) == 1 + 2 * 10
    assert told[0].startswith("0%")
    assert told[-1].startswith("67%")


def test_a_repainting_refuses(tmp_path: Path) -> None:
    original = from_pillow(pillow_picture("RGB", (16, 16)))
    given: dict[str, Any] = {"original": original, "hole": a_hole(16, 16)}
    large = Original(np.broadcast_to(np.zeros((), np.uint8), (1, 5000, 5000, 3)))
    for changed, sentence in (
        ({"hole": a_hole(8, 16)}, "The mask has 16 x 8 pixels and the picture 16 x 16"),
        ({"hole": torch.zeros(16, 16, dtype=torch.bool)}, "The mask hides nothing"),
        ({"hole": "random:1"}, "hides everything"),
        ({"num_steps": 0}, "Steps: 0 was given"),
        ({"num_samples": 9}, "Samples: 9 was given; use a whole number from 1 to 8"),
        ({"seed": float("nan")}, "Seed: nan"),
        ({"original": large, "hole": a_hole(5000, 5000), "num_samples": 2}, "Ask for 1 or fewer"),
    ):
        with pytest.raises(ValueError, match=sentence):
            page.repaint(run_of(), Repainting(**{**given, **changed}), "a.png", tmp_path, deaf)
    dots, side = torch.zeros(1200, 1200, dtype=torch.bool), 1200
    dots[::8, ::8] = True  # a model of 16 pixels looks at each by itself
    thin, row = Original(np.zeros((1, 1, 3000, 3), np.uint8)), torch.ones(1, 3000, dtype=torch.bool)
    row[0, 0] = False
    for shape, hole, sentence in (
        (
            Original(np.zeros((1, side, side, 3), np.uint8)),
            dots,
            r"The mask has 22,500 parts that lie apart, and the page",
        ),
        (thin, row, r"3,000 x 1 pixels and the model sees 16 x 16, so the picture is enlarged"),
    ):
        begin = time.monotonic()
        with pytest.raises(ValueError, match=sentence):
            page.repaint(run_of(), Repainting(original=shape, hole=hole), "a.png", tmp_path, deaf)
        assert time.monotonic() - begin < 10
    with pytest.raises(ValueError, match="cannot paint"):
        page.repaint(run_of("mae"), Repainting(**given), "a.png", tmp_path, deaf)


def test_work_can_be_stopped_and_runs_out_of_time() -> None:
    """Inside a network's call, too, of which its task hears nothing."""
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2))

    def for_ever(tell: Callable[[View], None]) -> None:
        tell(View("begun"))
        until = time.monotonic() + 20
        while time.monotonic() < until:
            layer(torch.zeros(2))

    work = Work(60)
    news = work.run(for_ever, layer)
    assert next(news).text == "begun"
    work.stop()
    with pytest.raises(Stopped):
        next(news)
    with pytest.raises(ValueError, match=r"longer than the 0\.2 s"):
        list(Work(0.2).run(for_ever, layer))
    left = Work(60).run(for_ever, layer)
    next(left)
    left.close()  # as a server does when its client has gone
    assert not any(thread.name == "unveil-work" for thread in threading.enumerate())
    assert not layer[0]._forward_pre_hooks
    assert list(Work(60).run(lambda tell: 5)) == [5]


def test_generating_by_class_tells_of_its_steps(tmp_path: Path) -> None:
    run = run_of("umd_finetune")
    views: list[View] = []
    pictures, text = page.make(run, Generating(label="class 2", number=3, num_steps=4), tmp_path, views.append)
    assert [p.file.name for p in pictures if p.file] == ["class_2_1.png", "class_2_2.png", "class_2_3.png"]
    assert text.startswith("3 pictures of 16 px in")
    assert [view.text for view in views] == [f"Step {i} of 4" for i in range(1, 5)]
    again, _ = page.make(run, Generating(label="class 2", number=3, num_steps=4), tmp_path, deaf)
    other, _ = page.make(run, Generating(label="class 3", number=3, num_steps=4), tmp_path, deaf)
    assert again[0].view.tobytes() == pictures[0].view.tobytes() != other[0].view.tobytes()


def test_generating_refuses(tmp_path: Path) -> None:
    run = run_of("umd_finetune")
    for changed, sentence in (
        ({"label": "cat"}, "has no class of that name"),
        ({"number": 17}, "Pictures: 17"),
        ({"label": "class 1", "guidance_scale": float("nan")}, "Guidance"),
        ({"num_steps": "x"}, "Steps: 'x'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            page.make(run, Generating(**changed), tmp_path, deaf)
    only = run_of()
    assert page.why_not_generate(run, [only, run]) is None
    assert page.why_not_generate(only, [only, run]) == "diffmae only repaints. Choose umd_finetune above to generate."
    assert "unveil finetune-generator" in (page.why_not_generate(only, [only]) or "")


def test_a_picture_is_its_own_nearest_neighbour(tmp_path: Path) -> None:
    for label, number in itertools.product("ab", range(4)):
        (tmp_path / "data" / label).mkdir(parents=True, exist_ok=True)
        picture = pillow_picture("RGB", (20, 24), seed=hash((label, number)) % 1000)
        picture.save(tmp_path / "data" / label / f"{number}.png")
    neighbours = Neighbours(str(tmp_path / "data"), 6, "cpu")
    original = read_original((tmp_path / "data" / "b" / "3.png").read_bytes(), "x")
    views: list[View] = []
    found = neighbours.find(run_of(), original, 48, views.append)
    assert len(found) == 6  # from the first to the last of all eight
    assert (found[0].name, found[0].label) == ("3.png", "b")
    assert found[0].similarity == pytest.approx(1, abs=1e-5)
    assert [n.similarity for n in found] == sorted((n.similarity for n in found), reverse=True)
    assert any("0 of 6" in view.text for view in views)
    views.clear()
    neighbours.find(run_of(), original, 1, views.append)
    assert not views  # what it saw it knows
    with pytest.raises(ValueError, match="Neighbours: 0"):
        neighbours.find(run_of(), original, 0, deaf)
    with pytest.raises(ValueError, match="There is no data"):
        Neighbours(str(tmp_path / "nothing"), 6, "cpu").find(run_of(), original, 1, deaf)


def test_runs_are_named_and_described_without_paths(tmp_path: Path) -> None:
    paths = [save(tmp_path / "a" / "same"), save(tmp_path / "b" / "same"), save(tmp_path / "c", "mae")]
    runs = page.open_runs([str(path) for path in paths], "cpu")
    assert [run.name for run in runs] == ["same", "same 2", "c"]
    for run in runs:
        assert "photos" in run.describe()
        assert "somebody" not in run.describe()
        assert str(tmp_path) not in run.describe()
    assert page.open_runs([str(paths[0] / WEIGHTS)], "cpu")[0].name == "same"
    with pytest.raises(ValueError, match="is a model of clips"):
        page.open_runs([str(save(tmp_path / "clips", frames=4, tubelet_size=2))], "cpu")


def test_an_unforeseen_error_is_told_to_the_log_alone(caplog: pytest.LogCaptureFixture) -> None:
    for error in (RuntimeError("secret"), ValueError("cannot open '/home/x/secret'"), KeyError("secret")):
        assert "secret" not in web_task._sentence(error)
    assert caplog.text.count("secret") >= 3
    assert web_task._sentence(ValueError("Steps: 0 was given.")) == "Steps: 0 was given."
    assert web_task._sentence(Stopped()) == "Stopped."


# The page as a server


def test_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(save(tmp_path / "run"))
    for changed, sentence in (
        ({"port": 70_000}, "--port 70000"),
        ({"max_megabytes": 0.0}, "--max-megabytes 0"),
        ({"max_seconds": float("nan")}, "--max-seconds nan"),
        ({"limit_neighbours": 0}, "--limit-neighbours 0"),
        ({"run": (str(tmp_path / "none"),)}, "does not exist"),
        ({"host": "256.1.1.1"}, "cannot be listened on"),
    ):
        with pytest.raises(ValueError, match=sentence):
            web(Web(**{"run": (run,), "port": 0, **changed}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ValueError, match=r"--port \d+ cannot be listened on \(Address already in use\)"):
            web(Web(run=(run,), port=taken.getsockname()[1]))
    monkeypatch.setattr(web_task, "SHIPPED", tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"comes without its model of 64 pixels\. Name one of yours by --run"):
        web(Web(port=0))
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ValueError, match=re.escape('pip install "unveil[web]"')):
        web(Web(run=(run,), port=0))


class Client:
    """Speaks HTTP with the page, and sees to it that no answer says more than it may."""

    def __init__(self, url: str, secrets: list[str]) -> None:
        import httpx

        self.secrets = [secret.encode() for secret in secrets]
        self.http = httpx.Client(base_url=url, timeout=60, trust_env=False, event_hooks={"response": [self._look]})

    def _look(self, response: Any) -> None:
        body = response.read()
        assert response.status_code < 500, (response.request.url, response.status_code, body[:500])
        for secret in self.secrets:
            assert secret not in body, (secret, response.request.url, body[:2000])
            assert secret not in b"".join(name + value for name, value in response.headers.raw), secret

    def upload(self, data: bytes, name: str = "picture.png", kind: str = "image/png") -> tuple[int, Any]:
        response = self.http.post("/gradio_api/upload", files={"files": (name, data, kind)})
        return response.status_code, response.json()[0] if response.status_code == 200 else response.text

    def call(self, words: list[Any]) -> tuple[str, Any]:
        """How a repainting ended, "complete" or "error", and what it said."""
        response = self.http.post("/gradio_api/call/repaint", content=json.dumps({"data": words}), headers=JSON)
        if response.status_code != 200:
            return "refused", response.text
        events = self.http.get(f"/gradio_api/call/repaint/{response.json()['event_id']}").text
        last = [part for part in events.split("\n\n") if part.strip()][-1]
        event, data = re.match(r"event: (\w+)\ndata: (.*)", last, re.S).groups()  # type: ignore[union-attr]
        return event, json.loads(data)

    def words(self, path: str, **changed: Any) -> list[Any]:
        words = {"model": "run", "picture": path, "what": CENTER, "drawn": "", "mask": None, "share": 0.25}
        words |= {"steps": 1, "samples": 1, "seed": 0, **changed}
        files = {
            name: {"path": words[name], "meta": {"_type": "gradio.FileData"}} if words[name] else None
            for name in ("picture", "mask")
        }
        return list({**words, **files}.values())

    def attack(self, upload: Upload) -> str:
        status, path = self.upload(upload.data, upload.name, upload.kind)
        if status != 200:
            return f"refused with {status}"
        words = self.words(path)
        for place, word in upload.asked.items():
            if place < 0:
                words.pop()
            else:
                words[place] = word
        return self.call(words)[0]

    def request(self, request: Request) -> int:
        answer = self.http.build_request(request.method, "/", content=request.body, headers={**JSON, **request.headers})
        answer.url = answer.url.copy_with(raw_path=request.path.encode())
        return self.http.send(answer).status_code

    def is_well(self) -> None:
        status, path = self.upload(hostile.encoded())
        assert status == 200
        assert self.call(self.words(path))[0] == "complete"


def secrets(*more: Path | str) -> list[str]:
    import gradio

    here = [REPO, Path(gradio.__file__).parent.parent, Path(sys.prefix), *more]
    return [*map(str, here), "Traceback", "root:x:0"]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """The page in a thread, with two models of test size and a folder to search."""
    import uvicorn

    folder = tmp_path_factory.mktemp("web")
    runs = page.open_runs([str(save(folder / "run")), str(save(folder / "by-class", "umd_finetune"))], "cpu")
    options = Web(run=("run",), port=0, max_megabytes=1, max_megapixels=0.5, max_seconds=20, data=str(folder))
    with socket.socket() as bound, stored() as store, application(options, runs, store, "cpu") as app:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0))
        thread = threading.Thread(target=server.run, args=([bound],), daemon=True)
        thread.start()
        yield Client(f"http://127.0.0.1:{bound.getsockname()[1]}", secrets(store.folder, folder))
        server.should_exit = True
        thread.join(10)
    assert not store.folder.exists()


def test_the_page_says_nothing_of_its_machine(client: Client) -> None:
    start = client.http.get("/")
    assert start.status_code == 200
    for path in ("/config", "/gradio_api/info", "/theme.css"):
        assert client.http.get(path).status_code == 200
    named = client.http.get("/gradio_api/info").json()["named_endpoints"]
    assert list(named) == ["/repaint"]
    words = [parameter["parameter_name"] for parameter in named["/repaint"]["parameters"]]
    assert words == ["model", "picture", "what", "drawn", "mask", "share", "steps", "samples", "seed"]


@pytest.mark.parametrize("mode", ["RGBA", "I;16"])
def test_a_program_repaints_by_a_mask(client: Client, mode: str) -> None:
    pillow_picture(mode, (40, 60)).save(stream := io.BytesIO(), "PNG")
    original = read_original(stream.getvalue(), "x")
    hole = a_hole(40, 60).numpy()
    mask = as_png(hole.astype(np.uint8) * 255)
    drawn = "data:image/png;base64," + base64.b64encode(mask).decode()
    picture = client.upload(stream.getvalue(), "my photo.png")[1]
    for changed in ({"what": DRAW, "drawn": drawn}, {"what": FILE, "mask": client.upload(mask, "mask.png")[1]}):
        event, (files, facts) = client.call(client.words(picture, samples=2, steps=2, **changed))
        assert event == "complete"
        assert facts["text"].startswith("2 samples of 60 x 40 pixels in")
        paths = [file["path"] for file in files]
        assert [Path(path).name for path in paths] == [
            f"my_photo_{name}.png" for name in ("sample1", "sample2", "prediction", "disagreement")
        ]
        assert all(path.startswith(f"{FILES}/made/") for path in paths)
        for path in paths[:3]:
            made = read_original(client.http.get(f"/gradio_api/file={path}").content, "x")
            assert made.pixels.dtype == original.pixels.dtype
            np.testing.assert_array_equal(made.pixels[0][~hole], original.pixels[0][~hole])
            assert (made.pixels[0][hole] != original.pixels[0][hole]).any()


def test_a_program_is_told_in_a_sentence(client: Client) -> None:
    picture = client.upload(hostile.encoded())[1]
    for changed, sentence in (
        ({"picture": None}, "There is no picture yet"),
        ({"what": DRAW}, "Nothing is drawn yet"),
        ({"what": FILE}, "There is no mask yet"),
        ({"what": RANDOM, "share": 2}, "greater than maximum value"),
        ({"model": "other"}, "not in the list of choices"),
        ({"steps": 0}, "less than minimum value"),
    ):
        event, said = client.call(client.words(**{"path": picture, **changed}))
        assert event == "error"
        assert sentence in json.dumps(said), said


TEN = [list(family())[i] for family in hostile.UPLOADS for i in (0, -2)]


def test_ten_hostile_uploads(client: Client) -> None:
    for upload in TEN:
        client.attack(upload)
    client.is_well()


# In a process of its own: what takes longer

SLOW = pytest.mark.slow


@contextlib.contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple["subprocess.Popen[str]", str, list[str]]]:
    """`unveil web` as people start it, where it is, and what it says."""
    (folder / "secret-tmp").mkdir(exist_ok=True)
    command = [sys.executable, "-m", "unveil.cli", "web", "--port", "0", *options]
    environment = {**os.environ, "TMPDIR": str(folder / "secret-tmp")}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    said: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"The page is at (\S+) with", line):
                break
        else:
            raise AssertionError("".join(said))
        threading.Thread(target=lambda: said.extend(process.stderr or []), daemon=True).start()
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(found[1].removeprefix("http://").split(":")):  # type: ignore[arg-type]
                break
            time.sleep(0.1)
        yield process, found[1], said
    finally:
        if process.poll() is None:
            process.terminate()
            assert process.wait(30) == 0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple["subprocess.Popen[str]", str, Path]]:
    folder = tmp_path_factory.mktemp("served")
    runs = [str(save(folder / "run")), str(save(folder / "by-class", "umd_finetune"))]
    for label, number in itertools.product("ab", range(4)):
        (folder / "data" / label).mkdir(parents=True, exist_ok=True)
        pillow_picture("RGB", (20, 24), seed=number).save(folder / "data" / label / f"{label}{number}.png")
    options = ["--run", *runs, "--data", str(folder / "data"), "--max-megabytes", "2", "--max-megapixels", "4"]
    with served(folder, *options) as (process, url, _):
        yield process, url, folder
    assert not list((folder / "secret-tmp").iterdir())  # it leaves nothing


@SLOW
def test_a_hundred_hostile_uploads(server: Any) -> None:
    process, url, folder = server
    client = Client(url, secrets(folder, "secret-tmp", Path.home() / "."))
    uploads = [upload for family in hostile.UPLOADS for upload in family()]
    assert len(uploads) >= 100
    ended = {upload.what: client.attack(upload) for upload in uploads}
    assert set(ended.values()) <= {"error", "complete", "refused with 413", "refused with 400", "refused"}, ended
    accepted = {what for what, end in ended.items() if end == "complete"}
    assert len(accepted & {upload.what for upload in hostile.names()}) >= 5  # whose pictures are as good as any
    assert not accepted & {upload.what for upload in hostile.wrong()}
    for request in hostile.requests(FILES):
        client.request(request)
    client.is_well()
    assert process.poll() is None


def resident(pid: int) -> float:
    """MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", text)[1]) / 1000  # type: ignore[index]


@SLOW
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say how much memory is used")
def test_memory_after_200_requests_is_that_after_20(server: Any) -> None:
    """Within 16 MB, which is less than a tenth of a MB for a request."""
    process, url, _ = server
    client = Client(url, [])
    after = {}
    for number in range(1, 201):
        status, path = client.upload(hostile.encoded(size=(60 + number, 80)))
        assert status == 200
        assert client.call(client.words(path, seed=number))[0] == "complete"
        if number in (20, 200):
            after[number] = resident(process.pid)
    assert after[200] - after[20] < 16, after


@SLOW
def test_the_page_ends_when_it_is_interrupted(tmp_path: Path) -> None:
    """Though a page is open; SIGTERM ends the other tests' server."""
    with served(tmp_path, "--run", str(save(tmp_path / "run"))) as (process, url, said):
        open_page = urllib.request.urlopen(f"{url}/gradio_api/heartbeat/abc")
        assert open_page.read(5) == b"data:"
        assert list((tmp_path / "secret-tmp").iterdir())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert said[1:] == ["unveil: interrupted\n"]
    assert not list((tmp_path / "secret-tmp").iterdir())


# In a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="the page is driven by playwright")
    names = ("chromium", "chromium-browser", "google-chrome")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if program is None:
        pytest.skip("there is no Chromium to drive the page with")
    quiet = ["disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync", "no-first-run"]
    root = ["no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=[f"--{word}" for word in quiet + root])
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser: Any, server: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page in a window of (width, height); nothing may go wrong in it, and no request may leave this machine."""
    width, height = getattr(request, "param", (1280, 900))
    window = browser.new_page(viewport={"width": width, "height": height}, accept_downloads=True)
    window.set_default_timeout(30_000)
    wrong: list[str] = []
    url = server[1]

    def look(asked: Any) -> None:
        if not asked.url.startswith((url, "data:", "blob:")):
            wrong.append(asked.url)

    window.on("request", look)
    window.on("response", lambda answer: answer.status >= 400 and wrong.append(f"{answer.status} {answer.url}"))
    window.on("pageerror", lambda error: wrong.append(str(error)))
    window.on("console", lambda line: line.type == "error" and wrong.append(line.text))
    window.goto(url)
    window.wait_for_selector("#repaint-run")
    yield window
    assert window.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    window.close()
    assert not wrong


def draw(window: Any, begin: tuple[float, float], end: tuple[float, float]) -> None:
    """A stroke, in shares of the picture."""
    canvas = window.locator("#painter canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (begin, end)]
    window.mouse.move(*places[0])
    window.mouse.down()
    window.mouse.move(*places[1], steps=5)
    window.mouse.up()


def drawn_hole(window: Any) -> np.ndarray:
    text = window.evaluate("window.unveilMask()")
    return np.array(Image.open(io.BytesIO(base64.b64decode(text.partition(",")[2]))).convert("L")) >= 128


def set_number(window: Any, label: str, value: int) -> None:
    """Of a slider; a page that is still being put together may forget it."""
    field = window.locator(f"input[type=number][aria-label*='{label}']:visible").first
    slider = window.locator(f"input[type=range][aria-label*='{label}']:visible").first
    for _ in range(20):
        field.fill(str(value))
        field.blur()
        window.wait_for_timeout(100)
        if slider.input_value() == str(value):
            return
    raise AssertionError(f"{label} is {slider.input_value()}")


def download_to(path: Path, window: Any, name: str) -> None:
    """Click on a file until it comes: on a busy machine the page may be drawing the list anew while it is clicked on."""
    from playwright.sync_api import TimeoutError as TooLate

    for attempt in range(3):
        try:
            with window.expect_download(timeout=10_000) as download:
                window.click(f"#repaint-files a[download='{name}']")
            download.value.save_as(path)
            return
        except TooLate:
            if attempt == 2:
                raise


@SLOW
@pytest.mark.parametrize("opened", [(1280, 900), (390, 844)], indirect=True, ids=["desktop", "phone"])
def test_a_picture_is_dropped_drawn_on_repainted_and_fetched(opened: Any, tmp_path: Path) -> None:
    """Outside of what was drawn, what is fetched has the bits of what was dropped."""
    window = opened
    dropped = pillow_picture("RGBA", (131, 180))
    dropped.save(tmp_path / "my photo.png")
    window.set_input_files("#repaint-picture input[type=file]", tmp_path / "my photo.png")
    window.wait_for_selector("#painter .stage:not([hidden])")
    window.get_by_text("180 x 131 pixels, 8 bits, transparency.").wait_for()
    assert window.evaluate("window.unveilMask()") == ""
    draw(window, (0.1, 0.1), (0.9, 0.9))
    window.click("#painter .undo")
    assert window.evaluate("window.unveilMask()") == ""
    draw(window, (0.3, 0.4), (0.6, 0.5))
    hole = drawn_hole(window)
    assert hole.shape == (131, 180)
    assert hole[57, 80]
    assert not hole[10, 10]
    assert 0.02 < hole.mean() < 0.3
    window.get_by_text("Settings").click()
    set_number(window, "Samples", 2)
    window.evaluate(
        """() => {
            window.seen = new Set();
            const look = () => {
                const told = document.querySelector("#repaint-watch");
                const picture = told.querySelector("img");
                window.seen.add(told.innerText + (picture ? picture.src : ""));
            };
            new MutationObserver(look).observe(document.querySelector("#repaint-watch"), {subtree: true, childList: true});
        }"""
    )
    window.click("#repaint-run")
    window.wait_for_selector("#repaint-files a")
    seen = window.evaluate("[...window.seen]")
    pictures = {text for text in seen if "data:image" in text}
    assert len(pictures) >= 2, seen  # it was seen to come about
    assert any(re.search(r"Step \d+ of 20", text) for text in seen)
    assert "2 samples of 180 x 131 pixels in" in window.inner_text("#repaint-watch")
    window.wait_for_function("document.querySelectorAll('#repaint-gallery img').length >= 3")
    assert window.is_visible("#repaint-apart .scale")
    original = np.array(dropped)
    for name in ("sample1", "sample2", "prediction"):
        download_to(tmp_path / f"{name}.png", window, f"my_photo_{name}.png")
        made = np.array(Image.open(tmp_path / f"{name}.png"))
        np.testing.assert_array_equal(made[~hole], original[~hole])
        assert (made[hole] != original[hole]).any()
    window.screenshot(path=tmp_path / "page.png", full_page=True)


@SLOW
def test_a_large_picture_is_drawn_on_small_and_repainted_large(opened: Any, tmp_path: Path) -> None:
    """What is shown is smaller than the picture; what is fetched is not."""
    window = opened
    y, x = np.mgrid[:1000, :1600]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "large.png")
    window.set_input_files("#repaint-picture input[type=file]", tmp_path / "large.png")
    window.wait_for_selector("#painter .stage:not([hidden])")
    window.get_by_text("1,600 x 1,000 pixels").wait_for()
    window.locator("#painter .size").fill("1")
    draw(window, (0.5, 0.5), (0.51, 0.51))
    shown = drawn_hole(window)
    assert max(shown.shape) == page.SIDE
    hole = hole_for(torch.from_numpy(shown), 1000, 1600).numpy()
    window.get_by_text("Settings").click()
    set_number(window, "Samples", 1)
    set_number(window, "Steps", 2)
    window.click("#repaint-run")
    window.wait_for_selector("#repaint-files a")
    download_to(tmp_path / "made.png", window, "large_sample1.png")
    made = np.array(Image.open(tmp_path / "made.png"))
    np.testing.assert_array_equal(made[~hole], pixels[~hole])
    assert (made[hole] != pixels[hole]).any()


@SLOW
def test_the_other_tabs_and_the_stop_button(opened: Any) -> None:
    window = opened
    window.click("#repaint-run")
    assert "There is no picture yet" in window.wait_for_selector("#repaint-watch .problem").inner_text()
    window.click("text=Try: flower")
    window.wait_for_selector("#painter .stage:not([hidden])")
    draw(window, (0.1, 0.5), (0.9, 0.5))  # many windows of 16 pixels
    window.get_by_text("Settings").click()
    set_number(window, "Samples", 8)
    set_number(window, "Steps", 250)
    window.click("#repaint-run")
    window.wait_for_selector("#repaint-watch img")
    window.click("#repaint-stop")
    window.wait_for_function("document.querySelector('#repaint-watch').innerText.includes('Stopped.')")
    window.click("#what label:has-text('Random patches')")
    set_number(window, "Steps", 2)
    window.click("#repaint-run")  # goes on as if nothing had been
    window.wait_for_selector("#repaint-files a")
    window.click("[role=tab]:has-text('Generate')")
    assert window.inner_text("#generate-why").startswith("run only repaints. Choose by-class above")
    assert window.is_disabled("#generate-run")
    window.click("#model input")
    window.click("li:has-text('by-class')")
    window.wait_for_selector("#generate-run:enabled")
    set_number(window, "Steps", 3)
    window.click("#generate-run")
    window.wait_for_selector("#generate-files a")
    assert "4 pictures of 16 px in" in window.inner_text("#generate-watch")
    assert "class_0_1" in window.inner_text("#generate-files")
    window.click("[role=tab]:has-text('Neighbours')")
    window.locator("button:has-text('Try: temple'):visible").click()
    window.wait_for_selector("#near-picture a")
    window.click("#near-run")
    window.wait_for_selector("#near-gallery img")
    assert "Of 8 pictures the 8 nearest" in window.inner_text("#near-watch")
    assert re.search(r"b · \d\.\d{3} · b\d\.png", window.inner_text("#near-gallery"))


def test_the_model_of_the_package_paints_and_says_what_it_is() -> None:
    """Below 8 MB, with a card beside it; what it paints in a hole is nearer to the photo than one colour is."""
    from sklearn.datasets import load_sample_image

    place = Path(str(web_task.SHIPPED))
    assert place.stat().st_size < 8e6
    assert "Tiny-ImageNet" in (place.parent / "README.md").read_text(encoding="utf-8")
    (run,) = page.open_runs([str(place)], "cpu")
    assert run.about.data.startswith("Tiny-ImageNet")
    photo = Image.fromarray(load_sample_image("flower.jpg")).resize((64, 64))
    clip = from_pillow(photo).seen(3)
    hole, seen = named_hole(run.model.recipe.clip, "center:0.25", 0, 0, (1, 64, 64))
    painted = paint(run.model, clip, hole, num_steps=1, seen=seen).prediction
    flat = clip[:, ~hole].mean(1)
    error, plain = ((x - clip[:, hole]).square().mean() for x in (painted[:, hole], flat[:, None]))
    assert error < 0.7 * plain
