"""Two servers behind nginx, as docs/scaling.md configures it."""

import re
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import httpx

from tests.helpers.expected import not_run
from tests.server.conftest import free_port
from tests.server.test_front import SERVE, at, ready, running, stream
from tests.server.test_server import PROMPT, wait_for

DOCUMENT = Path(__file__).parents[2] / "docs" / "scaling.md"


def test_two_servers_behind_nginx(tmp_path: Path) -> None:
    if (nginx := shutil.which("nginx")) is None:
        not_run("nginx", "no nginx here: apt install nginx-light")
    [config] = re.findall(r"```nginx\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    ports = {"8000": free_port(), "8001": free_port(), "8002": free_port()}
    for port, ours in ports.items():
        config = config.replace(f"127.0.0.1:{port}", f"127.0.0.1:{ours}")
    temporary = "".join(
        f"{kind}_temp_path {tmp_path / kind};\n"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off;\npid {tmp_path / 'pid'};\nerror_log {tmp_path / 'log'};\nevents {{}}\n"
    path = tmp_path / "nginx.conf"
    path.write_text(f"{head}http {{\naccess_log off;\n{temporary}{config}}}\n")
    with (
        running(*SERVE, "--backend", "cpu", port=ports["8001"]) as first,
        running(*SERVE, "--backend", "cpu", port=ports["8002"]),
        ExitStack() as stack,
    ):
        # First these: to the router one that it found too early is dead for two seconds.
        wait_for(lambda: ready(at(ports["8001"])) and ready(at(ports["8002"])))
        router = stack.enter_context(subprocess.Popen([nginx, "-p", tmp_path, "-c", path]))
        try:
            front = at(ports["8000"])
            wait_for(lambda: ready(front))
            body = {"prompt": PROMPT, "max_tokens": 9, "seed": 1}
            whole = [
                httpx.post(front + "/v1/completions", json=body, timeout=60).json()
                for _ in range(4)
            ]
            [text] = {answer["choices"][0]["text"] for answer in whole}
            usage = {"stream_options": {"include_usage": True}}
            choices, _ = stream(front, "/v1/completions", body | usage)
            assert choices[0]["said"]["text"] == text
            first.kill()
            first.wait()
            for _ in range(4):  # the other answers, and nobody sees an error
                answer = httpx.post(front + "/v1/completions", json=body, timeout=60)
                assert answer.json()["choices"][0]["text"] == text
        finally:
            router.terminate()
