"""The web page: repainting, generating and neighbours in a browser, by Gradio."""

import base64
import contextlib
import functools
import html
import inspect
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from unveil import page
from unveil.checkpoint import pick_device
from unveil.originals import Original
from unveil.page import Neighbours, Run, Stopped, View, Work, data_url
from unveil.uploads import Reader, Store, hole_for
from unveil.veil import Veil

SHIPPED = files("unveil") / "shipped" / "diffmae_64.safetensors"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
EXAMPLES = {"Temple": "china.jpg", "Flower": "flower.jpg"}  # of scikit-learn, licensed CC BY
EXAMPLE_SIDE = 320
WAITING = 20  # requests in the queue
SWEEP = 60.0  # seconds
DRAW, FILE, RANDOM, CENTER = "Draw it", "A file of mine", "Random patches", "The centre"
EMPTY = '<p class="empty">What comes out appears here.</p>'
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Web:
    """A page in the browser: repaint a picture and watch it come about, generate by class, find neighbours.

    It is bound to this machine alone, works without a network, and keeps nothing: what is uploaded or made is removed after
    half an hour, and at the end. Ctrl-C ends it. Without --run it shows the small model that comes with the package.

    Example: unveil web --run runs/photos runs/umd-by-class --data photos/
    """

    run: tuple[str, ...] = ()
    """Run directories, weights files, or models on the hub as hf:owner/model, to choose from on the page. Default: the model of
    64 pixels that comes with the package."""
    data: str | None = None
    """Pictures among which to look for neighbours, as for probe; read when they are first asked for."""
    limit_neighbours: int = 5000
    """At most this many of them, from all over the data."""
    host: str = "127.0.0.1"
    """Where to listen. Anything but this machine lets everybody in who can reach it: the page has no login."""
    port: int = 7860
    """Where to listen; 0 takes any that is free."""
    max_megabytes: float = 20.0
    """Size of a file that is uploaded, at most."""
    max_megapixels: float = 24.0
    """Size of a picture, at most."""
    max_seconds: float = 120.0
    """Time for one request, at most."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... Default: cuda if there is one."""


def _check_installed() -> None:
    try:
        import gradio  # noqa: F401
        import uvicorn  # noqa: F401
    except Exception as error:  # a broken installation raises what it likes
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({type(error).__name__})"
        raise ValueError(f'The page needs Gradio{reason}: pip install "unveil[web]".') from None


def _check(options: Web) -> None:
    for name in ("max_megabytes", "max_megapixels", "max_seconds"):
        if not 0 < getattr(options, name) < 1e6:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name):g}: use a number above 0.")
    if options.limit_neighbours < 1:
        raise ValueError(f"--limit-neighbours {options.limit_neighbours}: use 1 or more.")
    if not 0 <= options.port <= 65535:
        raise ValueError(f"--port {options.port}: use 1 to 65535, or 0 for any that is free.")


def _runs(options: Web, device: str) -> list[Run]:
    if options.run:
        return page.open_runs(options.run, device)
    shipped = Path(str(SHIPPED))
    if not shipped.is_file():
        raise ValueError("This copy of Unveil comes without its model of 64 pixels. Name one of yours by --run.")
    return page.open_runs([str(shipped)], device)


