"""A web page for those who would rather click than type: `python mimicmotion/app.py --run-dir runs/demo`.

A picture and a driving video become a video beside its poses, as `sample.py --image --video` makes it: the model is
loaded once, one job runs at a time and others wait their turn. Needs gradio, the extra `app`.
"""

import dataclasses
import html
import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if __name__ == "__main__":  # python puts this folder first, where our modules would hide others of the same name
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mmkernels.optional import explain_missing

    explain_missing("mimicmotion/app.py", "`pip install -e .` in the checkout installs all of the trainer")

import tyro

from mimicmotion.commands import EXPECTED, one_sentence, sentence
from mimicmotion.config import Kernels, Precision, PresetName
from mimicmotion.data.cache import check_writable
from mimicmotion.data.progress import VideoProgress
from mimicmotion.data.still import FITS
from mimicmotion.gate import Gate
from mimicmotion.run.stopping import EndedBySignalError, Stop
from mimicmotion.sampling.picture_arguments import PictureArguments, Source, read_source
from mimicmotion.sampling.picture_to_video import beside, make_videos
from mmkernels.optional import optional

MOST_STEPS, MOST_GUIDANCE, MOST_SEED = 100, 20.0, 2**32 - 1
_HOME = ("127.0.0.1", "localhost")
_DAY_S = 86400
_CSS = "button[aria-label='Trim video to selection'] {display: none}"  # works with what lies elsewhere on the net


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """Serve a page on which a picture and a driving video become a video."""

    run_dir: Path = Path("runs/demo")  # a run's folder (its newest checkpoint) or one checkpoint folder
    weights: Path | None = None  # weights to use and not a run: whatever --model.pretrained of train.py takes
    pose_net: Path | None = None  # a file whose PoseNet goes with them, where they are a UNet alone
    preset: PresetName = "mimicmotion-72"  # settings and shape of the model that --weights are for
    encoder: str | None = None  # folder or hub id of Stable Video Diffusion; the run's or the preset's
    size: str | None = None  # height x width as 1024x576, multiples of 64; the trained one nearest the picture's shape
    pose_backend: Literal["dwpose", "holistic"] | None = None  # that of the prepared folder, the run or the preset
    dwpose_dir: Path | None = None  # folder of yolox_l.onnx and dw-ll_ucoco_384.onnx; downloaded where none is given
    precision: Precision | None = None  # of weights and activations; the run's where none is given
    memory_budget: float | Literal["auto"] | None = None  # GiB: rows together and frames decoded together that fit in
    kernels: Kernels | None = None  # the run's where none are given
    host: str = "127.0.0.1"  # address to serve at; who reaches it can use the page, with 0.0.0.0 the whole network
    port: int = 7860
    folder: Path = Path("runs/page")  # videos/ keeps what is made; all else in it goes when the page ends
    max_upload_mib: int = 200  # of one picture or video
    max_frames: int = 300  # of one video
    max_waiting: int = 8  # jobs that wait; a further one is refused
    debug: bool = False  # show where in the code an error arose


@dataclass(frozen=True)
class Given:
    """What a page sends, as it came: anything may be anything."""

    picture: Any  # {"path": where the upload lies, ...}, or None
    video: Any
    seed: Any
    steps: Any
    guidance: Any
    frames: Any
    fit: Any
    sound: Any

    def by_name(self, text: str) -> str:
        """Text with uploads by their names alone."""
        for upload in (self.picture, self.video):
            if isinstance(upload, dict) and (path := str(upload.get("path") or "")):
                text = text.replace(path, Path(path).name)
        return text


class GivenUpError(ValueError):
    """A job that was cancelled."""


class Shown(VideoProgress):
    """Shows a job on its page as well, and ends it once `stop` is set."""

    def __init__(self, show: Callable[..., object], stop: threading.Event) -> None:
        super().__init__()
        self._show, self._stop = show, stop
        self.lines: list[str] = []  # what was said

    @property
    def has_bars(self) -> bool:
        """The page has them."""
        return True

    def say(self, line: str) -> None:
        """As of VideoProgress."""
        self._check()
        self.lines.append(line)
        super().say(line)

    def reached(self, name: str, num_steps: int, total: int | None) -> None:
        """As of VideoProgress."""
        self._check()
        self._show((num_steps, total or None), desc=name)

    def _check(self) -> None:
        if self._stop.is_set():
            raise GivenUpError("cancelled: nothing of this video is kept")


