"""A real TensorBoard on the loopback interface, for tests that read a run as a browser would."""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

# a proxy in the environment is not for us
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class TensorBoard:
    """What a running TensorBoard says: `url` is its address; every method reads over HTTP."""

    def __init__(self, url: str):
        self.url = url

    def get(self, path: str, **query) -> bytes:
        """The body at /data/<path>?<query>."""
        address = f"{self.url}/data/{path}" + ("?" + urllib.parse.urlencode(query) if query else "")
        with _opener.open(address, timeout=60) as answer:
            return answer.read()

    def runs(self) -> list[str]:
        return json.loads(self.get("runs"))

    def tags(self, plugin: str) -> dict:
        """{run: tags} of "scalars" or "images" ({run: {tag: info}}), or of "text" ({run: [tag,
        ...]})."""
        return json.loads(self.get(f"plugin/{plugin}/tags"))

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        """[(step, value), ...]"""
        return [
            (step, value)
            for _, step, value in json.loads(self.get("plugin/scalars/scalars", run=run, tag=tag))
        ]

    def images(self, run: str, tag: str) -> list[tuple[int, bytes]]:
        """[(step, the encoded picture), ...]"""
        entries = json.loads(self.get("plugin/images/images", run=run, tag=tag, sample=0))
        return [
            (each["step"], self.get("plugin/images/individualImage?" + each["query"]))
            for each in entries
        ]

    def text(self, run: str, tag: str) -> str:
        """The newest text, as the HTML that the page shows."""
        return json.loads(self.get("plugin/text/text", run=run, tag=tag))[-1]["text"]

    def custom_scalars(self) -> dict:
        """The layout of the custom scalars tab."""
        return json.loads(self.get("plugin/custom_scalars/layout"))

    def hparams(self) -> list[dict]:
        """The session groups of the hparams table: "hparams", "metricValues", "sessions"."""
        columns = self._post(
            "plugin/hparams/experiment", {"experimentName": "", "includeMetrics": True}
        )
        request = {
            "experimentName": "",
            "startIndex": 0,
            "sliceSize": 100,
            "allowedStatuses": [
                "STATUS_UNKNOWN",
                "STATUS_SUCCESS",
                "STATUS_FAILURE",
                "STATUS_RUNNING",
            ],
            "colParams": [{"hparam": each["name"]} for each in columns.get("hparamInfos", [])]
            + [{"metric": each["name"]} for each in columns.get("metricInfos", [])],
        }
        return self._post("plugin/hparams/session_groups", request).get("sessionGroups", [])

    def _post(self, path: str, body: dict) -> dict:
        request = urllib.request.Request(
            f"{self.url}/data/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with _opener.open(request, timeout=60) as answer:
            return json.loads(answer.read())


@contextlib.contextmanager
def tensorboard_over(logdir: Path, seconds: float = 300) -> Iterator[TensorBoard]:
    """Start TensorBoard over a folder of runs on a free port; yield once it has read them; stop it
    at the end.

    Raises RuntimeError with its output when that takes longer than `seconds` or it ends by itself.
    """
    command = [
        sys.executable,
        "-m",
        "tensorboard.main",
        "--logdir",
        str(logdir),
        "--host",
        "127.0.0.1",
        "--port",
        "0",
        "--load_fast",
        "false",
        "--reload_task",
        "blocking",
        "--reload_interval",
        "0",
    ]
    # Port 0: it takes a free one and prints it. Blocking: it has read everything, once, before it
    # answers
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as output:
        # its own folder for its notes on itself
        environment = os.environ | {"TMPDIR": home, "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            yield _when_ready(process, output, time.monotonic() + seconds)
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _when_ready(process: subprocess.Popen, output, deadline: float) -> TensorBoard:
    said = ""
    while time.monotonic() < deadline and process.poll() is None:
        output.seek(0)
        said = output.read().decode("utf-8", "replace")
        address = re.search(r"http://127\.0\.0\.1:\d+(?=/)", said)
        if address:
            board = TensorBoard(address.group())
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                if board.runs():
                    return board
        time.sleep(0.2)
    raise RuntimeError(
        f"TensorBoard was not ready (exit status {process.poll()}); it said:\n{said}"
    )