def _bound(options: Web) -> socket.socket:
    """A socket that listens."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((options.host, options.port))
    except OSError as error:
        bound.close()
        raise ValueError(
            f"--host {options.host} --port {options.port} cannot be listened on ({error.strerror or error}). Give another "
            "--port, or 0 for any that is free."
        ) from None
    return bound


class _Page:
    """What stands behind the buttons."""

    def __init__(self, options: Web, runs: list[Run], reader: Reader, store: Store, device: str) -> None:
        self.options, self.reader, self.store = options, reader, store
        self.runs = {run.name: run for run in runs}
        self.neighbours = None
        if options.data is not None:
            self.neighbours = Neighbours(options.data, options.limit_neighbours, device)
        self.work: dict[str, Work] = {}  # of each session

    def chosen(self, name: Any) -> Run:
        if name not in self.runs:
            raise ValueError(f"There is no such model here. Choose from {', '.join(self.runs)}.")
        return self.runs[name]

    def stop(self, session: str | None) -> None:
        work = self.work.get(session or "")
        if work is not None:
            work.stop()

    def stop_all(self) -> None:
        for work in list(self.work.values()):
            work.stop()

    def _worked(self, session: str | None, run: Run, do: Callable[[Callable[[View], None]], Any]) -> Iterator[Any]:
        work = Work(self.options.max_seconds)
        self.work[session or ""] = work
        try:
            yield from work.run(do, run.model)
        finally:
            self.work.pop(session or "", None)

    def opened(self, picture: str | None) -> tuple[str, str]:
        """What the page shows of an upload: the picture as a data URL, and a sentence on it."""
        if not picture:
            return "", ""
        original = self.reader.picture(Path(picture))
        H, W = original.pixels.shape[1:3]
        bits = {255: "8 bits", 65535: "16 bits"}.get(original.top, "floats")
        alpha = ", transparency" if original.has_alpha else ""
        notes = "".join(f" {note[0].upper()}{note[1:]}." for note in original.notes)
        return data_url(_fitting(page.seen(original))), f"{W:,} x {H:,} pixels, {bits}{alpha}.{notes}"

    def hole(self, original: Original, what: str, drawn: str, mask: str | None, share: float) -> Any:
        """What the page's choice of a mask means, for `page.Repainting`."""
        if what in (RANDOM, CENTER):
            if not isinstance(share, int | float) or not 0 < share < 1:
                raise ValueError(f"Share: {share!r} was given; use a number between 0 and 1.")
            return f"{'random' if what == RANDOM else 'center'}:{share:g}"
        if what == FILE:
            if not mask:
                raise ValueError("There is no mask yet. Upload one, or draw over the picture.")
            return self.reader.hole(Path(mask))
        if what != DRAW:
            raise ValueError(f"There is no such mask. Choose from {DRAW}, {FILE}, {RANDOM}, {CENTER}.")
        if not drawn:
            raise ValueError("Nothing is drawn yet. Draw over the part of the picture that is to be repainted.")
        begin, _, text = drawn.partition(",")
        try:
            data = base64.b64decode(text, validate=True) if begin == "data:image/png;base64" else b""
        except ValueError:
            data = b""
        if not data:
            raise ValueError("The drawn mask is no PNG picture. Draw it again.")
        return hole_for(self.reader.hole(data, "The drawn mask"), *original.pixels.shape[1:3])

    def repaint(
        self,
        session: str | None,
        model: str,
        picture: str | None,
        what: str,
        drawn: str,
        mask: str | None,
        share: float,
        num_steps: int,
        num_samples: int,
        seed: int,
    ) -> Iterator[View | page.Repainted]:
        run = self.chosen(model)
        if not picture:
            raise ValueError("There is no picture yet. Drop one, or take an example.")
        original = self.reader.picture(Path(picture))
        asked = page.Repainting(
            original=original,
            hole=self.hole(original, what, drawn, mask, share),
            num_steps=num_steps,
            num_samples=num_samples,
            seed=seed,
        )
        folder = self.store.new()
        yield from self._worked(session, run, lambda tell: page.repaint(run, asked, Path(picture).name, folder, tell))

    def generate(
        self, session: str | None, model: str, label: str | None, number: int, scale: float, num_steps: int, seed: int
    ) -> Iterator[View | tuple[list[page.Picture], str]]:
        run = self.chosen(model)
        why = page.why_not_generate(run, list(self.runs.values()))
        if why is not None:
            raise ValueError(why)
        asked = page.Generating(
            label=label or None,
            number=number,
            num_steps=num_steps,
            guidance_scale=scale if isinstance(scale, int | float) else -1.0,
            seed=seed,
        )
        folder = self.store.new()
        yield from self._worked(session, run, lambda tell: page.make(run, asked, folder, tell))

    def near(
        self, session: str | None, model: str, picture: str | None, k: int
    ) -> Iterator[View | tuple[View, list[page.Neighbour]]]:
        run = self.chosen(model)
        neighbours = self.neighbours
        if neighbours is None:
            raise ValueError(
                "The page was started without pictures to search. Start it with --data and a folder of them."
            )
        if not picture:
            raise ValueError("There is no picture yet. Drop one, or take an example.")
        original = self.reader.picture(Path(picture))

        def find(tell: Callable[[View], None]) -> tuple[View, list[page.Neighbour]]:
            found = neighbours.find(run, original, k, tell)
            text = (
                f"Of {neighbours.known(run):,} pictures the {len(found)} nearest, each with the cosine of its features."
            )
            return View(text, page.shown(page.seen(original), page.SMALL)), found

        yield from self._worked(session, run, find)