class Jobs:
    """Makes videos one at a time; what a page sends is checked here."""

    def __init__(self, arguments: Arguments, source: Source, served: Path) -> None:
        """served: folder of uploads, whose files the page may show."""
        self._arguments, self._source, self._served = arguments, source, served
        self._one = threading.Lock()
        self._stops: dict[str, threading.Event] = {}  # of the job of each open page

    def make(self, given: Given, page: str, show: Callable[..., object]) -> tuple[Path, Path, str]:
        """The video beside its picture and poses, the video alone, and what was decided, one a line.

        show: as of gradio.Progress. Raises what `make_videos` does, and ValueError for what the page does not offer.
        """
        asked = self._checked(given)
        stop = self._stops[page] = threading.Event()
        shown = Shown(show, stop)
        with self._one:  # a cancelled job may still be in its last step
            videos = self._arguments.folder / "videos"
            videos.mkdir(exist_ok=True)
            number = 1 + max((int(path.stem) for path in videos.glob("*.mp4") if path.stem.isdigit()), default=0)
            try:
                (output,) = make_videos(
                    dataclasses.replace(asked, out=videos / f"{number:04d}.mp4"), source=self._source, progress=shown
                )
            finally:
                if self._stops[page] is stop:  # else another job of the page waits already
                    del self._stops[page]
        copies = Path(tempfile.mkdtemp(dir=self._served))
        both, one = (Path(shutil.copy(path, copies)) for path in (beside(output), output))
        said = "\n".join(shown.lines).replace(f"{self._arguments.folder}{os.sep}", "")
        return both, one, given.by_name(said)

    def cancel(self, page: str) -> None:
        """End the page's job at its next step."""
        if (stop := self._stops.get(page)) is not None:
            stop.set()

    def end(self) -> None:
        """End whatever runs, and wait until it has: a thread in the middle of torch's code would abort the process."""
        for stop in list(self._stops.values()):
            stop.set()
        with self._one:
            pass

    def _checked(self, given: Given) -> PictureArguments:
        """Settings of one video. Raises ValueError where a value is none that the page offers."""
        if given.fit not in FITS:
            raise ValueError(f"fit is {str(given.fit)[:40]}, wanted one of {', '.join(FITS)}")
        return dataclasses.replace(
            of_model(self._arguments),
            image=self._upload(given.picture, "a picture of a person"),
            video=self._upload(given.video, "a driving video"),
            fit=given.fit,
            seed=_integer("seed", given.seed, 0, MOST_SEED),
            num_steps=_integer("steps", given.steps, 1, MOST_STEPS),
            guidance=_number("guidance", given.guidance, 0, MOST_GUIDANCE),
            num_frames=1 + _integer("frames", given.frames, 1, self._arguments.max_frames),
            sound=given.sound is True,
            beside=True,
        )

    def _upload(self, given: Any, what: str) -> Path:
        """A file that was uploaded; nothing else is opened."""
        if given is None:
            raise ValueError(f"give {what} first")
        path = Path(str(given.get("path") if isinstance(given, dict) else given)).resolve()
        if not path.is_relative_to(self._served.resolve()) or not path.is_file():
            raise ValueError(f"{path.name!r} was not uploaded here; upload {what}")
        return path


def _number(name: str, value: Any, least: float, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ValueError(f"{name} is {str(value)[:40]}, wanted a number from {least} to {most}")
    return value


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if _number(name, value, least, most) % 1:
        raise ValueError(f"{name} is {value}, wanted a whole number")
    return int(value)


def of_model(arguments: Arguments) -> PictureArguments:
    """What is the same for every video of the page."""
    names = {field.name for field in dataclasses.fields(PictureArguments)}
    return PictureArguments(**{name: value for name, value in vars(arguments).items() if name in names})


def build_page(gradio: Any, arguments: Arguments, source: Source, jobs: Jobs) -> Any:
    """The page: what goes in, how, and below what comes out."""
    sampling, frames, most = source.config.sampling, source.config.data.num_frames - 1, arguments.max_frames
    with gradio.Blocks(title="MimicMotion", analytics_enabled=False, delete_cache=(3600, _DAY_S)) as page:
        gradio.Markdown("# A picture that moves as a video does")
        with gradio.Row():
            inputs = [
                gradio.Image(label="Picture of a person", type="filepath", sources=["upload"], height=320),
                gradio.Video(label="Driving video", sources=["upload"], height=320),
            ]
        with gradio.Row():
            inputs += [
                gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=MOST_SEED),
                gradio.Slider(1, MOST_STEPS, min(sampling.num_steps, MOST_STEPS), step=1, label="Steps"),
                gradio.Slider(0, MOST_GUIDANCE, sampling.guidance, step=0.1, label="Guidance"),
                gradio.Slider(1, most, min(frames, most), step=1, label="Most frames"),
            ]
        with gradio.Row():
            inputs += [
                gradio.Radio(FITS, value=FITS[0], label="Picture to size", info="crop: its middle; pad: all of it"),
                gradio.Checkbox(False, label="Copy the video's sound"),
            ]
        with gradio.Row():
            make, cancel = gradio.Button("Make the video", variant="primary"), gradio.Button("Cancel")
        wide = gradio.Video(label="Picture | pose | generated", interactive=False, autoplay=True, loop=True)
        with gradio.Row():
            alone = gradio.File(label="The generated video alone", interactive=False)
            notes = gradio.Textbox(label="What was decided", interactive=False, lines=3)
        clicked, given_up = _answers(gradio, arguments, jobs)
        # Nothing of gradio looks into what was uploaded: it goes to our own decoders as it came.
        job = make.click(
            clicked, inputs, [wide, alone, notes], api_name="make", preprocess=False, show_progress_on=wide
        )
        cancel.click(given_up, cancels=[job], queue=False, api_name="cancel")
        cancel.click(None, outputs=notes, js="() => 'cancelled'")
        page.unload(given_up)
    return page.queue(max_size=arguments.max_waiting, default_concurrency_limit=1, api_open=False)


