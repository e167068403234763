"""Training on several cards of one host: what a step takes of each, by how they share the work.

    python bench/parallel.py [--cards H100 "RTX 4090"] [--frames 72 144] [--counts 1 8] [--workers 2]
    python bench/parallel.py --measure

Modelled, on any machine: the released 1.5B UNet's forward, backward and update on one of 1, 2, 4 and 8 cards
(bench/shared_step.py). data: each card has clips of its own, gradients are summed while backward runs. shard: the
same, and weights, gradients and moments lie in parts (FSDP2), gathered one block ahead. frames: cards share the frames
of one clip, and exchange them for pixels where frames are taken together. AdamW in float32 on cards of 40 GiB and more
and wherever weights lie in parts, which 8 bits cannot; else with 8 bits. Kernels are fused; where that has no room,
one card and data follow a plan made for the memory. What collectives reach of a link stands in mmkernels/cards.py, with
its source. Writes parallel-modelled.json and .png.

Measured, with --measure: a small UNet in float32 on this machine's CPU, one thread a process: two processes by data and
by frames, over gloo, against one, in turns. Writes parallel-measured.json.
"""

import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

if not __package__:  # run as a file: import from the checkout, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import tyro
from diffusers import UNetSpatioTemporalConditionModel
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import environment, parallel_measured, parallel_picture, report
from bench.frame_exchange import Exchanged, exchanged
from bench.result_file import write_rows
from bench.shared_step import Found, fitted
from mmkernels.cards import card
from mmkernels.choices import GIB
from mmkernels.planning.sharing import Sharing
from mmkernels.planning.sizes import LATENT_STRIDE, parse_size
from mmkernels.planning.svd import HEADS

