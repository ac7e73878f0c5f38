"""Kills an export at random moments until it gets through, again and again: the campaign behind the test of resuming.

    python tests/end_to_end/kill_export.py --seconds 600             # a long campaign on a small module
    python tests/end_to_end/kill_export.py --model bert --seconds 600      # on a tiny BERT, text calibration and a bit budget
    python tests/end_to_end/kill_export.py --model sharded --seconds 600   # on a Llama in shards under a memory limit

Each round exports into a folder that holds the artifact of an *other* export, so that the replacement of a live
artifact is killed too. After every kill the artifact must be the old or the new one, whole, and a layer that was
finished must not be quantized again; the artifact that a round ends with must be that of an export nobody killed, byte
for byte. One JSON line with the counts is printed.

With ``--captured`` what will be killed begins with a model that was captured before, as nothing is written until then: as
many kills while something is done in half of the time. The process that nobody kills captures anew, and so goes on with
what others left as a command that is given again does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "support")]

# Forked children must not find locks of threads that the parent started.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


def contents(folder: Path) -> dict[str, bytes]:
    """Bytes of every file of an artifact; what a killed process left under temporary names is no part of it."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".") and p.is_file()}


def in_child(run, delay: float | None) -> bool:
    """Run in a forked process; kill it after ``delay`` seconds. True if it came to its end.

    Raises:
        RuntimeError: it ended by itself, but not well.
    """
    pid = os.fork()
    if pid == 0:
        try:
            run()
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    if status:
        raise RuntimeError(f"an export ended with status {status}")
    return True


def same_pair(found: dict[str, bytes], whole: dict[str, bytes], names: tuple[str, ...]) -> bool:
    return all(found.get(name) == whole.get(name) for name in names)


def everything_is_large() -> None:
    """From here on the tensors of a tiny model are left on disk, and its activations go there."""
    from claq_export import deferred, preflight, verify
    from claq_export.calibration import spill
    from claq_export.capture import lazy

    for module in (deferred, lazy, verify):
        module.DEFER_FROM = 8192
    spill.SPILL_FROM = 256
    predict = preflight.predict_resources

    def without_room(*arguments):
        return dataclasses.replace(predict(*arguments), activations=0)

    import claq_export.compiler

    claq_export.compiler.predict_resources = without_room


def capture_alone(export) -> Callable[..., object]:
    """A capture of the model, in the place of the one that ``export`` begins with; for forked processes, which change it."""
    from claq_export import api

    class CapturedError(Exception):
        pass

    capture, found = api.capture, []

    def alone(*arguments, **options):
        found.append(capture(*arguments, **options))
        raise CapturedError

    api.capture = alone
    with contextlib.suppress(CapturedError):
        export()
    api.capture = capture
    return lambda *_, **__: found[0]


def campaign(
    kind: str, seconds: float, seed: int, most_kills: int, folder: Path, captured: bool = False
) -> dict[str, float]:
    """Rounds of killed exports for about ``seconds``; raises AssertionError at the first violation."""
    import torch
    from tiny_models import save_tiny_bert, save_tiny_llama, sentences, shard

    import claq_export
    from claq_export import api
    from claq_export.calibration.progress import ProgressReporter

    limits = {}
    if kind == "bert":
        model, example = save_tiny_bert(folder / "model"), None
        config = claq_export.Config(bits=3.5, calibration=sentences(40), samples=6, sequence_length=32)
    elif kind == "sharded":
        model, example = save_tiny_llama(folder / "model"), None
        shard(model)
        everything_is_large()
        config = claq_export.Config(bits=4, calibration=sentences(40), samples=6, sequence_length=32, batch_size=2)
        limits = {"memory": 64 << 30, "cache": False}
    else:
        torch.manual_seed(0)
        widths = (64, 96, 160, 128, 96, 64, 64)
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        model, example = torch.nn.Sequential(*layers), torch.randn(4, 64)
        config = claq_export.Config(bits=3.5, calibration=[torch.randn(32, 64) for _ in range(4)])
    other = claq_export.Config(bits=2, calibration="none")
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "layers.log"

    def export(out: Path, settings: claq_export.Config, work: Path | None) -> claq_export.ExportResult:
        class Reporter(ProgressReporter):
            def layer(self, name: str, **fields: object) -> None:
                if "layer_seconds" in fields:
                    with log.open("a") as lines:
                        lines.write(json.dumps([name, bool(fields.get("restored"))]) + "\n")

        return claq_export.export(
            model,
            example,
            out=out / "model.onnx",
            config=settings,
            work=work,
            verify=bool(limits),  # under a limit the artifact is only compared with the finished layers
            reporter=Reporter(True),
            **limits,
        )

    # Here and not in a child, so that children find everything imported.
    export(folder / "old", other, None)
    start = time.perf_counter()
    result = export(folder / "expected", config, None)
    duration = time.perf_counter() - start
    capture = capture_alone(lambda: export(folder / "captured", config, None)) if captured else api.capture

    def export_killed(out: Path, work: Path) -> None:
        api.capture = capture
        export(out, config, work)

    lasts = duration - result.seconds["capture"] if captured else duration  # of what is killed
    expected, old = contents(folder / "expected"), contents(folder / "old")
    counts = {"rounds": 0, "kills": 0, "restored": 0, "repeated": 0, "seconds_undisturbed": round(duration, 2)}
    while time.perf_counter() - start < seconds or not counts["rounds"]:
        out, work = folder / "out", folder / "work"
        out.mkdir(exist_ok=True)
        for path in out.iterdir():
            path.unlink()
        for name, content in old.items():
            (out / name).write_bytes(content)
        log.unlink(missing_ok=True)
        finished, kills = False, 0
        while not finished:
            # Now and then nobody kills, and nobody after so many: a slow machine would never come to an end.
            delay = rng.uniform(0, 1.1 * lasts) if kills < most_kills and rng.random() < 0.9 else None
            begun = export_killed if delay is not None else functools.partial(export, settings=config)
            finished = in_child(functools.partial(begun, out=out, work=work), delay)
            kills += not finished
            found = contents(out)
            for names in (("model.onnx",), ("claq.safetensors",), ("claq.json",)):
                assert same_pair(found, old, names) or same_pair(found, expected, names), (
                    f"{names} is neither old nor new"
                )
            whole = expected if found["model.onnx"] == expected["model.onnx"] else old
            data = [name for name in whole if name.startswith("model.onnx.")]
            assert same_pair(found, whole, ("model.onnx", *data)), "the graph and its data are of two exports"
        assert contents(out) == expected, "a resumed export ends otherwise than an undisturbed one"
        assert not work.exists()
        assert not [path.name for path in out.iterdir() if path.name.startswith(".")], "temporary files were left"
        runs = [json.loads(line) for line in log.read_text().splitlines()]
        quantized = [name for name, restored in runs if not restored]
        counts["rounds"] += 1
        counts["kills"] += kills
        counts["restored"] += sum(restored for _, restored in runs)
        # A process can be killed between writing a layer down and saying so, never the other way round.
        counts["repeated"] += len(quantized) - len(set(quantized))
        assert len(quantized) == len(set(quantized)), "a finished layer was quantized again"
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("module", "bert", "sharded"), default="module")
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most-kills", type=int, default=8, help="in a round")
    parser.add_argument("--captured", action="store_true", help="kill no process while it captures the model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(
            json.dumps(
                campaign(
                    options.model,
                    options.seconds,
                    options.seed,
                    options.most_kills,
                    Path(scratch) / "campaign",
                    options.captured,
                )
            )
        )


if __name__ == "__main__":
    main()