def _fitting(image: Image.Image) -> Image.Image:
    """A picture as it is drawn on: at its own size unless it is large, so that a pixel of the mask is one of its own."""
    return image if max(image.size) <= page.SIDE else page.shown(image)


_PATHS = re.compile(r"(?:^|[\s'\"(=])(?:[A-Za-z]:)?[/\\]\w")


def _sentence(error: Exception) -> str:
    """What the page says of an error. Ours are sentences for people; of others, and of paths, the server's log knows."""
    if isinstance(error, Stopped):
        return "Stopped."
    if type(error) is ValueError and not _PATHS.search(str(error)):
        return str(error)
    _log.error("a request failed", exc_info=error)
    return "Something went wrong on the server, which has noted it. Try another picture or other settings."


def _told(view: View) -> str:
    """A view as HTML."""
    caption = f"<figcaption>{html.escape(view.text)}</figcaption>"
    picture = f'<img src="{data_url(view.picture)}" alt="What is there by now">' if view.picture else ""
    return f"<figure>{picture}{caption}</figure>"


def _problem(error: Exception) -> str:
    return f'<p class="problem" role="alert">{html.escape(_sentence(error))}</p>'


def _apart(picture: page.Picture | None) -> str:
    if picture is None:
        return ""
    return (
        f'<figure><img src="{data_url(picture.view)}" alt="Disagreement of the samples"><div class="scale"></div>'
        '<div class="ends"><span>the samples agree</span><span>0.3 of the range apart, and more</span></div></figure>'
    )


def _examples(store: Store) -> dict[str, str]:
    """Photographs to try, made smaller, each with the path of its file."""
    from sklearn.datasets import load_sample_image

    store.kept.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, file in EXAMPLES.items():
        image = Image.fromarray(load_sample_image(file))
        image.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
        path = store.kept / f"{name.lower()}.png"
        image.save(path)
        found[name] = str(path)
    return found