BENCH = "parallel"
Wanted = tuple[str, Sharing, int]  # a card, and the frames of a clip
# What several cards are asked to reach, on eight H100 with clips of 72 frames: times one card.
CLIPS_GOAL, STEP_GOAL = 6.4, 5.5


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is modelled or measured, and where it goes."""

    measure: bool = False  # two processes on this CPU, instead of modelled cards
    cards: tuple[str, ...] = ("H100", "A100", "RTX 4090")  # of mmkernels/cards.py
    counts: tuple[int, ...] = (1, 2, 4, 8)  # of cards
    frames: tuple[int, ...] = (72, 144, 288)  # of a clip
    size: str = "1024x576"  # pixels as WIDTHxHEIGHT
    workers: int = 1  # processes that model beside each other
    rounds: int = 5  # measured: each provider runs once a round
    out: Path = Path("runs/parallel")  # folder of the rows and the picture
    json: Path | None = None  # rows go here instead of into OUT
    picture: Path | None = None  # the picture goes here instead of into OUT


def sharings(count: int) -> list[Sharing]:
    """The ways that so many cards share the work."""
    if count == 1:
        return [Sharing(cards=1)]
    mixed = [Sharing(cards=count, frames=count // 2)] if count >= 8 else []
    return [Sharing(cards=count), Sharing(cards=count, shard=count), *one_clip(count), *mixed]


def one_clip(count: int) -> list[Sharing]:
    """The ways that so many cards share one clip, as longer ones are."""
    return [Sharing(cards=count, frames=count), Sharing(cards=count, frames=count, shard=count)]


def model(settings: Settings, console: Console) -> int:
    """Trace every provider, print, write."""
    width, height = parse_size(settings.size)
    shortest, most = min(settings.frames), max(settings.counts)
    shared = {shortest: [each for count in settings.counts for each in sharings(count)]}
    for frames in settings.frames:
        shared.setdefault(frames, one_clip(most))
    wanted = [(name, each, frames) for name in settings.cards for frames in settings.frames for each in shared[frames]]
    sent = of_the_released_unet(most, shortest, height, width)
    rows = settings.json or settings.out / "parallel-modelled.json"
    picture = settings.picture or settings.out / "parallel-modelled.png"
    found: list[Found] = []
    for each in _model_all(wanted, settings.workers, width, height):
        found.append(each)
        write(found, settings, sent, rows)  # as far as it has come, since minutes pass for all of them
        step = "no room" if each.step is None else f"{each.step.step_s:.2f} s"
        words = f"{each.card}, {each.frames} frames, {each.sharing}: {step}"
        console.print(f"{len(found)} of {len(wanted)}: {words}", markup=False)
    print_table(found, settings.size, console)
    print_exchanges(sent, most, shortest, console)
    for line in goals(found):
        console.print(line, markup=False)
    parallel_picture.plot(found, settings.size, picture)
    console.print(f"rows: {rows}\npicture: {picture}", markup=False)
    return 0


def _model_all(wanted: Sequence[Wanted], workers: int, width: int, height: int) -> Iterator[Found]:
    one = partial(_fitted, width=width, height=height)
    if workers == 1:
        yield from map(one, wanted)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(one, wanted)


def _fitted(wanted: Wanted, *, width: int, height: int) -> Found:
    name, sharing, frames = wanted
    return fitted(sharing, card(name), frames=frames, height=height, width=width)


def of_the_released_unet(ranks: int, frames: int, height: int, width: int) -> Exchanged:
    """What its frames send, in bfloat16."""
    with FakeTensorMode():
        unet = UNetSpatioTemporalConditionModel(num_attention_heads=HEADS)
    pixels = height // LATENT_STRIDE * width // LATENT_STRIDE
    return exchanged(unet, ranks=ranks, batch=1, frames=frames, pixels=pixels, element_bytes=2)


def alone(found: Sequence[Found], one: Found) -> Found | None:
    """What one such card does with clips as long, where it can."""
    same = (each for each in found if each.is_of(one) and each.sharing.cards == 1 and each.fits)
    return next(same, None)


def print_table(found: Sequence[Found], size: str, console: Console) -> None:
    """A line for each way."""
    table = Table(title=f"a step at {size} (modelled)", title_justify="left")
    for heading in ("card", "frames", "cards", "shared by", "runs"):
        table.add_column(heading, no_wrap=True)
    headings = ("step, s", "waiting, s", "clips a minute", "one card's, times", "sent, GB", "peak, GiB", "of")
    for heading in headings:
        table.add_column(heading, justify="right")
    for each in found:
        usable = f"{card(each.card).usable_gib:g}"
        known = [each.card, str(each.frames), str(each.sharing.cards), str(each.sharing), each.provider]
        if each.step is None:
            table.add_row(*known, "", "", "", "", "", "no room", usable)
            continue
        base = alone(found, each)
        times = "" if base is None else f"{each.clips_per_s / base.clips_per_s:.2f}"
        step, peak_gib = each.step, each.step.peak_bytes / GIB
        figures = (f"{step.step_s:.2f}", f"{step.waited_s:.2f}", f"{60 * each.clips_per_s:.1f}", times)
        table.add_row(*known, *figures, f"{step.sent_bytes / 1e9:.1f}", f"{peak_gib:.1f}", usable)
    console.print(table)


def print_exchanges(sent: Exchanged, ranks: int, frames: int, console: Console) -> None:
    """What sharing frames exchanges, and what other ways would."""
    console.print(
        f"{frames} frames on {ranks} cards exchange, over all cards and a step, {sent.residual_blocks / 1e9:.1f} GB "
        f"in residual blocks and {sent.transformers / 1e9:.1f} GB in transformers: 2 (K - 1) / K of their tokens "
        f"forward and as much backward (formula). With q, k and v exchanged attention would take "
        f"{sent.other_attention / 1e9:.1f} GB forward, where {sent.transformers / 2e9:.1f} are here; halos of the "
        f"convolutions {sent.halos / 1e9:.1f} GB, where {sent.residual_blocks / 2e9:.1f} are.",
        markup=False, soft_wrap=True,
    )  # fmt: skip


def goals(found: Sequence[Found]) -> list[str]:
    """Whether eight H100 reach what is asked of them."""
    said = []
    for name, goal, is_meant in (
        ("clips a second by data", CLIPS_GOAL, lambda each: each.sharing == Sharing(cards=8)),
        ("one clip's step by frames", STEP_GOAL, lambda each: each.sharing == Sharing(cards=8, frames=8)),
    ):
        for each in found:
            base = alone(found, each)
            if (each.card, each.frames) != ("H100", 72) or not is_meant(each) or base is None:
                continue
            times = each.clips_per_s / base.clips_per_s if each.fits else math.nan
            verdict = "reached" if times >= goal else "not reached"
            said.append(f"goal, 8 H100, {name}: {goal} times one card's; {times:.2f} (modelled): {verdict}")
    return said


def write(found: Sequence[Found], settings: Settings, sent: Exchanged, path: Path) -> None:
    """A row for each way; the setting and the links with their sources are shared."""
    shared = {
        "bench": BENCH, "kind": "modelled", "size": settings.size, "versions": environment.versions(),
        "commit": environment.commit(), "goals": goals(found), "formula_bytes": asdict(sent),
        "links": {name: asdict(link) for name in settings.cards if (link := card(name).peers) is not None},
    }  # fmt: skip
    write_rows(({**shared, **row(each, found)} for each in found), path)


def row(each: Found, found: Sequence[Found]) -> dict[str, object]:
    """One way's figures, rounded."""
    known = {
        "card": each.card, "frames": each.frames, "cards": each.sharing.cards, "shared_by": str(each.sharing),
        "optimizer": each.optimizer, "provider": each.provider, "fits": each.fits,
    }  # fmt: skip
    if each.step is None:
        return known
    base, step = alone(found, each), each.step
    times = None if base is None else round(each.clips_per_s / base.clips_per_s, 3)
    figures = {name: round(getattr(step, name), 4) for name in ("step_s", "waited_s", "network_s")}
    return known | figures | {
        "sent_bytes": step.sent_bytes, "peak_gib": round(step.peak_bytes / GIB, 2), "times_one_card": times,
    }  # fmt: skip


def main(settings: Settings) -> int:
    """Model or measure. Returns the exit status."""
    console = report.make_console()
    if settings.measure:
        path = settings.json or settings.out / "parallel-measured.json"
        return parallel_measured.measure(settings.rounds, path, console)
    return model(settings, console)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