def _answers(gradio: Any, arguments: Arguments, jobs: Jobs) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What the page's buttons do: make a video, and give it up."""

    def clicked(
        picture: Any,
        video: Any,
        seed: Any,
        steps: Any,
        guidance: Any,
        frames: Any,
        fit: Any,
        sound: Any,
        request: Any,
        progress: Any = gradio.Progress(),  # noqa: B008  gradio hands over one of the job
    ) -> tuple[str, str, str]:
        given = Given(picture, video, seed, steps, guidance, frames, fit, sound)
        try:
            both, one, said = jobs.make(given, str(request.session_hash), progress)
        except EXPECTED as error:
            why = html.escape(given.by_name(sentence(error)))  # the page takes it for HTML
            raise gradio.Error(why, duration=None, print_exception=arguments.debug) from error
        return str(both), str(one), said

    def given_up(request: Any) -> None:
        jobs.cancel(str(request.session_hash))

    for function in (clicked, given_up):
        function.__annotations__["request"] = gradio.Request  # by which gradio knows what to hand over
    return clicked, given_up


def serve(arguments: Arguments) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises ValueError or OSError where it cannot begin."""
    if min(arguments.max_upload_mib, arguments.max_frames, arguments.max_waiting) < 1:
        raise ValueError("got --max-upload-mib, --max-frames or --max-waiting below 1; give at least 1 of each")
    _check_free(arguments.host, arguments.port)
    check_writable(folder := arguments.folder.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    arguments = dataclasses.replace(arguments, folder=folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix="served-", ignore_cleanup_errors=True) as served:
        os.environ |= {"GRADIO_TEMP_DIR": served, "GRADIO_ANALYTICS_ENABLED": "False"}
        gradio, middleware = (optional(name, "the page") for name in ("gradio", "starlette.middleware"))
        source = read_source(of_model(arguments)).kept()
        jobs = Jobs(arguments, source, Path(served))
        page = build_page(gradio, arguments, source, jobs)
        most_bytes = arguments.max_upload_mib * 2**20
        hosts = _HOME if arguments.host in _HOME else ()
        gate = middleware.Middleware(Gate, folder=Path(served), most_upload_bytes=most_bytes, hosts=hosts)
        _, address, _ = page.launch(
            server_name=arguments.host,
            server_port=arguments.port,
            max_file_size=most_bytes,
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            app_kwargs={"middleware": [gate], "docs_url": None, "redoc_url": None, "openapi_url": None},
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            run_history=False,
            enable_monitoring=False,
            footer_links=[],
            css=_CSS,
        )
        try:
            print(f"{source.words}: the page is at {address}, videos go to {folder}/videos; Ctrl-C ends it", flush=True)
            threading.Event().wait()
        finally:
            jobs.end()  # else closing waits for all steps of the job that runs
            page.close(verbose=False)
            jobs.end()


def _check_free(host: str, port: int) -> None:
    """Raise ValueError where nobody can be served at an address."""
    try:
        with socket.create_server((host, port)):
            pass
    except (OSError, OverflowError) as error:
        raise ValueError(f"{host}:{port} cannot be served at ({error}); give another --port or --host") from error


def main() -> None:
    """Run the command line; exits with 1 and the reason where the page cannot be served."""
    arguments = tyro.cli(Arguments)
    try:
        with (
            Stop(before="the page ends, and what it was making", again=""),
            one_sentence("page stopped", debug=arguments.debug),
        ):
            serve(arguments)
    except EndedBySignalError:  # all is ended and said
        os._exit(0)  # a thread of the server that still waits for a browser would keep Python alive


if __name__ == "__main__":
    main()