def blocks(behind: _Page) -> Any:
    """The page itself, `gradio.Blocks`."""
    import gradio as gr

    options, runs = behind.options, list(behind.runs.values())
    examples = _examples(behind.store)
    names = list(behind.runs)
    first = runs[0]
    one = {"concurrency_limit": 1, "concurrency_id": "model"}  # one model at work at a time; the others wait
    own: dict[str, Any] = {"api_visibility": "private"}
    limits = f"Up to {options.max_megabytes:g} MB and {options.max_megapixels:g} megapixels. Nothing is kept."

    def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
        """For events without a place to say what went wrong."""

        @functools.wraps(function)  # Gradio looks at what it takes
        def answering(*values: Any) -> Any:
            try:
                return function(*values)
            except Exception as error:
                raise gr.Error(html.escape(_sentence(error)), print_exception=False) from None

        return answering

    def picture_input(key: str) -> Any:
        """A place to drop a picture, with examples."""
        file = gr.File(label="Picture", file_types=["image", ".npy"], height=120, elem_id=f"{key}-picture")
        with gr.Row():
            for name, path in examples.items():
                button = gr.Button(f"Try: {name.lower()}", icon=path, size="sm", min_width=120)
                button.click(lambda path=path: path, None, file, show_progress="hidden", **own)
        return file

    def settings(num_steps: int) -> tuple[Any, Any]:
        steps = gr.Slider(1, page.MAX_STEPS, num_steps, step=1, label="Steps")
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
        return steps, seed

    def watch_repainting(request: gr.Request, *words: Any) -> Iterator[Any]:
        yield _told(View("Reading the picture")), gr.skip(), gr.skip(), gr.skip()
        try:
            for news in behind.repaint(request.session_hash, *words):
                if isinstance(news, View):
                    yield _told(news), gr.skip(), gr.skip(), gr.skip()
                    continue
                shown = [(picture.view, picture.name) for picture in news.pictures]
                kept = [p.file for p in (*news.pictures, news.disagreement) if p is not None]
                yield (
                    _told(View(news.text)),
                    gr.update(value=shown, visible=True),
                    gr.update(value=_apart(news.disagreement), visible=news.disagreement is not None),
                    gr.update(value=[str(file) for file in kept], visible=True),
                )
        except Exception as error:
            yield _problem(error), gr.skip(), gr.skip(), gr.skip()

    def watch_generating(request: gr.Request, *words: Any) -> Iterator[Any]:
        yield _told(View("Drawing the noise")), gr.skip(), gr.skip()
        try:
            for news in behind.generate(request.session_hash, *words):
                if isinstance(news, View):
                    yield _told(news), gr.skip(), gr.skip()
                    continue
                pictures, text = news
                shown = [(picture.view, picture.name) for picture in pictures]
                files = [str(picture.file) for picture in pictures]
                yield _told(View(text)), gr.update(value=shown, visible=True), gr.update(value=files, visible=True)
        except Exception as error:
            yield _problem(error), gr.skip(), gr.skip()

    def watch_searching(request: gr.Request, *words: Any) -> Iterator[Any]:
        yield _told(View("Reading the picture")), gr.skip()
        try:
            for news in behind.near(request.session_hash, *words):
                if isinstance(news, View):
                    yield _told(news), gr.skip()
                    continue
                view, found = news
                shown = [(n.view, " · ".join(filter(None, (n.label, f"{n.similarity:.3f}", n.name)))) for n in found]
                yield _told(view), gr.update(value=shown, visible=True)
        except Exception as error:
            yield _problem(error), gr.skip()

    def repainted(
        request: gr.Request,
        model: str,
        picture: str | None,
        what: str,
        drawn: str,
        mask: str | None,
        share: float,
        steps: int,
        samples: int,
        seed: int,
    ) -> tuple[list[str], dict[str, Any]]:
        """For programs, which see these names: all files, and what is to be said of them."""
        words = model, picture, what, drawn, mask, share, steps, samples, seed
        last = None
        for news in behind.repaint(request.session_hash, *words):
            last = news
        assert isinstance(last, page.Repainted)
        kept = [p.file for p in (*last.pictures, last.disagreement) if p is not None]
        return [str(file) for file in kept], {"text": last.text, "seconds": last.seconds}

    def stop(request: gr.Request) -> None:
        behind.stop(request.session_hash)

    def model_changed(name: str) -> tuple[Any, ...]:
        run = behind.chosen(name)
        return run.describe(), *generating(run)

    def generating(run: Run) -> tuple[Any, Any, Any]:
        why, labels = page.why_not_generate(run, runs), page.class_names(run)
        return (
            gr.update(value=why or "", visible=why is not None),
            gr.update(choices=labels, value=labels[0] if labels else None, visible=bool(labels)),
            gr.update(interactive=why is None),
        )

    def gallery(key: str, columns: int = 2) -> Any:
        return gr.Gallery(
            label="Result", show_label=False, columns=columns, height="auto", format="png", object_fit="contain",
            elem_id=f"{key}-gallery", interactive=False, buttons=["fullscreen"], visible=False,
        )  # fmt: skip

    with gr.Blocks(title="Unveil", analytics_enabled=False) as made:
        gr.Markdown("# Unveil\nTake something out of a picture, and see what could be there instead.")
        model = gr.Dropdown(names, value=first.name, label="Model", elem_id="model", interactive=len(names) > 1)
        about = gr.Markdown(first.describe(), elem_classes="quiet")
        with gr.Tab("Repaint"), gr.Row():
            with gr.Column(min_width=300):
                picture = picture_input("repaint")
                facts = gr.Markdown(limits, elem_classes="quiet")
                what = gr.Radio([DRAW, RANDOM, CENTER, FILE], value=DRAW, label="What to repaint", elem_id="what")
                painter = gr.HTML(
                    "", html_template="", js_on_load=_front("painter.js"), apply_default_css=False, elem_id="painter"
                )
                share = gr.Slider(0.05, 0.95, 0.5, step=0.05, label="Share of the picture", visible=False)
                mask = gr.File(
                    label="Mask: as large as the picture, white where it is to be repainted",
                    file_types=["image"], height=120, visible=False, elem_id="repaint-mask",
                )  # fmt: skip
                with gr.Accordion("Settings", open=False):
                    samples = gr.Slider(1, page.MAX_SAMPLES, 4, step=1, label="Samples: different answers")
                    steps, seed = settings(20)
                with gr.Row():
                    run_button = gr.Button("Repaint", variant="primary", scale=2, min_width=120, elem_id="repaint-run")
                    stop_button = gr.Button("Stop", scale=1, min_width=80, elem_id="repaint-stop")
            with gr.Column(min_width=300):
                watch = gr.HTML(EMPTY, elem_classes="watch", elem_id="repaint-watch", apply_default_css=False)
                results = gallery("repaint")
                apart = gr.HTML(
                    "", elem_classes="apart", elem_id="repaint-apart", apply_default_css=False, visible=False
                )
                downloads = gr.File(
                    label="Download, at the picture's own size", file_count="multiple", interactive=False,
                    elem_id="repaint-files", elem_classes="downloads", visible=False,
                )  # fmt: skip
        with gr.Tab("Generate"), gr.Row():
            why_not, labels, can = generating(first)
            with gr.Column(min_width=300):
                why = gr.Markdown(why_not["value"], visible=why_not["visible"], elem_id="generate-why")
                label = gr.Dropdown(
                    labels["choices"], value=labels["value"], label="Class", visible=labels["visible"], elem_id="label"
                )
                number = gr.Slider(1, page.MAX_MADE, 4, step=1, label="Pictures")
                scale = gr.Slider(0, 10, 1.5, step=0.1, label="Guidance: how far towards the class; 1 is none")
                generate_steps, generate_seed = settings(50)
                with gr.Row():
                    generate_button = gr.Button(
                        "Generate", variant="primary", scale=2, min_width=120, elem_id="generate-run",
                        interactive=can["interactive"],
                    )  # fmt: skip
                    generate_stop = gr.Button("Stop", scale=1, min_width=80)
            with gr.Column(min_width=300):
                generate_watch = gr.HTML(EMPTY, elem_classes="watch", elem_id="generate-watch", apply_default_css=False)
                generate_results = gallery("generate")
                generate_files = gr.File(
                    label="Download",
                    file_count="multiple",
                    interactive=False,
                    elem_id="generate-files",
                    elem_classes="downloads",
                    visible=False,
                )
        with gr.Tab("Neighbours"), gr.Row():
            with gr.Column(min_width=300):
                if behind.neighbours is None:
                    gr.Markdown(
                        "Start the page with `--data photos/` to search a folder for what looks alike to the model."
                    )
                near_picture = picture_input("near")
                count = gr.Slider(1, 48, 12, step=1, label="Neighbours")
                near_button = gr.Button(
                    "Find", variant="primary", elem_id="near-run", interactive=behind.neighbours is not None
                )
            with gr.Column(min_width=300):
                near_watch = gr.HTML(EMPTY, elem_classes="watch", elem_id="near-watch", apply_default_css=False)
                near_results = gallery("near", 4)
        drawn = gr.Textbox("", visible=False, label="Drawn mask, as a data URL of a PNG")
        program, program_files, program_facts = (
            gr.Button(visible=False),
            gr.File(file_count="multiple", visible=False, label="Files"),
            gr.JSON(visible=False, label="Facts"),
        )

        words = [model, picture, what, drawn, mask, share, steps, samples, seed]
        with_mask = "(...words) => { words[3] = window.unveilMask ? window.unveilMask() : ''; return words; }"
        picture.change(guarded(behind.opened), picture, [painter, facts], show_progress="minimal", **own)
        what.change(
            lambda word: (
                gr.update(visible=word == DRAW),
                gr.update(visible=word in (RANDOM, CENTER)),
                gr.update(visible=word == FILE),
            ),
            what, [painter, share, mask], show_progress="hidden", **own,
        )  # fmt: skip
        model.change(guarded(model_changed), model, [about, why, label, generate_button], show_progress="hidden", **own)
        run_button.click(
            watch_repainting, words, [watch, results, apart, downloads], js=with_mask, show_progress="minimal",
            show_progress_on=watch, **one, **own,
        )  # fmt: skip
        generate_button.click(
            watch_generating, [model, label, number, scale, generate_steps, generate_seed],
            [generate_watch, generate_results, generate_files], show_progress="minimal", show_progress_on=generate_watch,
            **one, **own,
        )  # fmt: skip
        near_button.click(
            watch_searching, [model, near_picture, count], [near_watch, near_results], show_progress="minimal",
            show_progress_on=near_watch, **one, **own,
        )  # fmt: skip
        for button in (stop_button, generate_stop):
            button.click(stop, show_progress="hidden", **own)
        program.click(
            guarded(repainted), words, [program_files, program_facts], api_name="repaint",
            api_description="Repaint a picture; returns the files at its own size, and a sentence.", **one,
        )  # fmt: skip
    made.queue(default_concurrency_limit=1, max_size=WAITING, api_open=True)
    made.state_session_capacity = 100
    return made


