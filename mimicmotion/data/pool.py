"""Many videos at once, by threads of one process: decoding, poses and encoders leave the interpreter's lock."""

from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from mimicmotion.data.cache import Clip, Drop
from mimicmotion.data.clip_maker import ClipMaker


def make_all(maker: ClipMaker, videos: Sequence[Path], workers: int) -> list[list[Clip | Drop]]:
    """What came of each video, in order. The first error stops all."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(maker.make, video) for video in videos]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            maker.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