def _front(name: str) -> str:
    return (files("unveil") / "front" / name).read_text(encoding="utf-8")


def _theme(gradio: Any) -> Any:
    """Quiet, in the fonts that the reader's machine has: none is fetched."""
    theme = gradio.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="md",
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"],
    )  # fmt: skip
    plain = {
        "block_label_background_fill": "transparent",
        "block_label_border_width": "0px",
        "block_label_shadow": "none",
        "block_label_text_weight": "600",
        "block_label_text_color": "*body_text_color",
        "block_title_text_weight": "600",
        "block_title_text_color": "*body_text_color",
        "button_primary_background_fill": "*primary_600",
        "button_primary_background_fill_hover": "*primary_700",
        "button_primary_text_color": "white",
    }
    dark = {f"{name}_dark": value for name, value in plain.items()}
    known = inspect.signature(theme.set).parameters  # some have no other value in the dark
    return theme.set(**plain, **{name: value for name, value in dark.items() if name in known})


@contextlib.contextmanager
def stored() -> Iterator[Store]:
    """A folder for a page, which Gradio keeps to if it is imported here; removed at the end."""
    store = Store()
    ours = {"GRADIO_TEMP_DIR": str(store.folder), "GRADIO_EXAMPLES_CACHE": str(store.kept)}
    ours["GRADIO_ANALYTICS_ENABLED"] = "False"
    before = {name: os.environ.get(name) for name in ours}
    os.environ.update(ours)
    try:
        yield store
    finally:
        store.close()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def application(options: Web, runs: list[Run], store: Store, device: str) -> Iterator[Veil]:
    """The page as an ASGI application."""
    import fastapi
    import gradio

    reader = Reader(int(options.max_megabytes * 1e6), int(options.max_megapixels * 1e6))
    behind = _Page(options, runs, reader, store, device)
    over = threading.Event()

    def keep_clean() -> None:
        reader.start()
        while not over.wait(SWEEP):
            store.sweep()

    try:
        threading.Thread(target=keep_clean, name="unveil-sweep", daemon=True).start()
        app = gradio.mount_gradio_app(
            fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
            blocks(behind),
            path="/",
            server_name=options.host,
            server_port=options.port,
            allowed_paths=[],
            show_error=False,
            max_file_size=int(options.max_megabytes * 1e6),
            ssr_mode=False,
            run_history=False,
            footer_links=["api"],
            theme=_theme(gradio),
            css=_front("page.css"),
        )
        yield Veil(app, store.folder, options.host, int(options.max_megabytes * 1e6) + 100_000, store.sweep)
    finally:
        over.set()
        behind.stop_all()
        reader.close()


def web(options: Web, on_ready: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run `unveil web` until it is interrupted or told to end; on_ready is told in a sentence where the page is.

    Returns:
        "url", and "runs", the names of the models.

    Raises:
        ValueError: Gradio is not installed, a model cannot be loaded, or the port is taken.
    """
    _check(options)
    device = pick_device(options.device)
    with contextlib.ExitStack() as stack:
        bound = stack.enter_context(_bound(options))
        stack.enter_context(_ending_by_terminate())
        store = stack.enter_context(stored())
        _check_installed()
        runs = _runs(options, device)
        app = stack.enter_context(application(options, runs, store, device))
        import uvicorn

        port = bound.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{port}"
        if on_ready is not None:
            if options.host not in LOOPBACK:
                on_ready(f"--host {options.host} lets everybody in who can reach this machine; the page has no login.")
            on_ready(f"The page is at {url} with {', '.join(run.name for run in runs)}. Ctrl-C ends it.")
        # Pages that are open listen for ever, so at the end they are cut off, which is no news.
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=0, access_log=False)
        server = uvicorn.Server(config)
        logging.getLogger("uvicorn.error").addFilter(lambda record: not server.should_exit)
        server.run(sockets=[bound])
    return {"url": url, "runs": [run.name for run in runs]}


@contextlib.contextmanager
def _ending_by_terminate() -> Iterator[None]:
    """Lets what is open be closed if the process is told to end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
